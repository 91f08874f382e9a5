"""Any guide fitted through Pyro's own traces: where the log joint cannot stand alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import default_process_message
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.distributions import TransformedDistribution

from pyroflow.flows import draw_from
from pyroflow.guides import AutoFlow
from pyroflow.inference.checkpoint import saved_settings
from pyroflow.inference.fit import Fit
from pyroflow.inference.objectives import bound_loss, bound_scores, cut_loss
from pyroflow.inference.trainer import Loop
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw
from pyroflow.model.records import is_random, log_joint
from pyroflow.seeds import between_draws, drawing, quick, seeded
from pyroflow.transforms import Bijection

VECTORIZED = {"particles": 256, "scored": 1024}
ONE_BY_ONE = {"particles": 16, "scored": 16}  # where each draw takes a run of the model
STEPS = 3000
GAUSSIAN_PART = 0.2  # of the steps
ANNEALED_PART = 0.5  # of the rest

# The parts of a fit, one of which a checkpoint is of.
GAUSSIAN, FLOW, GROWN = "affine layer alone", "all", "all, after growing"


def fit_by_traces(
    problem: BoundModel,
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
    with path_derivative(guide, not importance_weighted):
        draws = ONE_BY_ONE if problem.max_plate_nesting is None else VECTORIZED
        num_particles = num_particles or draws["particles"]
        scored = torch.randint(2**31, (), device="cpu")
        loss, score = _objective(
            problem, num_particles, draws["scored"], importance_weighted, scored
        )
        parameters = _parameters(problem)
        settings = settings | {"num_particles": num_particles}
        shared["keep_last"] = problem.subsampled
        inner = layers_inside(guide)
        first = round(GAUSSIAN_PART * steps) if inner else 0
        start = None
        if isinstance(guide, AutoFlow):
            guide.flow.fitted = True
        placing = first > 0 and saved_settings(checkpoint).get("part") != FLOW
        fixed = list(guide.buffers()) if isinstance(guide, nn.Module) else []
        options = {"fixed": [*fixed, scored], "checkpoint": checkpoint, **shared}
        if placing:
            gaussian = [p for p in parameters if p not in inner]
            part = {"steps": first, "label": "fit_guide, Gaussian"}
            part["settings"] = settings | {"part": GAUSSIAN}
            start = _run(Loop(gaussian, lambda step: loss(1.0), score, **part, **options))
            guide.affine.recentre()
        annealed = ANNEALED_PART * (steps - first)
        if annealing is None:
            annealing = (lambda t: min(1.0, 0.1 + 0.9 * t / annealed)) if first else (lambda t: 1.0)
        loop = Loop(
            parameters,
            lambda step: loss(annealing(step)),
            score,
            before=start,
            steps=steps - first,
            label="fit_guide",
            settings=settings | {"part": FLOW},
            resume=not placing,
            **options,
        )
        fit = _run(loop)
        if problem.max_plate_nesting is not None:
            warn_of_mixing(problem.mixes())
        return fit


def warn_of_mixing(site: str | None) -> None:
    """Warn if runs at the fitted guide's own draws are not what the fit took them for."""
    if site is not None:
        warnings.warn(
            f"the model mixes draws that run side by side, at {site}, where the fitted guide is: "
            "its control flow or its indices depend on the latents. The fit is not to be trusted "
            "there; diagnose runs the draws one by one. Write the model with torch.where, and "
            "with indices from the right, as in z[..., 0]",
            stacklevel=4,
        )


def _run(loop: Loop) -> Fit:
    """Without validation, so that a draw with a density of NaN costs its step and not the fit."""
    with pyro.validation_enabled(False):
        return loop.run()


