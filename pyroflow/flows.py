"""Flow: a base distribution and transforms as one trainable module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Distribution, Transform
from torch.distributions.transforms import _InverseTransform

from pyroflow.checks import check_choice, check_count
from pyroflow.transforms import Affine, ConditionalAffine, ConditionalPlanar, Planar
from pyroflow.transforms.affine import AffineKind

Direction = Literal["auto", "base_to_data", "data_to_base"]


class StandardNormal(nn.Module):
    """N(0, I) in D dimensions that follows its module's device and dtype."""

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(check_count("input_dim", input_dim, 1)))

    def forward(self) -> Distribution:
        """The distribution, with event shape (D,)."""
        return dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1)


class Flow(nn.Module):
    """A base distribution pushed through transforms; ``flow()`` is a fresh distribution.

    Any of Pyro's and torch's transforms may stand in the list, conditional ones too.

    Args:
        base: a distribution with event shape (D,), or a module whose call returns one, so that
            its tensors move with the flow.
        transforms: applied from base to data, first to last; ``t.inv`` runs t backwards.

    Attributes:
        fitted: whether a ``fit_`` function has placed the flow on its data or target.

    Raises:
        TypeError: an entry that is no transform.
        ValueError: at a call, a context that is missing or that no transform takes.

    Example:
        >>> import torch
        >>> from pyroflow import Affine, Flow, Planar
        >>> from pyroflow.flows import StandardNormal
        >>> flow = Flow(StandardNormal(2), [Planar(2, num_layers=4).inv, Affine(2)])
        >>> flow().log_prob(torch.zeros(5, 2)).shape, flow().sample((3,)).shape
        (torch.Size([5]), torch.Size([3, 2]))
    """

    def __init__(
        self,
        base: Distribution | nn.Module,
        transforms: Sequence[Transform | ConditionalTransform],
    ) -> None:
        super().__init__()
        for t in transforms:
            if not isinstance(t, Transform | ConditionalTransform):
                raise TypeError(f"transforms must hold transforms, got {type(t).__name__}")
        self.base = base
        transforms = [part for t in transforms for part in _flatten(t)]
        # Torch's inverse loses its transform when it is copied, so the transform itself is
        # kept, and whether to turn it round.
        self._inverted = [isinstance(t, _InverseTransform) for t in transforms]
        self._parts = [t.inv if isinstance(t, _InverseTransform) else t for t in transforms]
        self.parts = nn.ModuleList(t for t in self._parts if isinstance(t, nn.Module))
        self._undecided = False
        self.fitted = False

    @property
    def conditional(self) -> bool:
        """Whether the flow needs a context."""
        return any(isinstance(t, ConditionalTransform) for t in self._parts)

    @property
    def input_dim(self) -> int:
        """D, the event size."""
        base = self.base() if isinstance(self.base, nn.Module) else self.base
        return base.event_shape[-1]

    def forward(self, context: Tensor | None = None) -> dist.TransformedDistribution:
        """The flow as a Pyro distribution.

        Args:
            context: shape (*B, C), for a conditional flow. The distribution then has batch shape
                B and is a snapshot: call the flow anew after an optimiser step.
        """
        if self.conditional and context is None:
            raise ValueError("this flow is conditional: call it with a context, flow(context)")
        if context is not None and not self.conditional:
            raise ValueError("this flow has no conditional transform: call it without a context")
        base = self.base() if isinstance(self.base, nn.Module) else self.base
        return dist.TransformedDistribution(base, self.transforms(context))

    def transforms(self, context: Tensor | None = None) -> list[Transform]:
        """The transforms from base to data, conditioned on the context."""
        conditioned = [
            t.condition(context) if isinstance(t, ConditionalTransform) else t for t in self._parts
        ]
        placed = zip(conditioned, self._inverted, strict=True)
        return [t.inv if inverted else t for t, inverted in placed]

    @torch.no_grad()
    def place(self, direction: Direction, data: Tensor | None = None) -> None:
        """Prepare a flow that was never fitted; on a fitted one do nothing.

        Decides an open direction, draws the planar layers anew (so that a fit is reproducible
        from its own seed) and, given data, sets the outermost affine layer to their mean and
        covariance. The planar layers are the identity here, so either direction continues
        the same distribution.

        Args:
            direction: "base_to_data" or "data_to_base".
            data: shape (N, D).
        """
        if self.fitted:
            return
        upright = self._parts[-1] if self._parts and not self._inverted[-1] else None
        if data is not None and isinstance(upright, Affine | ConditionalAffine):
            upright.standardize(data)
        for index, part in enumerate(self._parts):
            if isinstance(part, Planar | ConditionalPlanar):
                part.reset_parameters()
                if self._undecided:
                    self._inverted[index] = direction == "data_to_base"
        self._undecided, self.fitted = False, True

    def get_extra_state(self) -> dict[str, Any]:
        """What a state dict must hold beside tensors: the directions, and whether fitted."""
        return {
            "inverted": list(self._inverted),
            "undecided": self._undecided,
            "fitted": self.fitted,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`get_extra_state` gave."""
        self._inverted = list(state["inverted"])
        self._undecided, self.fitted = state["undecided"], state["fitted"]


def _flatten(t: Transform | ConditionalTransform) -> list[Transform | ConditionalTransform]:
    """The parts of a composed transform: torch's composition would hide their parameters."""
    if isinstance(t, ComposeTransform):
        return [part for nested in t.parts for part in _flatten(nested)]
    return [t]


def planar_flow(
    input_dim: int,
    num_layers: int = 16,
    context_dim: int | None = None,
    *,
    direction: Direction = "auto",
    affine: AffineKind | None = "full",
    hidden_dims: Sequence[int] = (64, 64),
) -> Flow:
    """A planar flow: standard normal base, K planar layers, an affine layer.

    It starts as the affine layer alone, as every planar layer starts at the identity.

    Args:
        input_dim: D.
        num_layers: K; 0 leaves a Gaussian.
        context_dim: C, for parameters that are a network's output at a context (*B, C).
        direction: which way the planar layers run in closed form. "base_to_data" (as in the
            paper) samples without a root search and solves K scalar equations to score foreign
            data; "data_to_base" scores in closed form and solves them to sample. "auto" takes
            what the first fit does most: "data_to_base" for :func:`~pyroflow.fit_density`,
            "base_to_data" for :func:`~pyroflow.fit_energy`; until then "data_to_base".
        affine: "full" (lower-triangular scale), "diagonal", or None for no affine layer.
        hidden_dims: sizes of the context network's hidden layers.

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
    check_choice("direction", direction, ("auto", "base_to_data", "data_to_base"))
    check_choice("affine", affine, ("full", "diagonal", None))
    base = StandardNormal(input_dim)
    if context_dim is None:
        parts = [Planar(input_dim, num_layers)]
        parts += [] if affine is None else [Affine(input_dim, affine)]
    else:
        sizes = {"hidden_dims": hidden_dims}
        parts = [ConditionalPlanar(input_dim, context_dim, num_layers, **sizes)]
        parts += (
            [] if affine is None else [ConditionalAffine(input_dim, context_dim, affine, **sizes)]
        )
    flow = Flow(base, parts)
    flow._inverted[0] = direction != "base_to_data"
    flow._undecided = direction == "auto"
    return flow
