"""A model with its arguments and its guide, inspected in one run of each."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from pyroflow.checks import check_args
from pyroflow.model.comparison import PROBES, differs, spread
from pyroflow.model.latents import started_anywhere
from pyroflow.model.priors import PriorsAtLatents
from pyroflow.model.records import Record, Sites, Values, is_deterministic, is_factor, quietly
from pyroflow.model.runs import Runs
from pyroflow.seeds import seeded


class BoundModel:
    """A model with its arguments and, where there is one, a guide for its latents.

    One run of the guide, which sets it up, and one of the model at the guide's draw say what
    their structure is. Without a guide the model runs at always the same latents, with its
    parameters at their start values; one bad draw is no error there.

    Args:
        model: a Pyro model.
        guide: a guide for its latents.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        start: without a guide, latents by name to run at, where their shapes fit, with the
            parameters as they are; the others are drawn from their priors.

    Attributes:
        given: the model as it was given.
        model: the model, whose priors are scored at the latents that a value comes from.
        guide_trace: of the run of the guide.
        model_trace: of the run of the model.
        latents: names of its latent sites, in order.
        observed: names of the sites that have data: no ``pyro.factor``, and none whose value
            follows from other sites.
        plates: by name, the vectorised plates around its sites, as Pyro's frames.
        depth: how many dimensions the plates of model and guide take.
        subsampled: names of the plates that draw a part of their rows, so that the log joint is
            an estimate.
        learns: whether the model has parameters of its own to train.
        runs: the model at given latents.
        guide_runs: the guide, which samples its latents.

    Raises:
        ValueError: If the guide does not sample a latent site of the model, or has the data.

    Example:
        >>> from pyroflow import AutoPlanarFlow
        >>> from pyroflow.targets import eight_schools_centered as model
        >>> bound = BoundModel(model, AutoPlanarFlow(model))
        >>> bound.latents, bound.observed, list(bound.plates)
        (['mu', 'tau', 'theta'], ['y'], ['schools'])
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable | None = None,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
        start: Values | None = None,
    ) -> None:
        self.guide, self.args, self.kwargs = guide, check_args(args), dict(kwargs or {})
        self.guide_trace: Trace | None = None
        self.given, self.model = model, PriorsAtLatents()(model)
        self.runs = Runs(self.model, self.args, self.kwargs)
        if guide is None:
            self.model_trace, self.learns = run_at_start(model, self.args, self.kwargs, start)
        else:
            self._run_at_draw()
        self._read(prune_subsample_sites(self.model_trace))
        self.runs.depth = self.depth
        if self.learns or self.subsampled:  # later runs have other parameters, or other rows
            self.runs.inspected = None
        # A flow's layers have no batching rules. Pyro's autoguides are made to go into a plate, and
        # some of their transforms cannot score what another run has drawn.
        options = {"predict": True, "by_vmap": False, "compared": not isinstance(guide, AutoGuide)}
        self.guide_runs = Runs(guide, self.args, self.kwargs, self.depth, **options)
        self.guide_runs.subsample = self.runs.subsample

    @classmethod
    def for_weights(
        cls,
        model: Callable,
        guide: Callable,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
        *,
        in_full: bool = False,
    ) -> BoundModel:
        """The same for weights: NaN is no error; subsampling is, unless they are ``in_full``."""
        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Encountered NaN")  # which is a weight of zero
            bound = cls(model, guide, args, kwargs)
        if not in_full:
            check_whole(bound)
        return bound

    def with_guide(self, guide: Callable) -> BoundModel:
        """The same model and arguments with another guide."""
        return BoundModel(self.given, guide, self.args, self.kwargs)

    @torch.no_grad()
    def _run_at_draw(self) -> None:
        with poutine.block():
            self.guide_trace = poutine.trace(self.guide).get_trace(*self.args, **self.kwargs)
        drawn = self.guide_trace.iter_stochastic_nodes()
        self.model_trace = self.runs.inspect({name: site["value"] for name, site in drawn})
        self.learns = _has_parameters(self.model_trace)

    def _read(self, sites: Trace) -> None:
        """What the run says of the structure; the guide must have a draw of each latent."""
        sampled = {n: site for n, site in sites.nodes.items() if site["type"] == "sample"}
        self.latents = [name for name, site in sampled.items() if not site["is_observed"]]
        self.observed = [name for name, site in sampled.items() if _has_data(site)]
        if self.guide_trace is not None:
            _check_covered(self)
            _check_not_swapped(self)
        self.plates = _plates(self.model_trace)
        guided = _plates(self.guide_trace or Trace())
        frames = [*self.plates.values(), *guided.values()]
        self.depth = max((-frame.dim for frame in frames), default=0)
        nodes = self.model_trace.nodes.items()
        self.subsampled = [name for name, site in nodes if _draws_subsample(site)]

    @cached_property
    def fingerprint(self) -> str:
        """The log joint of the run, which tells model and arguments from others without a guide."""
        trace = prune_subsample_sites(self.model_trace)
        with torch.no_grad(), pyro.validation_enabled(False):
            return f"{float(trace.log_prob_sum()):.6g}"

    @property
    def sequential(self) -> bool:
        """Whether each draw takes a run of the model, or of the guide."""
        return self.runs.sequential or self.guide_runs.sequential

    @cached_property
    def max_plate_nesting(self) -> int | None:
        """What Pyro's own ELBOs take to vectorise draws; None where draws would mix."""
        return self.depth if self.mixes(away=True) is None else None

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


