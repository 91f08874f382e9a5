"""The latents of a model, split into those of the rows of a plate and the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine import Trace
from torch import Size, Tensor

from pyroflow.model.supports import bijection


@dataclass
class LocalSites:
    """The sites with one value for each row of a plate, joined to one vector of D a row.

    Attributes:
        shapes: the unconstrained event shape of each site, by name, in the model's order.
        init_loc: the mean over rows of the unconstrained start values, shape (D,).
        dim: the plate's dimension, negative.
        size: N, the rows of the plate in full.
        global_names: the other sites.
    """

    shapes: dict[str, Size]
    init_loc: Tensor
    dim: int
    size: int
    global_names: list[str]

    @classmethod
    def split(cls, trace: Trace, plate: str) -> LocalSites:
        """Find the local sites in a trace of a model's latents.

        Raises:
            RuntimeError: no latents.
            ValueError: no latent in the plate, or one that the guide cannot treat (naming it).
        """
        sites = dict(trace.iter_stochastic_nodes())
        frames = {f.name: f for site in sites.values() for f in site["cond_indep_stack"]}
        if not sites:
            raise RuntimeError("AmortizedPlanarGuide found no latent variables; use an empty guide")
        if plate not in frames:
            listed = ", ".join(sorted(map(repr, frames))) or "none; use AutoPlanarFlow"
            raise ValueError(
                f"plate must name a plate that holds latents, got {plate!r}; those of the model "
                f"are in: {listed}"
            )
        local = {n: s for n, s in sites.items() if plate in _plates(s)}
        others = {n: s for n, s in sites.items() if n not in local}
        for name, site in local.items():
            _check_alone(name, site, plate)
        for name, site in others.items():
            _check_in_full(name, site, plate)
        frame = frames[plate]
        starts = {n: _unconstrained_rows(s, frame.dim) for n, s in local.items()}
        vectors = [start.reshape(len(start), -1) for start in starts.values()]
        return cls(
            shapes={n: start.shape[1:] for n, start in starts.items()},
            init_loc=torch.cat(vectors, -1).mean(0),
            dim=frame.dim,
            size=frame.full_size or frame.size,
            global_names=list(others),
        )

    @property
    def names(self) -> list[str]:
        """The local sites."""
        return list(self.shapes)

    @property
    def trailing(self) -> int:
        """How many batch dimensions stand right of the plate's."""
        return -self.dim - 1

    def unpack(self, local: Tensor) -> dict[str, Tensor]:
        """Split vectors of shape (*B, D) into unconstrained values by site, (*B, *event)."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        pieces = zip(self.shapes.items(), local.split(sizes, -1), strict=True)
        return {name: piece.reshape(local.shape[:-1] + shape) for (name, shape), piece in pieces}

    def with_trailing_dims(self, local: Tensor) -> Tensor:
        """Shape (*B, N, D) as (*B, N, 1, ..., 1, D), so that N stands at the plate's place."""
        return local.reshape(*local.shape[:-1], *(1,) * self.trailing, local.shape[-1])


def _plates(site: dict[str, Any]) -> list[str]:
    return [frame.name for frame in site["cond_indep_stack"]]


def _check_alone(name: str, site: dict[str, Any], plate: str) -> None:
    others = [other for other in _plates(site) if other != plate]
    if others:
        raise ValueError(
            f"site {name!r} lies in plate {others[0]!r} as well as in {plate!r}: nested plates "
            f"are not supported; in place of plate {others[0]!r} make its dimension one of the "
            "site's event, with .expand([...]).to_event(1)"
        )


def _check_in_full(name: str, site: dict[str, Any], plate: str) -> None:
    for frame in site["cond_indep_stack"]:
        if frame.full_size is not None and frame.size < frame.full_size:
            raise ValueError(
                f"site {name!r} is a latent in plate {frame.name!r}, which subsamples "
                f"{frame.size} of {frame.full_size} rows, and the guide has local latents for "
                f"plate {plate!r} only: run plate {frame.name!r} in full, or integrate the site "
                "out of the model"
            )


def _unconstrained_rows(site: dict[str, Any], dim: int) -> Tensor:
    """The unconstrained start values of a local site, shape (B, *event)."""
    fn, value = site["fn"], site["value"]
    with helpful_support_errors(site):
        transform = bijection(fn.support)
    start = transform.inv(value)
    rows = value.shape[dim - fn.event_dim]
    batch = value.shape[: value.dim() - fn.event_dim]
    start = start.reshape(rows, *start.shape[len(batch) :])
    one = start[:1].reshape(*(1,) * len(batch), *start.shape[1:])
    if transform(one).shape[: len(batch)] != (1,) * len(batch):
        raise ValueError(
            f"site {site['name']!r} has a support that differs between rows, which a guide cannot "
            "know of rows that were not drawn: sample it on a fixed support and move it in the "
            "model"
        )
    return start
