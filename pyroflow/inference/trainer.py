"""The trainer that the ``fit_`` functions share: Adam, then perhaps L-BFGS, over one state."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyroflow.inference.fit import Checkpoint, Fit, Objective, copy_tensors
from pyroflow.inference.launches import READ, Launches
from pyroflow.inference.processes import averaged
from pyroflow.inference.recorded_step import RecordedSteps
from pyroflow.inference.row_adam import RowAdam
from pyroflow.inference.schedule import LearningRateSchedule
from pyroflow.inference.state import Mark, State
from pyroflow.seeds import between_draws, quick

EVALUATIONS = 60  # scores taken in the course of Adam's steps
CLEARLY_WORSE = 5  # evaluations in a row, each by three standard errors, that end a fit
ROLLED_BACK_AFTER = 20  # steps in a row without a finite loss and gradient
MAX_SKIPPED = 100  # of those in a row that end a fit
POLISH_ITERATIONS = 20  # of L-BFGS between two scores
POLISH_PATIENCE = 250  # evaluations of the polish loss without a better score that end a fit


class Trainer:
    """Adam with iterate averaging, then perhaps L-BFGS; the best state is kept.

    A checkpoint is of the time between two steps: one that is cut off is done again.

    Args:
        objective: what is minimised.
        schedule: of Adam's learning rate; says how many steps to take.
        lr: Adam's highest learning rate.
        settings: what a checkpoint must agree on to be resumed.
        label: the progress bar's.
        resume: whether to go on from a checkpoint that exists; else it is written over.
        before: the course of an earlier part, which the result begins with.
        polish: evaluations of the exact loss for L-BFGS, where that is one of few parameters.
        evaluations: scores taken in the course of Adam's steps.
        save_every: Adam's steps between two checkpoints; by default a tenth of all.
    """

    def __init__(
        self,
        objective: Objective,
        schedule: LearningRateSchedule,
        *,
        lr: float,
        settings: dict[str, Any],
        label: str,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        resume: bool = True,
        before: Fit | None = None,
        polish: int = 0,
        evaluations: int = EVALUATIONS,
        save_every: int | None = None,
    ) -> None:
        self.objective, self.schedule, self.lr = objective, schedule, lr
        self.parameters, self.loss = objective.parameters, quick(objective.loss)
        self.score = objective.score and quick(objective.score)
        self.total, self.polishable = schedule.steps + polish, polish > 0
        shapes = [list(t.shape) for t in objective.tensors]
        own = {"steps": schedule.steps, "polish": polish, "lr": lr, "shapes": shapes}
        self.checkpoint = Checkpoint(checkpoint, settings | own, objective.processes)
        self.label, self.progress, self.resume = label, progress, resume
        self.every = max(1, schedule.steps // evaluations)
        self.save_every = save_every or max(1, schedule.steps // 10)
        self.stateful = [schedule, *objective.stateful]
        self.state = State(before=None if before is None else asdict(before))
        self.phase: Descent | Polish = Descent(self)
        self.mark: Mark | None = None

    @between_draws()
    def run(self) -> Fit:
        """Take the steps that are left; the parameters end in their best state, come what may."""
        self._resume()
        shown = {"total": self.total, "initial": self.state.step, "desc": self.label}
        averages = averaged(self.parameters, self.objective.processes)
        try:
            with averages as self.averaged, tqdm(**shown, disable=not self.progress) as bar:
                self._take_steps(bar)
            self._save()
        except BaseException:
            if self.mark and not self.state.polishing:  # L-BFGS's last state is in the file already
                self.mark.restore(self)
                self._save()
            raise
        finally:
            if self.state.best:
                copy_tensors(self.state.best, self.parameters)
        return self.state.fit(self.schedule.reason)

    def _take_steps(self, bar: tqdm) -> None:
        began = time.perf_counter() - self.state.seconds
        self._note()
        if not self.state.best:
            self.evaluate()
        while not self._ended():
            self._note()
            descends = self._descends()
            if self.state.step % self.save_every == 0 or not descends:
                self._save()
            if not descends and not self.state.polishing:
                self.phase = Polish(self)
            self.phase.step()
            self.state.seconds = time.perf_counter() - began
            self._show(bar)

    def _descends(self) -> bool:
        """Whether Adam goes on."""
        # At a high rate the held-out loss may rise for other reasons than overfitting: polish then.
        ended = self.polishable and self.state.worse >= CLEARLY_WORSE
        return self.state.step < self.schedule.end and not (ended or self.state.polishing)

    def _ended(self) -> bool:
        last = self.total if self.polishable else self.schedule.end
        return self.state.step >= last or bool(self.state.stopped)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Score the average, or the iterate while there is none, and keep it if it is best."""
        if self.score is None:
            return
        state, current = self.state, [p.detach().clone() for p in self.parameters]
        candidate = state.average or current
        copy_tensors(candidate, self.parameters)
        self.objective.processes.check_draws()
        score = self.score().double().cpu().nan_to_num(torch.inf, torch.inf, -torch.inf)
        copy_tensors(current, self.parameters)
        state.scores.append((state.step, score.mean().item()))
        enough = self.objective.enough(score) if self.objective.enough else ""
        better = self.objective.keep_last or score.mean() < state.best_score.mean()
        if not state.best or better or enough:
            state.best_score, state.best, state.worse = score, [t.clone() for t in candidate], 0
            state.stopped = enough
        elif self.objective.exact_loss is not None and len(score) > 1:
            excess = score - state.best_score
            clear = excess.mean() > 3 * excess.std() / len(excess) ** 0.5
            state.worse = state.worse + 1 if clear else 0

    def _show(self, bar: tqdm) -> None:
        state = self.state
        bar.update(min(state.step, self.total) - bar.n)
        if state.step % 20 == 0 or state.polishing:
            best = state.best_score.mean()
            bar.set_postfix(loss=f"{state.losses[-1]:.4f}", best=f"{best:.4f}", refresh=False)

    def _note(self) -> None:
        """Note the state between two steps of Adam, if a checkpoint is to have it."""
        if self.checkpoint.path is not None and not self.state.polishing:
            self.mark = Mark(self, self.mark)

    def _save(self) -> None:
        if self.checkpoint.path is not None:
            self.checkpoint.write(
                state=vars(self.state),
                stateful=[part.state_dict() for part in self.stateful],
                tensors=[t.detach() for t in self.objective.tensors],
                optimizer=self.phase.optimizer.state_dict(),
            )

    def _resume(self) -> None:
        saved = self.checkpoint.read() if self.resume else {}
        if not saved:
            return
        self.state = State(**saved["state"])
        for part, state in zip(self.stateful, saved["stateful"], strict=True):
            part.load_state_dict(state)
        copy_tensors(saved["tensors"], self.objective.tensors)
        if self.state.polishing:
            self.phase = Polish(self)
        self.phase.optimizer.load_state_dict(saved["optimizer"])


