"""Metropolis steps in which each row of a structured guide accepts or rejects by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroflow.chains.independence import Proposal
from pyroflow.chains.target import Points, Target
from pyroflow.guides import AutoFlow, AutoStructuredFlow
from pyroflow.guides.structure import GivenGlobals
from pyroflow.model.comparison import FAILURES
from pyroflow.model.row_terms import GLOBAL, RowTerms
from pyroflow.seeds import between_draws, drawing

PROBED = 8  # points by which terms are found


@dataclass
class Part:
    """What moves by itself, and of each step the part of its proposals that were accepted."""

    name: str
    rates: list[float] = field(default_factory=list)


class _State(NamedTuple):
    """Of C chains, what the log target is the sum of, and the proposal's densities there."""

    first: Tensor  # of the globals with their part of log |det T'|, shape (C,)
    terms: Tensor  # of the rows with theirs, shape (C, R)
    log_joint: Tensor  # of each row, without, shape (C, R)
    rest: Tensor  # of the log joint, shape (C,)
    proposed: Tensor  # log density of the rows' base numbers, shape (C, R)


class RowWise:
    r"""A step of the globals, and then one of each row by itself, for all chains.

    In base space, where u are the globals' numbers and ε_j those of row j, first u' is proposed
    with all ε as they are: rows move with the globals, x_j' = T_j(u', ε_j), and what a row is off
    at both cancels, so that acceptance does not fall with the number of rows, as it does where
    all rows are drawn anew. Then ε_j' of each row is proposed. Given u, rows are independent, so
    that each accepts by its own weight. Both are steps of independence Metropolis whose proposals
    are the guide's base and a wider part, of the conditional posteriors of u and of each ε_j.

    Args:
        target: the posterior in base space.
        guide: a structured guide.
        points: draws of it.
        chains: C.
        wide: the part of the proposals that come from the wider part.

    Attributes:
        parts: globals and rows, with their rates since :meth:`settle`.
        longest: the most steps in which the globals, or one row, of a chain stayed in place.

    Raises:
        ValueError: As :class:`~pyroflow.model.row_terms.RowTerms`.
    """

    name = "rows"

    def __init__(
        self, target: Target, guide: AutoStructuredFlow, points: Points, chains: int, wide: float
    ) -> None:
        self.target, self.rows = target, GivenGlobals(target.flow.transforms())
        places = guide.affine.rows()
        self.terms = RowTerms(target.log_joint, places, points.x[:PROBED], chains)
        self.size, base = self.rows.size, type(guide.flow.base)
        like = points.u

        def proposal(size: int) -> Proposal:
            return Proposal(base(size).to(like)(), wide)

        self.leading = proposal(self.size) if self.size else None
        self.of_rows = [(proposal(plate.shape[1]), *plate.shape) for plate in places]
        row = torch.arange(self.terms.num, device=like.device)
        numbers = [r.repeat_interleave(d) for r, (_, _, d) in self._split(row)]
        first = torch.full((self.size,), GLOBAL, device=like.device)
        self.base_row = torch.cat([first, *numbers])  # of each base number
        self.parts = ([Part("globals")] if self.size else []) + [Part("rows")]
        self._points: Points | None = None
        self._state: _State | None = None
        self.longest, self._stays = 0, row.new_zeros(1, self.terms.num + 1)

    def settle(self) -> None:
        """Nothing adapts; from here on steps count."""
        for part in self.parts:
            part.rates.clear()
        self.longest = 0
        self._stays.zero_()

    @torch.no_grad()
    def step(self, points: Points) -> Points:
        """All chains one step on."""
        if points is not self._points:
            self._state = self._at(points.u, points.x, self._image(points.u)[1])
        moved = torch.ones_like(points.log_joint, dtype=torch.bool)
        if self.leading is not None:
            points, moved = self._move_globals(points)
        points, taken = self._move_rows(points)
        stayed = ~torch.cat([moved.unsqueeze(1), taken], 1)
        self._stays = torch.where(stayed, self._stays + 1, 0)
        self.longest = max(self.longest, int(self._stays.max()))
        self._points = points
        return points

    def _move_globals(self, points: Points) -> tuple[Points, Tensor]:
        u, before = points.u.clone(), self._state
        with drawing():
            u[:, : self.size], _ = self.leading.sample(len(u))
            bar = torch.rand_like(u[:, 0]).log()
        x, log_det = self._image(u)
        there = self._at(u, x, log_det, before.proposed)
        log_weights = [
            state.first + state.terms.sum(1) - self.leading.log_prob(at[:, : self.size])
            for state, at in ((there, u), (before, points.u))
        ]
        moved = bar < log_weights[0] - log_weights[1]
        pairs = zip(there, before, strict=True)
        self._state = _State(*(_where(moved, new, old) for new, old in pairs))
        self.parts[0].rates.append(moved.double().mean().item())
        return self._points_at(_where(moved, u, points.u), _where(moved, x, points.x)), moved

    def _move_rows(self, points: Points) -> tuple[Points, Tensor]:
        before, chains = self._state, len(points.u)
        with drawing():
            eps = [p.sample(chains * J)[0].reshape(chains, J * d) for p, J, d in self.of_rows]
            bar = torch.rand_like(before.terms).log()
        u = torch.cat([points.u[:, : self.size], *eps], 1)
        x, log_det = self._image(u)
        there = self._at(u, x, log_det)
        self.terms.check_rest(there.rest, before.rest)
        ratio = there.terms - there.proposed - (before.terms - before.proposed)
        taken = bar < ratio
        kinds = ("terms", "log_joint", "proposed")
        now = {k: torch.where(taken, getattr(there, k), getattr(before, k)) for k in kinds}
        self._state = before._replace(**now)
        self.parts[-1].rates.append(taken.double().mean().item())
        u = torch.where(_by_number(taken, self.base_row), u, points.u)
        x = torch.where(_by_number(taken, self.terms.row), x, points.x)
        return self._points_at(u, x), taken

    def _image(self, u: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = self.target.image(u)
        return x.to(self.target.like), log_det

    def _at(self, u: Tensor, x: Tensor, log_det: Tensor, proposed: Tensor | None = None) -> _State:
        rest, log_joint = self.terms(x)
        eps = torch.cat([torch.zeros_like(u[:, : self.size]), u[:, self.size :]], 1)
        of_rows = self.rows.log_det(eps)
        first = _number(rest + log_det - of_rows.sum(1))
        if proposed is None:
            proposed = torch.cat([self._log_proposal(u, i) for i in range(len(self.of_rows))], 1)
        return _State(first, _number(log_joint + of_rows), log_joint, rest, proposed)

    def _log_proposal(self, u: Tensor, plate: int) -> Tensor:
        """Log density of the base numbers of a plate's rows, shape (C, J)."""
        proposal, rows, size = self.of_rows[plate]
        start = self.size + sum(J * d for _, J, d in self.of_rows[:plate])
        numbers = u[:, start : start + rows * size].reshape(-1, size)
        return proposal.log_prob(numbers).reshape(len(u), rows)

    def _points_at(self, u: Tensor, x: Tensor) -> Points:
        state = self._state
        log_joint = state.rest + state.log_joint.sum(1)
        return Points(u, x, log_joint, state.first + state.terms.sum(1))

    def _split(self, rows: Tensor) -> list[tuple[Tensor, tuple[Distribution, int, int]]]:
        """Numbers of all rows (R,) by plate."""
        return list(zip(rows.split([J for _, J, _ in self.of_rows]), self.of_rows, strict=True))


def row_wise(target: Target, guide: AutoFlow, *given: Any, needed: bool) -> RowWise | None:
    """The steps for a guide, or None where its rows cannot be told apart, unless they are needed.

    Raises:
        TypeError: If they are needed, and the guide is not structured.
        ValueError: If they are needed, as :class:`~pyroflow.model.row_terms.RowTerms` does.
    """
    try:
        if not isinstance(guide, AutoStructuredFlow):
            raise TypeError(
                'method "rows" needs an AutoStructuredFlow, whose rows are independent given its '
                f'globals; got {type(guide).__name__}: take method "auto"'
            )
        with between_draws():
            return RowWise(target, guide, *given)
    except FAILURES:
        if needed:
            raise
        return None


def _where(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(rows.unsqueeze(1) if new.dim() == 2 else rows, new, old)


def _by_number(taken: Tensor, row: Tensor) -> Tensor:
    """Whether the row of each number (D,) is one of those (C, R); globals are none."""
    return taken[:, row.clamp(min=0)] & (row != GLOBAL)


def _number(log_density: Tensor) -> Tensor:
    return log_density.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
