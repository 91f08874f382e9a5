"""Weights of a guide's draws row by row, as rows are independent given the globals."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.quasirandom import SobolEngine

from pyroflow.diagnostics.marginals import Columns, columns_of, numbered
from pyroflow.diagnostics.report import RowReport
from pyroflow.diagnostics.wider import (
    _directions,
    _draw,
    _log_ratio,
    unseen_rows,
    wide_rows,
)
from pyroflow.flows import StandardNormal
from pyroflow.guides import AmortizedPlanarGuide
from pyroflow.guides.plate_rows import RowsAtGlobals
from pyroflow.guides.structure import GivenGlobals
from pyroflow.model.bound import BoundModel
from pyroflow.model.comparison import agree
from pyroflow.model.draws import Draws
from pyroflow.model.log_joint import LogJoint
from pyroflow.model.program import NUMBERS
from pyroflow.model.records import Values
from pyroflow.model.row_terms import GLOBAL, RowTerms
from pyroflow.seeds import drawing

CANDIDATES = (1, 2, 4, 8, 16, 32, 64)  # of each row
NOISE = 0.1  # variance of a log weight of globals, that the choice of candidates may leave
PROBED, PILOT = 8, 32  # draws by which terms are found, and candidates are counted
ABOVE = 3.0  # nats above all weights of draws, at a mode that they miss
TINY, EDGE = 1e-300, 1e-16  # of a number between 0 and 1
MOST, LEAST = 4e6, 1000  # numbers in a set of draws, and draws


class Weighed(NamedTuple):
    """Draws weighed row by row.

    First the guide's globals, and of each row one of its candidates, by its weight; log p − log q
    is the marginal log weight of the globals. Then the guide's own draws with weights of latents.
    """

    draws: Draws
    columns: Columns
    given: Tensor  # log weights of the guide's own rows given the globals, shape (S, R)
    leading: Tensor  # the globals, shape (S, G)


class _Part(NamedTuple):
    """What :class:`Weighed` is made of."""

    log_weights: Tensor  # marginal ones of the globals, shape (S,)
    each: Tensor  # of the globals with one row, shape (S, R)
    given: Tensor  # of the rows given the globals, shape (S, R)
    chosen: Tensor  # draws of the rows by their weights, shape (S, D)
    log_joint: Tensor  # there, shape (S,)
    own_joint: Tensor  # at the guide's own draws, shape (S,)


class Candidates:
    r"""Marginal weights of a guide's globals, by candidates of each row.

    Joint weights of J rows vary by the sum of what each adds. But given the globals g rows are
    independent: with M candidates x_jm ~ q(x_j | g) and w_jm = exp f_j(x_jm, g) / q(x_jm | g),

    ŵ(g) = exp f₀(g) / q(g) Π_j mean_m w_jm

    has the expectation p(y, g)/q(g) for any M, and (g, one x_jm of each row by its weight) the
    weight ŵ(g) as a draw of the posterior. The joint of g and x_j alone has the weight
    ŵ(g) w_j1 / mean_m w_jm. With M = 1 all three are the joint weight. The candidates are points
    of a Sobol sequence, shifted by the guide's own draw, which is one of them: each is a draw of q,
    and their mean has little noise. M is chosen so that the noise of log ŵ is small; what is left
    of it shows in the weights, as any other fault of the guide does.

    References:
        Chopin, Jacob and Papaspiliopoulos, SMC²: an efficient algorithm for sequential analysis of
        state space models, 2013, section 2, https://arxiv.org/abs/1101.1528.

    Attributes:
        num: M.
        noise: the variance that their choice leaves in log ŵ.

    Raises:
        ValueError: As :class:`~pyroflow.model.row_terms.RowTerms`.
    """

    @torch.no_grad()
    def __init__(self, log_joint: LogJoint, bound: BoundModel) -> None:
        guide, q = bound.guide, bound.guide.over_coordinates(*bound.args, **bound.kwargs)
        self.transforms, self.base, self.like = list(q.transforms), q.base_dist, guide.start()
        rows = RowsAtGlobals if isinstance(guide, AmortizedPlanarGuide) else GivenGlobals
        self.rows = rows(self.transforms)
        self.shapes = [tuple(plate.shape) for plate in self.rows.places]
        with drawing():
            u = self.base.sample((PILOT,))
        points = self.pushed(u)[0]
        self.terms = RowTerms(log_joint, self.rows.places, points[:PROBED])
        self.lattice = self._lattice()
        self.num, self.noise = self._count(points)

    def pushed(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The image of base numbers u (S, D), and the guide's log density there."""
        x, log_q = u, self.base.log_prob(u).double()
        for t in self.transforms:
            x, log_det = t.forward_and_log_det(x)
            log_q = log_q - log_det.double()
        return x, log_q

    def weigh(
        self, x: Tensor, log_q: Tensor, wide: Tensor | None = None, ratio: Tensor | None = None
    ) -> _Part:
        """Of draws x (S, D); with base numbers of wider rows, the weights and draws of these."""
        eps, inner = self.rows.base(x)
        of_rows = self.rows.log_q(eps, inner)
        first, terms = self.terms(x)
        given = _number(terms - of_rows)
        mean, chosen, found = self._choose(x, inner, eps, self.num, (first, terms, given))
        log_weights = _number(first - (log_q - of_rows.sum(1)) + mean.sum(1))
        if wide is not None:
            chosen = self.rows.at(x, inner, wide)
            found = self.terms(chosen)[1]
            given = _number(found - self.rows.log_q(wide, inner) - ratio)
        each = _number(log_weights.unsqueeze(1) - mean + given)
        joints = first + found.sum(1), first + terms.sum(1)
        return _Part(log_weights, each, given, chosen, *joints)

    def _choose(
        self, x: Tensor, inner: Tensor, eps: Tensor, num: int, at: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The log mean weight of M candidates of each row, one by its weight, and its terms."""
        first, found, total = at
        chosen, place = x, self.terms.row.clamp(min=0)
        start = torch.special.ndtr(eps.double())
        for shift in self.lattice[1:num]:
            other = torch.special.ndtri(((start + shift) % 1).clamp(TINY, 1 - EDGE)).to(eps)
            there = self.rows.at(x, inner, other)
            again, terms = self.terms(there)
            self.terms.check_rest(again, first)
            log_weight = _number(terms - self.rows.log_q(other, inner))
            total = torch.logaddexp(total, log_weight)
            with drawing():
                taken = torch.rand_like(total).log() < log_weight - total
            found = torch.where(taken, terms, found)
            moved = taken[:, place] & (self.terms.row != GLOBAL)
            chosen = torch.where(moved, there, chosen)
        return total - math.log(num), chosen, found

    def _count(self, x: Tensor) -> tuple[int, float]:
        """How many candidates are enough, and the variance that their choice then leaves."""
        _, inner = self.rows.base(x)
        for num in CANDIDATES:
            means = []
            for _ in range(2):
                with drawing():
                    eps = torch.randn_like(x)
                there = self.rows.at(x, inner, eps)
                first, terms = self.terms(there)
                at = first, terms, _number(terms - self.rows.log_q(eps, inner))
                means.append(self._choose(there, inner, eps, num, at)[0])
            change = (means[0] - means[1]).square().nan_to_num(torch.inf, torch.inf)
            noise = (change / 2).sum(1).mean().item()
            if noise <= NOISE:
                break
        return num, noise

    def _lattice(self) -> Tensor:
        """Points of the unit cube of each row, the same for all rows of a plate, (M, D)."""
        num, like = max(CANDIDATES), self.like
        found = [torch.zeros(num, self.rows.size, dtype=torch.float64, device=like.device)]
        for J, d in self.shapes:
            points = SobolEngine(d).draw(num, dtype=torch.float64).to(like.device)
            found.append(points.unsqueeze(1).expand(num, J, d).reshape(num, -1))
        return torch.cat(found, 1)


class RowWeights:
    """What weights of rows say of a guide; see :class:`Candidates`."""

    def __init__(self, bound: BoundModel, num: int) -> None:
        self.bound, self.guide = bound, bound.guide
        self.log_joint = LogJoint(bound, self.guide, num)
        self.candidates = Candidates(self.log_joint, bound)
        latents = zip(self.guide.latents, self.guide.latents.sizes, strict=True)
        names = [name for site, size in latents for name in numbered(site.name, size)]
        self.names = [names[i] for rows in self.candidates.rows.places for i in rows[:, 0].tolist()]
        self.at_once = max(1, NUMBERS // self.guide.latent_dim)
        self.most = max(LEAST, int(MOST / self.guide.latent_dim))  # draws in a set
        self.largest = torch.full((len(self.names) + 1,), -torch.inf, dtype=torch.float64)

    @torch.no_grad()
    def weigh(self, draws: Draws, columns: Columns) -> Weighed:
        """The draws of a guide with their weights.

        Raises:
            ValueError: If the terms of the rows do not add up to the log joint of the draws, or a
                term of no row changes with them.
        """
        x, log_det = self.guide.unconstrain(draws.sites)
        part = self._weighed(x, draws.log_q.to(x.device) + log_det.double())
        expected = draws.log_p.to(x.device) + log_det.double()
        both = (expected - part.own_joint).isfinite()
        if not agree(part.own_joint[both].to(x), expected[both].to(x)):
            raise ValueError("the terms of the rows do not add up to the log joint")
        self.largest = torch.maximum(self.largest, _largest(part))
        values, log_det = self.guide.constrain(part.chosen)
        log_p = part.log_joint - log_det.double()
        chosen = Draws(values, log_p, log_p - part.log_weights)
        own, leading = self._by_latent(part, draws.sites), self.candidates.rows.leading
        return Weighed(chosen, columns._replace(own=own), part.given, x[:, leading])

    @torch.no_grad()
    def misses(self, x: Tensor) -> bool:
        """Whether at x (D,) the globals, or a row, have a far larger weight than all draws.

        Where joint weights are even, they say themselves what is missed.
        """
        if self.candidates.num == 1:
            return True
        log_q = self.guide.flow().log_prob(x.unsqueeze(0)).double()
        return bool((_largest(self._weighed(x.unsqueeze(0), log_q)) > self.largest + ABOVE).any())

    @torch.no_grad()
    def wide(self, num: int) -> tuple[Columns, Tensor, str]:
        """Draws of globals wider than the guide, and of rows given them; see :class:`Columns`.

        The globals' marginal weights take candidates of the guide; the weight of each row is that
        of one wider draw of it, from a mixture as that of the globals.

        Returns:
            The latents, the log weights of the globals, shape (S,), and in words, what mass a row
            has that its candidates do not find, if one has.
        """
        like, size = self.candidates.like, self.candidates.rows.size
        ratio = like.new_zeros(num, dtype=torch.float64)
        with drawing():
            u = self.candidates.base.sample((num,))
            if size:
                base = _Pushed(self._base(size), [self._leading_at])
                ways = _directions(base, None)
                u[:, :size] = _draw(base.base_dist, ways, num)
                ratio = _log_ratio(base.base_dist, ways, u[:, :size]).double()
            wide = [wide_rows(self._base(d), num, J) for J, d in self.candidates.shapes]
        eps, more = (torch.cat(found, 1) for found in zip(*wide, strict=True))
        x, log_q = self.candidates.pushed(u)
        part = self._weighed(x, log_q + ratio, torch.cat([u[:, :size], eps], 1), more)
        values, _ = self.guide.constrain(part.chosen)
        columns = columns_of(values, self.bound.runs.records)
        columns = columns._replace(own=self._by_latent(part, values))
        return columns, part.log_weights, unseen_rows(self.names, part.each, part.log_weights)

    def report(self, parts: list[Weighed]) -> RowReport:
        """What the sets of draws say of single rows."""
        given, leading = torch.cat([p.given for p in parts]), torch.cat([p.leading for p in parts])
        counts = self.candidates.num, self.candidates.noise
        return RowReport.of(self.names, given, leading.double(), *counts)

    def _weighed(self, *draws: Tensor) -> _Part:
        split = zip(*(t.split(self.at_once) for t in draws), strict=True)
        parts = [self.candidates.weigh(*some) for some in split]
        return _Part(*(torch.cat(found) for found in zip(*parts, strict=True)))

    def _base(self, size: int) -> Distribution:
        return StandardNormal(size).to(self.candidates.like)()

    def _leading_at(self, u: Tensor) -> Tensor:
        """The globals (S, G) at their base numbers."""
        found = u.new_zeros(len(u), self.guide.latent_dim)
        found[:, : u.shape[1]] = u
        return self.candidates.pushed(found)[0][:, self.candidates.rows.leading]

    def _by_latent(self, part: _Part, values: Values) -> Tensor:
        """The log weight of each latent, in the order of sites, (S, D)."""
        row = self.guide.latents.unpack(self.candidates.terms.row)
        row = torch.cat([row[name].flatten() for name in values])
        common = part.log_weights.unsqueeze(1)
        return torch.where(row == GLOBAL, common, part.each[:, row.clamp(min=0)]).cpu()


class _Pushed(NamedTuple):
    """Draws of a base, and what is made of them."""

    base_dist: Distribution
    transforms: list


def _largest(part: _Part) -> Tensor:
    """The largest log weights of the rows, and of the globals, shape (R + 1,)."""
    return torch.cat([part.given.amax(0), part.log_weights.amax(0, keepdim=True)]).cpu()


def _number(log_weight: Tensor) -> Tensor:
    """−inf for what is no weight."""
    return log_weight.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
