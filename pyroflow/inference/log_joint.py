"""The log joint of a Pyro model as a function of its unconstrained latents, at low cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.autograd import Function
from torch.distributions import biject_to
from torch.fx.experimental.proxy_tensor import make_fx

from pyroflow.inference.elbo import PARTICLES, Problem, log_prob_by_particle
from pyroflow.seeds import quick, seeded

Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]

# What tracing and vmap raise where Python needs to know a number, or an operation is not theirs.
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, KeyError)


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

    def __init__(self, problem: Problem, guide: AutoContinuous, num: int) -> None:
        self.problem, self.guide, self.num = problem, guide, num
        self._batched = self._find_batched()
        self._graph = self._record()
        self._evaluate = self._graph or quick(self._value_and_gradient)

    @property
    def one_by_one(self) -> bool:
        """Whether each point takes a run of the model."""
        return self._batched == self._one_by_one

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
            return self._batched(z)

    def values_and_gradients(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The log joint at z (S, D) and its gradient, shapes (S,) and (S, D)."""
        parts = [self._evaluate(_padded(part, self.num)) for part in z.detach().split(self.num)]
        value, gradient = (torch.cat(found)[: len(z)] for found in zip(*parts, strict=True))
        return value, gradient

    def _value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with pyro.validation_enabled(False), torch.enable_grad():
            z = z.detach().requires_grad_()
            value = self._batched(z)
            (gradient,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), gradient

    def _find_batched(self) -> Callable[[Tensor], Tensor]:
        """How to evaluate many points: in a plate, by torch's vmap, or one by one."""
        if self.problem.plates is not None:
            return self._in_plate
        by_vmap = torch.func.vmap(self._single)
        try:
            with torch.no_grad(), pyro.validation_enabled(False):
                z = self._spread_points(2)
                if _same((by_vmap(z),), (self._one_by_one(z),)):
                    return by_vmap
        except FAILURES:
            pass
        return self._one_by_one

    def _single(self, z: Tensor) -> Tensor:
        return self._run(z, self.problem.model).log_prob_sum() + self._log_jacobian(z)

    def _one_by_one(self, z: Tensor) -> Tensor:
        return torch.stack([self._single(point) for point in z])

    def _in_plate(self, z: Tensor) -> Tensor:
        plates = self.problem.plates
        spread = z.reshape(z.shape[:1] + (1,) * plates + z.shape[1:])
        plate = pyro.plate(PARTICLES, len(z), dim=-1 - plates)
        log_p = log_prob_by_particle(self._run(spread, plate(self.problem.model)), plates)
        return log_p + self._log_jacobian(z)

    def _run(self, latents: Tensor, model: Callable) -> poutine.Trace:
        values = {
            site["name"]: biject_to(site["fn"].support)(value)
            for site, value in self.guide._unpack_latent(latents)
        }
        run = poutine.trace(poutine.condition(model, data=values)).get_trace
        with poutine.block():
            trace = prune_subsample_sites(run(*self.problem.args, **self.problem.kwargs))
        self._check_latents(trace, values)
        return trace

    def _check_latents(self, trace: poutine.Trace, values: dict[str, Tensor]) -> None:
        """A latent of some runs only would be drawn from its prior, and nothing would say so."""
        free = [name for name, _ in trace.iter_stochastic_nodes()]
        changed = free + [name for name in values if name not in trace.nodes]
        if changed:
            raise ValueError(
                f"site {changed[0]!r} is a latent in some runs of the model only: the guide needs "
                "the same latents in every run. Let the model sample all of them each time, and "
                "mask or weigh what does not count"
            )

    def _log_jacobian(self, z: Tensor) -> Tensor:
        """Log |det ∂θ/∂z|, shape (*B) for z (*B, D)."""
        total = z.new_zeros(z.shape[:-1])
        start = 0
        for name, site in self.guide.prototype_trace.iter_stochastic_nodes():
            shape = self.guide._unconstrained_shapes[name]
            part = z[..., start : start + shape.numel()].reshape(z.shape[:-1] + shape)
            start += shape.numel()
            transform = biject_to(site["fn"].support)
            log_det = transform.log_abs_det_jacobian(part, transform(part))
            total = total + log_det.reshape(z.shape[:-1] + (-1,)).sum(-1)
        return total

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
            if _same(graph(second), self._value_and_gradient(second)):
                return graph
        except FAILURES:
            pass
        return None

    def _spread_points(self, num: int, seed: int = 0) -> Tensor:
        with seeded(seed):
            start = self.guide._init_loc()
            noise = torch.randn(num, len(start), dtype=start.dtype, device="cpu")
            return start + noise.to(start)


class _Evaluated(Function):
    """A LogJoint as a function that can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, log_joint: LogJoint) -> Tensor:
        value, gradient = log_joint.values_and_gradients(z)
        finite = gradient.isfinite().all(-1)
        ctx.save_for_backward(gradient.where(finite.unsqueeze(-1), 0.0))
        return value.where(finite, torch.nan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grad.unsqueeze(-1) * gradient, None


def _padded(z: Tensor, num: int) -> Tensor:
    return z if len(z) == num else torch.cat([z, z[-1:].expand(num - len(z), -1)])


def _same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    tolerance = 1e-9 if found[0].dtype == torch.float64 else 1e-3
    return all(
        torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        for a, b in zip(found, expected, strict=True)
    )
