"""A model and a guide with their arguments, inspected in one run of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample

from pyroflow.model.comparison import PROBES, differs, spread
from pyroflow.model.priors import PriorsAtLatents
from pyroflow.model.records import Sites
from pyroflow.model.runs import Runs
from pyroflow.seeds import seeded


@dataclass
class Problem:
    """A model and a guide, with the arguments of both.

    Attributes:
        model: the Pyro model.
        guide: the guide, set up by :meth:`inspect`.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        guide_trace: of one run of the guide.
        model_trace: of the model at that draw.
        runs: the model at given latents.
        guide_runs: the guide, which samples its latents.
    """

    model: Callable
    guide: Callable
    args: tuple
    kwargs: dict[str, Any]
    guide_trace: Trace
    model_trace: Trace

    def __post_init__(self) -> None:
        depth = _plate_depth(self.guide_trace, self.model_trace)
        self.runs = Runs(self.model, self.args, self.kwargs, depth)
        # A flow's layers have no batching rules. Pyro's autoguides are made to go into a plate, and
        # some of their transforms cannot score what another run has drawn.
        options = {"predict": True, "by_vmap": False}
        options["compared"] = not isinstance(self.guide, AutoGuide)
        self.guide_runs = Runs(self.guide, self.args, self.kwargs, depth, **options)
        self.guide_runs.subsample = self.runs.subsample

    @classmethod
    def inspect(
        cls, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any] | None
    ) -> Problem:
        """Set the guide up by a first call, and check it.

        Raises:
            ValueError: If the guide does not sample a latent site of the model.
        """
        args, kwargs = tuple(args), dict(kwargs or {})
        with torch.no_grad(), poutine.block():
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            replayed = poutine.trace(poutine.replay(model, trace=guide_trace))
            model_trace = replayed.get_trace(*args, **kwargs)
        _check_covered(guide_trace, model_trace)
        return cls(PriorsAtLatents()(model), guide, args, kwargs, guide_trace, model_trace)

    @property
    def latents(self) -> list[str]:
        """Names of the model's latent sites."""
        return list(prune_subsample_sites(self.model_trace).stochastic_nodes)

    @property
    def subsampled(self) -> bool:
        """Whether a plate draws a part of the data, so that the log joint is an estimate."""
        return any(_draws_subsample(site) for site in self.model_trace.nodes.values())

    @property
    def sequential(self) -> bool:
        """Whether each draw takes a run of the model, or of the guide."""
        return self.runs.sequential or self.guide_runs.sequential

    @cached_property
    def plates(self) -> int | None:
        """The depth of the plates, where draws vectorise in Pyro's own ELBOs; else None."""
        return self.runs.plates if self.mixes(away=True) is None else None

    def mixes(self, *, away: bool = False) -> str | None:
        """Where draws of the guide that run side by side in a plate differ from runs alone.

        Args:
            away: whether the draws are spread widely, and not the guide's own.
        """
        with seeded(0):
            guided = self.guide_draws(len(PROBES))
            if self.guide_runs.sequential:
                return "the guide"
            latents = {name: guided[name].values for name in self.latents}
            if away:
                latents = spread(latents, self.model_trace.nodes)
            return differs(self.runs, latents, len(PROBES), self.runs.in_plate)

    def guide_draws(self, num: int) -> Sites:
        """The guide's sites at ``num`` draws; plates that subsample draw their rows anew."""
        self.runs.subsample.clear()
        return self.guide_runs.evaluate({}, num)


def _plate_depth(*traces: Trace) -> int:
    frames = [
        frame
        for trace in traces
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
    ]
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)


def _draws_subsample(site: dict[str, Any]) -> bool:
    if site["type"] != "sample" or not site_is_subsample(site):
        return False
    drawn = site["fn"].subsample_size
    return drawn is not None and drawn < site["fn"].size


def _check_covered(guide_trace: Trace, model_trace: Trace) -> None:
    missing = [
        name
        for name, site in prune_subsample_sites(model_trace).iter_stochastic_nodes()
        if name not in guide_trace.nodes
    ]
    if missing:
        raise ValueError(
            f"the guide does not sample the model's latent site {missing[0]!r}: make the guide for "
            "the whole model, or, if the site is discrete and enumerated, train with Pyro's "
            "TraceEnum_ELBO and SVI"
        )
