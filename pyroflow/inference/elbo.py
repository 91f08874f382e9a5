"""log p − log q of draws from a guide, for any Pyro model and guide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

PARTICLES = "num_particles_vectorized"  # Pyro's own name for this plate


@dataclass
class Problem:
    """A model and a guide, with the arguments of both.

    ``plates`` is the depth of their plates where draws can be evaluated many at a time, and
    None where the model must run once for each. ``subsampled`` says whether a plate draws a part
    of the data, so that the log joint is itself an estimate.
    """

    model: Callable
    guide: Callable
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    plates: int | None = None
    subsampled: bool = False
    latent: bool = True

    @classmethod
    def inspect(
        cls, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any] | None
    ) -> Problem:
        """Set the guide up by a first call, check it, and find out whether draws vectorise.

        Raises:
            ValueError: a latent site of the model that the guide does not sample.
        """
        problem = cls(model, guide, tuple(args), dict(kwargs or {}))
        with torch.no_grad(), poutine.block():
            guide_trace, model_trace = problem.traces()
            _check_covered(guide_trace, model_trace)
            free = prune_subsample_sites(model_trace).stochastic_nodes
            problem.latent = len(free) > 0
            sites = model_trace.nodes.values()
            problem.subsampled = any(_draws_subsample(site) for site in sites)
            plates = _plate_depth(guide_trace, model_trace)
            problem.plates = plates if problem._vectorizes(plates, model_trace) else None
        return problem

    def traces(self, num: int | None = None, plates: int | None = None) -> tuple[Trace, Trace]:
        """Traces of guide and model for one draw, or for ``num`` draws in a plate."""
        model, guide = self.model, self.guide
        if num is not None:
            plate = pyro.plate(PARTICLES, num, dim=-1 - plates)
            model, guide = plate(model), plate(guide)
        guide_trace = poutine.trace(guide).get_trace(*self.args, **self.kwargs)
        replayed = poutine.trace(poutine.replay(model, trace=guide_trace))
        return guide_trace, replayed.get_trace(*self.args, **self.kwargs)

    def log_weights(self, num_samples: int) -> Tensor:
        """Return log p(x, z) − log q(z) of S draws, shape (S,); the mean estimates the ELBO."""
        if self.plates is None:
            pairs = (self.traces() for _ in range(num_samples))
            return torch.stack([log_prob(m) - log_prob(g) for g, m in pairs])
        guide_trace, model_trace = self.traces(num_samples, self.plates)
        log_p = log_prob_by_particle(model_trace, self.plates)
        return log_p - log_prob_by_particle(guide_trace, self.plates)

    def _vectorizes(self, plates: int, single: Trace) -> bool:
        """Whether two draws at once get the log densities that they get one by one.

        A model that indexes its latents from the left reads another draw's values when it is
        vectorised, often without an error, so only the comparison can tell.
        """
        try:
            guide_trace, model_trace = self.traces(2, plates)
            together = log_prob_by_particle(model_trace, plates)
        except (RuntimeError, ValueError, IndexError, NotImplementedError):
            return False
        apart = torch.stack([self._log_joint(guide_trace, model_trace, single, i) for i in (0, 1)])
        return torch.allclose(together, apart, rtol=1e-4, atol=1e-4, equal_nan=True)

    def _log_joint(self, guide_trace: Trace, batch: Trace, single: Trace, index: int) -> Tensor:
        """The model's log density at one of the vectorised draws, from a run of its own."""
        values = {}
        for name, site in batch.nodes.items():
            if site["type"] == "sample" and site_is_subsample(site):
                values[name] = site["value"]
            elif name in single.nodes and name in guide_trace.nodes and site["type"] == "sample":
                values[name] = site["value"][index].reshape(single.nodes[name]["value"].shape)
        conditioned = poutine.trace(poutine.condition(self.model, data=values))
        return log_prob(conditioned.get_trace(*self.args, **self.kwargs))


def log_prob(trace: Trace) -> Tensor:
    """The log density of a trace.

    Without plates, whose zeros have torch's default dtype and device.
    """
    return prune_subsample_sites(trace).log_prob_sum()


def log_prob_by_particle(trace: Trace, plates: int) -> Tensor:
    """The log density of each draw of a vectorised trace, shape (S,)."""
    trace = prune_subsample_sites(trace)
    trace.compute_log_prob()
    by_site = [
        site["log_prob"].movedim(-1 - plates, 0).flatten(1).sum(1) if plates else site["log_prob"]
        for site in trace.nodes.values()
        if site["type"] == "sample"
    ]
    return torch.stack(by_site).sum(0)


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