def _check_covered(bound: BoundModel) -> None:
    data = "" if bound.observed else "this call gives the model no data; pass them, or "
    for name in bound.latents:
        if name not in bound.guide_trace.nodes:
            raise ValueError(
                f"the guide does not sample the model's latent site {name!r}, so there are no "
                f"draws of it: {data}make the guide for the whole model. In place of a discrete "
                "site write a mixture distribution, or enumerate it and train with Pyro's "
                "TraceEnum_ELBO and SVI"
            )


def _check_not_swapped(bound: BoundModel) -> None:
    nodes = prune_subsample_sites(bound.guide_trace).nodes.items()
    guided = [name for name, site in nodes if site["type"] == "sample" and _has_data(site)]
    if guided and not bound.observed:
        raise ValueError(
            f"model and guide are swapped: the second has data at site {guided[0]!r}, and the "
            "first has none: call with (model, guide, ...)"
        )


def check_whole(bound: BoundModel) -> None:
    """Raise ``ValueError`` if a plate subsamples, where the log joint itself is needed."""
    if bound.subsampled:
        name = bound.subsampled[0]
        plate = bound.model_trace.nodes[name]["fn"]
        raise ValueError(
            f"the plate {name!r} takes {plate.subsample_size} of {plate.size} rows a run, so "
            "that the model's log joint is an estimate and weights are noise: use the same "
            "model, or arguments, with its plates in full, without subsample_size"
        )


def check_latents(bound: BoundModel) -> None:
    """Raise ``ValueError`` if there are none."""
    if not bound.latents:
        raise ValueError(
            "the model has no latent sites: everything it samples is observed, so there is "
            "nothing for a guide to approximate; leave out obs= at the sites to infer"
        )


def check_sites(bound: BoundModel) -> None:
    """Whether guide and model have the same latent sites, of the same shapes.

    Raises:
        ValueError: If there are no latents, a shape is another in the guide, or the guide has
            a site of its own that is not auxiliary.
    """
    check_latents(bound)
    for name in bound.latents:
        site = bound.model_trace.nodes[name]
        expected, got = site["fn"].shape(), site["value"].shape
        if expected != got:
            raise ValueError(
                f"the guide samples site {name!r} with shape {tuple(got)}, and the model with "
                f"{tuple(expected)}: give both the same plates and event dimensions"
            )
    for name, site in prune_subsample_sites(bound.guide_trace).iter_stochastic_nodes():
        if name not in bound.latents and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"the guide samples site {name!r}, which is no latent of the model: remove it, "
                "or mark it with infer={'is_auxiliary': True} if the other sites are made of it"
            )


def run_at_start(
    model: Callable, args: tuple, kwargs: dict[str, Any], start: Values | None = None
) -> tuple[Trace, bool]:
    """A run at the given latents where they fit, else at draws; and whether it has parameters."""

    def init(site: Record) -> Tensor:
        value = (start or {}).get(site["name"])
        fits = value is not None and value.shape == site["fn"].shape()
        return value if fits else init_to_sample(site)

    started = poutine.trace(InitMessenger(started_anywhere(init))(model))
    store = pyro.get_param_store().scope() if start is None else nullcontext()
    with seeded(0), torch.no_grad(), poutine.block(), quietly(), store:
        trace = started.get_trace(*args, **kwargs)
        return trace, _has_parameters(trace)


def _has_parameters(trace: Trace) -> bool:
    params = [site["value"] for site in trace.nodes.values() if site["type"] == "param"]
    return any(value.unconstrained().requires_grad for value in params)


def _has_data(site: Record) -> bool:
    return site["is_observed"] and not (is_deterministic(site) or is_factor(site))


def _plates(trace: Trace) -> dict[str, CondIndepStackFrame]:
    stacks = [s["cond_indep_stack"] for s in trace.nodes.values() if s["type"] == "sample"]
    return {frame.name: frame for stack in stacks for frame in stack if frame.vectorized}


def _draws_subsample(site: Record) -> bool:
    if site["type"] != "sample" or not site_is_subsample(site):
        return False
    drawn = site["fn"].subsample_size
    return drawn is not None and drawn < site["fn"].size


def within(model: Callable) -> Callable:
    """A model without the handlers of Pyro around it."""
    while isinstance(model, partial) and isinstance(model.func, partial):
        model = model.func.args[1]
    return model


def signature_of(model: Callable) -> inspect.Signature:
    """The arguments of a model, which handlers of Pyro around it hide."""
    model = within(model)
    return inspect.signature(getattr(model, "forward", model))
