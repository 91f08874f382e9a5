"""The log joint of a model whose plates draw a part of their rows: of those, and of all rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from pyroflow.model.at_hand import AtHand, Rows, Subsampling, dims_of, places_at_hand
from pyroflow.model.bound import BoundModel, check_whole
from pyroflow.model.comparison import FAILURES, PROBES, Way, agree, moves
from pyroflow.model.draws import Draws
from pyroflow.model.latents import Latents
from pyroflow.model.locations import Filled, Moves
from pyroflow.model.log_joint import ROUNDED, LogJoint, traced
from pyroflow.model.records import tensors_of
from pyroflow.seeds import seeded

COUPLING, AXES = 2, 4  # their places among the tensors of a site, if there are so many


class LogJointAtHand(LogJoint):
    """The log joint of a model at the rows at hand, each counted as often as its weight says.

    It is a function of the coordinates of these rows and of the latents outside of plates that
    subsample, recorded with the rows as inputs, so that other rows take no other graph.

    Args:
        bound: a model with plates that subsample.
        guide: its guide, which knows all rows.
        num: points side by side.

    Attributes:
        rows: those at hand.
        subsampling: of which plates.
        drawn: the table of their latents.

    Raises:
        ValueError: If it cannot be recorded, or says something else than the model.
    """

    def __init__(self, bound: BoundModel, guide: Any, num: int) -> None:
        self.runs, self.guide, self.num = bound.runs, guide, bound.runs.at_once(num)
        self.given = bound.args, bound.kwargs
        self.subsampling, start = Subsampling.of(bound.model_trace), guide.start()
        self.drawn = guide.drawn(self.subsampling)
        with seeded(0):
            first, second = (self.subsampling.draw().to(start) for _ in range(2))
        self.rows = first
        try:
            x = self._spread_points(self.num, 1)
            self._graph = traced(self._at, x, *self._moved_by())
            self._check(second)
        except FAILURES as error:
            raise ValueError("the model cannot be recorded with its rows as inputs") from error

    def _check(self, others: Rows) -> None:
        """Compare with runs of the model at other rows; without weight none may count."""
        x = self._spread_points(len(PROBES), 2)
        first, self.rows = self.rows, others
        if not self._same(self.values_and_gradients(x), self._one_by_one(x)):
            raise ValueError("the recorded log joint is not the model's")
        values = []
        for rows in (first, others):
            nothing = {name: torch.zeros_like(weights) for name, weights in rows.weights.items()}
            self.rows = Rows(rows.index, nothing)
            values.append(self.values_and_gradients(x)[0])
        self.rows = first
        if not agree(*values):
            raise ValueError("the model counts rows otherwise than by their plates")

    def _one_by_one(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = [self._value_and_gradient(one[None], self.runs.one_by_one) for one in x]
        return tuple(map(torch.cat, zip(*found, strict=True)))

    def differs(self, x: Tensor) -> str | None:
        """Where runs of the model at a few points x in full differ from what is relied on."""
        x = x[:, places_at_hand(self.guide.latents, self.rows.index)]
        same = self._same(self.values_and_gradients(x), self._one_by_one(x))
        return None if same else "the log joint"

    def _evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._graph(x, *self._moved_by())

    def _moved_by(self) -> tuple[Tensor, ...]:
        """The tensors of coordinates of all rows; which rows are at hand, and their weights."""
        rows = (*self.rows.index.values(), *self.rows.weights.values())
        return (*super()._moved_by(), *rows)

    def _evaluated(
        self, x: Tensor, way: Way | None = None, moved_by: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        tensors, rows = self._read(self._moved_by() if moved_by is None else moved_by)

        def alone(x: Tensor) -> tuple[Tensor, Tensor]:
            return self._filled(x, rows, tensors)

        value, lost = alone(x[0]) if way else torch.func.vmap(alone)(x)
        return value.where(lost < ROUNDED, torch.nan).reshape(len(x))

    def _read(self, moved_by: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Rows]:
        """The tensors of coordinates, and the rows, of what :meth:`_moved_by` returns."""
        names = list(self.subsampling.plates)
        rest = len(moved_by) - 2 * len(names)
        index, weights = (
            dict(zip(names, moved_by[start:], strict=False)) for start in (rest, rest + len(names))
        )
        return moved_by[:rest], Rows(index, weights)

    def _filled(self, x: Tensor, rows: Rows, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Log joint at x (D,), and how far the latents are rounded."""
        batch, at_hand, moved = self.drawn, AtHand(rows), []
        numbers, lost = batch.unpack(x), x.new_zeros(())
        number = lambda name, _: numbers[name]  # noqa: E731
        if tensors:
            coordinates = self.guide.coordinates
            tensors = _at_hand(coordinates, self.guide.latents, rows, *tensors)
            number = Moves(batch, coordinates.counts, x, *tensors, total=at_hand.total)
        fill = Filled(batch, number, at_hand.total)
        run = self.runs.filled(lambda model: fill(at_hand(model)), inside=set(batch.sites))
        self.runs.subsample.clear()  # which a run notes
        if tensors:
            _, log_det, lost = number.result()
            moved = [log_det]
        parts = [log_prob.sum() for log_prob in tensors_of(run)[1].values()]
        return torch.stack([*parts, *fill.log_dets, *moved]).sum(), lost

    def _spread_points(self, num: int, seed: int = 0) -> Tensor:
        with seeded(seed):
            start = self.guide.start()[places_at_hand(self.guide.latents, self.rows.index)]
            return start + moves(num, start)


