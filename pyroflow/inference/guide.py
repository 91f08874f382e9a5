"""Variational inference: a guide fitted to a Pyro model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyroflow.guides import AutoFlow
from pyroflow.inference.elbo import Problem
from pyroflow.inference.fit import Fit, check_options
from pyroflow.inference.loop import Loop
from pyroflow.seeds import seeded
from pyroflow.transforms import Bijection

VECTORIZED = {"particles": 256, "scored": 1024}
ONE_BY_ONE = {"particles": 16, "scored": 16}  # where each draw takes a run of the model
GAUSSIAN_PART = 0.2  # of the steps
ANNEALED_PART = 0.5  # of the rest


def fit_guide(
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    *,
    steps: int = 3000,
    num_particles: int | None = None,
    lr: float = 0.03,
    seed: int | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    device: str | torch.device | None = None,
) -> Fit:
    """Fit a guide to a model by maximising the evidence lower bound.

    Pyro's ``Trace_ELBO`` with all particles in one vectorised run of the model, where two
    vectorised draws get the log densities that they get one by one, and a run for each
    particle elsewhere. Adam's learning rate warms up and decays to zero; the last quarter of
    the iterates are averaged; the guide ends in the state with the best bound on a fixed set
    of draws (in the last one where a plate subsamples the data, since the bound is then one of
    the part that was drawn). Parameters of the model, if it has any, are trained too.

    A guide of :class:`~pyroflow.AutoFlow` or :class:`~pyroflow.AutoPlanarFlow` follows path
    derivatives, where all of its transforms are pyroflow's and run forwards. The first fifth of
    the steps goes to its affine layer alone, which moves and scales what the layers inside make
    of the base (at the identity a Gaussian), and then sets the units of the rest. After that
    the log joint's weight β rises from 0.1 to 1 over half of the steps left, while the entropy
    keeps its own (equation 20 of Rezende & Mohamed 2015): the flow spreads before it settles.

    Args:
        model: a Pyro model.
        guide: a guide for it, such as :class:`~pyroflow.AutoPlanarFlow`; trained in place.
        args: positional arguments of model and guide.
        kwargs: keyword arguments of model and guide.
        steps: optimiser steps.
        num_particles: draws a step; by default 256, or 16 where they take a run each.
        lr: highest learning rate.
        seed: makes the fit reproducible, without touching the global generator. A guide
            that was called before keeps the parameters it got then.
        progress: show a progress bar.
        checkpoint: file that the fit is saved to as it goes, and resumed from if it exists;
            needs a seed.
        device: where to move a guide that is a module; its arguments are the caller's.

    Returns:
        The course of the fit; ``best_loss`` is −ELBO in nats.

    Raises:
        ValueError: a latent site that is discrete or that the guide does not sample (naming the
            site), a guide without parameters, an option out of range, a checkpoint of another
            fit.

    Example:
        >>> from pyroflow import AutoPlanarFlow
        >>> from pyroflow.targets import toy_model
        >>> guide = AutoPlanarFlow(toy_model, num_layers=4)
        >>> fit = fit_guide(toy_model, guide, steps=20, seed=0, progress=False)
        >>> sorted(guide.median())
        ['z']
    """
    options = {"steps": steps, "lr": lr, "seed": seed, "checkpoint": checkpoint}
    check_options(**options, num_particles=1 if num_particles is None else num_particles)
    with seeded(seed), ExitStack() as contexts:
        problem = Problem.inspect(model, guide, args, kwargs)
        contexts.enter_context(_along_path(guide))
        draws = ONE_BY_ONE if problem.plates is None else VECTORIZED
        num_particles = num_particles or draws["particles"]
        if isinstance(guide, nn.Module):
            guide.to(device)
        loss, score = _objective(problem, num_particles, draws["scored"])
        parameters = _parameters(loss)
        settings = {"kind": "guide", "num_particles": num_particles, "seed": seed}
        shared = {"lr": lr, "progress": progress, "settings": settings}
        shared["keep_last"] = problem.subsampled
        settings["log joint of a draw"] = _fingerprint(problem)
        inner = _layers_inside(guide)
        first = round(GAUSSIAN_PART * steps) if inner else 0
        start = None
        if first and not (checkpoint is not None and Path(checkpoint).exists()):
            gaussian = [p for p in parameters if p not in inner]
            label = "fit_guide, Gaussian"
            options = {"steps": first, "label": label, **shared}
            start = Loop(gaussian, lambda step: loss(1.0), score, **options).run()
            guide.affine.absorb()
        annealed = ANNEALED_PART * (steps - first)
        loop = Loop(
            parameters,
            lambda step: loss(min(1.0, 0.1 + 0.9 * step / annealed) if first else 1.0),
            score,
            fixed=list(guide.buffers()) if isinstance(guide, nn.Module) else [],
            before=start,
            steps=steps - first,
            label="fit_guide",
            checkpoint=checkpoint,
            **shared,
        )
        return loop.run()


def _fingerprint(problem: Problem) -> str:
    """What model and arguments have to say of a fixed draw, by which to know them again."""
    with seeded(0), torch.no_grad(), poutine.block():
        trace = poutine.trace(problem.model).get_trace(*problem.args, **problem.kwargs)
        return f"{trace.log_prob_sum().item():.6g}"


def _objective(
    problem: Problem, num_particles: int, scored: int
) -> tuple[Callable[[float], Tensor], Callable[[], Tensor]]:
    """The training loss as a function of β, and −(log p − log q) of a fixed set of draws."""
    seed = int(torch.randint(2**31, ()))
    if problem.plates is None:
        elbo = Trace_ELBO(num_particles=num_particles)
    else:
        elbo = Trace_ELBO(
            num_particles=num_particles, vectorize_particles=True, max_plate_nesting=problem.plates
        )

    # Bound, so that no name of the model's arguments meets one of Pyro's own.
    model = partial(problem.model, *problem.args, **problem.kwargs)
    guide = partial(problem.guide, *problem.args, **problem.kwargs)

    def loss(beta: float) -> Tensor:
        return elbo.differentiable_loss(poutine.scale(model, scale=beta), guide)

    def score() -> Tensor:
        with seeded(seed):
            return -problem.log_weights(scored)

    return loss, score


def _layers_inside(guide: Callable) -> set[Tensor]:
    """What is trained of the layers inside an affine one, which has to be placed before."""
    if not isinstance(guide, AutoFlow) or guide.affine is None:
        return set()
    inside = [t for t in guide.flow.parts if t is not guide.affine]
    return {p for t in inside for p in t.parameters() if p.requires_grad}


@contextmanager
def _along_path(guide: Callable) -> Iterator[None]:
    """Train with path derivatives, where all of the guide's transforms have them."""
    flow = isinstance(guide, AutoFlow)
    if not flow or not all(isinstance(t, Bijection) for t in guide.get_transforms()):
        yield
        return
    before, guide.path_derivative = guide.path_derivative, True
    try:
        yield
    finally:
        guide.path_derivative = before


def _parameters(loss: Callable[[float], Tensor]) -> list[Tensor]:
    """Every parameter that a run of model and guide meets, as Pyro's own SVI collects them."""
    with torch.no_grad(), poutine.trace(param_only=True) as captured:
        loss(1.0)
    parameters = [site["value"].unconstrained() for site in captured.trace.nodes.values()]
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters:
        raise ValueError("guide has no parameters to train: pass one such as AutoPlanarFlow(model)")
    return parameters
