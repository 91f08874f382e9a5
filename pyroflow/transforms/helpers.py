"""Functions that make a transform, named as Pyro names its own."""

from __future__ import annotations

from collections.abc import Sequence

from pyroflow.transforms.activations import Nonlinearity
from pyroflow.transforms.planar import ConditionalPlanar, Planar
from pyroflow.transforms.radial import ConditionalRadial, Radial
from pyroflow.transforms.sylvester import ConditionalSylvester, Orthogonal, Sylvester


def planar(
    input_dim: int,
    num_layers: int = 1,
    *,
    nonlinearity: Nonlinearity = "tanh",
    negative_slope: float = 0.2,
) -> Planar:
    """K planar layers (base to data), the counterpart of Pyro's ``planar``.

    Args:
        input_dim: D.
        num_layers: K.
        nonlinearity: "tanh" or "leaky_relu", as in :class:`~pyroflow.Planar`.
        negative_slope: of the leaky ReLU, in (0, 1).

    Raises:
        ValueError: input_dim < 1, num_layers < 0 or an unknown nonlinearity.

    Example:
        >>> import torch
        >>> import pyroflow as pf
        >>> pf.planar(2, num_layers=8)(torch.randn(5, 2)).shape
        torch.Size([5, 2])
    """
    return Planar(input_dim, num_layers, nonlinearity=nonlinearity, negative_slope=negative_slope)


def conditional_planar(
    input_dim: int,
    context_dim: int,
    num_layers: int = 1,
    *,
    hidden_dims: Sequence[int] = (64, 64),
) -> ConditionalPlanar:
    """K planar layers (base to data) and the network that turns a context into their parameters.

    Args:
        input_dim: D.
        context_dim: C.
        num_layers: K.
        hidden_dims: sizes of the network's hidden layers; () for a linear map.

    Raises:
        ValueError: a size that is too small.

    Example:
        >>> import torch
        >>> import pyroflow as pf
        >>> t = pf.conditional_planar(2, context_dim=3, num_layers=8)
        >>> t.condition(torch.randn(5, 3))(torch.randn(5, 2)).shape
        torch.Size([5, 2])
    """
    return ConditionalPlanar(input_dim, context_dim, num_layers, hidden_dims=hidden_dims)


def radial(input_dim: int, num_layers: int = 1) -> Radial:
    """K radial layers (base to data), the counterpart of Pyro's ``radial``.

    Args:
        input_dim: D.
        num_layers: K.

    Raises:
        ValueError: input_dim < 1 or num_layers < 0.

    Example:
        >>> import torch
        >>> import pyroflow as pf
        >>> pf.radial(2, num_layers=8)(torch.randn(5, 2)).shape
        torch.Size([5, 2])
    """
    return Radial(input_dim, num_layers)


def conditional_radial(
    input_dim: int,
    context_dim: int,
    num_layers: int = 1,
    *,
    hidden_dims: Sequence[int] = (64, 64),
) -> ConditionalRadial:
    """K radial layers (base to data) and the network that turns a context into their parameters.

    Args:
        input_dim: D.
        context_dim: C.
        num_layers: K.
        hidden_dims: sizes of the network's hidden layers; () for a linear map.

    Raises:
        ValueError: a size that is too small.

    Example:
        >>> import torch
        >>> import pyroflow as pf
        >>> t = pf.conditional_radial(2, context_dim=3, num_layers=8)
        >>> t.condition(torch.randn(5, 3))(torch.randn(5, 2)).shape
        torch.Size([5, 2])
    """
    return ConditionalRadial(input_dim, context_dim, num_layers, hidden_dims=hidden_dims)


def sylvester(
    input_dim: int,
    num_units: int,
    num_layers: int = 1,
    orthogonal: Orthogonal = "householder",
) -> Sylvester:
    """L Sylvester layers of M units (base to data).

    Pyro's ``sylvester`` has the number of reflections where this has the number of units.

    Args:
        input_dim: D.
        num_units: M, from 1 to D.
        num_layers: L.
        orthogonal: "householder", "qr" or "triangular", as in :class:`~pyroflow.Sylvester`.

    Raises:
        ValueError: a size out of range, or an unknown ``orthogonal``.

    Example:
        >>> import torch
        >>> import pyroflow as pf
        >>> pf.sylvester(5, num_units=3)(torch.randn(7, 5)).shape
        torch.Size([7, 5])
    """
    return Sylvester(input_dim, num_units, num_layers, orthogonal)


def conditional_sylvester(
    input_dim: int,
    context_dim: int,
    num_units: int,
    num_layers: int = 1,
    orthogonal: Orthogonal = "householder",
    *,
    hidden_dims: Sequence[int] = (64, 64),
) -> ConditionalSylvester:
    """L Sylvester layers (base to data) and the network that turns a context into parameters.

    Args:
        input_dim: D.
        context_dim: C.
        num_units: M, from 1 to D.
        num_layers: L.
        orthogonal: "householder", "qr" or "triangular", as in :class:`~pyroflow.Sylvester`.
        hidden_dims: sizes of the network's hidden layers; () for a linear map.

    Raises:
        ValueError: a size out of range, or an unknown ``orthogonal``.

    Example:
        >>> import torch
        >>> import pyroflow as pf
        >>> t = pf.conditional_sylvester(5, context_dim=3, num_units=2)
        >>> t.condition(torch.randn(7, 3))(torch.randn(7, 5)).shape
        torch.Size([7, 5])
    """
    sizes = (input_dim, context_dim, num_units, num_layers)
    return ConditionalSylvester(*sizes, orthogonal, hidden_dims=hidden_dims)
