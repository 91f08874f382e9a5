"""Arrays of a model's sites as xarray datasets, with the names of their dimensions."""

from __future__ import annotations

import datetime
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyroflow.model.records import SiteRuns, Sites, is_deterministic

if TYPE_CHECKING:
    from xarray import Dataset

Dims = Mapping[str, Sequence[str]]
Coords = Mapping[str, Sequence[Hashable]]
Variable = tuple[list[str], np.ndarray]  # names of the dimensions, values
Group = dict[str, Variable]

SAMPLE = ["chain", "draw"]  # the first dimensions of what is drawn


def site_dims(record: dict[str, Any], shape: Sequence[int], event_dim: int) -> list[str]:
    """Names of a site's dimensions: its plates, its ``event_dims``, or ``{site}_dim_0`` and so on.

    Args:
        record: Pyro's record of the site.
        shape: of the values to label, without draws.
        event_dim: how many of these dimensions are the event's.
    """
    plates = {frame.dim: frame for frame in record["cond_indep_stack"] if frame.vectorized}
    batch, number = len(shape) - event_dim, count()
    events = record["infer"].get("event_dims", ())
    dims = []
    for axis, size in enumerate(shape):
        frame = plates.get(axis - batch)
        if frame is not None and frame.size == size:
            dims.append(frame.name)
        elif 0 <= axis - batch < len(events):
            dims.append(events[axis - batch])
        else:
            dims.append(f"{record['name']}_dim_{next(number)}")
    return dims


def value_dims(record: dict[str, Any], shape: Sequence[int]) -> list[str]:
    """Names of the dimensions of a site's value."""
    event_dim = record["fn"].event_dim
    outermost = min((f.dim for f in record["cond_indep_stack"] if f.vectorized), default=0)
    if is_deterministic(record) and event_dim == len(shape):
        # pyro.deterministic calls all dimensions the event's, those of plates too, unless told
        event_dim = max(len(shape) + outermost, 0)
    return site_dims(record, shape, event_dim)


def drawn_sites(sites: Sites, names: Iterable[str]) -> Group:
    """The draws of the sites of these names, as far as they are there."""
    found = {name: sites[name] for name in names if name in sites}
    return {
        name: drawn(value_dims(site.record, site.values.shape[1:]), site.values)
        for name, site in found.items()
    }


def drawn(dims: list[str], values: Tensor) -> Variable:
    """Draws of shape (S, *shape), with names for the dimensions of ``shape``, as one chain."""
    return SAMPLE + dims, as_array(values)[None]


def log_likelihood(site: SiteRuns) -> Variable:
    """The log density of a site's data, by draw."""
    return drawn(site_dims(site.record, site.log_prob.shape[1:], event_dim=0), site.log_prob)


def observed_values(record: dict[str, Any]) -> Variable:
    """The data of a site, as many as the model scores."""
    value = record["value"]
    event = value.shape[value.ndim - record["fn"].event_dim :]
    value = value.expand(record["log_prob"].shape + event)
    return value_dims(record, value.shape), as_array(value)


def as_array(value: Tensor | np.ndarray) -> np.ndarray:
    """A copy in numpy."""
    return np.array(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)


def named_arguments(model: Callable, args: tuple, kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """The arguments by the model's signature, the entries of dictionaries by their keys."""
    while isinstance(model, partial) and isinstance(model.func, partial):
        model = model.func.args[1]  # in a handler of Pyro, which hides the signature
    signature = inspect.signature(getattr(model, "forward", model))
    named = []
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named += [(f"{name}_{i}", entry) for i, entry in enumerate(value)]
        elif isinstance(value, Mapping):
            named += [(str(key), entry) for key, entry in value.items()]
        else:
            named.append((name, value))
    return named


def renamed(groups: dict[str, Group], dims: Dims) -> dict[str, Group]:
    """The groups with the caller's names of dimensions.

    A plate named "chain" or "draw" becomes ``{plate}_plate``.

    Raises:
        ValueError: a name that no variable has; another number of dimensions than it has.
        TypeError: a string in place of a list.
    """
    known = {name for group in groups.values() for name in group}
    for name, given in dims.items():
        if name not in known:
            raise ValueError(f"dims has an entry {name!r}, expected some of {sorted(known)}")
        if isinstance(given, str):
            raise TypeError(f"dims[{name!r}] must be a list of names, got the string {given!r}")
    return {
        group: {
            name: (_names(group, name, names, dims), values)
            for name, (names, values) in variables.items()
        }
        for group, variables in groups.items()
    }


def _names(group: str, name: str, names: list[str], dims: Dims) -> list[str]:
    start = len(SAMPLE) if names[: len(SAMPLE)] == SAMPLE else 0
    sample, own = names[:start], names[start:]
    if name not in dims:
        return sample + [f"{dim}_plate" if dim in SAMPLE else dim for dim in own]
    given = list(dims[name])
    if group == "log_likelihood":  # of a site without its event dimensions
        given = given[: len(own)]
    if len(given) != len(own):
        raise ValueError(f"dims[{name!r}] must name {len(own)} dimensions, like {own}; got {given}")
    return sample + given


def datasets(
    groups: dict[str, Group], coords: Coords, predictions_coords: Coords
) -> dict[str, Dataset]:
    """The groups as datasets, with labels 0, 1, … where the caller gives none.

    Raises:
        ValueError: labels of a dimension that is nowhere; of another number than its size.
    """
    ahead = {name for name in groups if name.startswith("predictions")}
    _check_labels("coords", coords, groups)
    _check_labels("predictions_coords", predictions_coords, {k: groups[k] for k in ahead})
    sets = {name: _dataset(groups[name], coords) for name in groups if name not in ahead}
    for name in ahead:
        sizes = _sizes(groups[name])
        fitting = {k: v for k, v in coords.items() if len(v) == sizes.get(k)}
        sets[name] = _dataset(groups[name], {**fitting, **predictions_coords})
    return sets


def _check_labels(argument: str, labels: Coords, groups: dict[str, Group]) -> None:
    known = {dim for group in groups.values() for dim in _sizes(group)}
    for dim in labels:
        if dim not in known:
            raise ValueError(f"{argument} has an entry {dim!r}, expected some of {sorted(known)}")


def _sizes(group: Group) -> dict[str, int]:
    return {
        dim: size
        for dims, values in group.values()
        for dim, size in zip(dims, values.shape, strict=True)
    }


def _dataset(group: Group, coords: Coords) -> Dataset:
    from xarray import Dataset

    labels = {}
    for dim, size in _sizes(group).items():
        labels[dim] = np.asarray(coords.get(dim, range(size)))
        if labels[dim].shape != (size,):
            raise ValueError(
                f"coords[{dim!r}] must be a list of {size} labels, got shape {labels[dim].shape}"
            )
    return Dataset(group, coords=labels, attrs=_attributes())


def _attributes() -> dict[str, str]:
    return {
        "created_at": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "inference_library": "pyroflow",
        "inference_library_version": version("pyroflow"),
    }
