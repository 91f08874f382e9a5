"""Variational inference: a guide fitted to a Pyro model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import nn

from pyroflow.checks import check_choice, check_count
from pyroflow.guides import AmortizedPlanarGuide, AutoFlow, AutoStructuredFlow
from pyroflow.guides.arguments import data_into_args
from pyroflow.inference.callbacks import Callbacks, interrupted
from pyroflow.inference.fit import Fit, check_options, check_precision, has_path
from pyroflow.inference.gaussian_start import TICKS
from pyroflow.inference.guide_fit import RATE, STEPS, GuideFit, finished, refuse_nonfinite
from pyroflow.inference.minibatches import MinibatchBound
from pyroflow.inference.objectives import DRAWS, OBJECTIVES, LogJointBound
from pyroflow.inference.processes import held, processes
from pyroflow.inference.schedule import AdaptiveAnnealing, Annealing, described
from pyroflow.inference.trace_bound import TraceBound
from pyroflow.model.arguments import warn_of_forgotten_data
from pyroflow.model.bound import BoundModel, check_latents
from pyroflow.progress import progress_bar
from pyroflow.seeds import one_at_a_time, seeded
from pyroflow.shown import missing

TRIES = 3  # draws that a model may fail before it is refused


@data_into_args()
@one_at_a_time
def fit_guide(
    model: Callable,
    guide: Callable,
    *data: Any,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    steps: int | None = None,
    num_particles: int | None = None,
    lr: float = RATE,
    seed: int | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    device: str | torch.device | None = None,
    warm_start: bool = True,
    objective: str = "elbo",
    group_size: int = 2,
    annealing: Annealing = None,
    early_stop: bool = True,
    callbacks: Callbacks = None,
) -> Fit:
    """Fit a guide to a model by maximising the evidence lower bound.

    A guide of the :class:`~pyroflow.AutoFlow` family, for a model without parameters and
    subsampled plates, is fitted to the model's log joint as a plain function, recorded once where
    that is possible. The guide is first initialized: its affine layer becomes the best Gaussian
    that several ascents to the modes find, in the coordinates that the model's priors dictate
    (``guide.centring``); a guide that was trained before goes on from where it is. Then Adam
    trains all along path derivatives. Learning-rate schedule: linear warm-up, cosine decay,
    shortened once the loss is flat (:class:`~pyroflow.StopRule`); the last iterates are averaged.
    At most 100 natural gradient steps follow, one for fifteen steps in all, where the guide is of
    pyroflow's own layers, has at most 1024 parameters, and a draw is cheap. The guide ends in the
    state with the best bound on a fixed set of draws, and at once where their weights say that
    nothing is left to gain.

    An :class:`~pyroflow.AutoStructuredFlow` or :class:`~pyroflow.AmortizedPlanarGuide` takes plates
    that subsample too. A step draws and evaluates the rows at hand; the start, the fixed draws and
    so ``best_loss`` are of all rows, some at a time. Learning is slower, as rows at random make the
    gradients of the globals noisy.

    Any other guide or model is fitted by Pyro's ``Trace_ELBO``, vectorised where that is found to
    change nothing; a flow's affine layer is trained first, and parameters of the model too.

    Under torchrun the processes share each step's draws and come to one result.

    References:
        Amari, Natural gradient works efficiently in learning, 1998;
        Roeder, Wu and Duvenaud, Sticking the landing, 2017, https://arxiv.org/abs/1703.09194;
        Zhang, Carpenter, Gelman and Vehtari, Pathfinder, 2022, https://arxiv.org/abs/2108.03782.

    Args:
        model: a Pyro model.
        guide: a guide for it, such as :class:`~pyroflow.AutoPlanarFlow`; trained in place.
        data: arguments of model and guide, as in Pyro's ``svi.step(x, y)``. A tuple or list in
            first place is taken as ``args``, and a dict or None after it as ``kwargs``.
        args: the same as a tuple: for a model whose first argument is a tuple or list.
        kwargs: keyword arguments of model and guide.
        steps: the most optimiser steps, natural gradient steps among them; by default 3000, or
            1500 where some are. A guide that grows takes 3000 at each depth, and is annealed at the
            first.
        num_particles: draws a step; by default 128, or 256 by Pyro's traces, and 16 where each
            takes a run of the model.
        lr: highest learning rate.
        seed: makes the fit reproducible, without touching the global generator, whatever other
            threads draw; fits of guides in several threads take turns. A guide that was called
            before keeps the parameters it got then, and what the model draws by NumPy or
            Python's ``random`` is the caller's. None draws from the global generator.
        progress: show a progress bar, in a notebook or on a terminal.
        callbacks: as in :func:`~pyroflow.fit_density`; the steps before the flow's are told of too.
        checkpoint: file that the fit is saved to as it goes, and resumed from if it exists;
            needs a seed.
        device: where to move a guide that is a module; its arguments are the caller's.
        warm_start: initialize the guide as said above; else, and where each draw takes a run of
            the model, its affine layer is trained first, from the guide's own start.
        objective: "elbo"; "iwae", the importance-weighted bound; or "dreg", the same with doubly
            reparametrised gradients, which needs pyroflow's own layers.
        group_size: draws behind each importance-weighted bound.
        annealing: step ↦ β, the weight of the log joint, such as
            :func:`~pyroflow.paper_annealing`, or an :class:`~pyroflow.AdaptiveAnnealing`. The
            stop rule is off then.
        early_stop: whether the stop rule, or weights that are all equal, may shorten the fit.

    Returns:
        The course of the fit, up to Ctrl-C if that ended it after its first score, with a warning;
        ``best_loss`` is the negative bound that was the objective, in nats, and ``stopped`` says
        why it ended. Where the ascents before the first step led to modes
        that the guide does not draw, they are in ``missed``, and a warning says so.

    Raises:
        TypeError: If the model fails by an array that is no tensor, or what is given is no model,
            guide or argument (here and in the other functions of a model).
        ValueError: If a latent site is discrete or not sampled by the guide, if the density is
            finite nowhere near the start (both name the sites), if the latents are not those that
            the guide was made for, the guide has no parameters, an option is out of range, or the
            checkpoint is of another fit or in use by one.

    Warns:
        UserWarning: If the model observes nothing, as its data were not given; if the guide is at
            one of several modes.

    Example:
        >>> from pyroflow import AutoPlanarFlow
        >>> from pyroflow.targets import toy_model
        >>> guide = AutoPlanarFlow(toy_model, num_layers=4)
        >>> fit = fit_guide(toy_model, guide, steps=20, seed=0, progress=False)
        >>> sorted(guide.median())
        ['z']
    """
    options = {"lr": lr, "seed": seed, "checkpoint": checkpoint, "device": device}
    check_options(steps=_or_one(steps), num_particles=_or_one(num_particles), **options)
    _check_objective(objective, group_size, num_particles)
    ours = processes()
    seed, checkpoint, progress = ours.options(seed, checkpoint, progress)
    settings, began = {"kind": "guide", "seed": seed}, time.perf_counter()
    with held(checkpoint), seeded(seed):
        set_up = isinstance(guide, AutoFlow) and guide.prototype_trace is not None
        if set_up or checkpoint is not None or ours.count > 1:
            start = BoundModel(model, args=args, kwargs=kwargs)
            settings["log joint of a draw"] = start.fingerprint
        if set_up:
            guide.check_model(start.model_trace)  # whether it was made for these latents
        warn_of_forgotten_data(model, args, kwargs or {})
        problem, valid = inspected(model, guide, args, kwargs)
        check_latents(problem)
        if isinstance(guide, nn.Module):
            ours.start_alike(guide.to(device))
            check_precision(guide)
        settings["annealing"] = described(annealing, steps or STEPS)
        bound, bar = None, None
        if isinstance(guide, AutoFlow | AmortizedPlanarGuide) and not problem.learns:
            if objective == "dreg" and not has_path(guide):
                raise ValueError(
                    "objective='dreg' needs the path derivatives of pyroflow's own layers, and the "
                    "guide has others: use objective='iwae'"
                )
            # With much data it takes minutes until the first step.
            bar = progress_bar("fit_guide, start", TICKS, progress)
            options = {"seed": seed, "processes": ours}
            bound = _by_log_joint(problem, objective, group_size, num_particles, **options)
        if bound is not None:
            settings |= {"objective": objective, "group_size": group_size}
        elif objective == "dreg" or isinstance(annealing, AdaptiveAnnealing):
            raise ValueError(
                "objective='dreg' and AdaptiveAnnealing need a guide of the AutoFlow family, and a "
                "model without parameters and subsampled plates: use objective='iwae' or 'elbo', "
                "and a function of the step as annealing"
            )
        else:
            bound = TraceBound(problem, objective, num_particles, ours)
        fit = GuideFit(
            bound,
            steps=steps,
            annealing=annealing,
            warm_start=warm_start,
            early_stop=early_stop,
            checkpoint=checkpoint,
            settings=settings,
            bar=bar,
            lr=lr,
            progress=progress,
            callbacks=callbacks,
        )
        if not (valid or fit.warm_start):  # which looks for a start farther away
            refuse_nonfinite(problem)
        try:
            found = fit.run()
        except KeyboardInterrupt:
            found = finished(interrupted(fit.trainer, stacklevel=4), bound)
        if found.missed:
            warnings.warn(
                f"the guide is at one mode: {missing(found.missed, found.missed_share)}. Take "
                "posterior, which fits one flow at each mode and mixes them, or let guides start "
                "at each (init_loc_fn)",
                stacklevel=4,
            )
        # Before the first step a start may have taken longer than all of them.
        return replace(found, seconds=max(found.seconds, time.perf_counter() - began))


def _by_log_joint(problem: BoundModel, *args: Any, **options: Any) -> LogJointBound | None:
    """The bound of the log joint; None where plates subsample and it cannot be recorded."""
    if isinstance(problem.guide, AutoFlow) and not problem.subsampled:
        return LogJointBound(problem, *args, **options)
    if not isinstance(problem.guide, AutoStructuredFlow | AmortizedPlanarGuide):
        return None
    try:
        return MinibatchBound(problem, *args, **options)
    except ValueError as error:
        (why, *_) = str(error.__cause__ or error).splitlines()
        warnings.warn(
            "the fit is by Pyro's traces, of the rows that each step has alone, and keeps the last "
            f"state, as no log joint of all rows is to be had: {why}",
            stacklevel=5,
        )
        return None


def _check_objective(objective: str, group_size: int, num_particles: int | None) -> None:
    check_choice("objective", objective, OBJECTIVES)
    check_count("group_size", group_size, 1)
    if objective != "elbo" and (num_particles or DRAWS) % group_size:
        raise ValueError(
            f"group_size must divide num_particles = {num_particles or DRAWS}, got {group_size}"
        )


def inspected(
    model: Callable, guide: Callable, args: tuple, kwargs: dict | None
) -> tuple[BoundModel, bool]:
    """``BoundModel``, and whether a draw of the guide was valid in the model.

    Where none of a few was, the support may begin farther away, which is for the fit to find.
    """
    for _ in range(TRIES):
        try:
            return BoundModel(model, guide, args, kwargs), True
        except ValueError as error:
            failed = error
    with pyro.validation_enabled(False):
        try:
            return BoundModel(model, guide, args, kwargs), False
        except ValueError:
            raise failed from None


def _or_one(count: int | None) -> int:
    return 1 if count is None else count
