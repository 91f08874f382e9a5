"""The trainer that the ``fit_`` functions share: Adam, then perhaps more, over one state."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pyroflow.inference.callbacks import Callbacks, Callers
from pyroflow.inference.fit import Checkpoint, Fit, Objective, copy_tensors
from pyroflow.inference.natural import Natural
from pyroflow.inference.phases import CLEARLY_WORSE, Descent, Polish
from pyroflow.inference.processes import averaged
from pyroflow.inference.schedule import LearningRateSchedule
from pyroflow.inference.state import Mark, State
from pyroflow.progress import Bar, progress_bar
from pyroflow.seeds import between_draws, quick

EVALUATIONS = 60  # scores taken in the course of Adam's steps


class Trainer:
    """Adam with iterate averaging, then perhaps a polish; the best state is kept.

    A checkpoint is of the time between two steps: one that is cut off is done again.

    Args:
        objective: what is minimised.
        schedule: of Adam's learning rate; says how many steps to take.
        lr: Adam's highest learning rate.
        settings: what a checkpoint must agree on to be resumed.
        label: the progress bar's.
        resume: whether to go on from a checkpoint that exists; else it is written over.
        before: the course of an earlier part, which the result begins with.
        polish: natural gradient steps, or evaluations of the exact loss for L-BFGS.
        evaluations: scores taken in the course of Adam's steps.
        callbacks: see :func:`~pyroflow.fit_density`.
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
        callbacks: Callbacks = None,
    ) -> None:
        self.objective, self.schedule, self.lr = objective, schedule, lr
        self.parameters, self.loss = objective.parameters, quick(objective.loss)
        self.score = objective.score and quick(objective.score)
        self.total, self.polishable = schedule.steps + polish, polish > 0
        shapes = [list(t.shape) for t in objective.tensors]
        own = {"steps": schedule.steps, "polish": polish, "lr": lr, "shapes": shapes}
        self.checkpoint = Checkpoint(checkpoint, settings | own, objective.processes)
        self.label, self.progress, self.resume = label, progress, resume
        self.every, self.save_every = (max(1, schedule.steps // n) for n in (evaluations, 10))
        self.callers = Callers(callbacks, objective.processes)
        self.stateful = [schedule, *objective.stateful]
        self.state = State(before=None if before is None else asdict(before))
        self.phase: Descent | Polish | Natural = Descent(self)
        self.mark: Mark | None = None

    @between_draws()
    def run(self) -> Fit:
        """Take the steps that are left; the parameters end in their best state, come what may."""
        self._resume()
        bar = progress_bar(self.label, self.total, self.progress, initial=self.state.step)
        try:
            with averaged(self.parameters, self.objective.processes) as self.averaged, bar:
                self._take_steps(bar)
            self._save()
        except BaseException:
            if self.mark and not self.state.polishing:  # its last state is in the file already
                self.mark.restore(self)
                self._save()
            raise
        finally:
            if self.state.best:
                copy_tensors(self.state.best, self.parameters)
        return self.state.fit(self.callers.ended or self.schedule.reason)

    def _take_steps(self, bar: Bar) -> None:
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
                self.phase = _polish(self)
            self.phase.step()
            self.state.seconds = time.perf_counter() - began
            self._show(bar)
            self.callers.tell(self.state, self.label)

    def _descends(self) -> bool:
        """Whether Adam goes on."""
        # At a high rate the held-out loss may rise for other reasons than overfitting: polish then.
        ended = self.polishable and self.state.worse >= CLEARLY_WORSE
        return self.state.step < self.schedule.end and not (ended or self.state.polishing)

    def _ended(self) -> bool:
        last = self.total if self.polishable else self.schedule.end
        ended = self.state.step >= last or (isinstance(self.phase, Natural) and self.phase.over)
        return ended or bool(self.state.stopped or self.callers.ended)

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
        better = self.objective.keep_last or self.phase.better(score, state.best_score)
        if not state.best or better or enough:
            state.best_score, state.best, state.worse = score, [t.clone() for t in candidate], 0
            state.stopped = enough
        elif self.objective.exact_loss is not None and len(score) > 1:
            excess = score - state.best_score
            clear = excess.mean() > 3 * excess.std() / len(excess) ** 0.5
            state.worse = state.worse + 1 if clear else 0

    def _show(self, bar: Bar) -> None:
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
                phase=self.phase.state_dict(),
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
            self.phase = _polish(self)
        self.phase.load_state_dict(saved["phase"])


def _polish(trainer: Trainer) -> Polish | Natural:
    return Natural(trainer) if trainer.objective.natural else Polish(trainer)
