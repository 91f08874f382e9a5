"""The log joint of a model as a sum over rows that are independent given its globals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributions import Independent
from torch.nn.functional import pad

from pyroflow.model.comparison import FAILURES, agree
from pyroflow.model.log_joint import ROUNDED, LogJoint, _padded, terms_at, traced
from pyroflow.model.program import NUMBERS
from pyroflow.model.records import Record

Key = tuple[str, str]  # a site, and the kind of its terms

GLOBAL = -1  # the row of a term that depends on no row
NOISE = 64  # rounding units, by which a term that nothing has changed may differ


class RowTerms:
    r"""log p(y, g, x) = f₀(g) + Σ_j f_j(x_j, g), in the coordinates of a guide's flow.

    The log joint is a sum of many terms: the log densities of sites, number by number, and the
    log-determinants of supports and coordinates. To which row a term belongs is read off its
    values: rows are moved, half of them at a time, by the digits of their numbers in base two. A
    term of one row changes with just those halves that the row is in, one of several rows with a
    half and the other half too. It needs no derivatives, and holds whatever the indexing: plates,
    ``theta[group]``, or plates in plates.

    Args:
        log_joint: the log joint, of a model that torch's ``vmap`` can run.
        rows: of each plate the places of its rows' numbers, (J, d).
        points: an even number of draws of the guide, shape (P, D), of which one is moved to the
            next.
        num: points at which the terms are asked for at once, as far as the memory has room.

    Attributes:
        num: how many rows there are in all plates together, R.
        row: of each of the D numbers its row, −1 for globals.
        owners: by site and kind of term, the rows that its terms belong to.

    Raises:
        ValueError: If the model cannot be run by ``vmap``, a term depends on several rows, or the
            sum is not the log joint; the message names the site.
    """

    def __init__(
        self, log_joint: LogJoint, rows: Sequence[Tensor], points: Tensor, num: int = NUMBERS
    ) -> None:
        self.log_joint, self.num = log_joint, sum(map(len, rows))
        runs = log_joint.runs
        if not self.num:
            raise ValueError("there are no rows")
        if runs.way != runs.by_vmap:
            raise ValueError("draws cannot run side by side")
        self.like = points[:0]
        self.row = torch.full_like(points[0], GLOBAL, dtype=torch.long)
        start = 0
        for places in rows:
            own = torch.arange(start, start + len(places), device=points.device)
            self.row[places] = own.unsqueeze(1).expand_as(places)
            start += len(places)
        self.owners = self._owners(points)
        self._starts = {key: _start(owner) for key, owner in self.owners.items()}
        numbers = sum(map(len, self.owners.values())) + len(points[0])
        self.at_once = max(1, min(num, NUMBERS // (4 * numbers)))
        self._evaluate = self._recorded(points)
        found, rest = self(points)
        if not agree((found + rest.sum(1)).to(points), log_joint.values(points)):
            raise ValueError("the terms do not add up to the log joint")

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f₀ at x (S, D), shape (S,), and all f_j, shape (S, R), in float64."""
        moved_by, num = self.log_joint._moved_by(), self.at_once
        parts = [self._evaluate(_padded(part, num), *moved_by) for part in x.split(num)]
        first, rest = (torch.cat(found)[: len(x)] for found in zip(*parts, strict=True))
        return first, rest

    def check_rest(self, found: Tensor, before: Tensor) -> None:
        """Raise ``ValueError`` if f₀ is another one where only rows have moved."""
        if not agree(found.to(self.like), before.to(self.like)):
            raise ValueError("a term of no row changes with them")

    def _terms(self, x: Tensor, *moved_by: Tensor) -> dict[Key, Tensor]:
        """All terms at x (D,), flat; NaN where the coordinates say more than z has digits for."""
        runs, guide = self.log_joint.runs, self.log_joint.guide
        terms, moves = terms_at(runs, guide, x, moved_by, _densities)
        moved = [key for key in terms if key[1] == "coordinates"]
        for key, lost in zip(moved, moves.lost, strict=True):
            terms[key] = terms[key].where(lost < ROUNDED, torch.nan)
        return {key: term.reshape(-1) for key, term in terms.items()}

    def _alone(self, x: Tensor) -> dict[Key, Tensor]:
        """The terms at one x (D,), by operations whose rounding is the same each time."""
        by_site = torch.func.vmap(lambda x: self._terms(x, *self.log_joint._moved_by()))
        return {key: term[0] for key, term in by_site(x.unsqueeze(0)).items()}

    @torch.no_grad()
    def _owners(self, points: Tensor) -> dict[Key, Tensor]:
        owners: dict[Key, Tensor] = {}
        for here, there in zip(points[0::2], points[1::2], strict=True):
            for key, found in self._changing(here, there).items():
                known = owners.setdefault(key, found)
                owners[key] = torch.where(known == GLOBAL, found, known)
                if bool(((found != GLOBAL) & (owners[key] != found)).any()):
                    raise ValueError(f"the rows of site {key[0]!r} could not be told apart")
        return owners

    def _changing(self, here: Tensor, there: Tensor) -> dict[Key, Tensor]:
        """The row with which each term changes, as far as it does between two points (D,)."""
        before = self._alone(here)
        owners = {key: torch.zeros_like(term, dtype=torch.long) for key, term in before.items()}
        times = {key: torch.zeros_like(owner) for key, owner in owners.items()}
        bits = max(1, (self.num - 1).bit_length())
        for bit in range(bits):
            digit = torch.where(self.row == GLOBAL, GLOBAL, self.row >> bit & 1)
            moved = [self._alone(torch.where(digit == value, there, here)) for value in (0, 1)]
            for key, term in before.items():
                low, high = (_changed(term, after[key]) for after in moved)
                if bool((low & high).any()):
                    raise ValueError(f"site {key[0]!r} has a term of several rows")
                owners[key] += high.long() << bit
                times[key] += low | high
        for key, count in times.items():
            if bool(((count > 0) & (count < bits)).any()):
                raise ValueError(f"the rows of site {key[0]!r} could not be told apart")
            owners[key][count == 0] = GLOBAL
        return owners

    def _recorded(self, points: Tensor) -> Callable:
        """The sums as a graph of plain operations, where there can be one."""
        moved_by = self.log_joint._moved_by()
        try:
            x = points[:1].expand(self.at_once, -1).contiguous()
            return traced(self._summed, x, *moved_by)
        except FAILURES:
            return self._summed

    def _summed(self, x: Tensor, *moved_by: Tensor) -> tuple[Tensor, Tensor]:
        terms = torch.func.vmap(lambda x: self._terms(x, *moved_by))(x)
        first = x.new_zeros(len(x), dtype=torch.float64)
        rest = x.new_zeros(len(x), self.num, dtype=torch.float64)
        for key, term in terms.items():
            start, own = self._starts[key], self.owners[key]
            if start is None:
                of_rows = term.where(own != GLOBAL, 0.0).double()
                first = first + term.where(own == GLOBAL, 0.0).double().sum(1)
                rest = rest.scatter_add(1, own.clamp(min=0).expand_as(term), of_rows)
            elif start == GLOBAL:
                first = first + term.double().sum(1)
            else:
                rest = rest + pad(term.double(), (start, self.num - start - len(own)))
        return first, rest


def _start(owner: Tensor) -> int | None:
    """The first of the rows, where terms are one of each in turn, −1 where all are of none."""
    if bool((owner == GLOBAL).all()):
        return GLOBAL
    in_turn = owner[0] + torch.arange(len(owner), device=owner.device)
    return int(owner[0]) if owner[0] != GLOBAL and torch.equal(owner, in_turn) else None


def _densities(record: Record) -> Tensor:
    """The log density of a site, number by number where ``to_event`` has summed it."""
    fn, summed = record["fn"], record["log_prob"]
    if not isinstance(fn, Independent) or record["mask"] is not None:
        return summed
    each = fn.base_dist.log_prob(record["value"]) * record["scale"]
    outside = summed.isneginf().reshape(summed.shape + (1,) * (each.dim() - summed.dim()))
    return each.masked_fill(outside, -torch.inf)


def _changed(before: Tensor, after: Tensor) -> Tensor:
    """Which terms are other ones, beyond rounding."""
    size = torch.finfo(before.dtype).eps * torch.maximum(before.abs(), after.abs()).clamp(min=1.0)
    near = (before - after).abs() <= NOISE * size
    return ~(near | (before == after) | (before.isnan() & after.isnan()))
