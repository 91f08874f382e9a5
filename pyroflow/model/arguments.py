"""A model's arguments: arrays that are no tensors, and data that were forgotten."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from typing import Any

import numpy as np
import torch
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyroflow.model.bound import run_at_start, signature_of
from pyroflow.model.records import is_deterministic
from pyroflow.seeds import one_at_a_time

CANDIDATES = 10  # sites, from the last, that forgotten data are looked for at
Given = dict[int | str, Any]  # arguments by place or keyword


def parameters_of(model: Callable) -> list[str]:
    """The names of a model's arguments, where they can be told."""
    try:
        return list(signature_of(model).parameters)
    except (TypeError, ValueError):
        return []


def takes(model: Callable, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the model can be called so, as far as can be told."""
    try:
        signature_of(model).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # no function of Python's
        pass
    return True


@one_at_a_time
def arrays_at_fault(model: Callable, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """What to do about arrays among the arguments, where the model fails by them alone.

    Many an array does no harm, such as one of indices. So the model runs with the arguments as
    they are, and where that fails with tensors for them, all and all but one.
    """
    given = dict(enumerate(args)) | kwargs
    arrays = {key: value for key, value in given.items() if _is_array(value)}
    if not arrays or _runs(model, given):
        return None
    for dtype in (None, torch.get_default_dtype()):  # whole numbers as they are, then as others
        try:
            tensors = {key: _tensor(array, dtype) for key, array in arrays.items()}
        except (TypeError, ValueError):  # of strings, say
            return None
        if _runs(model, given | tensors):
            found = [k for k in arrays if not _runs(model, given | tensors | {k: arrays[k]})]
            wrong = {key: (arrays[key], tensors[key]) for key in found or arrays}
            return _way_out(wrong, parameters_of(model))
    return None


def _is_array(value: object) -> bool:
    return hasattr(value, "__array__") and not isinstance(value, Tensor)


def _tensor(array: Any, dtype: torch.dtype | None) -> Tensor:
    """A tensor of torch's default dtype and device, or of whole numbers where no dtype is given."""
    copied = np.array(array, order="C")
    fractions = copied.dtype.kind == "f"
    dtype = torch.get_default_dtype() if fractions else dtype
    return torch.tensor(copied, dtype=dtype, device=torch.get_default_device())


def _way_out(wrong: dict[int | str, tuple[Any, Tensor]], names: list[str]) -> str:
    kinds, ways = [], []
    for key, (array, tensor) in wrong.items():
        name = names[key] if isinstance(key, int) and key < len(names) else str(key)
        kinds.append(f"{name!r} is a {type(array).__module__.split('.')[0]} {type(array).__name__}")
        values = f"{name}.to_numpy()" if hasattr(array, "to_numpy") else name
        ways.append(f"torch.as_tensor({values}, dtype={tensor.dtype})")
    return (
        f"the model fails where argument {' and '.join(kinds)}, and works on tensors: pass "
        f"{', '.join(ways)}"
    )


def _runs(model: Callable, given: Given) -> bool:
    try:
        _run(model, given).compute_log_prob()
    except Exception:  # a model may raise any
        return False
    return True


def _run(model: Callable, given: Given) -> Trace:
    args = tuple(value for key, value in given.items() if isinstance(key, int))
    kwargs = {key: value for key, value in given.items() if isinstance(key, str)}
    return prune_subsample_sites(run_at_start(model, args, kwargs)[0])


def warn_of_forgotten_data(model: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    """Warn if a model observes nothing, and would if it got an argument that is None.

    To Pyro a site with ``obs=None`` is a latent. So where there are such arguments, each gets
    draws of the model's sites in turn, those of its data among them: does a site observe them?
    """
    given = dict(enumerate(args)) | kwargs
    absent = _absent(model, args, kwargs)
    if not absent:
        return
    try:
        sites = _run(model, given)
    except Exception:  # the fit will tell
        return
    latents = list(sites.stochastic_nodes)
    if _observing(sites):
        return
    for (name, key), site in product(absent.items(), latents[: -CANDIDATES - 1 : -1]):
        with suppress(Exception):  # a number of rows, say, is not to be drawn from a Normal
            if site in _observing(_run(model, given | {key: sites.nodes[site]["value"]})):
                warnings.warn(
                    f"the model observes nothing, so that its prior is fitted: argument {name!r}, "
                    f"the data of site {site!r}, was not given",
                    stacklevel=5,
                )
                return


def _absent(model: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, int | str]:
    """By name, the place or keyword of the arguments that are None, as they are by default."""
    try:
        signature = signature_of(model)
        given = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # the fit will tell
        return {}
    absent = {}
    for place, (name, p) in enumerate(signature.parameters.items()):
        if p.default is None and given.get(name) is None:
            by_place = place < len(args) and p.kind is not p.KEYWORD_ONLY
            absent[name] = place if by_place else name
    return absent


def _observing(sites: Trace) -> list[str]:
    """The sites that have data; those of ``pyro.factor`` too, which may stand for some."""
    return [name for name in sites.observation_nodes if not is_deterministic(sites.nodes[name])]
