"""Independence Metropolis: draws of a guide, and of a wider distribution, as proposals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from pyro.distributions import Chi2
from torch import Tensor
from torch.distributions import Distribution, StudentT

from pyroflow.chains.target import AT_ONCE, Points, Target
from pyroflow.seeds import drawing

WIDE_DF = 2.0  # of the wider part, a fifteenth of whose draws are five times as far out


class Proposal:
    """A mixture over base space: the guide's base, and a wider part in two halves.

    One half is a Student-t variable in D dimensions, wider in all directions at once; the other is
    the base with one of its numbers from a Student-t variable. As the weights of a chain are taken
    against the density of the whole mixture, each draw is a proposal of one fixed distribution.

    Args:
        base: of the flow, in float64, with event shape (D,).
        wide: the part of the draws that come from the wider part.
    """

    def __init__(self, base: Distribution, wide: float) -> None:
        self.base, self.wide = base, wide
        self.dim = base.event_shape[0]
        one = base.base_dist
        df = min(WIDE_DF, one.df.min().item() / 2) if isinstance(one, StudentT) else WIDE_DF
        like = one.loc.new_tensor
        self._tail = StudentT(like(df), like(0.0), like(1.0))
        self._chi2 = Chi2(like(df))

    def sample(self, num: int) -> tuple[Tensor, Tensor]:
        """Draws u (N, D), and which of them are the guide's own (N,)."""
        u = self.base.sample((num,))
        if not self.wide:
            return u, torch.ones_like(u[:, 0], dtype=torch.bool)
        share = torch.rand_like(u[:, 0])
        everywhere, own = share < self.wide / 2, share >= self.wide
        scale = (self._tail.df / self._chi2.sample((num,))).sqrt()
        far = torch.randn_like(u) * scale.unsqueeze(1)
        column = torch.randint(self.dim, (num, 1), device=u.device)
        along = u.scatter(1, column, self._tail.sample((num, 1)))
        u = torch.where(own.unsqueeze(1), u, along)
        return torch.where(everywhere.unsqueeze(1), far, u), own

    def log_prob(self, u: Tensor) -> Tensor:
        """Log density of the mixture at u (N, D), shape (N,)."""
        each = self.base.base_dist.log_prob(u)
        base = each.sum(-1)
        if not self.wide:
            return base
        along = base + (self._tail.log_prob(u) - each).logsumexp(-1) - math.log(self.dim)
        half = math.log(self.wide / 2)
        parts = [base + math.log1p(-self.wide), along + half, self._far(u) + half]
        return torch.stack(parts).logsumexp(0)

    def _far(self, u: Tensor) -> Tensor:
        df, dim = self._tail.df, self.dim
        normaliser = ((df + dim) / 2).lgamma() - (df / 2).lgamma() - dim / 2 * (math.pi * df).log()
        return normaliser - (df + dim) / 2 * (u.square().sum(-1) / df).log1p()


class Proposed(NamedTuple):
    """Proposals, shape (C,) each: where to, with which log weight, and the bar to pass."""

    points: Points
    log_weight: Tensor
    log_uniform: Tensor


class Independence:
    """A step of independence Metropolis for all chains.

    A chain with weight w = p/q at its place goes to a draw of q with weight w' with probability
    min(1, w'/w).

    References:
        Tierney, Markov chains for exploring posterior distributions, 1994,
        https://doi.org/10.1214/aos/1176325750.

    Args:
        target: the posterior in base space.
        proposal: q.
        chains: C.
        steps: how many there will be, so that no proposal is made in vain.

    Attributes:
        rates: of each step since :meth:`settle`, the part of the chains that moved.
    """

    name = "independence"

    def __init__(self, target: Target, proposal: Proposal, chains: int, steps: int) -> None:
        self.target, self.proposal = target, proposal
        self.rates: list[float] = []
        self._rows = self._propose(chains, steps)
        self._points: Points | None = None  # where the chains were left, with these log weights
        self._log_weight: Tensor | None = None

    def settle(self) -> None:
        """Nothing adapts; from here on steps count."""
        self.rates.clear()

    def step(self, points: Points) -> Points:
        """All chains one step on."""
        if points is not self._points:
            self._log_weight = points.log_target - self.proposal.log_prob(points.u)
        new = next(self._rows)
        moved = new.log_uniform < new.log_weight - self._log_weight
        self._log_weight = torch.where(moved, new.log_weight, self._log_weight)
        self._points = points.replaced(moved, new.points)
        self.rates.append(moved.double().mean().item())
        return self._points

    @torch.no_grad()
    def _propose(self, chains: int, steps: int) -> Iterator[Proposed]:
        """A row of proposals for each step, made for many steps at once."""
        rows = max(1, AT_ONCE // chains)
        for start in range(0, steps, rows):
            num = min(rows, steps - start)
            with drawing():
                u, _ = self.proposal.sample(num * chains)
                log_uniform = torch.rand_like(u[:, 0]).log().split(chains)
            points = self.target.at(u)
            log_weight = (points.log_target - self.proposal.log_prob(u)).split(chains)
            for row in range(num):
                part = torch.arange(row * chains, (row + 1) * chains, device=u.device)
                yield Proposed(points.at(part), log_weight[row], log_uniform[row])


def expected_acceptance(log_weights: Tensor) -> float:
    """The acceptance of independence Metropolis in the long run, from weights of proposals.

    It is the mean of min(1, w'/w) over a proposal of weight w' and a draw of the posterior, which
    is one of the proposals by its weight w.
    """
    finite = log_weights[log_weights.isfinite()]
    if not len(finite):
        return 0.0
    weights = (finite - finite.max()).exp().sort().values
    below = weights.cumsum(0)
    # Of a place with weight w: the smaller ones by their part of w, the larger ones in full.
    at_least = torch.arange(len(weights) - 1, -1, -1, device=weights.device)
    return ((below + at_least * weights).sum() / below[-1] / len(log_weights)).item()
