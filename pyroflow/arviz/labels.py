"""Arrays of a model's sites as xarray datasets, with the names of their dimensions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from inspect import Parameter
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyroflow.distribution import VERSION
from pyroflow.model.bound import signature_of
from pyroflow.model.records import Record, SiteRuns, Sites, is_deterministic

if TYPE_CHECKING:
    from xarray import Dataset

Dims = Mapping[str, Sequence[str]]
Coords = Mapping[str, Sequence[Hashable]]
# Names of the dimensions, save those of draws, and values, with the draws first if there are any.
Variable = tuple[list[str], np.ndarray]
Group = dict[str, Variable]

SAMPLE = ["chain", "draw"]  # the first dimensions of what is drawn
DATA = ("observed_data", "constant_data", "predictions_constant_data")  # groups without draws


def drawn_sites(sites: Sites, names: Iterable[str]) -> Group:
    """The draws of the sites of these names, as far as they are there."""
    found = {name: sites[name] for name in names if name in sites}
    return {
        name: (_dims(site.record, site.values.shape[1:]), as_array(site.values))
        for name, site in found.items()
    }


def joined(parts: Sequence[Variable]) -> Variable:
    """A variable whose draws come in parts."""
    return parts[0][0], np.concatenate([values for _, values in parts])


def log_likelihood(site: SiteRuns) -> Variable:
    """The log density of a site's data, by draw."""
    return _dims(site.record, site.log_prob.shape[1:], event_dim=0), as_array(site.log_prob)


def observed_values(record: Record) -> Variable:
    """The data of a site, as many as the model scores."""
    value = record["value"]
    event = value.shape[value.ndim - record["fn"].event_dim :]
    value = value.expand(record["log_prob"].shape + event)
    return _dims(record, value.shape), as_array(value)


def _dims(record: Record, shape: Sequence[int], event_dim: int | None = None) -> list[str]:
    """Names of dimensions: the site's plates, its ``event_dims``, or ``{site}_dim_0`` and so on."""
    plates = {frame.dim: frame for frame in record["cond_indep_stack"] if frame.vectorized}
    if event_dim is None:
        event_dim = record["fn"].event_dim
        if is_deterministic(record) and event_dim == len(shape):
            # pyro.deterministic calls all dimensions the event's, those of plates too, unless told
            event_dim = max(len(shape) + min(plates, default=0), 0)
    events, number = dict(enumerate(record["infer"].get("event_dims", ()))), count()
    dims = []
    for place, size in enumerate(shape, start=event_dim - len(shape)):  # below 0 in the batch
        if place in plates and plates[place].size == size:
            dims.append(plates[place].name)
        else:
            dims.append(events.get(place) or f"{record['name']}_dim_{next(number)}")
    return dims


def as_array(value: Tensor | np.ndarray) -> np.ndarray:
    """A copy in numpy."""
    return np.array(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)


def named_arguments(model: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by the model's signature, the entries of dictionaries by their keys."""
    bound = signature_of(model).bind(*args, **kwargs)
    named = {}
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is Parameter.VAR_POSITIONAL:
            named |= {f"{name}_{i}": entry for i, entry in enumerate(value)}
        elif isinstance(value, Mapping):
            named |= {str(key): entry for key, entry in value.items()}
        else:
            named[name] = value
    return named


def datasets(
    groups: dict[str, Group],
    dims: Dims,
    coords: Coords,
    predictions_coords: Coords,
    num_chains: int = 1,
) -> dict[str, Dataset]:
    """The groups as datasets, with the caller's names of dimensions and labels.

    A plate named "chain" or "draw" becomes ``{plate}_plate``; labels are 0, 1, … by default.
    Draws come chain by chain.

    Raises:
        ValueError: If a name is nowhere; if a variable has another number of dimensions, or a
            dimension another size, than the caller says.
        TypeError: If a string stands in place of a list of names.
    """
    _check_known("dims", dims, groups.values())
    for name, given in dims.items():
        if isinstance(given, str):
            raise TypeError(f"dims[{name!r}] must be a list of names, got the string {given!r}")
    named = {
        group: {
            n: _named(group, n, variable, dims, num_chains) for n, variable in variables.items()
        }
        for group, variables in groups.items()
    }
    sizes = {
        group: {
            d: n for names, v in variables.values() for d, n in zip(names, v.shape, strict=True)
        }
        for group, variables in named.items()
    }
    ahead = {group: size for group, size in sizes.items() if group.startswith("predictions")}
    _check_known("coords", coords, sizes.values())
    _check_known("predictions_coords", predictions_coords, ahead.values())
    labels = dict.fromkeys(groups, coords)
    for group, size in ahead.items():
        fitting = {dim: given for dim, given in coords.items() if len(given) == size.get(dim)}
        labels[group] = {**fitting, **predictions_coords}
    return {group: _dataset(named[group], sizes[group], labels[group]) for group in groups}


def _check_known(argument: str, given: Mapping, groups: Iterable[Mapping]) -> None:
    known = {name for group in groups for name in group}
    for name in given:
        if name not in known:
            raise ValueError(f"{argument} has an entry {name!r}, expected some of {sorted(known)}")


def _named(group: str, name: str, variable: Variable, dims: Dims, num_chains: int) -> Variable:
    """A variable with all of its dimensions, chains too; names may be the caller's."""
    own, values = variable
    names = list(dims.get(name, [f"{dim}_plate" if dim in SAMPLE else dim for dim in own]))
    if group == "log_likelihood":  # of a site without its event dimensions
        names = names[: len(own)]
    if len(names) != len(own):
        raise ValueError(f"dims[{name!r}] must name {len(own)} dimensions, like {own}; got {names}")
    if group in DATA:
        return names, values
    return SAMPLE + names, values.reshape(num_chains, len(values) // num_chains, *values.shape[1:])


def _sizes(group: Group) -> dict[str, int]:
    return {d: n for dims, v in group.values() for d, n in zip(dims, v.shape, strict=True)}


def _dataset(group: Group, sizes: Mapping[str, int], coords: Coords) -> Dataset:
    from xarray import Dataset

    labels = {dim: np.asarray(coords.get(dim, range(size))) for dim, size in sizes.items()}
    for dim, size in sizes.items():
        if labels[dim].shape != (size,):
            raise ValueError(
                f"coords[{dim!r}] must be a list of {size} labels, got shape {labels[dim].shape}"
            )
    attributes = {
        "created_at": datetime.now(timezone.utc).isoformat(),
        "inference_library": "pyroflow",
        "inference_library_version": VERSION,
    }
    return Dataset(group, coords=labels, attrs=attributes)
