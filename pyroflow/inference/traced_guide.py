"""Any guide fitted through Pyro's own traces: where the log joint cannot stand alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import default_process_message
from torch import Tensor, nn
from torch.distributions import TransformedDistribution

from pyroflow.flow import draw_from
from pyroflow.guides import AutoFlow
from pyroflow.inference.elbo import Problem
from pyroflow.inference.fit import Fit
from pyroflow.inference.loop import Loop
from pyroflow.seeds import between_draws, drawing, quick, seeded
from pyroflow.transforms import Bijection

VECTORIZED = {"particles": 256, "scored": 1024}
ONE_BY_ONE = {"particles": 16, "scored": 16}  # where each draw takes a run of the model
STEPS = 3000
GAUSSIAN_PART = 0.2  # of the steps
ANNEALED_PART = 0.5  # of the rest


def fit_by_traces(
    problem: Problem,
    *,
    steps: int | None,
    num_particles: int | None,
    annealing: Callable[[int], float] | None,
    importance_weighted: bool,
    checkpoint: str | Path | None,
    settings: dict[str, Any],
    **shared: Any,
) -> Fit:
    """Fit with Pyro's ``Trace_ELBO``; models with parameters or subsampled data are served here.

    A guide of :class:`~pyroflow.AutoFlow` spends the first fifth of the steps on its affine layer
    alone, which then sets the units of the rest; after that β rises from 0.1 to 1 over half of
    the steps left, while the entropy keeps its weight (equation 20 of Rezende & Mohamed 2015).
    """
    guide, steps = problem.guide, steps or STEPS
    with _along_path(guide, not importance_weighted):
        draws = ONE_BY_ONE if problem.plates is None else VECTORIZED
        num_particles = num_particles or draws["particles"]
        loss, score = _objective(problem, num_particles, draws["scored"], importance_weighted)
        parameters = _parameters(loss)
        shared["settings"] = settings | {"num_particles": num_particles}
        shared["keep_last"] = problem.subsampled
        inner = layers_inside(guide)
        first = round(GAUSSIAN_PART * steps) if inner else 0
        start = None
        if first and not (checkpoint is not None and Path(checkpoint).exists()):
            gaussian = [p for p in parameters if p not in inner]
            label = "fit_guide, Gaussian"
            options = {"steps": first, "label": label, **shared}
            start = _run(Loop(gaussian, lambda step: loss(1.0), score, **options))
            guide.affine.absorb()
        annealed = ANNEALED_PART * (steps - first)
        if annealing is None:
            annealing = (lambda t: min(1.0, 0.1 + 0.9 * t / annealed)) if first else (lambda t: 1.0)
        loop = Loop(
            parameters,
            lambda step: loss(annealing(step)),
            score,
            fixed=list(guide.buffers()) if isinstance(guide, nn.Module) else [],
            before=start,
            steps=steps - first,
            label="fit_guide",
            checkpoint=checkpoint,
            **shared,
        )
        return _run(loop)


def _run(loop: Loop) -> Fit:
    """Without validation, so that a draw with a density of NaN costs its step and not the fit."""
    with pyro.validation_enabled(False):
        return loop.run()


def _objective(
    problem: Problem, num_particles: int, scored: int, importance_weighted: bool
) -> tuple[Callable[[float], Tensor], Callable[[], Tensor]]:
    """The training loss as a function of β, and −(log p − log q) of a fixed set of draws."""
    seed = int(torch.randint(2**31, (), device="cpu"))
    kind = partial(RenyiELBO, alpha=0.0) if importance_weighted else Trace_ELBO
    options = {} if problem.plates is None else {"max_plate_nesting": problem.plates}
    elbo = kind(
        num_particles=num_particles, vectorize_particles=problem.plates is not None, **options
    )

    # Bound, so that no name of the model's arguments meets one of Pyro's own.
    model = partial(problem.model, *problem.args, **problem.kwargs)
    guide = partial(problem.guide, *problem.args, **problem.kwargs)

    def loss(beta: float) -> Tensor:
        with _DrawingAtSites():
            return elbo.differentiable_loss(poutine.scale(model, scale=beta), guide)

    weigh = quick(_DrawingAtSites()(problem.log_weights))

    def score() -> Tensor:
        with seeded(seed), between_draws():
            return -weigh(scored)

    return loss, score


class _DrawingAtSites(Messenger):
    """Lets sample sites draw inside of ``drawing``, flows their base alone."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn, known = msg["fn"], msg["done"] or msg["is_observed"] or msg["value"] is not None
        if known or isinstance(fn, Delta):
            return
        if isinstance(fn, TransformedDistribution) and fn.has_rsample and not msg["args"]:
            msg["value"], msg["done"] = draw_from(fn), True
            return
        with drawing():
            default_process_message(msg)


def layers_inside(guide: Callable) -> set[Tensor]:
    """What is trained of the layers inside an affine one, which has to be placed before."""
    if not isinstance(guide, AutoFlow) or guide.affine is None:
        return set()
    inside = [t for t in guide.flow.parts if t is not guide.affine]
    return {p for t in inside for p in t.parameters() if p.requires_grad}


@contextmanager
def _along_path(guide: Callable, wanted: bool) -> Iterator[None]:
    """Train with path derivatives, where all of the guide's transforms have them."""
    if not wanted or not has_path(guide):
        yield
        return
    before, guide.path_derivative = guide.path_derivative, True
    try:
        yield
    finally:
        guide.path_derivative = before


def has_path(guide: Callable) -> bool:
    """Whether all transforms of a guide know the gradient along the path of a sample."""
    flow = isinstance(guide, AutoFlow)
    return flow and all(isinstance(t, Bijection) for t in guide.get_transforms())


def _parameters(loss: Callable[[float], Tensor]) -> list[Tensor]:
    """Every parameter that a run of model and guide meets, as Pyro's own SVI collects them."""
    with torch.no_grad(), poutine.trace(param_only=True) as captured:
        loss(1.0)
    parameters = [site["value"].unconstrained() for site in captured.trace.nodes.values()]
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters:
        raise ValueError("guide has no parameters to train: pass one such as AutoPlanarFlow(model)")
    return parameters
