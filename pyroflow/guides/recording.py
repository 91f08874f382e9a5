"""Coordinates recorded from a model, and c spread over them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

from pyroflow.guides.coordinates import Coordinates, Description
from pyroflow.model.at_hand import AtHand, Rows, Subsampling, dims_of, places_at_hand
from pyroflow.model.centring import Prior, conditionals, nothing_downstream, powers
from pyroflow.model.comparison import FAILURES
from pyroflow.model.latents import Latents
from pyroflow.model.locations import Filled, Moves, is_wide
from pyroflow.model.recorded import Recorded
from pyroflow.model.records import quietly
from pyroflow.model.sites import LatentSite

Number = Callable[[str, Prior | None], Tensor]
NOTHING = nullcontext()
MOST_SITES = 20  # that are moved: each takes operations of its own, and loops write many


def coordinates_of(
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    latents: Latents,
    start: Tensor,
    centring: Mapping[str, float | Tensor] | None = None,
    part: tuple[Latents, Subsampling] | None = None,
) -> Coordinates | None:
    """The coordinates of a model as it is written, c = 1; None where there are none to choose.

    There are none if no prior takes location or scale from other latents, if more than 20 sites
    do, such as the steps of a walk in a loop, or if what they take cannot be recorded: control flow
    that depends on latents, random numbers, unknown operations.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        latents: the table of its latents.
        start: unconstrained latents, shape (D,), at which it is run.
        centring: c by site, of ``LocScaleReparam``; else c is 1, to be found.
        part: where plates subsample, the table of the latents that one run draws, and the plates.
    """
    # The handler with which Pyro's guides start latents would sample before they are given.
    while isinstance(model, partial) and isinstance(model.func, partial):
        handler, inner = model.func.args
        if not isinstance(handler, InitMessenger):
            break
        model = inner

    def run(table: Latents, number: Number, rows: AbstractContextManager = NOTHING) -> None:
        with quietly(), poutine.block(), Filled(table, number), rows:
            model(*args, **kwargs)

    priors = _Priors(run, latents) if part is None else _PriorsInFull(run, latents, *part)
    try:
        return _recorded(priors, latents, start.detach(), given=centring is not None)
    except FAILURES:
        return None


class _Priors:
    """The priors of a model's latents.

    Attributes:
        found: by site, its prior in the last run.
    """

    def __init__(self, run: Callable, latents: Latents) -> None:
        self.run, self.latents = run, latents
        self.found: dict[str, Prior | None] = {}

    def at(self, z: Tensor) -> list[Tensor]:
        """Location, scale and information of each site that has them, in turn, at z (D,)."""
        return self._at(z, self.latents)

    def _at(self, z: Tensor, table: Latents, *rows: AtHand) -> list[Tensor]:
        pieces = table.unpack(z)

        def number(name: str, prior: Prior | None) -> Tensor:
            self.found[name] = prior
            return pieces[name]

        self.run(table, number, *rows)
        kept = [(self.found[site.name], site.unconstrained_shape) for site in table]
        return [t for prior, shape in kept if prior is not None for t in prior.expand(shape)]

    def located(self) -> list[str]:
        """The sites that have them."""
        return [site.name for site in self.latents if self.found[site.name] is not None]

    def give(self, moves: Moves) -> None:
        """Give each site's prior to the moves, at the numbers that the sites before it have."""
        self.run(self.latents, moves)