def _objective(
    problem: BoundModel, num_particles: int, scored: int, importance_weighted: bool, seed: Tensor
) -> tuple[Callable[[float], Tensor], Callable[[], Tensor]]:
    """The training loss as a function of β, and −(log p − log q) of a fixed set of draws."""
    has_rsample = _has_rsample(problem)
    if importance_weighted and not has_rsample:
        raise ValueError(
            "objective='iwae' needs a guide all of whose sites are reparametrised (rsample), and "
            "the guide has others: use objective='elbo'"
        )
    nesting = problem.max_plate_nesting
    options = {} if nesting is None else {"max_plate_nesting": nesting}
    elbo = Trace_ELBO(
        num_particles=num_particles, vectorize_particles=nesting is not None, **options
    )

    # Bound, so that no name of the model's arguments meets one of Pyro's own.
    model = partial(problem.model, *problem.args, **problem.kwargs)
    guide = partial(problem.guide, *problem.args, **problem.kwargs)
    objective = "iwae" if importance_weighted else "elbo"

    def loss(beta: float) -> Tensor:
        with _DrawingAtSites():
            if not importance_weighted:
                found = elbo.differentiable_loss(poutine.scale(model, scale=beta), guide)
                if bool(found.isfinite()) or not has_rsample:
                    return found
            return _loss_of_weights(problem, beta, objective, num_particles)

    weigh = quick(_DrawingAtSites()(lambda: draw(problem, scored).log_weights))

    def score() -> Tensor:
        with seeded(int(seed)), between_draws():
            return bound_scores(weigh())

    return loss, score


def _has_rsample(problem: BoundModel) -> bool:
    """Whether draws of the guide have a path to its parameters."""
    sites = prune_subsample_sites(problem.guide_trace).iter_stochastic_nodes()
    return all(site["fn"].has_rsample for _, site in sites)


def _loss_of_weights(problem: BoundModel, beta: float, objective: str, num: int) -> Tensor:
    """The loss from log weights one by one: Pyro's is not finite where one of them is not."""
    drawn = problem.guide_draws(num)  # which chooses how they run
    problem.runs.choose({name: drawn[name].values for name in problem.latents}, num)
    guided = problem.guide_runs.way({}, num)
    latents = {name: guided[name].values for name in problem.latents}
    log_weights = beta * problem.runs.log_joint(latents, num) - log_joint(guided)
    if bool(log_weights.isfinite().all()):
        return bound_loss(log_weights, objective, num)
    along_path = getattr(problem.guide, "path_derivative", False)
    random = {name: site for name, site in guided.items() if is_random(site.record)}
    with path_derivative(problem.guide, False):
        fixed = {name: site.values.detach() for name, site in random.items()}
        log_q = log_joint(problem.guide_runs.way(fixed, num))
    z = torch.cat([value.detach().reshape(num, -1) for value in latents.values()], 1)
    return cut_loss(log_weights, objective, num, z, log_q, path=along_path)


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
def path_derivative(guide: Callable, wanted: bool) -> Iterator[None]:
    """Train with path derivatives or without, where all of the guide's transforms have them."""
    if not has_path(guide):
        yield
        return
    before, guide.path_derivative = guide.path_derivative, wanted
    try:
        yield
    finally:
        guide.path_derivative = before


def has_path(guide: Callable) -> bool:
    """Whether all transforms of a guide know the gradient along the path of a sample."""
    flow = isinstance(guide, AutoFlow)
    return flow and all(isinstance(t, Bijection) for t in guide.get_transforms())


def _parameters(problem: BoundModel) -> list[Tensor]:
    """Every parameter that a run of model and guide meets, as Pyro's own SVI collects them."""
    unchecked = pyro.validation_enabled(False)
    with torch.no_grad(), unchecked, poutine.trace(param_only=True) as captured:
        guided = poutine.trace(problem.guide).get_trace(*problem.args, **problem.kwargs)
        poutine.replay(problem.model, trace=guided)(*problem.args, **problem.kwargs)
    parameters = [site["value"].unconstrained() for site in captured.trace.nodes.values()]
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters:
        raise ValueError("guide has no parameters to train: pass one such as AutoPlanarFlow(model)")
    return parameters
