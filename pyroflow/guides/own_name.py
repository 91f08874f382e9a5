"""The names of a guide's parameters in Pyro's parameter store: its own, and gone when it is."""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Iterator

import pyro
from pyro.nn import PyroModule
from pyro.nn.module import _make_name
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn

# By guide, what it has put into the store. Kept beside the guide: no copy or pickle shall have it.
_PUT: weakref.WeakKeyDictionary[nn.Module, dict[str, weakref.ref[Tensor]]]
_PUT = weakref.WeakKeyDictionary()


def take_own_name(guide: PyroModule) -> None:
    """Share no names in Pyro's parameter store with another guide, or with an earlier self.

    Pyro would train the tensors that the store has under the name, and this guide would stay
    as it is: after a second guide of the same class, a copy, or parameters made anew. What the
    guide puts there leaves the store with it.
    """
    name = guide._pyro_name
    if not _is_free(guide, name):
        count = 2
        while not _is_free(guide, f"{name}_{count}"):
            count *= 2
        # Names are taken in turn: a bisection finds the first free one among many guides'.
        tried = range(2, count)
        count = 2 + bisect_left(tried, True, key=lambda c: _is_free(guide, f"{name}_{c}"))
        _rename(guide, f"{name}_{count}")
    if guide not in _PUT:
        _PUT[guide] = {}
        weakref.finalize(guide, _forget, _PUT[guide]).atexit = False
    _PUT[guide].update((key, weakref.ref(p)) for key, p in _stored(guide, guide._pyro_name))


def _is_free(guide: PyroModule, name: str) -> bool:
    store = pyro.get_param_store()
    pairs = _stored(guide, name)
    return not any(key in store and store[key].unconstrained() is not p for key, p in pairs)


def _stored(module: PyroModule, name: str) -> Iterator[tuple[str, Tensor]]:
    """The keys that Pyro gives the parameters of a module with this name, and their tensors."""
    for attribute, p in module._parameters.items():
        yield _make_name(name, attribute), p
    for attribute, child in module._modules.items():
        path = _make_name(name, attribute)
        if isinstance(child, PyroModule):
            yield from _stored(child, path)
        elif child is not None:
            trained = ((key, p) for key, p in child.named_parameters() if p.requires_grad)
            yield from ((param_with_module_name(path, key), p) for key, p in trained)


def _rename(module: PyroModule, name: str) -> None:
    module._pyro_name = name
    for attribute, child in module._modules.items():
        if isinstance(child, PyroModule):
            _rename(child, _make_name(name, attribute))


def _forget(put: dict[str, weakref.ref[Tensor]]) -> None:
    """Take out of the store what a guide has put there, unless it was replaced since."""
    store = pyro.get_param_store()
    for key, ref in put.items():
        p = ref()
        if p is not None and key in store and store[key].unconstrained() is p:
            # The store knows one key of a tensor, which may be another guide's, of a shared part.
            store._param_to_name[p] = key
            del store[key]
            others = [other for other, q in store.named_parameters() if q is p]
            store._param_to_name.update((p, other) for other in others)
