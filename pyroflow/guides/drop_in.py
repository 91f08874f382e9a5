"""What lets a continuous guide be set up, called, copied and moved like any module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pyro
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyroflow.flows import Flow
from pyroflow.guides.own_name import take_own_name
from pyroflow.guides.refusals import (
    refuse_circular,
    refuse_local_latents,
    refuse_moving_supports,
    refuse_unsupported,
)
from pyroflow.model.latents import Site, check_structure, keep_support_only, move_support, point_at
from pyroflow.threads import one_at_a_time


class DropIn(AutoContinuous):
    """A guide whose distribution over the unconstrained latents is a :class:`~pyroflow.Flow`.

    Subclasses make the flow. Beyond Pyro's guides this one keeps its model when it is copied,
    owns its names in Pyro's parameter store, and moves the bounds of supports with its parameters.
    """

    flow: Flow

    def _make_flow(self, init_loc: Tensor) -> Flow:
        """The flow at the start, for latents that start at ``init_loc``, shape (D,)."""
        raise NotImplementedError

    def setup(self, *args: Any, **kwargs: Any) -> DropIn:
        """Run the model to see its latents, and make the parameters; later calls do nothing.

        It runs once, and once more where a support has bounds, to see whether they move. The
        first call of the guide does the same.

        Args:
            *args: the model's.
            **kwargs: the model's.

        Returns:
            The guide itself.

        Raises:
            ValueError: a latent that is discrete, an angle, in a plate that subsamples, or on a
                support that depends on another latent; a transform that does not fit. The message
                names the site and the way out.
            RuntimeError: a model without latents, or a guide that was pickled before.
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
            self.flow = self._make_flow(self._init_loc())
        except Exception:
            self.prototype_trace = None  # so that the next call says the same
            raise
        for site in self._sites():
            keep_support_only(site)
        if self.master is None:
            self._create_plates()  # for NeuTraReparam, which takes them from a guide not called yet

    def _inspect_model(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._setup_prototype(*args, **kwargs)
        except NotImplementedError as error:
            refuse_unsupported(self._sites(), error)
            raise
        refuse_local_latents(self._sites())
        refuse_circular(self._sites())
        refuse_moving_supports(self.model, self._sites(), args, kwargs)

    def _sites(self) -> Iterator[Site]:
        return (site for _, site in self.prototype_trace.iter_stochastic_nodes())

    def check_model(self, model_trace: poutine.Trace) -> None:
        """Compare the trace of a run of a model with what the guide was set up with.

        Args:
            model_trace: of one run, not vectorised.

        Raises:
            ValueError: a latent site that is new, gone, of another shape or on another support,
                by name.
        """
        check_structure(self._sites(), model_trace)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latents, with ``pyro.sample`` at each site; returns them by site name."""
        self.setup(*args, **kwargs)
        take_own_name(self)
        latent = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        masked, draws = poutine.get_mask() is False, {}
        for site, unconstrained in self._unpack_latent(latent):
            name = site["name"]
            with ExitStack() as stack:
                for frame in self._cond_indep_stacks[name]:
                    stack.enter_context(plates[frame.name])
                draws[name] = pyro.sample(name, point_at(site, unconstrained, masked))
        return draws

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Site, Tensor]]:
        """As in Pyro, and for draws of shape (*B, D) too: (*B, *shape of the site).

        What Pyro knows are particles, which stand in front of as many ones as there are plates.
        """
        batch, sites = latent.shape[:-1], list(self._sites())
        plates = max(len(site["fn"].batch_shape) for site in sites)
        if len(batch) > plates > 0 and all(size == 1 for size in batch[-plates:]):
            yield from super()._unpack_latent(latent)
            return
        shapes = [self._unconstrained_shapes[site["name"]] for site in sites]
        pieces = latent.split([shape.numel() for shape in shapes], -1)
        for site, shape, piece in zip(sites, shapes, pieces, strict=True):
            yield site, piece.reshape(batch + shape)

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, pyro.plate]:
        """As in Pyro, but unseen by the model, which would take the indices from them.

        A model whose plate has grown would run on a part of its rows and say nothing.
        """
        with poutine.block(hide_fn=site_is_subsample):
            return super()._create_plates(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DropIn:
        """As any module, and the tensors in the supports of the sites too."""
        super()._apply(fn, recurse)
        if self.prototype_trace is not None:
            for site in self._sites():
                move_support(site, fn)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.prototype_trace is None:
            raise RuntimeError(
                f"this {type(self).__name__} has no parameters yet to load a state dict into: call "
                "setup(*args) with the model's arguments first"
            )
        super()._load_from_state_dict(*args, **kwargs)

    def _start_state(self) -> dict[str, Any]:
        """What the set-up needs, and no pickle holds."""
        return {"_model": self._model}

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's version takes model and master from the guide itself.
        model, master = self._model, self.master
        state = dict(super().__getstate__())
        self._model, self.master = model, master
        return state | dict.fromkeys(self._start_state()) | {"master": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> DropIn:
        """A guide for the same model, whose parameters are its own."""
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        start = self._start_state() if self.prototype_trace is None else {"_model": self._model}
        memo |= {id(part): part for part in self._model or ()}
        other.__setstate__(copy.deepcopy(self.__getstate__() | start, memo))
        return other
