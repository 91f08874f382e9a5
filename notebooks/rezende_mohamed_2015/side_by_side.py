"""Runs side by side on one GPU, each in a thread, so that their small kernels overlap."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch

T = TypeVar("T")

# torch has so many streams, and then begins anew: captures on the same stream share memory.
MOST_RUNS = 32


class Turns:
    """Lets runs go on side by side, but for the start of one, for which all others pause.

    A thread that captures a graph is the only one that may ask for memory, and what makes a
    capture sound is set for the whole process: Pyro's validation, and that a look at a result is
    an error. So is TF32, which a run has for its matrix products while it starts: the graph keeps
    it, and scores, which are no part of a start, are in float32.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._going = 0  # runs that are not at their start, and do not pause
        self._starting: int | None = None  # the thread of the run that is
        self._ended = False

    @contextmanager
    def run(self) -> Iterator[None]:
        """A run inside; up to its first :meth:`pause` it is alone."""
        with self._changed:
            self._changed.wait_for(lambda: self._starting is None)
            self._starting = threading.get_ident()
            self._changed.wait_for(lambda: not self._going)
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        self._before = before
        try:
            self._check()
            yield
        finally:
            with self._changed:
                self._leave()

    def pause(self) -> None:
        """Between two steps of a run: let another one start.

        Raises:
            KeyboardInterrupt: If :meth:`end` was called.
        """
        with self._changed:
            self._leave()
            self._changed.wait_for(lambda: self._starting is None)
            self._going += 1
        self._check()

    def end(self) -> None:
        """Break runs off at their next pause, and let none start."""
        self._ended = True

    def _check(self) -> None:
        if self._ended:
            raise KeyboardInterrupt

    def _leave(self) -> None:
        if self._starting == threading.get_ident():
            torch.backends.cuda.matmul.allow_tf32 = self._before
            self._starting = None
        else:
            self._going -= 1
        self._changed.notify_all()


def side_by_side(
    tasks: Iterable[T], do: Callable[[T, Callable[[], None]], None], jobs: int, device: torch.device
) -> None:
    """Do some tasks, so many at a time, in threads with streams of their own; in their order.

    What one of them raises is printed, and raised when all have ended.

    Args:
        tasks: at most ``MOST_RUNS``.
        do: called with a task and with what it must call between its steps.
        jobs: how many at a time.
        device: the GPU.
    """
    turns = Turns()

    def run(task: T) -> None:
        try:
            with turns.run(), _stream(device):
                do(task, turns.pause)
        except Exception:
            traceback.print_exc()  # at once, as the others go on
            raise

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run, task) for task in tasks]
        try:
            errors = [future.exception() for future in futures]
        except KeyboardInterrupt:
            turns.end()
            raise
    for error in errors:
        if error is not None:
            raise error


def _stream(device: torch.device) -> AbstractContextManager:
    """A stream of the GPU; of high priority, as those have a pool apart from the captures'."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device, priority=-1))
