"""Posteriors whose answer is known: a Pyro model, and exact draws of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from pyroflow.seeds import seeded

from ..judging import Draws, Reference, from_draws, supports

NUM = 200_000  # draws of a reference: errors of 0.002 sd, and of 0.2 % of an sd


class Exact(Protocol):
    """The answer, worked out without the Pyro model."""

    log_evidence: float | None

    def draws(self, num: int) -> Draws:
        """Independent draws {site: (num, *site)} in float64, by torch's generator."""

    def moments(self) -> tuple[Tensor, Tensor] | None:
        """Mean and sd of the unconstrained columns by quadrature, where draws are too many."""


@dataclass(frozen=True)
class Sampler:
    """An answer by a sampler; 0 is the log evidence of a model without data."""

    draw: Callable[[int], Draws]
    log_evidence: float | None = 0.0

    def draws(self, num: int) -> Draws:
        """Those of the sampler."""
        return self.draw(num)

    def moments(self) -> None:
        """None: they are those of the draws."""


@dataclass(frozen=True)
class Target:
    """A small posterior with its answer.

    Attributes:
        name: says what it is; numbers of latents last.
        kind: what is hard about it.
        build: makes the Pyro model and its arguments, numbers in torch's default dtype.
        solve: makes the exact answer.
        heavy: sites judged by quantiles, as their moments do not exist or stray in some
            thousand draws.
        smooth: whether the density goes to zero at every edge of the unconstrained space.
    """

    name: str
    kind: str
    build: Callable[[], tuple[Callable, tuple]]
    solve: Callable[[], Exact]
    heavy: tuple[str, ...] = ()
    smooth: bool = True

    @cached_property
    def exact(self) -> Exact:
        """The answer; in float64, whatever the default is."""
        with double():
            return self.solve()

    def draws(self, num: int, seed: int = 0) -> dict[str, Tensor]:
        """Exact draws {site: (num, *site)}, the same for the same seed."""
        with double(), seeded(seed):
            return dict(self.exact.draws(num))

    def reference(self, num: int = NUM) -> Reference:
        """Moments and quantiles of that many exact draws; moments by quadrature where known."""
        with double():
            moments = self.exact.moments()
            found = supports(*self.build())
        sample = self.draws(num if moments is None else 1000)
        reference = from_draws(sample, found, self.heavy)
        if moments is None:
            return reference
        return replace(reference, mean=moments[0], sd=moments[1])


@contextmanager
def double() -> Iterator[None]:
    """float64 as torch's default inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
