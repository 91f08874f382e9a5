"""What a guide made of several modules needs to be set up, copied and moved like any module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

from pyroflow.guides.refusals import refuse_circular, refuse_moving_supports
from pyroflow.model.latents import Site, keep_support_only, move_support, point_at, started_anywhere
from pyroflow.threads import one_at_a_time


class SetUpGuide(AutoGuide):
    """A guide that makes its parts in one run of the model.

    Beyond Pyro's guides this one keeps its model when it is copied, owns its names in Pyro's
    parameter store, and moves the bounds of supports with its parameters. Unlike
    :class:`~pyroflow.guides.drop_in.DropIn` it has no one vector of all latents.
    """

    def __init__(self, model: Callable, init_loc_fn: Callable) -> None:
        super().__init__(InitMessenger(started_anywhere(init_loc_fn))(model))
        self._plain_model = (model,)  # without start values; in a tuple, so as not to be registered

    def _make_parts(self, *args: Any, **kwargs: Any) -> None:
        """Make the parameters; ``prototype_trace`` has the latents."""
        raise NotImplementedError

    def setup(self, *args: Any, **kwargs: Any) -> SetUpGuide:
        """Run the model to see its latents, and make the parameters; later calls do nothing.

        The first call of the guide does the same.

        Args:
            *args: the model's.
            **kwargs: the model's.

        Returns:
            The guide itself.

        Raises:
            ValueError: a latent that is an angle, or on a support that depends on another latent.
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
            with torch.no_grad():
                super()._setup_prototype(*args, **kwargs)
            refuse_circular(self._sites())
            self._make_parts(*args, **kwargs)
            refuse_moving_supports(self.model, self._sites(), args, kwargs)
        except Exception:
            self.prototype_trace = None  # so that the next call says the same
            raise
        for site in self._sites():
            keep_support_only(site)

    def _sites(self) -> Iterator[Site]:
        return (site for _, site in self.prototype_trace.iter_stochastic_nodes())

    def _sample_sites(
        self, values: dict[str, Tensor], plates: dict[str, pyro.plate]
    ) -> dict[str, Tensor]:
        """Sample all sites at unconstrained values, in the model's order, with the Jacobians."""
        masked, draws = poutine.get_mask() is False, {}
        for site in self._sites():
            name = site["name"]
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                draws[name] = pyro.sample(name, point_at(site, values[name], masked))
        return draws

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SetUpGuide:
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

    def __getstate__(self) -> dict[str, Any]:
        model, master = self._model, self.master  # which Pyro's version takes from this guide
        state = dict(super().__getstate__())
        self._model, self.master = model, master
        return state | {"_model": None, "_plain_model": None, "master": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> SetUpGuide:
        """A guide for the same model, whose parameters are its own."""
        other = memo[id(self)] = type(self).__new__(type(self))
        memo |= {id(self._plain_model[0]): self._plain_model[0]} if self._plain_model else {}
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        other._model, other._plain_model = self._model, self._plain_model
        return other
