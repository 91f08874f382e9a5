"""Flow: a base distribution and transforms as one trainable module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.distributions.conditional import (
    ConditionalTransform,
    _ConditionalInverseTransformModule,
)
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Distribution, Transform
from torch.distributions.transforms import _InverseTransform

from pyroflow.checks import check_choice, check_count
from pyroflow.flows.columns import ByColumns
from pyroflow.flows.shown import LAYERS, ShownFlow
from pyroflow.transforms import (
    Affine,
    Bijection,
    ConditionalAffine,
)
from pyroflow.transforms.conditional import Conditional

Direction = Literal["auto", "base_to_data", "data_to_base"]
AnyTransform = Transform | ConditionalTransform
Steps = tuple[tuple[AnyTransform, bool], ...]

_AFFINE = (Affine, ConditionalAffine)
_INVERSES = (_InverseTransform, _ConditionalInverseTransformModule)


class StandardNormal(nn.Module):
    """N(0, I) in D dimensions that follows its module's device and dtype."""

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(check_count("input_dim", input_dim, 1)))

    def forward(self) -> Distribution:
        """The distribution, with event shape (D,)."""
        return dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1)


class FlowDistribution(dist.TransformedDistribution):
    """A ``TransformedDistribution`` whose ``log_prob`` reads each transform's parameters once."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at value (*, D)."""
        if self._validate_args:
            self._validate_sample(value)
        total, event_dim = 0.0, len(self.event_shape)
        for t in reversed(self.transforms):
            if isinstance(t, Bijection):
                value, log_det = t.inverse_and_log_det(value)
            elif isinstance(t, _InverseTransform) and isinstance(t.inv, Bijection):
                value, log_det = t.inv.forward_and_log_det(value)
                log_det = -log_det
            else:
                y, value = value, t.inv(value)
                log_det = t.log_abs_det_jacobian(value, y)
            event_dim += t.domain.event_dim - t.codomain.event_dim
            total = total - sum_rightmost(log_det, event_dim - t.domain.event_dim)
        base = self.base_dist
        return total + sum_rightmost(base.log_prob(value), event_dim - len(base.event_shape))


