"""The eleven hierarchies: Pyro model, data, reference draws and log evidence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyroflow.seeds import seeded

from ..judging import LEVELS, Reference, from_draws, supports
from . import ports

ROOT = Path(__file__).resolve().parents[3]
FOLDER = Path(os.environ.get("PYROFLOW_HIERARCHIES", ROOT.parent / "shared/data/hierarchies"))

INTEGERS = {"county", "rat", "site", "year", "group"}  # data that are indices


@dataclass(frozen=True)
class Port:
    """A Pyro model, and the data that are its arguments."""

    model: Callable
    arguments: tuple[str, ...]


PORTS = {
    "neal-funnel_10": Port(ports.neal_funnel, ("dim",)),
    "radon_mn-intercept": Port(ports.radon, ("J", "county", "log_uranium", "floor", "log_radon")),
    "rats-slopes_lkj": Port(ports.rats, ("J", "rat", "week", "weight")),
    "peregrine-sites_years_poisson": Port(ports.peregrine, ("S", "T", "site", "year", "count")),
    "peregrine-latent_gp_poisson": Port(ports.latent_gp, ("decade", "count")),
    "uk_drivers-random_walk": Port(
        ports.random_walk, ("log_drivers", "log_price", "belt_law", "season")
    ),
    "irt-2pl": Port(ports.irt, ("y",)),
    "synthetic-normal_1000": Port(ports.normal_groups, ("J", "group", "y")),
    "synthetic-label_switching": Port(ports.label_switching, ("y",)),
    "synthetic-horseshoe": Port(ports.horseshoe, ("X", "y")),
    "seeds-binomial": Port(ports.seeds, ("n", "germinated", "seed", "extract")),
}
NAMES = tuple(PORTS)


@dataclass(frozen=True)
class Hierarchy:
    """A posterior with its reference.

    Attributes:
        name: of the JSON file.
        model: the Pyro model, called as ``model(*args)``.
        args: its data, numbers in torch's default dtype.
        draws: reference draws as values of the model's sites, shape (S, *site), in float64.
        log_joint: the stored log joint at each of them, shape (S,).
        reference: moments of all columns, on the unconstrained scale.
        log_evidence: with an error of 0.00 to 0.04, 0.1 for the item responses.
    """

    name: str
    model: Callable
    args: tuple
    draws: dict[str, Tensor]
    log_joint: Tensor
    reference: Reference
    log_evidence: float


def load(name: str, folder: str | Path | None = None) -> Hierarchy:
    """One of the hierarchies ``NAMES`` from its files.

    Args:
        name: of the JSON file.
        folder: where the files are; by default ``FOLDER``, which the environment variable
            PYROFLOW_HIERARCHIES sets.

    Raises:
        ValueError: If the name is unknown, or there are no such files.
    """
    if name not in PORTS:
        raise ValueError(f"name must be one of {', '.join(PORTS)}; got {name!r}")
    path = Path(folder or FOLDER) / f"{name}.json"
    if not path.exists():
        raise ValueError(f"there is no {path}: set PYROFLOW_HIERARCHIES to the folder it is in")
    port, stored = PORTS[name], json.loads(path.read_text())
    args = tuple(_argument(key, stored["data"][key]) for key in port.arguments)
    with np.load(path.with_name(f"{name}.draws.npz")) as arrays:
        table = torch.from_numpy(arrays["draws_full" if "draws_full" in arrays else "draws"])
        log_joint = torch.from_numpy(arrays["log_joint"])
    draws = by_site(table.double(), stored["sites"])
    return Hierarchy(
        name,
        port.model,
        args,
        draws,
        log_joint,
        _reference(name, port.model, args, draws, stored),
        stored["log_normalizer"]["value"],
    )


def by_site(table: Tensor, sites: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The columns of a table (S, C) as values of the sites; ``rho`` as a 2 x 2 Cholesky factor."""
    draws, start = {}, 0
    for site in sites:
        shape = torch.Size(site["shape"])
        if site["support"] == "corr_cholesky":
            rho, start = table[:, start], start + 1
            rows = [torch.ones_like(rho), torch.zeros_like(rho), rho, (1 - rho**2).sqrt()]
            draws[site["name"]] = torch.stack(rows, -1).reshape(-1, 2, 2)
        else:
            end = start + shape.numel()
            draws[site["name"]], start = table[:, start:end].reshape(-1, *shape), end
    return draws


def log_joint(model: Callable, args: tuple, values: dict[str, Tensor]) -> float:
    """The log joint of a model at values of its sites, constrained."""
    conditioned = poutine.condition(model, data=values)
    return poutine.trace(conditioned).get_trace(*args).log_prob_sum().item()


def _argument(key: str, value: Any) -> Any:
    if isinstance(value, int):
        return value
    dtype = torch.long if key in INTEGERS else torch.get_default_dtype()
    return torch.tensor(value, dtype=dtype)


def _reference(
    name: str, model: Callable, args: tuple, draws: dict[str, Tensor], stored: dict[str, Any]
) -> Reference:
    """Stored moments of more draws than are kept; the funnel's x by quantiles."""
    by_name = supports(model, args)
    by_name = {site["name"]: by_name[site["name"]] for site in stored["sites"]}
    if name == "neal-funnel_10":
        return from_draws(_funnel(stored["data"]["dim"]), by_name, heavy=("x",))
    stats = stored["reference"]
    mean, sd = (
        torch.tensor(stats[f"{key}_unconstrained"], dtype=torch.float64) for key in ("mean", "sd")
    )
    few = from_draws(draws, by_name)
    return replace(
        few, mean=mean, sd=sd, quantiles=mean.new_full((len(LEVELS), len(mean)), torch.nan)
    )


def _funnel(dim: int, num: int = 200_000) -> dict[str, Tensor]:
    with seeded(0):
        v = 3 * torch.randn(num, dtype=torch.float64)
        x = (v / 2).exp()[:, None] * torch.randn(num, dim, dtype=torch.float64)
    return {"v": v, "x": x}
