"""Flows of one family: a standard normal base, layers, an affine layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from torch import nn

from pyroflow.checks import check_choice, known_options
from pyroflow.flows.flow import AnyTransform, Direction, Flow, StandardNormal
from pyroflow.transforms import (
    Conditional,
    ConditionalAffine,
    ConditionalPlanar,
    ConditionalRadial,
    ConditionalSinhArcsinh,
    ConditionalSylvester,
    Support,
)
from pyroflow.transforms.affine import AffineKind
from pyroflow.transforms.kernels.units import Nonlinearity
from pyroflow.transforms.support import SupportLike
from pyroflow.transforms.sylvester import Orthogonal

Depth = int | Literal["auto"]
MOST_UNITS = 8  # of a Sylvester flow, where no number is given


@known_options
def planar_flow(
    input_dim: int,
    num_layers: Depth = 16,
    context_dim: int | None = None,
    *,
    direction: Direction = "auto",
    affine: AffineKind | None = "full",
    hidden_dims: Sequence[int] = (64, 64),
    nonlinearity: Nonlinearity = "tanh",
    negative_slope: float = 0.2,
    tails: bool = False,
    support: SupportLike | None = None,
) -> Flow:
    """A planar flow: standard normal base, K planar layers, an affine layer.

    It starts as the affine layer alone, as every planar layer starts at the identity.

    Args:
        input_dim: D.
        num_layers: K; 0 leaves a Gaussian. "auto" is one until :func:`~pyroflow.fit_density` fits
            K = 0, 2, 4, 8, 16 and 32 anew, for as long as held-out rows gain, and takes the best;
            the fit says which.
        context_dim: C, for parameters that are a network's output at a context (*B, C).
        direction: which way the layers run in closed form. "base_to_data" (as in the paper)
            samples without a root search and solves K scalar equations to score data;
            "data_to_base" scores in closed form and solves them to sample. "auto" takes what the
            first fit does most: "data_to_base" for :func:`~pyroflow.fit_density`, "base_to_data"
            for :func:`~pyroflow.fit_energy`; until then "data_to_base".
        affine: "full" (lower-triangular scale), "diagonal", or None for no affine layer.
        hidden_dims: sizes of the context network's hidden layers; () for a linear map.
        nonlinearity: "tanh" or "leaky_relu", as in :class:`~pyroflow.Planar`.
        negative_slope: of the leaky ReLU, in (0, 1).
        tails: whether a :class:`~pyroflow.SinhArcsinh` layer follows the others, last before the
            affine layer, for K = 0 too. Planar layers leave the tails of their base as they are,
            and so lose on heavy-tailed data; it gives each coordinate skew and tails of its own.
        support: of each column, as a sequence, or of some by position or by name, as in
            {1: "positive", "share": (0, 1)}: None for the line, "positive", or (low, high), of
            which one may be infinite; bounds excluded. Names take a fit to a frame. See
            :class:`~pyroflow.transforms.Support`.

    Returns:
        The flow; ``flow()``, or ``flow(context)``, is a distribution over (*, D).

    Raises:
        ValueError: If a size is out of range or an option unknown.

    Example:
        >>> import torch
        >>> from pyroflow import planar_flow
        >>> flow = planar_flow(2, num_layers=8, context_dim=3)
        >>> flow(torch.randn(7, 3)).log_prob(torch.zeros(7, 2)).shape
        torch.Size([7])
    """
    bend = {"nonlinearity": nonlinearity, "negative_slope": negative_slope}
    shared = (input_dim, context_dim, direction, affine, hidden_dims, tails, support)
    return _layered_flow(ConditionalPlanar, num_layers, *shared, **bend)


@known_options
def radial_flow(
    input_dim: int,
    num_layers: Depth = 16,
    context_dim: int | None = None,
    *,
    direction: Direction = "auto",
    affine: AffineKind | None = "full",
    hidden_dims: Sequence[int] = (64, 64),
    tails: bool = False,
    support: SupportLike | None = None,
) -> Flow:
    """A radial flow: standard normal base, K radial layers, an affine layer.

    Arguments and errors are those of :func:`planar_flow`; radial layers run both ways in closed
    form.

    Example:
        >>> import torch
        >>> from pyroflow import radial_flow
        >>> radial_flow(2, num_layers=8)().log_prob(torch.zeros(7, 2)).shape
        torch.Size([7])
    """
    shared = (input_dim, context_dim, direction, affine, hidden_dims, tails, support)
    return _layered_flow(ConditionalRadial, num_layers, *shared)


@known_options
def sylvester_flow(
    input_dim: int,
    num_units: int,
    num_layers: Depth = 4,
    context_dim: int | None = None,
    *,
    orthogonal: Orthogonal = "householder",
    direction: Direction = "auto",
    affine: AffineKind | None = "full",
    hidden_dims: Sequence[int] = (64, 64),
    tails: bool = False,
    support: SupportLike | None = None,
) -> Flow:
    """A Sylvester flow: standard normal base, L Sylvester layers of M units, an affine layer.

    ``num_units`` is M, from 1 to D, and ``orthogonal`` says how Q is made: see
    :class:`~pyroflow.Sylvester`. The other arguments and the errors are those of
    :func:`planar_flow`.

    Example:
        >>> import torch
        >>> from pyroflow import sylvester_flow
        >>> sylvester_flow(5, num_units=3, num_layers=2)().log_prob(torch.zeros(7, 5)).shape
        torch.Size([7])
    """
    sizes = {"num_units": num_units, "orthogonal": orthogonal}
    shared = (input_dim, context_dim, direction, affine, hidden_dims, tails, support)
    return _layered_flow(ConditionalSylvester, num_layers, *shared, **sizes)


def check_flow(function: str, flow: object) -> None:
    """Raise ``TypeError`` for what is no flow, with the way from it to one."""
    if isinstance(flow, Flow):
        return
    got = type(flow).__name__
    if hasattr(flow, "shape"):
        way_out = f"the flow comes first, {function}(flow, ...)"
    elif isinstance(flow, AnyTransform):
        way_out = "make one of it, Flow(StandardNormal(D), [it, Affine(D)])"
    elif isinstance(flow, type) or not isinstance(flow, nn.Module):
        got = getattr(flow, "__name__", got) if callable(flow) else got
        way_out = "make one, such as planar_flow(D)"
    else:
        way_out = "a guide is fitted by fit_guide(model, guide, ...)"
    raise TypeError(f"flow must be a pyroflow.Flow, got {got}: {way_out}")


FAMILIES = {"planar": planar_flow, "radial": radial_flow, "sylvester": sylvester_flow}


def make_flow(
    kind: str,
    input_dim: int,
    *,
    num_layers: Depth | None = None,
    num_units: int | None = None,
    **options: Any,
) -> Flow:
    """A flow by the name of its family, "planar", "radial" or "sylvester".

    Without ``num_layers`` it has the family's default, without ``num_units`` a Sylvester flow has
    min(D, 8); the other options are those of the families.

    Raises:
        ValueError: If the family is unknown, or ``num_units`` is given to another than Sylvester.
    """
    check_choice("kind", kind, FAMILIES)
    sizes = {} if num_layers is None else {"num_layers": num_layers}
    if kind == "sylvester":
        sizes["num_units"] = min(input_dim, MOST_UNITS) if num_units is None else num_units
    elif num_units is not None:
        raise ValueError(f"num_units is of Sylvester flows, got {num_units!r} for kind {kind!r}")
    return FAMILIES[kind](input_dim, **sizes, **options)


def _layered_flow(
    layers: type[Conditional],
    num_layers: Depth,
    input_dim: int,
    context_dim: int | None,
    direction: Direction,
    affine: AffineKind | None,
    hidden_dims: Sequence[int],
    tails: bool,
    support: SupportLike | None,
    **options: Any,
) -> Flow:
    if num_layers == "auto":
        shared = (input_dim, context_dim, direction, affine, hidden_dims, tails, support)
        flow = _layered_flow(layers, 0, *shared, **options)
        flow.deepen = partial(_deepened, layers, shared, options)
        return flow
    if isinstance(num_layers, str):
        raise ValueError(
            f"num_layers must be an integer of at least 0, or 'auto', got {num_layers!r}"
        )
    check_choice("direction", direction, ("auto", "base_to_data", "data_to_base"))
    check_choice("affine", affine, ("full", "diagonal", None))
    check_choice("tails", tails, (False, True))

    def make(conditional: type[Conditional], **options: Any) -> nn.Module:
        if context_dim is None:
            return conditional.family(input_dim, **options)
        return conditional(input_dim, context_dim, hidden_dims=hidden_dims, **options)

    parts = [make(layers, num_layers=num_layers, **options)]
    parts += [make(ConditionalSinhArcsinh)] if tails else []
    parts += [] if affine is None else [make(ConditionalAffine, kind=affine)]
    parts += [] if support is None else [Support(input_dim, support)]
    return Flow(StandardNormal(input_dim), parts, direction=direction)


def _deepened(layers: type[Conditional], shared: tuple, options: dict, num_layers: int) -> Flow:
    return _layered_flow(layers, num_layers, *shared, **options)