class LogJointInFull(LogJoint):
    """The log joint with all rows of the plates that subsample, some rows at a time.

    Args:
        part: that of the rows at hand.
    """

    one_by_one, traced = False, False  # of several graphs

    def __init__(self, part: LogJointAtHand) -> None:
        self.part, self.runs, self.guide, self.num = part, part.runs, part.guide, part.num
        self.given = part.given
        like = part.guide.start()
        self.cover = [rows.to(like) for rows in part.subsampling.cover()]
        found = (places_at_hand(self.guide.latents, rows.index) for rows in self.cover)
        self.places = [places.to(like.device) for places in found]

    @classmethod
    def of(cls, bound: BoundModel, num: int) -> LogJointInFull | None:
        """That of a model and its guide; None where no plate subsamples.

        Raises:
            ValueError: If it is not to be had, by the plate's name.
        """
        if bound.subsampled and hasattr(bound.guide, "drawn"):  # which knows all rows
            with suppress(ValueError):
                return cls(LogJointAtHand(bound, bound.guide, num))
        check_whole(bound)
        return None

    @torch.no_grad()
    def values(self, x: Tensor) -> Tensor:
        """The log joint at x (S, D), shape (S,), without derivatives."""
        return self.values_and_gradients(x)[0]

    def values_and_gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The log joint at x (S, D) and its gradient, shapes (S,) and (S, D)."""
        value, gradient = x.new_zeros(len(x)), torch.zeros_like(x)
        for rows, places in zip(self.cover, self.places, strict=True):
            self.part.rows = rows
            found, slope = self.part.values_and_gradients(x[:, places])
            value += found
            gradient.index_add_(1, places, slope)
        return value / len(self.cover), gradient / len(self.cover)

    @torch.no_grad()
    def draw(self, num: int) -> Draws:
        """Draws of the guide with all rows, whatever the model draws of them."""
        q = self.guide.over_coordinates(*self.given[0], **self.given[1])
        x = q.sample((num,))
        values, log_det = self.guide.constrain(x)
        log_p, log_q = (t.double() - log_det.double() for t in (self.values(x), q.log_prob(x)))
        lost = int((~(log_p - log_q).isfinite()).sum())
        return Draws(values, log_p, log_q, {"of all rows": lost})

    def differs(self, x: Tensor) -> str | None:
        """As that of the rows at hand."""
        return self.part.differs(x)


def _at_hand(
    coordinates: Any, latents: Latents, rows: Rows, c: Tensor, *tensors: Tensor
) -> Iterator[Tensor]:
    """Of the tensors of a guide's coordinates those of some rows."""
    yield c[places_at_hand(latents, rows.index)]
    left = iter(tensors)
    for name, count in coordinates.counts.items():
        site = latents.sites[name]
        dims = dims_of(site.plates, len(site.batch_shape), rows.index)
        for i, tensor in enumerate(itertools.islice(left, count)):
            coupling = count > 1 and i == COUPLING
            if coupling:
                tensor = tensor.reshape(*site.unconstrained_shape, -1)
            if dims and i == AXES and count == AXES + 1:
                yield tensor.new_zeros(0, 0)  # the axes, which are the numbers' own
                continue
            for dim, plate in dims:
                tensor = tensor.index_select(dim, rows.index[plate])
            yield tensor.flatten(0, -2) if coupling else tensor
