"""A Pyro model or guide, run at given values of its latents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

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
    joined,
    outside_support,
    quietly,
    tensor_of,
    tensors_of,
)
from pyroflow.model.supports import moved, preimage, remember

PLATE = "num_particles_vectorized"  # Pyro's own name for the plate around a model
NUMBERS = 2**22  # in the values of draws side by side, to bound the memory
# Numbers of data, in all and for each of so many latents at most, above which a draw is dear.
CHEAP, EACH, LATENTS = 5000, 50, 256


class Program:
    """A Pyro model or guide with its arguments, run at given values of its latents.

    Args:
        model: the Pyro model; ``args`` and ``kwargs``: its arguments.
        depth: how many dimensions its plates take; None if it is not to run in a plate.
        predict: whether the observed sites are sampled as well, and not read from the data.

    Attributes:
        subsample: by name, the rows that plates drew, which all runs share; cleared by the owner.
        records: Pyro's records of a run of its own, once there was one.
    """

    def __init__(
        self,
        model: Callable,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
        depth: int | None = None,
        predict: bool = False,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs or {}
        self.depth, self.predict = depth, predict
        self.subsample: Values = {}
        self.records: Run = {}

    def keep_records(self, latents: Values) -> None:
        """Make a run of its own, at the first draw, and keep its records."""
        if not self.records:
            self.records = self._run(self.model, rows_of(latents, 0))

    def numbers(self, *, observed: bool) -> int:
        """In the values of the data, or of the latents; of their size is the cost of a draw."""
        sites = [s for s in self.records.values() if "log_prob" in s]
        return sum(tensor_of(s["value"]).numel() for s in sites if s["is_observed"] == observed)

    @property
    def dear(self) -> bool:
        """Whether the data are so many that a draw costs much, and a posterior is nearly normal."""
        data, latents = self.numbers(observed=True), self.numbers(observed=False)
        return latents <= LATENTS and data > max(CHEAP, EACH * latents)

    def few(self, num: int, least: int, *, rows: bool = False) -> int:
        """So many draws, or fewer where each is dear, or of many ``rows`` that it averages over."""
        if rows and (latents := self.numbers(observed=False)) > LATENTS:
            return max(min(num, least), num * LATENTS // latents)
        if not self.dear:
            return num
        return max(min(num, least), num * CHEAP // self.numbers(observed=True))

    def at_once(self, num: int) -> int:
        """So many draws, or as many as the memory has room for."""
        numbers = self.numbers(observed=True) + self.numbers(observed=False)
        return max(1, min(num, NUMBERS // max(1, numbers)))

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
            run = self._run(self.model, rows_of(latents, index), inside)
            first = first or run
            check_same_sites(run, first)
            parts.append(
                {name: SiteRuns.of(run[name], 1, record) for name, record in first.items()}
            )
        return joined(parts)

    def filled(self, fill: Messenger, inside: Iterable[str]) -> Run:
        """One run, in which a handler gives the latents their values."""
        with quietly(), poutine.block():
            trace = poutine.trace(fill(self.model)).get_trace(*self.args, **self.kwargs)
            return self._scored(trace, inside)

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


def rows_of(values: Values, index: Sequence[int] | int) -> Values:
    """The draws at some places, or the one at a place, with the latents that they remember."""

    def move(t: Tensor, _: int) -> Tensor:
        whole = isinstance(index, int)
        return t[index] if whole else t[torch.tensor(list(index), device=t.device)]

    return {name: moved(value, move) for name, value in values.items()}
