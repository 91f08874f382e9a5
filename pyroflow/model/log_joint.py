"""The log joint of a Pyro model as a function of its unconstrained latents, at low cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.autograd import Function
from torch.fx.experimental.proxy_tensor import make_fx

from pyroflow.model.bound import BoundModel
from pyroflow.model.comparison import FAILURES, PROBES, agree, differs, moves
from pyroflow.model.records import Values
from pyroflow.seeds import quick, seeded

Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]


class LogJoint:
    """log p(x, θ(z)) + log |det ∂θ/∂z| for the unconstrained latents z of a guide.

    Running a Pyro model through its handlers costs ten times its arithmetic. So value and gradient
    of N points at once are recorded as one graph of plain operations, which is kept if it
    repeats at fresh points what the model itself says there. Where it does not, or nothing can be
    recorded (control flow that depends on the latents), the model runs each time.

    Args:
        problem: a model, with all latents covered by the guide and without a subsampled plate.
        guide: its guide, set up.
        num: N, the number of points that one evaluation takes. Others are made to fit.

    Attributes:
        traced: whether the graph is in use.
    """

    def __init__(self, problem: BoundModel, guide: AutoContinuous, num: int) -> None:
        self.runs, self.guide, self.num = problem.runs, guide, num
        probes = self._spread_points(len(PROBES))
        self.runs.choose(self._constrained(probes)[0], len(probes))
        self._graph = self._record()
        self._evaluate = self._graph or quick(self._value_and_gradient)

    @property
    def one_by_one(self) -> bool:
        """Whether each point takes a run of the model."""
        return self.runs.sequential

    @property
    def traced(self) -> bool:
        """Whether value and gradient come from a recorded graph."""
        return self._graph is not None

    def __call__(self, z: Tensor) -> Tensor:
        """The log joint at z (S, D), shape (S,), with a first derivative.

        It is NaN where its gradient is not finite, so that the point can be left out.
        """
        return _Evaluated.apply(z, self)

    @torch.no_grad()
    def values(self, z: Tensor) -> Tensor:
        """The log joint at z (S, D), shape (S,), without derivatives."""
        with pyro.validation_enabled(False):
            return self._evaluated(z)

    def values_and_gradients(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The log joint at z (S, D) and its gradient, shapes (S,) and (S, D)."""
        parts = [self._evaluate(_padded(part, self.num)) for part in z.detach().split(self.num)]
        value, gradient = (torch.cat(found)[: len(z)] for found in zip(*parts, strict=True))
        return value, gradient

    def differs(self, z: Tensor) -> str | None:
        """Where runs of the model at a few points z differ from what is relied on, if they do."""
        if self.one_by_one:
            return None
        site = differs(self.runs, self._constrained(z)[0], len(z), self.runs.way)
        if site is None and self._same(self.values_and_gradients(z), self._value_and_gradient(z)):
            return None
        return site or "the log joint"

    def _value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with pyro.validation_enabled(False), torch.enable_grad():
            z = z.detach().requires_grad_()
            value = self._evaluated(z)
            (gradient,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), gradient

    def _evaluated(self, z: Tensor) -> Tensor:
        latents, log_det = self._constrained(z)
        return self.runs.log_joint(latents, len(z)) + log_det

    def _constrained(self, z: Tensor) -> tuple[Values, Tensor]:
        """The latents θ at z (S, D), by site (S, *shape), and log |det ∂θ/∂z|, shape (S,)."""
        return self.guide.latents.constrain(z)

    def _record(self) -> Gradient | None:
        """The graph of value and gradient at N points, if there is one that can be relied on."""
        if self.one_by_one:
            return None
        first, second = (self._spread_points(self.num, seed) for seed in (1, 2))
        try:
            graph = make_fx(lambda z: self._value_and_gradient(z))(first)
            with torch.no_grad(), warnings.catch_warnings():
                # Deprecated, but the only executor without Python's cost for each operation.
                warnings.simplefilter("ignore", DeprecationWarning)
                graph = torch.jit.trace(graph, (first,), check_trace=False)
            if first.is_cuda:  # its fuser writes the bounds of float64 as numbers nvrtc refuses
                graph = torch.jit.optimized_execution(False)(graph)
            if self._same(graph(second), self._value_and_gradient(second)):
                return graph
        except FAILURES:
            pass
        return None

    def _same(self, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
        return all(agree(*pair) for pair in zip(found, expected, strict=True))

    def _spread_points(self, num: int, seed: int = 0) -> Tensor:
        with seeded(seed):
            start = self.guide._init_loc()
            return start + moves(num, start)


class _Evaluated(Function):
    """A LogJoint as a function that can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, log_joint: LogJoint) -> Tensor:
        value, gradient = log_joint.values_and_gradients(z)
        finite = gradient.isfinite().all(-1)
        ctx.save_for_backward(gradient.where(finite.unsqueeze(-1), 0.0))
        return value.where(finite | value.isneginf(), torch.nan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grad.unsqueeze(-1) * gradient, None


def _padded(z: Tensor, num: int) -> Tensor:
    return z if len(z) == num else torch.cat([z, z[-1:].expand(num - len(z), -1)])