class Flow(ShownFlow, ByColumns):
    """A base distribution pushed through transforms; ``flow()`` is a fresh distribution.

    Args:
        base: a distribution with event shape (D,), or a module whose call returns one, so that
            its tensors move with the flow.
        transforms: ours, Pyro's and torch's, conditional ones too, applied from base to data, first
            to last; ``t.inv`` runs t backwards.
        direction: which way the layers among them (planar, radial, Sylvester, all that start as
            the identity) run in closed form: "base_to_data", "data_to_base", or "auto": as the
            first fit needs it, until then "data_to_base". None leaves each as it is given.

    Attributes:
        steps: each transform, from base to data, and whether the flow runs its inverse.
        fitted: whether the flow has been fitted: it is then never initialized again.
        columns: names of the columns, if it was fitted to a frame; else None.

    Raises:
        TypeError: If an entry is no transform, or the base no distribution.
        ValueError: If the direction is unknown, or the base has no event shape (D,); at a call, if
            a context is missing, or given and no transform takes it.

    Example:
        >>> import torch
        >>> from pyroflow import Affine, Flow, Planar
        >>> from pyroflow.flows import StandardNormal
        >>> flow = Flow(StandardNormal(2), [Planar(2, num_layers=4).inv, Affine(2)])
        >>> flow().log_prob(torch.zeros(5, 2)).shape, flow().sample((3,)).shape
        (torch.Size([5]), torch.Size([3, 2]))
    """

    __call__: Callable[..., FlowDistribution]  # what a type checker knows of flow(...)

    def __init__(
        self,
        base: Distribution | nn.Module,
        transforms: Sequence[AnyTransform],
        direction: Direction | None = None,
    ) -> None:
        super().__init__()
        if isinstance(transforms, AnyTransform):
            raise TypeError("transforms must be a sequence, got a single transform: write [t]")
        for t in transforms:
            if not isinstance(t, AnyTransform):
                raise TypeError(f"transforms must hold transforms, got {type(t).__name__}")
        check_choice("direction", direction, ("auto", "base_to_data", "data_to_base", None))
        self.base = _checked_base(base)
        # Torch's inverse loses its transform when it is copied, so the transform itself is
        # kept, and whether to turn it round.
        self.steps: Steps = tuple(
            (t.inv, True) if isinstance(t, _INVERSES) else (t, False)
            for given in transforms
            for t in _flatten(given)
        )
        self.parts = nn.ModuleList(m for t, _ in self.steps for m in _modules_within(t))
        self._others = [t for t, _ in self.steps if not isinstance(t, Bijection | Conditional)]
        self._undecided = direction == "auto"
        self.fitted = False
        if direction is not None:
            layers = [t for t, _ in self.steps]
            self.steps = _turned(self.steps, layers, direction != "base_to_data")

    @property
    def conditional(self) -> bool:
        """Whether the flow needs a context."""
        return any(isinstance(t, ConditionalTransform) for t, _ in self.steps)

    @property
    def input_dim(self) -> int:
        """D, the event size."""
        return self._base().event_shape[-1]

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """The flow as a Pyro distribution; for a conditional one, at a context (*B, C).

        It then has batch shape B and is a snapshot: call the flow anew after an optimiser step.
        """
        if self.conditional and context is None:
            raise ValueError("this flow is conditional: call it with a context, flow(context)")
        if context is not None and not self.conditional:
            raise ValueError("this flow has no conditional transform: call it without a context")
        base = self._base()
        _clear_caches(self._others)
        return FlowDistribution(base, self.transforms(context))

    def transforms(self, context: Tensor | None = None) -> list[Transform]:
        """The transforms from base to data, conditioned on the context."""
        found = []
        for t, inverted in self.steps:
            t = t.condition(context) if isinstance(t, ConditionalTransform) else t
            found.append(t.inv if inverted else t)
        return found

    @torch.no_grad()
    def initialize(self, data: Tensor | None = None) -> None:
        """Prepare a flow for its first fit; what was fitted, trained, loaded or moved stays.

        Layers that are the identity are drawn anew, unless they are frozen, so that a fit is
        reproducible from its own seed. Where their direction is open, they take the one that is
        in closed form for what the fit does most: scoring, where there are data (N, D), else
        sampling. Given data, an outermost affine layer, but for a support behind it, is set to
        their mean and covariance if all of pyroflow's layers are the identity.

        Raises:
            ValueError: If the covariance of the data is singular, and the scale a full triangle.
        """
        if self.fitted:
            return
        ours = [t for t, _ in self.steps if isinstance(t, (*LAYERS, *_AFFINE))]
        still = [t for t in ours if _is_identity(t, self.input_dim)]
        data, steps = self.unconstrained(data)
        last, inverted = steps[-1] if steps else (None, False)
        outermost = isinstance(last, _AFFINE) and not inverted
        if data is not None and outermost and len(still) == len(ours):
            last.standardize(data)
        for t in still:
            if isinstance(t, LAYERS) and any(p.requires_grad for p in t.parameters()):
                t.reset_parameters()
        if self._undecided:
            self.steps = _turned(self.steps, still, data is not None)
        self._undecided, self.fitted = False, True

    def get_extra_state(self) -> dict[str, Any]:
        """What a state dict must hold beside tensors: directions, whether fitted, and columns."""
        inverted = [inverted for _, inverted in self.steps]
        own = {"inverted": inverted, "undecided": self._undecided, "fitted": self.fitted}
        return own | self.column_state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`get_extra_state` gave.

        Raises:
            ValueError: If it is of a flow with another number of transforms.
        """
        transforms = [t for t, _ in self.steps]
        if len(state["inverted"]) != len(transforms):
            raise ValueError(
                f"state_dict is of a flow of {len(state['inverted'])} transforms, this one has "
                f"{len(transforms)}: make it with the same layers first"
            )
        self.steps = tuple(zip(transforms, state["inverted"], strict=True))
        self._undecided, self.fitted = state["undecided"], state["fitted"]
        self.set_column_state(state)

    def __getstate__(self) -> dict[str, Any]:
        _clear_caches(self._others)
        return self.__dict__.copy()

    def _base(self) -> Distribution:
        return self.base() if isinstance(self.base, nn.Module) else self.base


def take_over(flow: Flow, other: Flow) -> None:
    """Give a flow the transforms of another one with the same base, and all that it knows."""
    flow.steps, flow.parts, flow._others = other.steps, other.parts, other._others
    flow.deepen = None
    flow.set_extra_state(other.get_extra_state())


def _checked_base(base: Distribution | nn.Module) -> Distribution | nn.Module:
    if not isinstance(base, Distribution | nn.Module):
        raise TypeError(
            f"base must be a distribution, or a module whose call returns one, got "
            f"{type(base).__name__}: take pyroflow.flows.StandardNormal(D)"
        )
    if isinstance(base, Distribution) and len(base.event_shape) != 1:
        raise ValueError(
            f"base must have event shape (D,), got {tuple(base.event_shape)}: a distribution of "
            "D independent numbers has it with .to_event(1)"
        )
    return base


def _turned(steps: Steps, transforms: Sequence[AnyTransform], inverted: bool) -> Steps:
    """The steps with the layers among some of the transforms in one direction."""
    turned = {id(t) for t in transforms if isinstance(t, LAYERS)}
    return tuple((t, inverted if id(t) in turned else was) for t, was in steps)


def _is_identity(t: AnyTransform, input_dim: int) -> bool:
    """Whether a layer is the identity for every context, but for the rounding of float32."""
    like, generator = next(t.parameters()), torch.Generator("cpu").manual_seed(0)
    fixed = {"generator": generator, "device": "cpu"}
    x = torch.randn(16, input_dim, **fixed).to(like)
    if isinstance(t, ConditionalTransform):
        t = t.condition(torch.randn(16, t.nn.context_dim, **fixed).to(like))
    return torch.allclose(t(x), x, rtol=0, atol=1e-5)


def _flatten(t: AnyTransform) -> list[AnyTransform]:
    """The parts of a composed transform: torch's composition would hide their parameters."""
    if isinstance(t, ComposeTransform):
        return [part for nested in t.parts for part in _flatten(nested)]
    return [t]


def _modules_within(t: AnyTransform) -> list[nn.Module]:
    """The transform if it is a module, else the modules that it holds, as torch's may."""
    return [t] if isinstance(t, nn.Module) else [m for u in _held(t) for m in _modules_within(u)]


def _clear_caches(others: Iterable[AnyTransform]) -> None:
    """Empty the caches of others' transforms: they outlive an optimiser step (pyro issue #2564).

    The same tensor would get its old value, or a graph that is gone. And tensors with a graph can
    neither be copied nor pickled.
    """
    for t in others:
        if isinstance(t, Bijection):
            continue
        if isinstance(t, Transform):
            t.clear_cache()
        for name, value in list(vars(t).items()):
            if name.startswith("_cache") and isinstance(value, Tensor):
                setattr(t, name, None)
        _clear_caches(_held(t))


def _held(t: AnyTransform) -> Iterator[Transform]:
    if isinstance(t, _InverseTransform):
        yield t.inv
        return
    values = [value for name, value in vars(t).items() if name != "_inv"]
    values += t.children() if isinstance(t, nn.Module) else []
    for value in values:
        members = value if isinstance(value, list | tuple) else [value]
        yield from (inner for inner in members if isinstance(inner, Transform))
