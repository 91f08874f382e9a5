"""The state of a fit between two steps, and a mark of it to go back to where a step is cut off."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyroflow.inference.fit import Fit, copy_tensors
from pyroflow.seeds import generator_states, restore_generators

if TYPE_CHECKING:
    from pyroflow.inference.trainer import Trainer


@dataclass
class State:
    """Where a fit stands between two steps, beside its tensors; a checkpoint holds its fields."""

    before: dict[str, Any] | None = None  # the course of an earlier part
    step: int = 0
    losses: list[float] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    average: list[Tensor] = field(default_factory=list)  # of the last iterates
    averaged: int = 0  # so many
    best: list[Tensor] = field(default_factory=list)  # the parameters with the best score
    best_score: Tensor = field(default_factory=lambda: torch.tensor(math.inf, device="cpu"))
    worse: int = 0  # evaluations in a row that were clearly above the best one
    unimproved: int = 0  # evaluations of the exact loss since the best one
    skipped: int = 0
    skipped_in_a_row: int = 0
    rolled_back: int = 0
    polishing: bool = False
    stopped: str = ""
    seconds: float = 0.0
    launches: str = ""
    taken_again: int = 0  # steps that were recorded, and whose loss was not finite

    def fit(self, reason: str) -> Fit:
        """The course of the fit, with that of the part before; why it stopped, if not early."""
        before = Fit([], [], math.inf, 0, "", 0.0) if self.before is None else Fit(**self.before)
        steps = before.steps + self.step
        return Fit(
            losses=before.losses + self.losses,
            scores=before.scores + [(before.steps + t, score) for t, score in self.scores],
            best_loss=self.best_score.mean().item(),
            steps=steps,
            stopped=self.stopped or reason or f"all {steps} steps done",
            seconds=before.seconds + self.seconds,
            skipped=before.skipped + self.skipped,
            rolled_back=before.rolled_back + self.rolled_back,
            launches=self.launches,
        )


def fit_so_far(state: State) -> Fit | None:
    """The fit that was cut off, in its best state; None where no state was scored."""
    del state.losses[state.step :]  # that of a step that was cut off
    if state.best:
        return state.fit("")
    return None if state.before is None else Fit(**state.before)


class Mark:
    """The state between two steps of Adam, to go back to where a step is cut off."""

    @torch.no_grad()
    def __init__(self, trainer: Trainer, last: Mark | None) -> None:
        state = self.state = State(**vars(trainer.state))
        self.lengths = len(state.losses), len(state.scores)  # they only grow
        self.stateful = [part.state_dict() for part in trainer.stateful]
        self.phase = trainer.phase
        moments = [t for found in self.phase.optimizer.state.values() for t in found.values()]
        self.started = bool(moments)
        self.live = [*trainer.objective.tensors, *moments]
        # In one call, as it is done before every step, and not over the last mark's copies.
        spare = last.spare if last else []
        self.copies = spare if len(spare) == len(self.live) else [t.clone() for t in self.live]
        torch._foreach_copy_(self.copies, self.live)
        self.spare: list[Tensor] = last.copies if last else []
        self.rng = generator_states()

    def restore(self, trainer: Trainer) -> None:
        """Put the trainer back."""
        trainer.state, trainer.phase = self.state, self.phase
        del self.state.losses[self.lengths[0] :], self.state.scores[self.lengths[1] :]
        for part, state in zip(trainer.stateful, self.stateful, strict=True):
            part.load_state_dict(state)
        if not self.started:
            self.phase.optimizer.state.clear()
        copy_tensors(self.copies, self.live)
        restore_generators(self.rng)
