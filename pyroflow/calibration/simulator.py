"""Draws of latents and data from a model that has data already."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor


class Simulator:
    """Draws of latents and data from a model whose observations are lifted."""

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        data: Mapping[str, str] | Iterable[str] | None,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        trace = self._trace(model)
        if data is None:
            data = _observed(trace)
        self.arguments = dict(data) if isinstance(data, Mapping) else {}
        self.sites = [data] if isinstance(data, str) else list(data)
        self._check(trace)

    def _trace(self, model: Callable) -> Trace:
        met = []  # the sites so far, of which the last one is at fault

        def note(site: dict[str, Any]) -> dict[str, Any]:
            met.append(site["name"])
            return {}

        noted = poutine.trace(poutine.infer_config(model, note))
        with torch.no_grad(), poutine.block():
            try:
                return noted.get_trace(*self.args, **self.kwargs)
            except NotImplementedError as error:
                raise ValueError(
                    f"site {met[-1]!r} cannot be drawn from, as an improper prior cannot: give it "
                    "a distribution with a sampler"
                ) from error

    def _check(self, trace: Trace) -> None:
        names = [name for name, site in trace.nodes.items() if site["type"] == "sample"]
        if not self.sites:
            raise ValueError(
                "data: the model observes nothing when it is called with these arguments: name the "
                f"sites to simulate, out of {names}"
            )
        for name in self.sites:
            if name not in names:
                raise ValueError(f"data must name sample sites out of {names}, got {name!r}")
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and type(site["fn"]).__name__ == "Unit":
                raise ValueError(
                    f"site {name!r} is a pyro.factor, which no data can be drawn from: write it as "
                    "an observed sample site"
                )

    def draw(self) -> tuple[dict[str, Tensor], Callable, tuple, dict[str, Any]]:
        """Latents θ₀, the model with simulated data observed, and its arguments with them."""
        lifted = poutine.condition(self.model, data=dict.fromkeys(self.sites))
        trace = self._trace(lifted)
        values = {name: trace.nodes[name]["value"] for name in self.sites}
        latents = {
            name: site["value"]
            for name, site in prune_subsample_sites(trace).iter_stochastic_nodes()
            if name not in values
        }
        args, kwargs = self._arguments(values)
        return latents, poutine.condition(self.model, data=values), args, kwargs

    def _arguments(self, values: dict[str, Tensor]) -> tuple[tuple, dict[str, Any]]:
        if not self.arguments:
            return self.args, self.kwargs
        signature = inspect.signature(getattr(self.model, "forward", self.model))
        bound = signature.bind_partial(*self.args, **self.kwargs)
        for site, argument in self.arguments.items():
            if argument not in signature.parameters:
                raise ValueError(
                    f"data: site {site!r} maps to argument {argument!r}, and the model takes "
                    f"{list(signature.parameters)}"
                )
            bound.arguments[argument] = values[site]
        return bound.args, bound.kwargs


def _observed(trace: Trace) -> list[str]:
    return [
        name
        for name, site in prune_subsample_sites(trace).nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not site["infer"].get("_deterministic")
    ]
