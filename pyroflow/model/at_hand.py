"""Models whose plates draw a part of their rows, as functions of the rows at hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import NonlocalExit
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor

from pyroflow.model.latents import Latents
from pyroflow.model.records import Values
from pyroflow.model.sites import LatentSite


class Rows(NamedTuple):
    """Rows of plates, by the plate's name: their numbers, and how many rows each stands for."""

    index: Values
    weights: Values

    def to(self, like: Tensor) -> Rows:
        """With the dtype and device of a tensor."""
        index = {name: rows.to(like.device) for name, rows in self.index.items()}
        return Rows(index, {name: weights.to(like) for name, weights in self.weights.items()})


@dataclass(frozen=True)
class Subsampling:
    """The plates that draw a part of their rows: by name, N and how many are drawn, B."""

    plates: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, trace: Trace) -> Subsampling:
        """Those of a run of the model."""
        sites = {n: s["fn"] for n, s in trace.nodes.items() if s["type"] == "sample"}
        sites = {n: sites[n] for n in sites if site_is_subsample(trace.nodes[n])}
        sizes = {n: (fn.size, fn.subsample_size or fn.size) for n, fn in sites.items()}
        return cls({name: (N, B) for name, (N, B) in sizes.items() if B < N})

    def __str__(self) -> str:
        sizes = self.plates.items()
        return ", and ".join(f"all {N:,} rows of {n!r}, {B:,} at a time" for n, (N, B) in sizes)

    @property
    def parts(self) -> int:
        """How many draws it takes to cover all rows."""
        return math.prod(-(-N // B) for N, B in self.plates.values())

    def draw(self) -> Rows:
        """Rows at random, each of which stands for N/B."""
        index, weights = {}, {}
        for name, (N, B) in self.plates.items():
            index[name] = torch.randperm(N, device="cpu")[:B]
            weights[name] = torch.full((B,), N / B, dtype=torch.float64, device="cpu")
        return Rows(index, weights)

    def cover(self) -> list[Rows]:
        """All rows, in as many draws as it takes: the mean over them is of the plates in full.

        What a draw has room for beyond the last row has weight zero.
        """
        each = [self._cover_of(*sizes) for sizes in self.plates.values()]
        found = []
        for parts in itertools.product(*each):
            named = dict(zip(self.plates, parts, strict=True))
            index, weights = ({n: pair[k] for n, pair in named.items()} for k in (0, 1))
            found.append(Rows(index, weights))
        return found

    @staticmethod
    def _cover_of(N: int, B: int) -> Iterator[tuple[Tensor, Tensor]]:
        K = -(-N // B)
        numbers = torch.arange(K * B, device="cpu")
        weights = K * (numbers < N).double()
        return zip((numbers % N).split(B), weights.split(B), strict=True)


class AtHand(Messenger):
    """Gives the plates of a model their rows, and each row its weight.

    A plate that takes its rows from another one has them too. ValueError: If the model picks the
    rows of a plate itself.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows
        self._same: dict[str, str] = {}  # by plate, the one whose rows it takes

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if site_is_subsample(msg):
            self._give(msg)
            return
        for frame in msg["cond_indep_stack"]:
            own = self._same.get(frame.name)
            if own is not None:
                share = frame.size / frame.full_size
                msg["scale"] = msg["scale"] * (share * self._weight(own, frame.dim))

    def _give(self, msg: dict[str, Any]) -> None:
        index, name, value = self.rows.index, msg["name"], msg["value"]
        if value is None and name in index:
            value = msg["value"] = index[name]
        found = [own for own, rows in index.items() if rows is value]
        if name in index and not found:
            raise ValueError(
                f"the model picks the rows of plate {name!r} itself, by subsample=: let the plate "
                "draw them, by subsample_size="
            )
        self._same.update((name, own) for own in found)

    def total(self, site: LatentSite, parts: Tensor) -> Tensor:
        """The sum over the numbers of a site, each as often as its rows count."""
        parts = sum_rightmost(parts, parts.dim() - len(site.batch_shape))
        for frame in site.plates:
            if frame.name in self.rows.index:
                parts = parts * self._weight(frame.name, frame.dim).to(parts)
        return parts.sum()

    def _weight(self, name: str, dim: int) -> Tensor:
        return self.rows.weights[name].reshape(-1, *(1,) * (-dim - 1))


def with_rows(latents: Latents, sizes: Mapping[str, int]) -> Latents:
    """The table with so many rows of some plates, whose sites move no others."""
    return Latents(_with_rows(site, sizes) for site in latents)


def _with_rows(site: LatentSite, sizes: Mapping[str, int]) -> LatentSite:
    dims = dims_of(site.plates, len(site.batch_shape), sizes)
    batch, shape, value = list(site.batch_shape), list(site.unconstrained_shape), site.value
    for dim, name in dims:
        rows = torch.arange(sizes[name], device=value.device) % batch[dim]
        value = value.index_select(dim, rows)
        batch[dim] = shape[dim] = sizes[name]
    plates = tuple(frame._replace(size=sizes.get(frame.name, frame.size)) for frame in site.plates)
    full = {"batch_shape": Size(batch), "unconstrained_shape": Size(shape), "value": value}
    return replace(site, plates=plates, local=site.local or bool(dims), **full)


def places_at_hand(latents: Latents, index: Values) -> Tensor:
    """Where the numbers of the rows at hand are among those of a full table."""
    found, start = [], 0
    device = next((rows.device for rows in index.values()), torch.device("cpu"))
    for site, size in zip(latents, latents.sizes, strict=True):
        places = torch.arange(start, start + size, device=device).reshape(site.unconstrained_shape)
        start += size
        for dim, name in dims_of(site.plates, len(site.batch_shape), index):
            places = places.index_select(dim, index[name])
        found.append(places.flatten())
    return torch.cat(found)


def dims_of(
    plates: Iterable[CondIndepStackFrame], batch: int, names: Iterable[str]
) -> list[tuple[int, str]]:
    """The dimensions, from the left, of some plates among those around a site."""
    return [(batch + frame.dim, frame.name) for frame in plates if frame.name in names]


class _UntilDrawn(Messenger):
    """Gives a model's latents values, and ends its run once some plates have drawn their rows.

    Of the values, in a table, there are as many rows as the plates of the run have.
    """

    def __init__(self, plates: Sequence[str], latents: Latents) -> None:
        super().__init__()
        self.left, self.sites, self.found = set(plates), latents.sites, {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.sites:
            sizes = {frame.name: frame.size for frame in msg["cond_indep_stack"]}
            (site,) = with_rows(Latents([self.sites[msg["name"]]]), sizes)
            msg["value"], msg["is_observed"] = site.value, True

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        fn, name = msg["fn"], msg["name"]
        if name in self.left and isinstance(fn, _Subsample):
            sizes = {"size": fn.size, "subsample_size": fn.subsample_size}
            self.found[name] = sizes | {"subsample": msg["value"]}
            self.left.remove(name)
            if not self.left:
                raise NonlocalExit(msg)


@torch.no_grad()
def draws_of(
    model: Callable, plates: Sequence[str], latents: Latents, args: tuple, kwargs: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """How a model's plates draw their rows: by name the sizes and indices ``pyro.plate`` takes.

    Only the model knows the size that new data give its plates, and the indices that it may
    pick itself (``subsample=``), which a guide that drew its own would override. It runs up to
    there, with values for its latents, so that none has to be drawn.
    """
    until = _UntilDrawn(plates, latents)
    try:
        with poutine.block(), until:
            model(*args, **kwargs)
    except NonlocalExit:
        return until.found
    plate = min(until.left)
    raise ValueError(
        f"plate {plate!r} was not opened with a size in this run of the model: the guide needs "
        f"pyro.plate({plate!r}, size) in every run"
    )
