"""The two phases of a fit: steps of Adam, then perhaps L-BFGS."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyroflow.inference.fit import copy_tensors
from pyroflow.inference.launches import READ, Launches
from pyroflow.inference.recorded_step import RecordedSteps
from pyroflow.inference.row_adam import RowAdam
from pyroflow.seeds import quick

if TYPE_CHECKING:
    from pyroflow.inference.trainer import Trainer

CLEARLY_WORSE = 5  # evaluations in a row, each by three standard errors, that end a fit
ROLLED_BACK_AFTER = 20  # steps in a row without a finite loss and gradient
MAX_SKIPPED = 100  # of those in a row that end a fit
POLISH_ITERATIONS = 20  # of L-BFGS between two scores
POLISH_PATIENCE = 250  # evaluations of the polish loss without a better score that end a fit


class Phase:
    """Steps of an optimiser of torch's."""

    optimizer: torch.optim.Optimizer

    def better(self, score: Tensor, best: Tensor) -> bool:
        """Whether a state with these losses is better than the best one with those."""
        return bool(score.mean() < best.mean())

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.optimizer.load_state_dict(state)


class Descent(Phase):
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


class Polish(Phase):
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
