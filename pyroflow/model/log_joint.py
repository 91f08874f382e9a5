"""The log joint of a Pyro model as a function of its unconstrained latents, at low cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.autograd import Function

from pyroflow.model.bound import BoundModel
from pyroflow.model.by_rows import POINTS, ByRows
from pyroflow.model.comparison import FAILURES, PROBES, Outcome, Way, agree, differs, moves
from pyroflow.model.locations import Filled, Moves
from pyroflow.model.recorded import graph_of
from pyroflow.model.records import Record, log_joint
from pyroflow.model.runs import Runs
from pyroflow.seeds import quick, seeded

Points = tuple[Tensor, Tensor, Tensor]  # x (S, D), the log joint there and its gradient
Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]


# Standard deviations of a prior, by which its site's numbers may be rounded.
ROUNDED = 0.05


class LogJoint:
    """log p(y, θ(x)) + log |det ∂θ/∂x| for the coordinates x of a guide's flow, θ the latents.

    Running a Pyro model through its handlers costs ten times its arithmetic. So value and gradient
    of N points at once are recorded as one graph of plain operations, which is kept if it
    repeats at fresh points what the model itself says there. Where it does not, or nothing can be
    recorded (control flow that depends on the latents), the model runs each time. It is NaN where
    the coordinates say more than the latents have digits for, as at the far neck of a funnel.

    Args:
        bound: a model, with all latents covered by the guide and without a subsampled plate.
        guide: its guide, set up.
        num: N, the number of points that one evaluation takes, fewer where a point is dear. Others
            are made to fit.

    Attributes:
        traced: whether the graph is in use.
    """

    def __init__(self, bound: BoundModel, guide: AutoContinuous, num: int) -> None:
        self.runs, self.guide = bound.runs, guide
        self.num = num if self.runs.dear else self.runs.at_once(num)
        self._graph = None
        if not self.runs.chosen and self.runs.way == self.runs.by_vmap:
            self._graph = self._recorded(self._alone)
        if self._graph is not None:
            self.runs.chosen = True
        else:
            probes = self._spread_points(len(PROBES))
            self.runs.choose(self.guide.constrain(probes)[0], len(probes))
            self._graph = None if self.one_by_one else self._recorded(self._at_fresh_points)
        self._evaluate = self._by_graph if self._graph else quick(self._value_and_gradient)

    @property
    def one_by_one(self) -> bool:
        """Whether each point takes a run of the model."""
        return self.runs.sequential

    @property
    def traced(self) -> bool:
        """Whether value and gradient come from a recorded graph."""
        return self._graph is not None

    def __call__(self, x: Tensor) -> Tensor:
        """The log joint at x (S, D), shape (S,), with a first derivative.

        It is NaN where its gradient is not finite, so that the point can be left out.
        """
        return _Evaluated.apply(x, self)

    @torch.no_grad()
    def values(self, x: Tensor) -> Tensor:
        """The log joint at x (S, D), shape (S,), without derivatives."""
        if self.runs.dear:
            return self.values_and_gradients(x)[0]
        with pyro.validation_enabled(False):
            return torch.cat([self._evaluated(x) for x in x.split(self.runs.at_once(len(x)))])

    def values_and_gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The log joint at x (S, D) and its gradient, shapes (S,) and (S, D)."""
        return self._by(self._evaluate, x)

    def _by(self, evaluate: Gradient, x: Tensor) -> tuple[Tensor, Tensor]:
        parts = [evaluate(_padded(part, self.num)) for part in x.detach().split(self.num)]
        value, gradient = (torch.cat(found)[: len(x)] for found in zip(*parts, strict=True))
        return value, gradient

    def differs(self, x: Tensor) -> str | None:
        """Where runs of the model at a few points x differ from what is relied on, if they do."""
        if self.one_by_one:
            return None
        site = differs(self.runs, self.guide.constrain(x)[0], len(x), self.runs.way)
        same = self._same(self.values_and_gradients(x), self._value_and_gradient(x))
        return site or (None if same else "the log joint")

    def _by_graph(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._graph(x, *self._moved_by())

    def _moved_by(self) -> tuple[Tensor, ...]:
        """The tensors of the guide's coordinates, which may change between two evaluations."""
        return self.guide.coordinates.tensors() if self.guide.coordinates else ()

    def _value_and_gradient(
        self, x: Tensor, way: Way | None = None, moved_by: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, Tensor]:
        with pyro.validation_enabled(False), torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self._evaluated(x, way, moved_by)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), gradient

    def _evaluated(
        self, x: Tensor, way: Way | None = None, moved_by: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        if self.guide.coordinates is None:
            latents, log_det = self.guide.latents.constrain(x)
            return self.runs.log_joint(latents, len(x), way) + log_det
        given = self._moved_by() if moved_by is None else moved_by
        if way is None and self.runs.way == self.runs.by_vmap:
            value, lost = _filled(self.runs, self.guide, x, given)
        else:
            z, moved, lost = self.guide.coordinates.move(x, *given)
            latents, log_det = self.guide.latents.constrain(z)
            value = self.runs.log_joint(latents, len(x), way) + log_det + moved
        return value.where(lost < ROUNDED, torch.nan)

    def _recorded(self, expected: Callable[[], Points]) -> Callable | None:
        """The graph of value and gradient at N points, if it gives what is expected at others."""
        moved_by = self._moved_by()
        try:
            graph = _by_rows(self, moved_by)
            graph = graph or traced(self._at, self._spread_points(self.num, 1), *moved_by)
            x, *there = expected()
            found = self._by(lambda x: graph(x, *moved_by), x)
            return graph if self._same(found, there) else None
        except FAILURES:
            return None

    def _at(self, x: Tensor, *moved_by: Tensor) -> tuple[Tensor, Tensor]:
        return self._value_and_gradient(x, None, moved_by)

    def _at_fresh_points(self) -> Points:
        """What the model says of N points, run as it was chosen to."""
        x = self._spread_points(self.num, 2)
        return x, *self._value_and_gradient(x)

    def _alone(self) -> Points:
        """What it says of three points in runs of their own; one is the inspected draw."""
        known, x = self.runs.inspected, self._spread_points(len(PROBES))
        if known is None or known.slopes.keys() != self.guide.latents.sites.keys():
            return x, *self._value_and_gradient(x, self.runs.one_by_one)
        others = x[1:], *self._value_and_gradient(x[1:], self.runs.one_by_one)
        return tuple(map(torch.cat, zip(self._of(known, x), others, strict=True)))

    def _of(self, known: Outcome, like: Tensor) -> Points:
        """An outcome in terms of the coordinates."""
        x = self.guide.unconstrain(known.latents)[0].to(like).detach().requires_grad_()
        with torch.enable_grad():
            latents, log_det = self.guide.constrain(x)
            moved = [(latents[name] * slope).sum() for name, slope in known.slopes.items()]
            (gradient,) = torch.autograd.grad(torch.stack([*moved, log_det.sum()]).sum(), x)
        return x.detach(), (log_joint(known.sites) + log_det).detach(), gradient

    def _same(self, found: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
        return all(agree(*pair) for pair in zip(found, expected, strict=True))

    def _spread_points(self, num: int, seed: int = 0) -> Tensor:
        with seeded(seed):
            start = self.guide.start()
            return start + moves(num, start)


class _Evaluated(Function):
    """A LogJoint as a function that can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_joint: LogJoint) -> Tensor:
        value, gradient = log_joint.values_and_gradients(x)
        finite = gradient.isfinite().all(-1)
        ctx.save_for_backward(gradient.where(finite.unsqueeze(-1), 0.0))
        return value.where(finite | value.isneginf(), torch.nan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grad.unsqueeze(-1) * gradient, None


def _by_rows(log_joint: LogJoint, moved_by: tuple[Tensor, ...]) -> Callable | None:
    """The graph for some rows of the data at a time, where they are many and it can be."""
    if not log_joint.runs.dear:
        return None
    num = min(log_joint.num, POINTS)
    try:
        graph = ByRows.of(log_joint._at, log_joint._spread_points(num, 1), *moved_by)
    except FAILURES:
        log_joint.num = log_joint.runs.at_once(log_joint.num)
        return None
    log_joint.num = num
    return graph


def traced(function: Callable, *inputs: Tensor) -> Callable:
    """The graph of a function."""
    graph = graph_of(function, *inputs)
    with torch.no_grad(), warnings.catch_warnings():
        # Deprecated, but the only executor without Python's cost for each operation.
        warnings.simplefilter("ignore", DeprecationWarning)
        graph = torch.jit.trace(graph, inputs, check_trace=False)
    if inputs[0].is_cuda:  # its fuser writes the bounds of float64 as numbers nvrtc refuses
        graph = torch.jit.optimized_execution(False)(graph)
    return graph


def _filled(
    runs: Runs, guide: AutoContinuous, x: Tensor, moved_by: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Log joint at x (S, D), and how far z is rounded, by runs in each of which z is found.

    So locations and scales of priors, such as a matrix and its factor, are computed once.
    """

    def alone(x: Tensor) -> tuple[Tensor, Tensor]:
        terms, moves = terms_at(runs, guide, x, moved_by)
        return torch.stack([term.sum() for term in terms.values()]).sum(), moves.result()[2]

    return torch.func.vmap(alone)(x)


def terms_at(
    runs: Runs,
    guide: AutoContinuous,
    x: Tensor,
    moved_by: tuple[Tensor, ...],
    density: Callable[[Record], Tensor] = itemgetter("log_prob"),
) -> tuple[dict[tuple[str, str], Tensor], Moves]:
    """What the log joint at x (D,) is the sum of, by site and kind, and the moves of the latents.

    Each is of the shape that it has in the site: log densities as read from Pyro's records,
    log-determinants of supports and of coordinates.
    """
    counts = {} if guide.coordinates is None else guide.coordinates.counts
    moves = Moves(guide.latents, counts, x, *(moved_by or (x,)))
    fill = Filled(guide.latents, moves)
    run = runs.filled(fill, inside=set(guide.latents.sites))
    filled = [name for name in run if name in guide.latents.sites]
    moved = [name for name in filled if name in counts]
    kinds = {
        "density": {n: density(record) for n, record in run.items() if "log_prob" in record},
        "support": dict(zip(filled, fill.log_dets, strict=True)),
        "coordinates": dict(zip(moved, moves.log_dets, strict=True)),
    }
    return {(n, kind): t for kind, found in kinds.items() for n, t in found.items()}, moves


def _padded(x: Tensor, num: int) -> Tensor:
    return x if len(x) == num else torch.cat([x, x[-1:].expand(num - len(x), -1)])
