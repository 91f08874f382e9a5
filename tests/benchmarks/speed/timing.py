"""Short interleaved slices, and what is said of them. Imported by both processes: no torch here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles
from typing import Protocol, TypeVar

Name = TypeVar("Name")
Spread = dict[str, float]


class Timed(Protocol):
    """Something that can be run for a while."""

    def slice(self, seconds: float) -> float:
        """Run for about that long; return the seconds a call took."""


class Local:
    """A function of this process.

    The first slice finds out how long a call takes. Each slice starts with an untimed call, as
    another contender has just filled the processor's caches, unless one call fills the slice.
    """

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function
        self.estimate: float | None = None

    def slice(self, seconds: float) -> float:
        if self.estimate is None:
            self.function()
            self.estimate = self._per_call(1)
        calls = max(1, round(seconds / self.estimate))
        if calls > 1:
            self.function()
        self.estimate = self._per_call(calls)
        return self.estimate

    def _per_call(self, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            self.function()
        return (time.perf_counter() - start) / calls


def interleave(
    contenders: Mapping[Name, Timed], rounds: int, seconds: float, most: float = math.inf
) -> dict[Name, list[float]]:
    """Give every contender a slice, then every contender the next one; seconds a call.

    Three rounds are run whatever they take, further ones for as long as ``most`` seconds allow.
    """
    for timed in contenders.values():
        timed.slice(seconds / 4)
    taken: dict[Name, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > most:
            break
        for name, timed in contenders.items():
            taken[name].append(timed.slice(seconds))
    return taken


def spread(values: Sequence[float], scale: float = 1.0) -> Spread:
    """Median, quartiles and least, times the scale."""
    cuts = quantiles(values, method="inclusive") if len(values) > 1 else [values[0]] * 3
    names = ("q25", "median", "q75", "least")
    return {name: cut * scale for name, cut in zip(names, (*cuts, min(values)), strict=True)}


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """The ratio of the medians, the quartiles of each round's ratio, the ratio of the least."""
    rounds = spread([a / b for a, b in zip(above, below, strict=True)])
    return rounds | {"median": median(above) / median(below), "least": min(above) / min(below)}
