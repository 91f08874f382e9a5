"""A model run at given latents: what it computes and predicts, how likely its data are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyroflow.model.comparison import FAILURES, Outcome, Way, differs, disagreement, with_slopes
from pyroflow.model.program import Program, rows_of
from pyroflow.model.records import (
    SiteRuns,
    Sites,
    Values,
    is_random,
    joined,
    log_joint,
    quietly,
    tensor_of,
)
from pyroflow.seeds import seeded

CHUNK = 1000  # draws side by side


class Runs(Program):
    """A program that is run at many draws of its latents.

    Draws run side by side by torch's ``vmap``, or else in a plate around the model, or else one
    by one: the first way that repeats what three draws get in runs of their own
    (:func:`~pyroflow.model.comparison.differs`).

    Args:
        model: as in :class:`Program`, like args, kwargs, depth and predict.
        by_vmap: whether torch's ``vmap`` is tried.
        compared: whether ways to run are compared; else the first that runs is taken.

    Attributes:
        inspected: what one draw got in a run of its own, to compare with.
        chosen: whether the way to run is settled.
        right_by_vmap: whether ``vmap`` is known to run the model where all sites are given.

    Example:
        >>> from pyroflow.targets import eight_schools_noncentered
        >>> runs = Runs(eight_schools_noncentered, depth=1, predict=True)
        >>> sites = runs.evaluate({"mu": torch.zeros(5), "tau": torch.ones(5)}, 5)
        >>> sites["theta"].values.shape, sites["y"].log_prob.shape
        (torch.Size([5, 8]), torch.Size([5, 8]))
    """

    def __init__(
        self,
        model: Callable,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
        depth: int | None = None,
        predict: bool = False,
        by_vmap: bool = True,
        compared: bool = True,
    ) -> None:
        super().__init__(model, args, kwargs, depth, predict)
        self.compared = compared
        self.inspected: Outcome | None = None
        self._ways = [self.by_vmap] if by_vmap else []
        self._ways += [self.in_plate, self.one_by_one]
        self.right_by_vmap = self.chosen = False

    @property
    def sequential(self) -> bool:
        """Whether each draw takes a run of the model."""
        return self.chosen and self.way == self.one_by_one

    @property
    def way(self) -> Way:
        """How draws run."""
        return self._ways[0]

    def predictive(self) -> Runs:
        """The same with the data sampled."""
        ahead = Runs(self.model, self.args, self.kwargs, self.depth, predict=True)
        ahead.right_by_vmap, ahead.records = self.chosen and self.way == self.by_vmap, self.records
        return ahead

    def evaluate(self, latents: Values, size: int) -> Sites:
        """Run the model at S draws of its latents (S, *shape); those missing are sampled.

        Raises ``ValueError`` if a site is not in every run, or changes its shape.
        """
        return joined(list(self.parts(latents, size)))

    @torch.no_grad()
    def parts(self, latents: Values, size: int) -> Iterator[Sites]:
        """The same in parts, of as many draws as the memory has room for."""
        chunk = self.at_once(CHUNK)
        chunks = [range(i, min(i + chunk, size)) for i in range(0, size, chunk)]
        tried = self.right_by_vmap and not self.chosen
        parts = self._sampled(rows_of(latents, chunks[0]), len(chunks[0])) if tried else []
        if not self.chosen:
            # With the inspected draw three; drawn so that nothing drawn later changes.
            few = _few(size)[-2:] if self._inspected_beside(latents) else _few(size)
            with seeded(0):
                self.choose(rows_of(latents, few), len(few))
        yield from parts
        for rows in chunks[len(parts) :]:
            yield self.way(rows_of(latents, rows), len(rows))

    def _sampled(self, latents: Values, size: int) -> list[Sites]:
        """The first draws, in a plate, if ``vmap`` says the same where they are given.

        Of itself it cannot sample what does not depend on the latents.
        """
        try:
            found = self.in_plate(latents, size)
            given = {n: s.values for n, s in found.items() if is_random(s.record)}
            rows = _few(size)
            alone = self.by_vmap(rows_of(given, rows), len(rows))
        except FAILURES:
            return []
        index = torch.tensor(rows, device="cpu")
        if disagreement({n: site.at(index) for n, site in found.items()}, alone):
            return []
        self._ways, self.chosen = [self.in_plate, self.one_by_one], True
        return [found]

    def log_joint(self, latents: Values, size: int, way: Way | None = None) -> Tensor:
        """The log density of all sites together, shape (S,), with its graph.

        The way must be chosen, or given; the latents are taken to be inside their supports.
        """
        return log_joint((way or self.way)(latents, size, inside=set(latents)))

    def choose(self, latents: Values, size: int) -> None:
        """Choose how to run, by what a few of S draws get that way and alone; once.

        The inspected draw is compared as well. Where the model runs only one by one, these runs
        show whether the same sites are in all of them, and say the same when they are repeated.
        """
        few = _few(size)
        rows, before = rows_of(latents, few), self._inspected_beside(latents)
        while self._ways[1:] and not self.chosen:
            self.chosen = differs(self, rows, len(few), self.way, before) is None
            self._ways = self._ways if self.chosen else self._ways[1:]
        if not self.chosen:
            first, again = (self.one_by_one(rows, len(few)) for _ in range(2))
            if not self.predict:
                _warn_of_noise(disagreement(again, first))
        self.chosen = True

    def _inspected_beside(self, latents: Values) -> Outcome | None:
        """What the inspected draw got, if it can be put beside these."""
        known = self.inspected
        return known if known is not None and _kinds(known.latents) == _kinds(latents) else None

    def inspect(self, drawn: Values) -> Trace:
        """Run the model at one draw of a guide, and keep the records and what the draw gets."""
        drawn = {name: tensor_of(value).detach()[None] for name, value in drawn.items()}
        moving = {n: v.clone().requires_grad_() for n, v in drawn.items() if v.is_floating_point()}
        try:
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Converting a tensor with requires_grad")
                trace = self._inspected_at(drawn | moving)
                free = [name for name, site in self.records.items() if not site["is_observed"]]
                latents = {name: drawn[name] for name in free if name in drawn}
                moving = {name: leaf for name, leaf in moving.items() if name in latents}
                sites = {name: SiteRuns.of(site, 1, site) for name, site in self.records.items()}
                self.inspected = with_slopes(latents, moving, sites)
        except FAILURES:  # a model that torch cannot differentiate
            trace = self._inspected_at(drawn)
        return trace

    def _inspected_at(self, drawn: Values) -> Trace:
        trace = self._trace(self.model, {name: value[0].clone() for name, value in drawn.items()})
        with quietly():
            self.records = self._scored(trace)
        return trace


def _kinds(values: Values) -> dict[str, tuple]:
    return {name: (v.shape[1:], v.dtype, v.device) for name, v in values.items()}


def _warn_of_noise(site: str | None) -> None:
    if site is not None:
        warnings.warn(
            f"the model says something else of the same latents in each run, at site {site!r}: it "
            "draws random numbers of its own, by torch, NumPy or random, so that no verdict on "
            "its posterior holds. Draw them by pyro.sample, or once beforehand, and pass them as "
            "arguments",
            stacklevel=4,
        )


def _few(size: int) -> list[int]:
    return sorted({0, size // 2, size - 1})
