"""The fit of a guide in parts: its affine layer, all of it, and more layers where they gain."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro
from torch import Tensor

from pyroflow.guides import AmortizedPlanarGuide, AutoFlow, AutoStructuredFlow
from pyroflow.inference.amortized_start import amortized_start
from pyroflow.inference.centring import best_coordinates
from pyroflow.inference.fit import (
    Fit,
    Objective,
    check_settings,
    copy_tensors,
    path_derivative,
    read_checkpoint,
)
from pyroflow.inference.gaussian_start import PATHS, initialize, layers_inside
from pyroflow.inference.missed import missed_at
from pyroflow.inference.natural import natural_steps
from pyroflow.inference.objectives import LogJointBound, nothing_left
from pyroflow.inference.schedule import AdaptiveAnnealing, Annealing, LearningRateSchedule
from pyroflow.inference.stop_rule import StopRule
from pyroflow.inference.structured_start import structured_start
from pyroflow.inference.trace_bound import TraceBound
from pyroflow.inference.trainer import Trainer
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw
from pyroflow.progress import Bar
from pyroflow.seeds import between_draws, drawing, seeded

GAUSSIAN_PART = 0.2  # of the steps, on the affine layer alone
ANNEALED_PART = 0.5  # of the rest, where a guide is fitted by traces
WINDOW, LEAST_WINDOW = 800, 200  # steps of a flat loss, whose noise hides slow gains; if dear
WIDEST_WARM_START = 256  # latents, beyond which the Hessians cost more than they save
STEPS, FEWER = 3000, 1500  # by default, and where natural gradients end a fit
RATE = 0.03  # the highest learning rate
MANY = 32  # latents, above which that of an arrowhead falls as the root of their number
LEAST_GAIN = 0.02  # nats, that more layers must have brought
DEEPEST = 64

Bound = LogJointBound | TraceBound
# The parts of a fit, one of which a checkpoint is of.
GAUSSIAN, FLOW, GROWN = "affine layer alone", "all", "all, after growing"


class GuideFit:
    """The fit of one guide; see :func:`~pyroflow.fit_guide` for the options.

    By its log joint, a guide starts from the best Gaussian, or spends the first fifth of the
    steps on its affine layer alone, and may grow. By Pyro's traces it does the latter, and β then
    rises from 0.1 to 1 over half of the steps left, while the entropy keeps its weight (equation
    20 of Rezende & Mohamed 2015). ``bar`` is of what comes before the first step.
    """

    def __init__(
        self,
        bound: Bound,
        *,
        steps: int | None,
        annealing: Annealing,
        warm_start: bool,
        early_stop: bool,
        checkpoint: str | Path | None,
        settings: dict[str, Any],
        bar: Bar | None = None,
        **shared: Any,
    ) -> None:
        self.bound, self.guide, self.annealing, self.bar = bound, bound.guide, annealing, bar
        self.by_log_joint = isinstance(bound, LogJointBound)
        self.structured = isinstance(self.guide, AutoStructuredFlow)
        by_rows = self.structured or isinstance(self.guide, AmortizedPlanarGuide)
        self.warm_start = warm_start and _can_start(bound, by_rows)
        self.early_stop = early_stop and self.by_log_joint and annealing is None
        # Where the ascents ended, in the unconstrained latents; NaN where there was none.
        num = 2 * PATHS if self.warm_start and not by_rows else 0
        self.ends = [self.guide.start() * math.nan for _ in range(num)]
        fewer = natural_steps(bound, STEPS, annealing) and not getattr(self.guide, "grows", False)
        self.steps = steps or (FEWER if fewer else STEPS)
        self.spent = 0  # of them, on the affine layer alone
        own = {"num_particles": bound.num_particles, "early_stop": self.early_stop}
        self.settings = settings | own | {"steps in all": self.steps}
        self.saved = bound.processes.agree(read_checkpoint(checkpoint)).get("settings", {})
        self.part = self.saved.get("part")  # that was cut off
        self.shared = shared | {"checkpoint": checkpoint}
        self.trainer: Trainer | None = None  # the latest
        self.ended = ""  # why a callback has ended the fit
        if self.part in (None, GAUSSIAN):
            _refuse_used(annealing)

    @between_draws()
    def run(self) -> Fit:
        """Initialize the guide, train it, and grow it if it is to grow."""
        guide, before = self.guide, None
        grows = self.by_log_joint and getattr(guide, "grows", False)
        if self.saved:
            check_settings(self.shared["checkpoint"], self.saved, self.settings)
        if isinstance(guide, AutoFlow):
            guide.flow.fitted = True
        if self.part in (FLOW, GROWN):
            self.spent = self.steps - self.saved["steps"] - self.saved["polish"]
            if self.part == GROWN and grows:  # before it was cut off
                self._grow(self.saved["num_layers"] - guide.num_layers)
        elif not self.by_log_joint or guide.untouched or self.part == GAUSSIAN:
            before = self._initialize()
            if self.ended:
                return finished(before, self.bound)
        part = GROWN if self.part == GROWN else FLOW
        fit, gain = self._train(before, part, resume=self.part == part)
        while grows and guide.num_layers < DEEPEST and gain >= LEAST_GAIN:
            self._grow(min(guide.num_layers, DEEPEST - guide.num_layers))
            fit, gain = self._train(fit, GROWN, resume=False)
        _warn_of_mixing(self.bound.mixing())
        return finished(fit, self.bound, self.ends)

    def _initialize(self) -> Fit | None:
        """Set the affine layer to the best Gaussian, found without training or with it."""
        guide = self.guide
        if self.warm_start and self.part is None:
            if _started(self.bound, self.ends, self.bar):
                return None
            refuse_nonfinite(self.bound.problem)
        inner = layers_inside(guide)
        least = 1 if self.by_log_joint else 0
        self.spent = max(least, round(GAUSSIAN_PART * self.steps)) if inner else 0
        if not self.spent:
            return None
        gaussian = [p for p in self.bound.parameters() if p not in inner]
        objective = self._objective(gaussian, lambda step: self.bound.loss(1.0))
        schedule, settings = LearningRateSchedule(self.spent), self.settings | {"part": GAUSSIAN}
        label = "fit_guide, Gaussian"
        fit = self._run(Trainer(objective, schedule, label=label, settings=settings, **self.shared))
        if not self.ended:
            guide.affine.recentre()
        return fit

    def _train(self, before: Fit | None, part: str, *, resume: bool) -> tuple[Fit, float]:
        """Train all parameters; return the fit, and by how much it bettered the one before."""
        bound = self.bound
        annealing = None if part == GROWN else self.annealing  # the flow has found its modes
        natural = natural_steps(bound, self.steps - self.spent, self.annealing)
        steps = self.steps - self.spent - natural
        if isinstance(annealing, AdaptiveAnnealing):
            objective = self._objective(
                bound.parameters(), lambda step: bound.loss(annealing.beta, annealing)
            )
            objective.stateful = [annealing]
        else:
            beta = annealing or _default_annealing(steps, not self.by_log_joint and self.spent > 0)
            objective = self._objective(bound.parameters(), lambda step: bound.loss(beta(step)))
            if self.by_log_joint and bound.log_joint.traced:
                objective.steady, objective.weight = bound.steady, beta
        objective.natural = (bound.distribution, bound.log_joint) if natural else None
        depth = getattr(self.guide, "num_layers", None)
        window = bound.problem.runs.few(WINDOW, LEAST_WINDOW, rows=self.structured)
        trainer = Trainer(
            objective,
            LearningRateSchedule(steps, StopRule(window=window) if self.early_stop else None),
            label="fit_guide",
            settings=self.settings | {"num_layers": depth, "part": part},
            resume=resume,
            before=before,
            evaluations=bound.evaluations,
            polish=natural,
            **self.shared,
        )
        fit, before = self._run(trainer), trainer.state.before
        if trainer.state.stopped:  # with nothing left to gain, or for good
            return fit, 0.0
        if self.ended:
            return fit, -math.inf
        return fit, before["best_loss"] - fit.best_loss if before else math.inf

    def _objective(self, parameters: list[Tensor], loss: Callable[[int], Tensor]) -> Objective:
        bound = self.bound
        options = {"buffers": bound.buffers() + self.ends, "keep_last": bound.keep_last}
        if self.early_stop and bound.objective == "elbo":
            options["enough"] = partial(_enough, bound)
        options["groups"] = _groups(bound, parameters, self.shared["lr"])
        return Objective(parameters, loss, bound.score, processes=bound.processes, **options)

    def _run(self, trainer: Trainer) -> Fit:
        if self.bar is not None:
            self.bar.leave = self.bar.n > 0  # nothing is left of one that was not needed
            self.bar.close()
        self.trainer = trainer
        # Validation of every distribution would cost as much as the rest of a step, and a draw with
        # a density of NaN the fit.
        with pyro.validation_enabled(False), path_derivative(self.guide, self.bound.path):
            fit, self.ended = trainer.run(), trainer.callers.ended
            return fit

    def _grow(self, num: int) -> None:
        if num > 0:
            with drawing():
                self.guide.grow(num)


def _enough(bound: LogJointBound, scores: Tensor) -> str:
    """Why a fit may end with these losses; empty where draws are lost, as those left say little."""
    guide = bound.guide
    dim = guide.latent_dim if isinstance(guide, AutoStructuredFlow) else 0
    return "" if bound.cut else nothing_left(scores, dim)


def _can_start(bound: Bound, by_rows: bool) -> bool:
    """Whether a guide can be set to a Gaussian that is found without training."""
    if not isinstance(bound, LogJointBound) or bound.log_joint.one_by_one:
        return False
    guide = bound.guide
    return by_rows or (guide.affine is not None and guide.latent_dim <= WIDEST_WARM_START)


def finished(fit: Fit, bound: Bound, ends: Sequence[Tensor] = ()) -> Fit:
    """The fit with the particles skipped, and with what is missed of where ascents ended."""
    missed, share = missed_at(bound.log_joint, bound.guide, ends) if ends else ([], 0.0)
    skipped = int(bound.skipped)
    return replace(fit, skipped_particles=skipped, missed=missed, missed_share=share)


def _refuse_used(annealing: Annealing) -> None:
    if isinstance(annealing, AdaptiveAnnealing) and annealing.steps > 0:
        raise ValueError(
            "annealing is an AdaptiveAnnealing that another fit has used, and is at its end: "
            "pass a new one"
        )


def _default_annealing(steps: int, rises: bool) -> Callable[[int], float]:
    if not rises:
        return lambda step: 1.0
    return lambda step: min(1.0, 0.1 + 0.9 * step / (ANNEALED_PART * steps))


def _started(bound: LogJointBound, ends: list[Tensor], bar: Bar | None) -> bool:
    """Set a guide to the best Gaussian, and ``ends`` to where ascents led; whether there is one."""
    guide, log_joint = bound.guide, bound.log_joint
    if isinstance(guide, AmortizedPlanarGuide):
        return amortized_start(bound.problem, guide, log_joint.num)
    if isinstance(guide, AutoStructuredFlow):
        return structured_start(log_joint, guide)
    found, there = best_coordinates(log_joint, guide, bar)
    copy_tensors(there, ends[: len(there)])
    if found is not None:
        initialize(guide, found)
    return found is not None


def _groups(bound: Bound, parameters: list[Tensor], lr: float) -> list[dict] | None:
    """Torch's parameter groups: slower steps of what rows have, as their errors add up."""
    guide, lr = bound.guide, lr / bound.slower
    if not isinstance(guide, AutoStructuredFlow):
        return None if bound.slower == 1 else [{"params": parameters, "peak": lr}]
    own = {id(p) for part in guide.flow.parts[-1 - guide.tails :] for p in part.parameters()}
    slow = lr * min(1.0, math.sqrt(MANY / guide.latent_dim))
    groups = [
        {"params": [p for p in parameters if (id(p) in own) == mine], "peak": rate}
        for mine, rate in ((True, slow), (False, lr))
    ]
    return [group for group in groups if group["params"]]


