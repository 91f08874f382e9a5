"""What lets a guide be set up, called, copied and moved like any module."""

from __future__ import annotations

import copy
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from pyro.nn.module import _make_name
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn

from pyroflow.guides.refusals import (
    refuse_circular,
    refuse_moving_supports,
    refuse_subsampled,
    refuse_unsupported,
)
from pyroflow.guides.rows import KnownRows
from pyroflow.guides.shown import ShownGuide
from pyroflow.model.latents import Latents
from pyroflow.seeds import one_at_a_time, seeded

MARGINAL_DRAWS = 10_000  # draws behind median and quantiles

Values = dict[str, Tensor]


class ModuleGuide(ShownGuide, KnownRows, AutoGuide):
    """A guide that makes its parts in one run of the model.

    Beyond Pyro's guides it keeps its model when it is copied, owns its names in Pyro's parameter
    store, and moves the bounds of supports with its parameters. A subclass implements
    ``_make_parts`` (the parameters), ``_draw_unconstrained`` (samples auxiliary sites, and returns
    unconstrained values by site, and the plates by name) and ``_quantiles``, all of the model's
    arguments.

    Attributes:
        latents: after the first call, the table of the model's latents.
        local_plates: those whose rows have latents of their own, which may subsample.
    """

    latents: Latents
    local_plates: tuple[str, ...] = ()
    _unpickled: tuple[str, ...] = ("_model",)  # what no pickle holds

    def setup(self, *args: Any, **kwargs: Any) -> ModuleGuide:
        """Run the model to see its latents, and make the parameters; later calls do nothing.

        It runs once, and once more where a support has bounds, to see whether they move. The
        first call of the guide does the same, with the model's arguments too.

        Returns:
            The guide itself.

        Raises:
            ValueError: If a latent is discrete, an angle, in a plate that subsamples, or on a
                support that depends on another latent, or a transform does not fit. The message
                names the site and the way out.
            RuntimeError: If the model has no latents, or the guide was pickled before.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self

    @one_at_a_time
    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        if self._model is None:
            raise RuntimeError(
                f"this {type(self).__name__} was pickled before its first call, and a pickle holds "
                "no model: make the guide anew, or pickle it after setup(*args)"
            )
        try:
            self._inspect_model(*args, **kwargs)
            self._make_parts(*args, **kwargs)
        except Exception:
            self.prototype_trace = None  # so that the next call says the same
            raise

    def _inspect_model(self, *args: Any, **kwargs: Any) -> None:
        try:
            # AutoContinuous maps supports by Pyro's registry, which lacks that of a mixture.
            AutoGuide._setup_prototype(self, *args, **kwargs)
            latents = Latents.of(self.prototype_trace)
        except NotImplementedError as error:
            refuse_unsupported(self.prototype_trace, error)
            raise
        refuse_circular(self.prototype_trace)
        if not sum(latents.sizes):
            raise RuntimeError(
                f"{type(self).__name__} found no latent variables in the model: leave out obs= at "
                "the sites to infer"
            )
        self.set_latents(self._in_full(latents))
        refuse_subsampled(self.latents, self.local_plates)
        refuse_moving_supports(self.model, self.latents, args, kwargs)

    def start(self) -> Tensor:
        """Where the latents start, as one unconstrained vector (D,)."""
        return self.latents.pack({s.name: s.unconstrain(s.value)[0] for s in self.latents})

    def set_latents(self, latents: Latents) -> None:
        """Keep the table of latents, and what Pyro reads of it."""
        self.latents, self.prototype_trace = latents, latents.trace()
        self._cond_indep_stacks = {site.name: site.plates for site in latents}
        self._unconstrained_shapes = {site.name: site.unconstrained_shape for site in latents}
        self._prototype_frames = {frame.name: frame for site in latents for frame in site.plates}
        self.latent_dim = sum(latents.sizes)

    def forward(self, *args: Any, **kwargs: Any) -> Values:
        """Draw all latents, with ``pyro.sample`` at each site; returns them by site name."""
        self.setup(*args, **kwargs)
        take_own_name(self)
        values, plates = self._draw_unconstrained(*args, **kwargs)
        masked, draws = poutine.get_mask() is False, {}
        for site in self.latents:
            with ExitStack() as stack:
                for frame in site.plates:
                    stack.enter_context(plates[frame.name])
                draws[site.name] = pyro.sample(site.name, site.point(values[site.name], masked))
        return draws

    def median(self, *args: Any, **kwargs: Any) -> Values:
        """Posterior median of each latent, by site; see :meth:`quantiles`."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float], *args: Any, **kwargs: Any) -> Values:
        """Marginal posterior quantiles of each latent, from 10,000 draws with a fixed seed.

        They are those of the single numbers on the support: medians of a simplex need not sum
        to one.

        Args:
            quantiles: Q probabilities in [0, 1].
            *args: the model's, used where the guide was never called or reads data from them.
            **kwargs: likewise.

        Returns:
            By site name, a tensor of shape (Q, *shape of the site).

        Raises:
            ValueError: If quantiles is no sequence of numbers in [0, 1].
        """
        self.setup(*args, **kwargs)
        with seeded(0):
            return self._quantiles(quantiles, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ModuleGuide:
        """As any module, and the tensors in the supports of the sites too."""
        super()._apply(fn, recurse)
        if self.prototype_trace is not None:
            self.set_latents(self.latents.to(fn))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.prototype_trace is None:
            raise RuntimeError(
                f"this {type(self).__name__} has no parameters yet to load a state dict into: call "
                "setup(*args) with the model's arguments first"
            )
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's version takes model and master from the guide itself.
        model, master = self._model, self.master
        state = dict(super().__getstate__())
        self._model, self.master = model, master
        return state | dict.fromkeys((*self._unpickled, "master"))

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleGuide:
        """A guide for the same model, whose parameters are its own."""
        other = memo[id(self)] = type(self).__new__(type(self))
        memo |= {id(model): model for model in self._model or ()}
        kept = self._unpickled if self.prototype_trace is None else ("_model",)
        state = self.__getstate__() | {name: getattr(self, name) for name in kept}
        other.__setstate__(copy.deepcopy(state, memo))
        return other


def marginal_quantiles(draws: Values, quantiles: Sequence[float]) -> Values:
    """By site, the quantiles of each number over the first dimension, shape (Q, ...).

    Raises:
        ValueError: If quantiles is no sequence of numbers in [0, 1].
    """
    found = {}
    for name, values in draws.items():
        levels = torch.as_tensor(quantiles, dtype=values.dtype, device=values.device)
        if levels.dim() != 1 or not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError(
                "quantiles must be a sequence of numbers in [0, 1], such as [0.05, 0.95], got "
                f"{quantiles}"
            )
        # In parts, as torch takes 16 million numbers at most.
        columns = values.reshape(len(values), values[0].numel()).split(1000, 1)
        columns = [part.quantile(levels, 0) for part in columns if part.numel()]
        columns = torch.cat([*columns, levels.new_zeros(len(levels), 0)], 1)
        found[name] = columns.reshape(len(levels), *values.shape[1:])
    return found


# By guide, what it has put into Pyro's parameter store. No copy or pickle of it shall have this.
_STORED: weakref.WeakKeyDictionary[nn.Module, dict[str, weakref.ref[Tensor]]]
_STORED = weakref.WeakKeyDictionary()


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
    if guide not in _STORED:
        _STORED[guide] = {}
        weakref.finalize(guide, _take_out, _STORED[guide]).atexit = False
    _STORED[guide].update((key, weakref.ref(p)) for key, p in _keys(guide, guide._pyro_name))


def _is_free(guide: PyroModule, name: str) -> bool:
    store = pyro.get_param_store()
    pairs = _keys(guide, name)
    return not any(key in store and store[key].unconstrained() is not p for key, p in pairs)


def _keys(module: PyroModule, name: str) -> Iterator[tuple[str, Tensor]]:
    """The keys that Pyro gives the parameters of a module with this name, and their tensors."""
    for attribute, p in module._parameters.items():
        yield _make_name(name, attribute), p
    for attribute, child in module._modules.items():
        path = _make_name(name, attribute)
        if isinstance(child, PyroModule):
            yield from _keys(child, path)
        elif child is not None:
            trained = ((key, p) for key, p in child.named_parameters() if p.requires_grad)
            yield from ((param_with_module_name(path, key), p) for key, p in trained)


def _rename(module: PyroModule, name: str) -> None:
    module._pyro_name = name
    for attribute, child in module._modules.items():
        if isinstance(child, PyroModule):
            _rename(child, _make_name(name, attribute))


def _take_out(stored: dict[str, weakref.ref[Tensor]]) -> None:
    """Take out of the store what a guide has put there, unless it was replaced since."""
    store = pyro.get_param_store()
    for key, ref in stored.items():
        p = ref()
        if p is not None and key in store and store[key].unconstrained() is p:
            # The store knows one key of a tensor, which may be another guide's, of a shared part.
            store._param_to_name[p] = key
            del store[key]
            others = [other for other, q in store.named_parameters() if q is p]
            store._param_to_name.update((p, other) for other in others)
