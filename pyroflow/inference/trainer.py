"""The optimisation loop that the ``fit_`` functions share."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyroflow.inference.checkpoint import read_checkpoint, write_checkpoint
from pyroflow.inference.fit import Fit
from pyroflow.inference.optimizers import Mark, adam, copy, lbfgs
from pyroflow.inference.schedule import Course
from pyroflow.inference.stop_rule import StopRule
from pyroflow.seeds import between_draws, quick

EVALUATIONS = 60  # scores taken in the course of Adam's steps
CLEARLY_WORSE = 5  # evaluations in a row, each by three standard errors, that end a fit
ROLLED_BACK_AFTER = 20  # steps in a row without a finite loss and gradient
MAX_SKIPPED = 100  # of those in a row that end a fit
POLISH_PATIENCE = 250  # evaluations of the polish loss without a better score that end a fit


class Loop:
    """Adam with warm-up, cosine decay and tail averaging, then perhaps L-BFGS; best state kept.

    Args:
        parameters: the tensors that are trained.
        fixed: tensors that are not, but belong to the state that a checkpoint restores.
        loss: step ↦ scalar training loss; what it draws itself it draws inside ``drawing``.
        score: () ↦ losses of fixed points or draws, shape (n,). States are compared on their
            mean; with a ``polish_loss``, pairwise differences also decide on stopping.
        before: the course of an earlier part, which the result begins with.
        steps: Adam's steps.
        lr: Adam's highest learning rate.
        settings: what a checkpoint must agree on to be resumed.
        label: the progress bar's.
        keep_last: end in the last state, for a score that cannot tell the best one.
        polish_loss: () ↦ the exact training loss. Where the loss is a deterministic function
            of few parameters, L-BFGS gains what thousands of noisy steps do not.
        polish: evaluations of ``polish_loss``, about.
        stop_rule: hurries the fall of the rate, see :class:`~pyroflow.inference.schedule.Course`.
        evaluations: scores taken in the course of Adam's steps.
        stateful: what else a checkpoint restores, by ``state_dict`` and ``load_state_dict``.
        resume: whether to go on from a checkpoint that exists; else it is written over.

    A checkpoint is always of the time between two steps: one that is cut off is done again.
    """

    SAVED = (
        "step", "losses", "scores", "skipped", "skipped_in_a_row", "average", "averaged", "worse",
        "unimproved", "before", "best", "best_score", "seconds", "stopped", "polishing",
        "rolled_back",
    )  # fmt: skip

    def __init__(
        self,
        parameters: list[Tensor],
        loss: Callable[[int], Tensor],
        score: Callable[[], Tensor],
        *,
        fixed: list[Tensor] = (),
        before: Fit | None = None,
        steps: int,
        lr: float,
        settings: dict[str, Any],
        label: str,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        keep_last: bool = False,
        polish_loss: Callable[[], Tensor] | None = None,
        polish: int = 0,
        stop_rule: StopRule | None = None,
        evaluations: int = EVALUATIONS,
        stateful: Sequence[Any] = (),
        resume: bool = True,
    ) -> None:
        self.parameters, self.fixed, self.keep_last = parameters, fixed, keep_last
        self.loss, self.score = quick(loss), quick(score)
        self.polish_loss = None if polish_loss is None else quick(polish_loss)
        self.steps, self.total, self.lr = steps, steps + polish, lr
        self.settings = settings | {"steps": steps, "polish": polish, "lr": lr}
        self.settings["shapes"] = [list(t.shape) for t in [*parameters, *fixed]]
        self.label, self.progress = label, progress
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.course, self.every = Course(steps, stop_rule), max(1, steps // evaluations)
        self.stateful, self.resume = [self.course, *stateful], resume
        self.optimizer: torch.optim.Optimizer = adam(self.parameters, lr)
        self.before = None if before is None else asdict(before)
        self.step = self.skipped = self.skipped_in_a_row = self.averaged = 0
        self.worse = self.unimproved = self.rolled_back = 0
        self.losses: list[float] = []
        self.scores: list[tuple[int, float]] = []
        self.average: list[Tensor] = []
        self.best: list[Tensor] = []
        self.best_score = torch.tensor(math.inf, device="cpu")
        self.seconds, self.stopped, self.polishing, self.warned = 0.0, "", False, False
        self.mark: Mark | None = None
        self.spare: list[Tensor] = []  # for the next mark: that of now stays whole meanwhile

    @between_draws()
    def run(self) -> Fit:
        """Take the steps that are left; the parameters end in their best state, come what may."""
        self._resume()
        shown = {"total": self.total, "initial": self.step, "desc": self.label}
        try:
            with tqdm(**shown, disable=not self.progress) as bar:
                self._take_steps(bar)
            self._save()
        except BaseException:
            if self.mark and not self.polishing:  # L-BFGS's last state is in the file already
                self.mark.restore(self)
                self._save()
            raise
        finally:
            if self.best:
                copy(self.best, self.parameters)
        return self._result()

    def _take_steps(self, bar: tqdm) -> None:
        began = time.perf_counter() - self.seconds
        self._note()
        if not self.best:
            self._evaluate()
        while not self._ended():
            self._note()
            descends = self._descending()
            if self.step % max(1, self.steps // 10) == 0 or not descends:
                self._save()
            (self._descend if descends else self._polish)()
            self.seconds = time.perf_counter() - began
            self._show(bar)

    def _note(self) -> None:
        """Note the state between two steps of Adam, if a checkpoint is to have it."""
        if self.checkpoint is not None and not self.polishing:
            old = self.mark
            self.mark = Mark(self, self.spare)
            self.spare = old.copies if old else []

    def _descending(self) -> bool:
        """Whether Adam goes on.

        At a high rate the held-out loss may rise for other reasons than overfitting: a fit that
        can be polished is polished then, from its best state.
        """
        polishable = self.total > self.steps
        ended = self.polishing or (polishable and self.worse >= CLEARLY_WORSE)
        return self.step < self.course.end and not ended

    def _ended(self) -> bool:
        last = self.course.end if self.total == self.steps else self.total
        return self.step >= last or bool(self.stopped)

    def _descend(self) -> None:
        """One step of Adam, or none where loss or gradient is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.course.rate(self.step) * 0.5**self.rolled_back
        self.optimizer.zero_grad()
        loss = self.loss(self.step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, math.inf)
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        if finite:
            self.optimizer.step()
            for p in self.parameters:
                torch.autograd.graph.increment_version(p)  # fused Adam does not
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.losses.append(loss.item() if finite else math.nan)
        self.course.update(self.step, self.losses[-1])
        self.step += 1
        if self.skipped_in_a_row and self.skipped_in_a_row % ROLLED_BACK_AFTER == 0:
            self._roll_back()
        self._watch()

    def _roll_back(self) -> None:
        """Go back to the best state, with a fresh optimiser at half the rate."""
        copy(self.best, self.parameters)
        self.optimizer = adam(self.parameters, self.lr)
        self.rolled_back += 1

    def _watch(self) -> None:
        if self.course.averages(self.step):
            self._add_to_average()
        if self.step % self.every == 0 or self.step == self.course.end:
            self._evaluate()
        if self.skipped_in_a_row >= MAX_SKIPPED:
            self.stopped = f"loss or gradient not finite for {MAX_SKIPPED} steps in a row"
        elif self.worse >= CLEARLY_WORSE and self.total == self.steps:
            step, score = min(self.scores, key=lambda pair: pair[1])
            above = f"clearly above its {score:.4f} at step {step}"
            self.stopped = f"overfitting: held-out loss {above}"

    def _polish(self) -> None:
        """Some iterations of L-BFGS, at first from the best state that Adam found."""
        if not self.polishing:
            copy(self.best, self.parameters)
            self.optimizer, self.average, self.polishing = lbfgs(self.parameters), [], True
        before, best = self.step, self.best_score
        self.optimizer.step(self._closure)
        if not all(bool(p.isfinite().all()) for p in self.parameters):
            self.stopped = "L-BFGS left the finite numbers; the best state before it is kept"
            return
        self._evaluate()
        self.unimproved = 0 if self.best_score is not best else self.unimproved + self.step - before
        if self.unimproved >= POLISH_PATIENCE:
            self.stopped = f"held-out loss has not improved for {self.unimproved} evaluations"

    def _closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.polish_loss()
        loss.backward()
        self.losses.append(loss.item())
        self.step += 1
        return loss

    @torch.no_grad()
    def _add_to_average(self) -> None:
        self.averaged += 1
        self.average = self.average or [p.detach().clone() for p in self.parameters]
        now = [p.detach() for p in self.parameters]
        self.average = torch._foreach_lerp(self.average, now, 1 / self.averaged)

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Score the average, or the iterate while there is none, and keep it if it is best."""
        current = [p.detach().clone() for p in self.parameters]
        candidate = self.average or current
        copy(candidate, self.parameters)
        score = self.score().double().cpu()
        score = torch.where(score.isnan(), torch.inf, score)
        copy(current, self.parameters)
        self.scores.append((self.step, score.mean().item()))
        if not self.best or self.keep_last or score.mean() < self.best_score.mean():
            self.best_score, self.best, self.worse = score, [t.clone() for t in candidate], 0
        elif self.polish_loss is not None and len(score) > 1:
            excess = score - self.best_score
            clear = excess.mean() > 3 * excess.std() / len(excess) ** 0.5
            self.worse = self.worse + 1 if clear else 0

    def _show(self, bar: tqdm) -> None:
        bar.update(min(self.step, self.total) - bar.n)
        if self.step % 20 == 0 or self.polishing:
            best = self.best_score.mean()
            bar.set_postfix(loss=f"{self.losses[-1]:.4f}", best=f"{best:.4f}", refresh=False)

    def _result(self) -> Fit:
        nothing = dict.fromkeys(("steps", "seconds", "skipped", "rolled_back"), 0)
        before = self.before or {"losses": [], "scores": [], **nothing}
        steps = before["steps"] + self.step
        return Fit(
            losses=before["losses"] + self.losses,
            scores=before["scores"] + [(before["steps"] + t, score) for t, score in self.scores],
            best_loss=self.best_score.mean().item(),
            steps=steps,
            stopped=self.stopped or self.course.reason or f"all {steps} steps done",
            seconds=before["seconds"] + self.seconds,
            skipped=before["skipped"] + self.skipped,
            rolled_back=before["rolled_back"] + self.rolled_back,
        )

    def _save(self) -> None:
        """Write the checkpoint; where that fails the fit is worth more than the file."""
        if self.checkpoint is None:
            return
        loop = {name: getattr(self, name) for name in self.SAVED}
        loop["states"] = [part.state_dict() for part in self.stateful]
        loop["tensors"] = [t.detach() for t in [*self.parameters, *self.fixed]]
        try:
            write_checkpoint(self.checkpoint, self.settings, loop, self.optimizer.state_dict())
        except OSError as error:
            if not self.warned:
                warnings.warn(
                    f"checkpoint {self.checkpoint} cannot be written ({error}): the fit goes on, "
                    "tries again later, and leaves an older checkpoint as it is. Make room for it, "
                    "or name another file",
                    stacklevel=2,
                )
            self.warned = True

    def _resume(self) -> None:
        if self.checkpoint is None or not self.resume or not self.checkpoint.exists():
            return
        loop, optimizer = read_checkpoint(self.checkpoint, self.settings)
        for name in self.SAVED:
            setattr(self, name, loop[name])
        for part, state in zip(self.stateful, loop["states"], strict=True):
            part.load_state_dict(state)
        copy(loop["tensors"], [*self.parameters, *self.fixed])
        if self.polishing:
            self.optimizer = lbfgs(self.parameters)
        self.optimizer.load_state_dict(optimizer)