def fit_flow(bound: LogJointBound, steps: int, seed: int, **shared: Any) -> Fit:
    """Fit a guide by its log joint with the defaults of ``fit_guide``, from where it is."""
    settings = {"kind": "guide", "seed": seed}
    options = {"annealing": None, "warm_start": True, "early_stop": True, "checkpoint": None}
    return GuideFit(bound, steps=steps, settings=settings, lr=RATE, **options, **shared).run()


def _warn_of_mixing(site: str | None) -> None:
    if site is not None:
        warnings.warn(
            f"the model mixes draws that run side by side, at {site}, where the fitted guide "
            "is: its control flow or its indices depend on the latents. The fit is not to be "
            "trusted there; diagnose runs the draws one by one. Write the model with "
            "torch.where, and with indices from the right, as in z[..., 0]",
            stacklevel=7,
        )


def refuse_nonfinite(problem: BoundModel) -> None:
    """Raise ``ValueError`` if the density of 32 draws is never finite, and say at which sites."""
    with seeded(0), pyro.validation_enabled(False):
        draws = draw(problem, 32)
    if not bool(draws.log_weights.isfinite().any()):
        sites = ", ".join(repr(name) for name in draws.nonfinite) or "its sites together"
        raise ValueError(
            "the model's log density is not finite where the guide starts nor near it: look at "
            f"{sites}. Mend the model or its data there, or let the guide start elsewhere by "
            "init_loc_fn"
        )