class Descent:
    """Steps of Adam, fused where all parameters allow it: a third of the time."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.parameters = trainer, trainer.parameters
        groups = trainer.objective.groups or [{"params": self.parameters, "peak": trainer.lr}]
        kinds = {(p.device.type, p.is_floating_point()) for p in self.parameters}
        fused = kinds <= {("cpu", True), ("cuda", True)}
        self.optimizer = RowAdam(groups, lr=trainer.lr, fused=fused)
        given = trainer.objective, self.optimizer, trainer.checkpoint.path
        self.launches = None if trainer.state.launches else Launches.of(*given)  # once
        self.recorded = RecordedSteps(trainer.objective, trainer.schedule.steps)

    def step(self) -> None:
        """One step, or none where loss or gradient is not finite; some where each is one launch."""
        trainer, state = self.trainer, self.trainer.state
        launched = self._launched()
        for loss in launched or [self._taken()]:
            finite = math.isfinite(loss)
            state.skipped += not finite
            state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
            state.losses.append(loss)
            trainer.schedule.update(state.step, loss)
            state.step += 1
        self._watch(averages=not launched and trainer.schedule.averages(state.step))

    def _taken(self) -> float:
        """Take a step as it comes; its loss, NaN where it left no trace."""
        trainer, state = self.trainer, self.trainer.state
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._rate(state.step)
        self.optimizer.zero_grad()
        loss = self.recorded.take(state, partial(trainer.averaged, trainer.loss, state.step))
        norm = self.optimizer.clip(trainer.objective.max_norm)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            return math.nan
        self.optimizer.step()
        return loss.item()

    def _launched(self) -> list[float]:
        """Take steps up to the next score, but no more than are looked at together, as launches."""
        if self.launches is None or not self.launches.live:
            return []
        trainer, state = self.trainer, self.trainer.state
        averages, to_score = trainer.schedule.averages, trainer.every - state.step % trainer.every
        num = min(READ, to_score, trainer.schedule.end - state.step)
        steps = range(state.step, state.step + num)
        rates, weights = map(self._rate, steps), map(trainer.objective.weight, steps)
        losses = self.launches.take(
            list(rates), list(weights), lambda i: averages(steps[i] + 1) and self._average()
        )
        state.launches = self.launches.said
        return losses

    def _rate(self, step: int) -> float:
        return self.trainer.schedule.rate(step) * 0.5**self.trainer.state.rolled_back

    def _watch(self, *, averages: bool) -> None:
        trainer, state = self.trainer, self.trainer.state
        lost = state.skipped_in_a_row
        if state.best and lost and lost % ROLLED_BACK_AFTER == 0:
            copy_tensors(state.best, self.parameters)
            trainer.phase = Descent(trainer)  # with a fresh optimiser, at half the rate
            state.rolled_back += 1
        if averages:
            self._average()
        if state.step % trainer.every == 0 or state.step == trainer.schedule.end:
            trainer.evaluate()
        if lost >= MAX_SKIPPED:
            state.stopped = f"loss or gradient not finite for {MAX_SKIPPED} steps in a row"
        elif state.worse >= CLEARLY_WORSE and not trainer.polishable:
            step, score = min(state.scores, key=lambda pair: pair[1])
            above = f"clearly above its {score:.4f} at step {step}"
            state.stopped = f"overfitting: held-out loss {above}"

    @torch.no_grad()
    def _average(self) -> None:
        state, now = self.trainer.state, [p.detach() for p in self.parameters]
        state.averaged += 1
        state.average = torch._foreach_lerp(state.average or now, now, 1 / state.averaged)


class Polish:
    """L-BFGS on the exact loss, from the best state that Adam found."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.parameters = trainer, trainer.parameters
        self.loss = quick(trainer.objective.exact_loss)
        if not trainer.state.polishing:
            copy_tensors(trainer.state.best, self.parameters)
            trainer.state.average, trainer.state.polishing = [], True
        for p in self.parameters:  # each gradient is viewed as a flat vector
            p.data = p.data.contiguous()
        options = {"tolerance_grad": 0.0, "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
        options |= {"max_iter": POLISH_ITERATIONS, "history_size": 100}
        self.optimizer = torch.optim.LBFGS(self.parameters, **options)

    def step(self) -> None:
        """Some iterations."""
        trainer, state = self.trainer, self.trainer.state
        before, best = state.step, state.best_score
        self.optimizer.step(self._closure)
        if not all(bool(p.isfinite().all()) for p in self.parameters):
            state.stopped = "L-BFGS left the finite numbers; the best state before it is kept"
            return
        trainer.evaluate()
        improved = state.best_score is not best
        state.unimproved = 0 if improved else state.unimproved + state.step - before
        if state.unimproved >= POLISH_PATIENCE:
            state.stopped = f"held-out loss has not improved for {state.unimproved} evaluations"

    def _closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.trainer.averaged(self.loss)
        self.trainer.state.losses.append(loss.item())
        self.trainer.state.step += 1
        return loss