class _PriorsInFull(_Priors):
    """The same with all rows of plates that subsample, by runs side by side that cover them."""

    def __init__(self, run: Callable, latents: Latents, batch: Latents, sizes: Subsampling) -> None:
        super().__init__(run, latents)
        self.batch, self.sizes, cover = batch, sizes.plates, sizes.cover()
        self.places = torch.stack([places_at_hand(latents, rows.index) for rows in cover])
        self.index = {n: torch.stack([rows.index[n] for rows in cover]) for n in self.sizes}

    def at(self, z: Tensor) -> list[Tensor]:
        """As in one run of all rows."""

        def alone(z: Tensor, index: dict[str, Tensor]) -> list[Tensor]:
            weights = {name: torch.ones(B, device=z.device) for name, (_, B) in self.sizes.items()}
            return self._at(z, self.batch, AtHand(Rows(index, weights)))

        index = {name: rows.to(z.device) for name, rows in self.index.items()}
        parts = torch.func.vmap(alone)(z[self.places.to(z.device)], index)
        sites = [self.latents.sites[name] for name in self.located() for _ in range(3)]
        return [self._joined(t, site) for t, site in zip(parts, sites, strict=True)]

    def _joined(self, parts: Tensor, site: LatentSite) -> Tensor:
        """One tensor of all rows, from those of the runs (K, *)."""
        found = parts.unflatten(0, [-(-N // B) for N, B in self.sizes.values()])
        dims = {n: dim for dim, n in dims_of(site.plates, len(site.batch_shape), self.sizes)}
        for left, (name, (N, _)) in zip(itertools.count(1 - len(self.sizes)), self.sizes.items()):
            at = dims.get(name)
            # Not by a view, which the recorded constants, of other strides, would not allow.
            found = found[0] if at is None else torch.cat(found.unbind(0), at - left)
            found = found if at is None else found.narrow(at - left, 0, N)
        return found

    def give(self, moves: Moves) -> None:
        """By a run for each site that is moved."""
        for site in self.latents:
            prior = None
            if site.name in moves.tensors:
                values = iter(self.at(self.latents.pack(moves.x | moves.z)))
                three = {name: [next(values) for _ in range(3)] for name in self.located()}
                prior = Prior(*three[site.name], self.found[site.name].matrix)
            moves(site.name, prior)


def _recorded(
    priors: _Priors, latents: Latents, start: Tensor, *, given: bool
) -> Coordinates | None:
    read = Recorded.of(lambda z: priors.at(z), start)  # a function, as no method can be recorded
    located = priors.located()
    parts = [read.outputs[i : i + 3] for i in range(0, len(read.outputs), 3)]
    # What depends on no latent was computed when it was recorded.
    fixed = [all("constant" in part for part in three[:2]) for three in parts]
    moved = [name for name, alone in zip(located, fixed, strict=True) if not alone]
    if not 0 < len(moved) <= MOST_SITES:
        return None
    outputs = [t for three, alone in zip(parts, fixed, strict=True) if not alone for t in three]
    sites = _places(latents, {name: priors.found[name].matrix for name in moved})
    c = torch.ones_like(start)
    read = Recorded(read.steps, read.constants, outputs)
    tensors = _tensors(sites, read, c, start, given)
    counts = {name: len(own) for name, own in zip(moved, tensors, strict=True)}

    def to_z(x: Tensor, c: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        moves = Moves(latents, counts, x, c, *tensors)
        priors.give(moves)
        return moves.result()

    recorded = Recorded.of(to_z, start, c, *(t for own in tensors for t in own))
    return Coordinates(sites, recorded, read, c, tensors)


def _tensors(
    sites: list[Description], read: Recorded, c: Tensor, z: Tensor, given: bool
) -> list[list[Tensor]]:
    """The tensors of each site's map, with c = 1."""
    values, found = iter(read(z)), []
    for site in sites:
        prior = Prior(next(values), next(values), next(values), site["matrix"])
        at, piece = (t[site["start"] : site["stop"]].reshape(site["shape"]) for t in (c, z))
        own = powers(prior, at) if given else None
        u = torch.cat([z[:0], *(z[start:stop] for start, stop in site["before"])])
        own = own or conditionals(prior, at, piece, u, nothing_downstream(prior, len(u)))
        found.append([t.clone() for t in own])
    return found


def _places(latents: Latents, matrices: Mapping[str, bool]) -> list[Description]:
    """Where the numbers of the moved sites are."""
    sites, stop, before = [], 0, []
    for site, size in zip(latents, latents.sizes, strict=True):
        start, stop = stop, stop + size
        if site.name in matrices:
            shape, matrix = list(site.unconstrained_shape), matrices[site.name]
            place = {"name": site.name, "start": start, "stop": stop}
            sites.append(place | {"before": before, "shape": shape, "matrix": matrix})
        before = before if is_wide(site) else [*before, [start, stop]]
    return sites


def spread(coordinates: Coordinates, centring: Mapping[str, float | Tensor]) -> Tensor:
    """One vector c, shape (D,), from c by site; 1 for all others.

    Raises:
        ValueError: If a tensor does not broadcast to the unconstrained shape of its site.
    """
    c = torch.ones_like(coordinates.c)
    for site in coordinates.sites:
        given = torch.as_tensor(centring.get(site["name"], 1.0), dtype=c.dtype, device=c.device)
        try:
            c[site["start"] : site["stop"]] = given.expand(site["shape"]).reshape(-1)
        except RuntimeError:
            raise ValueError(
                f"centring expects c for site {site['name']!r} as a number or with shape "
                f"{tuple(site['shape'])}, got {tuple(given.shape)}"
            ) from None
    return c
