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

from pyroflow.checks import check_count
from pyroflow.foreign import forget, modules_within
from pyroflow.seeds import drawing
from pyroflow.transforms import (
    Affine,
    Bijection,
    ConditionalAffine,
    ConditionalPlanar,
    ConditionalRadial,
    ConditionalSylvester,
    Planar,
    Radial,
    Sylvester,
)

Direction = Literal["auto", "base_to_data", "data_to_base"]

# What starts as the identity and may run either way.
_LAYERS = (
    Planar,
    ConditionalPlanar,
    Radial,
    ConditionalRadial,
    Sylvester,
    ConditionalSylvester,
)

_AFFINE = (Affine, ConditionalAffine)

# What keeps no cache that outlives a change of the parameters.
_OURS = (Bijection, *_AFFINE, *_LAYERS)


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
        if isinstance(transforms, Transform | ConditionalTransform):
            raise TypeError("transforms must be a sequence, got a single transform: write [t]")
        for t in transforms:
            if not isinstance(t, Transform | ConditionalTransform):
                raise TypeError(f"transforms must hold transforms, got {type(t).__name__}")
        self.base = base
        transforms = [part for t in transforms for part in _flatten(t)]
        # Torch's inverse loses its transform when it is copied, so the transform itself is
        # kept, and whether to turn it round.
        self._inverted = [isinstance(t, _InverseTransform) for t in transforms]
        self._parts = [t.inv if isinstance(t, _InverseTransform) else t for t in transforms]
        self.parts = nn.ModuleList(m for t in self._parts for m in modules_within(t))
        self._foreign = [t for t in self._parts if not isinstance(t, _OURS)]
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
        forget(self._foreign)
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
        """Prepare a flow for its first fit; one that was fitted or trained by hand stays as it is.

        Layers that are the identity are drawn anew, unless they are frozen, so that a fit is
        reproducible from its own seed; they take the direction where it is open. Given data, an
        outermost affine layer is set to their mean and covariance if all of pyroflow's layers
        are the identity. Whatever has moved was trained, loaded or given, and is kept.

        Args:
            direction: "base_to_data" or "data_to_base".
            data: shape (N, D).
        """
        if self.fitted:
            return
        layers = [t for t in self._parts if isinstance(t, (*_LAYERS, *_AFFINE))]
        still = [t for t in layers if _is_identity(t, self.input_dim)]
        upright = self._parts[-1] if self._parts and not self._inverted[-1] else None
        if data is not None and isinstance(upright, _AFFINE) and len(still) == len(layers):
            upright.standardize(data)
        for index, part in enumerate(self._parts):
            if isinstance(part, _LAYERS) and part in still:
                if any(p.requires_grad for p in part.parameters()):
                    part.reset_parameters()
                if self._undecided:
                    self._inverted[index] = direction == "data_to_base"
        self._undecided, self.fitted = False, True

    def __getstate__(self) -> dict[str, Any]:
        forget(self._foreign)
        return self.__dict__.copy()

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


def draw_from(q: dist.TransformedDistribution, shape: Sequence[int] = ()) -> Tensor:
    """``q.rsample(shape)``, between draws but for those of the base."""
    with drawing():
        x = q.base_dist.rsample(shape)
    for t in q.transforms:
        x = t(x)
    return x


def _flatten(t: Transform | ConditionalTransform) -> list[Transform | ConditionalTransform]:
    """The parts of a composed transform: torch's composition would hide their parameters."""
    if isinstance(t, ComposeTransform):
        return [part for nested in t.parts for part in _flatten(nested)]
    return [t]


def _is_identity(t: Transform | ConditionalTransform, input_dim: int) -> bool:
    """Whether a layer is the identity for every context, but for the rounding of float32."""
    like, fixed = next(t.parameters()), {"generator": torch.Generator("cpu").manual_seed(0)}
    fixed["device"] = "cpu"
    x = torch.randn(16, input_dim, **fixed).to(like)
    if isinstance(t, ConditionalTransform):
        t = t.condition(torch.randn(16, t.nn.context_dim, **fixed).to(like))
    return torch.allclose(t(x), x, rtol=0, atol=1e-5)
