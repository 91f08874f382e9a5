"""Flows of one family: a standard normal base, layers, an affine layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyro.distributions.conditional import ConditionalTransform
from torch.distributions import Transform

from pyroflow.checks import check_choice
from pyroflow.flows.flow import Direction, Flow, StandardNormal
from pyroflow.transforms import (
    Affine,
    ConditionalAffine,
    ConditionalPlanar,
    ConditionalRadial,
    ConditionalSylvester,
    Planar,
    Radial,
    Sylvester,
)
from pyroflow.transforms.affine import AffineKind
from pyroflow.transforms.kernels.units import Nonlinearity
from pyroflow.transforms.sylvester import Orthogonal


def planar_flow(
    input_dim: int,
    num_layers: int = 16,
    context_dim: int | None = None,
    *,
    direction: Direction = "auto",
    affine: AffineKind | None = "full",
    hidden_dims: Sequence[int] = (64, 64),
    nonlinearity: Nonlinearity = "tanh",
    negative_slope: float = 0.2,
) -> Flow:
    """A planar flow: standard normal base, K planar layers, an affine layer.

    It starts as the affine layer alone, as every planar layer starts at the identity.

    Args:
        input_dim: D.
        num_layers: K; 0 leaves a Gaussian.
        context_dim: C, for parameters that are a network's output at a context (*B, C).
        direction: which way the planar layers run in closed form. "base_to_data" (as in the
            paper) samples without a root search and solves K scalar equations to score
            data; "data_to_base" scores in closed form and solves them to sample. "auto" takes
            what the first fit does most: "data_to_base" for :func:`~pyroflow.fit_density`,
            "base_to_data" for :func:`~pyroflow.fit_energy`; until then "data_to_base".
        affine: "full" (lower-triangular scale), "diagonal", or None for no affine layer.
        hidden_dims: sizes of the context network's hidden layers; () for a linear map.
        nonlinearity: "tanh" or "leaky_relu", as in :class:`~pyroflow.Planar`.
        negative_slope: of the leaky ReLU, in (0, 1).

    Returns:
        The flow; ``flow()``, or ``flow(context)``, is a distribution over (*, D).

    Raises:
        ValueError: input_dim < 1, num_layers < 0, context_dim < 1, or an unknown option.

    Example:
        >>> import torch
        >>> from pyroflow import planar_flow
        >>> flow = planar_flow(2, num_layers=8, context_dim=3)
        >>> flow(torch.randn(7, 3)).log_prob(torch.zeros(7, 2)).shape
        torch.Size([7])
    """
    bend = {"nonlinearity": nonlinearity, "negative_slope": negative_slope}
    shared = (input_dim, context_dim, direction, affine, hidden_dims)
    return _layered_flow(Planar, ConditionalPlanar, *shared, num_layers=num_layers, **bend)


def radial_flow(
    input_dim: int,
    num_layers: int = 16,
    context_dim: int | None = None,
    *,
    direction: Direction = "auto",
    affine: AffineKind | None = "full",
    hidden_dims: Sequence[int] = (64, 64),
) -> Flow:
    """A radial flow: standard normal base, K radial layers, an affine layer.

    It starts as the affine layer alone, as every radial layer starts at the identity.

    Args:
        input_dim: D.
        num_layers: K; 0 leaves a Gaussian.
        context_dim: as in :func:`planar_flow`.
        direction: as in :func:`planar_flow`; both ways are in closed form.
        affine: as in :func:`planar_flow`.
        hidden_dims: as in :func:`planar_flow`.

    Raises:
        ValueError: input_dim < 1, num_layers < 0, context_dim < 1, or an unknown option.

    Example:
        >>> import torch
        >>> from pyroflow import radial_flow
        >>> flow = radial_flow(2, num_layers=8)
        >>> flow().log_prob(torch.zeros(7, 2)).shape
        torch.Size([7])
    """
    shared = (input_dim, context_dim, direction, affine, hidden_dims)
    return _layered_flow(Radial, ConditionalRadial, *shared, num_layers=num_layers)


def sylvester_flow(
    input_dim: int,
    num_units: int,
    num_layers: int = 4,
    context_dim: int | None = None,
    *,
    orthogonal: Orthogonal = "householder",
    direction: Direction = "auto",
    affine: AffineKind | None = "full",
    hidden_dims: Sequence[int] = (64, 64),
) -> Flow:
    """A Sylvester flow: standard normal base, L Sylvester layers of M units, an affine layer.

    It starts as the affine layer alone, as every Sylvester layer starts at the identity.

    Args:
        input_dim: D.
        num_units: M, from 1 to D.
        num_layers: L; 0 leaves a Gaussian.
        orthogonal: "householder", "qr" or "triangular", as in :class:`~pyroflow.Sylvester`.
        context_dim: as in :func:`planar_flow`.
        direction: as in :func:`planar_flow`.
        affine: as in :func:`planar_flow`.
        hidden_dims: as in :func:`planar_flow`.

    Raises:
        ValueError: a size out of range, or an unknown option.

    Example:
        >>> import torch
        >>> from pyroflow import sylvester_flow
        >>> flow = sylvester_flow(5, num_units=3, num_layers=2)
        >>> flow().log_prob(torch.zeros(7, 5)).shape
        torch.Size([7])
    """
    sizes = {"num_units": num_units, "num_layers": num_layers, "orthogonal": orthogonal}
    shared = (input_dim, context_dim, direction, affine, hidden_dims)
    return _layered_flow(Sylvester, ConditionalSylvester, *shared, **sizes)


def _layered_flow(
    layers: Callable[..., Transform],
    conditional_layers: Callable[..., ConditionalTransform],
    input_dim: int,
    context_dim: int | None,
    direction: Direction,
    affine: AffineKind | None,
    hidden_dims: Sequence[int],
    **options: Any,
) -> Flow:
    """Standard normal base, layers of one family made with ``options``, an affine layer."""
    check_choice("direction", direction, ("auto", "base_to_data", "data_to_base"))
    check_choice("affine", affine, ("full", "diagonal", None))
    base = StandardNormal(input_dim)
    if context_dim is None:
        parts = [layers(input_dim, **options)]
        parts += [] if affine is None else [Affine(input_dim, affine)]
    else:
        sizes = (input_dim, context_dim)
        parts = [conditional_layers(*sizes, **options, hidden_dims=hidden_dims)]
        if affine is not None:
            parts.append(ConditionalAffine(*sizes, affine, hidden_dims=hidden_dims))
    return Flow(base, parts, direction=direction)
