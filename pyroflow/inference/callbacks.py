"""What a caller is told in the course of a fit, and how a caller ends one before its end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pyroflow.inference.fit import Fit
from pyroflow.inference.processes import Processes
from pyroflow.inference.state import State, fit_so_far

if TYPE_CHECKING:
    from pyroflow.inference.trainer import Trainer

BY_CALLBACK, INTERRUPTED = "stopped by a callback", "interrupted"  # how ``stopped`` begins

_PART = ContextVar("part", default=False)  # whether fits are part of what Ctrl-C is to end


@dataclass(frozen=True)
class FitProgress:
    """What the callbacks of a fit are told.

    Attributes:
        step: steps taken so far; of L-BFGS, evaluations.
        loss: training loss of the last one, in nats; NaN where it was skipped.
        score: the score, if one was taken at this step, as in :class:`~pyroflow.Fit`; else None.
        best_score: the lowest one so far; None where there is none yet.
        seconds: wall-clock time of this part of the fit.
        label: the part, as in the progress bar: "fit_guide" has a first one for its Gaussian.
    """

    step: int
    loss: float
    score: float | None
    best_score: float | None
    seconds: float
    label: str


Callback = Callable[[FitProgress], object]
Callbacks = Callback | Sequence[Callback] | None


def checked_callbacks(callbacks: Callbacks) -> list[Callback]:
    """The callbacks as a list; ``TypeError`` for what is none."""
    found = [] if callbacks is None else [callbacks] if callable(callbacks) else callbacks
    if not isinstance(found, Sequence) or not all(map(callable, found)):
        raise TypeError(
            "callbacks must be a function of a FitProgress, or a list of such functions, got "
            f"{callbacks!r}"
        )
    return list(found)


class Callers:
    """The callbacks of a fit, which the first of several processes calls alone.

    Attributes:
        ended: why one of them has ended the fit; empty if none has.
    """

    def __init__(self, callbacks: Callbacks, processes: Processes) -> None:
        found = checked_callbacks(callbacks)
        self.callbacks, self.processes = found if processes.writes else [], processes
        self.asked, self.ended = False, ""

    def tell(self, state: State, label: str) -> None:
        """Call them after a step; processes agree on an end where they score.

        True alone asks for it: many a function that writes returns a number.
        """
        step = state.step + (state.before["steps"] if state.before else 0)
        scored = bool(state.scores) and state.scores[-1][0] == state.step
        if self.callbacks:
            best = state.best_score.mean().item() if state.best else None
            score = state.scores[-1][1] if scored else None
            told = FitProgress(step, state.losses[-1], score, best, state.seconds, label)
            answers = [callback(told) for callback in self.callbacks]
            self.asked |= any(isinstance(a, bool | np.bool_) and bool(a) for a in answers)
        if (self.processes.count == 1 or scored) and self.processes.agree(self.asked):
            self.ended = f"{BY_CALLBACK} at step {step}"


def ended_by_caller(fit: Fit) -> bool:
    """Whether Ctrl-C or a callback has ended a fit, so that no other one shall follow."""
    return fit.stopped.startswith((INTERRUPTED, BY_CALLBACK))


@contextmanager
def part_of_a_whole() -> Iterator[None]:
    """Let Ctrl-C end what the fits inside are part of, and not one of them alone."""
    token = _PART.set(True)
    try:
        yield
    finally:
        _PART.reset(token)


def interrupted(trainer: Trainer | None, stacklevel: int) -> Fit:
    """The fit so far, with a warning; to be called where ``KeyboardInterrupt`` was caught.

    It is raised again where there is nothing to give, where the fit is part of a whole, and of
    several processes, which would wait for each other.
    """
    fit = None if trainer is None else fit_so_far(trainer.state)
    if fit is None or trainer.objective.processes.count > 1:
        raise  # noqa: PLE0704
    return kept(fit, f"at step {fit.steps}", stacklevel + 1)


def kept(fit: Fit, where: str, stacklevel: int) -> Fit:
    """A fit that Ctrl-C leaves, with a warning of where; raised again as :func:`interrupted`."""
    if _PART.get():
        raise  # noqa: PLE0704
    stopped = f"{INTERRUPTED} {where}"
    warnings.warn(
        f"the fit was {stopped}: it is in its best state so far. In a loop, look at fit.stopped "
        "to end that too",
        stacklevel=stacklevel + 1,
    )
    return replace(fit, stopped=stopped)
