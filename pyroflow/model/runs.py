"""A model run at given latents: what it computes and predicts, how likely its data are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from pyroflow.model.comparison import FAILURES, Outcome, Way, differs, disagreement, with_slopes
from pyroflow.model.records import (
    Given,
    Run,
    SiteRuns,
    Sites,
    Unobserve,
    Values,
    check_latents,
    check_same_sites,
    is_deterministic,
    is_random,
    joined,
    log_joint,
    outside_support,
    quietly,
    tensor_of,
    tensors_of,
)
from pyroflow.model.supports import moved, preimage, remember
from pyroflow.seeds import seeded

PLATE = "num_particles_vectorized"  # Pyro's own name for the plate around a model
CHUNK = 1000  # draws side by side, to bound the memory


class Runs:
    """A model with its arguments, to be run at many draws of its latents.

    Draws run side by side by torch's ``vmap``, or else in a plate around the model, or else one
    by one: the first way that repeats what three draws get in runs of their own
    (:func:`~pyroflow.model.comparison.differs`).

    Args:
        model: the Pyro model; ``args`` and ``kwargs``: its arguments.
        depth: how many dimensions its plates take; None if it is not to run in a plate.
        predict: whether the observed sites are sampled as well, and not read from the data.
        by_vmap: whether torch's ``vmap`` is tried.
        compared: whether ways to run are compared; else the first that runs is taken.

    Attributes:
        subsample: by name, the rows that plates drew, which all runs share; cleared by the owner.
        records: Pyro's records of a run of its own, once there was one.
        inspected: what one draw got in a run of its own, to compare with.
        chosen: whether the way to run is settled.

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
        self.model, self.args, self.kwargs = model, args, kwargs or {}
        self.depth, self.predict, self.compared = depth, predict, compared
        self.subsample: Values = {}
        self.records: Run = {}
        self.inspected: Outcome | None = None
        self._ways = [self.by_vmap] if by_vmap else []
        self._ways += [self.in_plate, self.one_by_one]
        self._right_by_vmap = self.chosen = False

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
        ahead.records = self.records
        ahead._right_by_vmap = self.chosen and self.way == self.by_vmap
        return ahead

    @torch.no_grad()
    def evaluate(self, latents: Values, size: int) -> Sites:
        """Run the model at S draws of its latents (S, *shape); those missing are sampled.

        Raises ``ValueError`` if a site is not in every run, or changes its shape.
        """
        chunks = [range(i, min(i + CHUNK, size)) for i in range(0, size, CHUNK)]
        parts = []
        if self._right_by_vmap and not self.chosen:
            parts = self._sampled(_rows(latents, chunks[0]), len(chunks[0]))
        if not self.chosen:
            few = _few(size)
            if self._inspected_beside(latents) is not None:
                few = few[-2:]  # with that draw three
            with seeded(0):  # so that a comparison changes nothing that is drawn later
                self.choose(_rows(latents, few), len(few))
        chunks = chunks[len(parts) :]
        return joined(parts + [self.way(_rows(latents, rows), len(rows)) for rows in chunks])

    def _sampled(self, latents: Values, size: int) -> list[Sites]:
        """The first draws, in a plate, if ``vmap`` says the same where they are given.

        Of itself it cannot sample what does not depend on the latents.
        """
        try:
            found = self.in_plate(latents, size)
            given = {n: s.values for n, s in found.items() if is_random(s.record)}
            rows = _few(size)
            alone = self.by_vmap(_rows(given, rows), len(rows))
        except FAILURES:
            return []
        index = torch.tensor(rows, device="cpu")
        if disagreement({n: site.at(index) for n, site in found.items()}, alone):
            return []
        self._ways, self.chosen = [self.in_plate, self.one_by_one], True
        return [found]

    def log_joint(self, latents: Values, size: int, way: Way | None = None) -> Tensor:
        """The log density of all sites together, shape (S,), with its graph.

        :meth:`choose` must have been called, or the way is given. The latents are taken to be
        inside their supports.
        """
        return log_joint((way or self.way)(latents, size, inside=set(latents)))

    def choose(self, latents: Values, size: int) -> None:
        """Choose how to run, by what a few of S draws get that way and alone; once.

        The inspected draw is compared as well.
        """
        few = _few(size)
        rows, before = _rows(latents, few), self._inspected_beside(latents)
        while self._ways[1:] and not self.chosen:
            self.chosen = differs(self, rows, len(few), self.way, before) is None
            self._ways = self._ways if self.chosen else self._ways[1:]
        self.chosen = True

    def _inspected_beside(self, latents: Values) -> Outcome | None:
        """What the inspected draw got, if it can be put beside these."""
        known = self.inspected
        return known if known is not None and _kinds(known.latents) == _kinds(latents) else None

    def keep_records(self, latents: Values) -> None:
        """Make a run of its own, at the first draw, and keep its records."""
        if not self.records:
            self.records = self._run(self.model, _rows(latents, 0))

    def inspect(self, drawn: Values) -> Trace:
        """Run the model at one draw of a guide, and keep the records and what the draw gets."""
        drawn = {name: tensor_of(value).detach()[None] for name, value in drawn.items()}
        moving = {n: v.clone().requires_grad_() for n, v in drawn.items() if v.is_floating_point()}
        try:
            with torch.enable_grad():
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

    def by_vmap(self, latents: Values, size: int, inside: Iterable[str] = ()) -> Sites:
        """Side by side, each as if it were alone: by construction, where torch can do it."""
        origins = {name: o for name, value in latents.items() if (o := preimage(value))}

        def alone(_: Tensor, values: Values, z: Values) -> tuple[Values, Values]:
            for name, latent in z.items():
                remember(values[name], latent, origins[name].support)
            return tensors_of(self._run(self.model, values, inside))

        run = torch.func.vmap(alone, randomness="different" if self.predict else "error")
        z = {name: origin.latent for name, origin in origins.items()}
        values, log_probs = run(torch.arange(size, device="cpu"), latents, z)
        return {
            name: SiteRuns(value, log_probs.get(name), self.records.get(name, {}))
            for name, value in values.items()
        }

    def in_plate(self, latents: Values, size: int, inside: Iterable[str] = ()) -> Sites:
        """Side by side in a plate around the model, as Pyro's ELBOs vectorise particles."""
        if self.depth is None:
            raise ValueError("the depth of the model's plates is not known")
        self.keep_records(latents)
        values = {
            name: moved(value, self._outermost, self.records[name]["fn"].event_dim)
            for name, value in latents.items()
            if name in self.records
        }
        plate = pyro.plate(PLATE, size, dim=-1 - self.depth)
        run = self._run(plate(self.model), values, inside)
        return {name: SiteRuns.of(run[name], size, record) for name, record in self.records.items()}

    def one_by_one(self, latents: Values, size: int, inside: Iterable[str] = ()) -> Sites:
        """A run for each draw."""
        first: Run | None = None
        parts = []
        for index in range(size):
            run = self._run(self.model, _rows(latents, index), inside)
            first = first or run
            check_same_sites(run, first)
            parts.append(
                {name: SiteRuns.of(run[name], 1, record) for name, record in first.items()}
            )
        return joined(parts)

    def _run(self, model: Callable, values: Values, inside: Iterable[str] = ()) -> Run:
        with quietly():
            run = self._scored(self._trace(model, values | self.subsample), inside)
        if not self.predict:
            check_latents(run, values)
        return run

    def _trace(self, model: Callable, values: Values) -> Trace:
        given = Given(values)(Unobserve()(model) if self.predict else model)
        with poutine.block():
            return poutine.trace(given).get_trace(*self.args, **self.kwargs)

    def _scored(self, trace: Trace, inside: Iterable[str] = ()) -> Run:
        """The records of a run, with log densities; −inf off the supports."""
        for name, record in trace.nodes.items():
            if record["type"] == "sample" and site_is_subsample(record):
                self.subsample[name] = record["value"]
        trace = prune_subsample_sites(trace)
        trace.compute_log_prob(site_filter=lambda _, record: not is_deterministic(record))
        sampled = {n: site for n, site in trace.nodes.items() if site["type"] == "sample"}
        for name, record in sampled.items():
            outside = outside_support(record, inside=name in inside)
            if outside is not None:
                record["log_prob"] = record["log_prob"].masked_fill(outside, -torch.inf)
        return sampled

    def _outermost(self, value: Tensor, event_dim: int) -> Tensor:
        """Draws of a site, shape (S, *batch, *event), with S left of all plates."""
        missing = self.depth - (value.ndim - 1 - event_dim)
        if missing < 0:
            raise ValueError("the site has dimensions outside the plates, where the draws belong")
        return value.reshape(value.shape[:1] + (1,) * missing + value.shape[1:])


def _kinds(values: Values) -> dict[str, tuple]:
    return {name: (v.shape[1:], v.dtype, v.device) for name, v in values.items()}


def _few(size: int) -> list[int]:
    return sorted({0, size // 2, size - 1})


def _rows(values: Values, index: Sequence[int] | int) -> Values:
    def move(t: Tensor, _: int) -> Tensor:
        whole = isinstance(index, int)
        return t[index] if whole else t[torch.tensor(list(index), device=t.device)]

    return {name: moved(value, move) for name, value in values.items()}
