"""Draws from a guide with what the model and the guide say of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import constraints

from pyroflow.checks import check_count
from pyroflow.inference.elbo import PARTICLES, Problem
from pyroflow.inference.rounding import rounded_draws
from pyroflow.seeds import seeded

CHUNK = 1000  # vectorised draws a run, to bound the memory


@dataclass
class Draws:
    """S draws of a guide, in float64 where they are log densities.

    Attributes:
        sites: by name, the model's latent sites on their own support, each of shape
            (S, *shape of the site in a run of its own).
        log_p: shape (S,), the model's log joint at the draws, observed sites included.
        log_q: shape (S,), the guide's log density there, of the same values on the same support.
        nonfinite: by name, for how many of the draws the log density of a site of the model or
            the guide is NaN or +inf, or is −inf: draws outside the support count as −inf.
        rounded: by name, for how many of the draws the value was rounded so near an edge of the
            support that the rest of the model cannot be what it says there.
    """

    sites: dict[str, Tensor]
    log_p: Tensor
    log_q: Tensor
    nonfinite: dict[str, int] = field(default_factory=dict)
    rounded: dict[str, int] = field(default_factory=dict)

    @property
    def log_weights(self) -> Tensor:
        """Log p(x, z) − log q(z), shape (S,), as they come: they may be −inf or NaN."""
        return self.log_p - self.log_q

    def __len__(self) -> int:
        return len(self.log_p)


def inspect_in_full(
    model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any] | None
) -> Problem:
    """``Problem.inspect`` for draws that are to be weighed: NaN is no error, subsampling is one.

    Raises:
        ValueError: what ``Problem.inspect`` refuses; a plate that subsamples the data.
    """
    with pyro.validation_enabled(False):
        problem = Problem.inspect(model, guide, args, kwargs)
    if problem.subsampled:
        raise ValueError(
            "a plate of the model subsamples the data, so that its log joint is an estimate and "
            "the weights are noise: use the same model with its plates in full, without "
            "subsample_size"
        )
    return problem


@torch.no_grad()
def draw(problem: Problem, num_samples: int, seed: int | None = None, chunk: int = CHUNK) -> Draws:
    """Draw from the guide and score the draws under model and guide.

    Pyro's validation is off meanwhile, so that one draw outside a support costs its own weight
    and not the run. Where a plate subsamples the data, ``log_p`` is an estimate.

    Args:
        problem: model and guide.
        num_samples: S.
        seed: makes the draws reproducible, without touching the global generator.
        chunk: draws a run, where the problem vectorises.

    Raises:
        ValueError: a model without latent sites; a site that changes its shape, is not in every
            run, or is one of the guide only; num_samples or chunk below 1.

    Example:
        >>> from pyroflow import AutoPlanarFlow
        >>> from pyroflow.targets import eight_schools_centered
        >>> guide = AutoPlanarFlow(eight_schools_centered, num_layers=0)
        >>> problem = Problem.inspect(eight_schools_centered, guide, (), None)
        >>> draws = draw(problem, 20, seed=0)
        >>> draws.sites["theta"].shape, draws.sites["tau"].shape, draws.log_weights.shape
        (torch.Size([20, 8]), torch.Size([20]), torch.Size([20]))
    """
    check_count("num_samples", num_samples, 1)
    check_count("chunk", chunk, 1)
    sizes = [1] * num_samples
    if problem.plates is not None:
        sizes = [min(chunk, num_samples - start) for start in range(0, num_samples, chunk)]
    with seeded(seed), pyro.validation_enabled(False), poutine.block(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NaN, which are counted
        shapes = _shapes(*problem.traces())
        return join([_run(problem, size, shapes) for size in sizes])


def join(parts: list[Draws]) -> Draws:
    """The draws of several runs as one."""
    return Draws(
        {name: torch.cat([part.sites[name] for part in parts]) for name in parts[0].sites},
        torch.cat([part.log_p for part in parts]),
        torch.cat([part.log_q for part in parts]),
        _summed([part.nonfinite for part in parts]),
        _summed([part.rounded for part in parts]),
    )


def _summed(counts: list[dict[str, int]]) -> dict[str, int]:
    names = sorted({name for part in counts for name in part})
    return {name: sum(part.get(name, 0) for part in counts) for name in names}


def _shapes(guide: Trace, model: Trace) -> dict[str, torch.Size]:
    """The latent sites of a run of its own, and their shapes."""
    latents = dict(prune_subsample_sites(model).iter_stochastic_nodes())
    if not latents:
        raise ValueError(
            "the model has no latent sites: everything it samples is observed, so there is nothing "
            "for a guide to approximate; leave out obs= at the sites to infer"
        )
    for name, site in latents.items():
        expected, got = site["fn"].shape(), site["value"].shape
        if expected != got:
            raise ValueError(
                f"the guide samples site {name!r} with shape {tuple(got)}, and the model with "
                f"{tuple(expected)}: give both the same plates and event dimensions"
            )
    for name, site in prune_subsample_sites(guide).iter_stochastic_nodes():
        if name not in latents and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"the guide samples site {name!r}, which is no latent of the model: remove it, or "
                "mark it with infer={'is_auxiliary': True} if the other sites are made of it"
            )
    return {name: site["value"].shape for name, site in latents.items()}


def _run(problem: Problem, size: int, shapes: dict[str, torch.Size]) -> Draws:
    """Draws of one run; one of them where the problem does not vectorise."""
    vectorized = problem.plates is not None
    guide, model = problem.traces(size, problem.plates) if vectorized else problem.traces()
    plates = problem.plates if vectorized else None
    found = {name for name, _ in prune_subsample_sites(model).iter_stochastic_nodes()}
    if found != set(shapes):
        changed = sorted(found ^ set(shapes))[0]
        raise ValueError(
            f"the model's latent site {changed!r} is not in every run: a guide needs the same "
            "sites each time; sample it always, and use its value only where it is needed"
        )
    sites = {name: _value(name, model, size, shape) for name, shape in shapes.items()}
    by_site = [_log_prob_by_site(trace, size, plates) for trace in (model, guide)]
    log_p, log_q = (torch.stack(list(parts.values())).sum(0) for parts in by_site)
    nonfinite = {}
    for parts in by_site:
        for name, values in parts.items():
            if count := int((~values.isfinite()).sum()):
                nonfinite[name] = max(count, nonfinite.get(name, 0))
    rescore = partial(_rescored, problem, model, size, plates)
    return Draws(sites, log_p, log_q, nonfinite, rounded_draws(model, by_site[0], rescore))


def _rescored(
    problem: Problem, run: Trace, size: int, plates: int | None, moved: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The model's log densities in a run again, with other values of some sites."""
    nodes = run.nodes.items()
    drawn = {n: s["value"] for n, s in nodes if s["type"] == "sample" and not s["is_observed"]}
    model = (
        problem.model
        if plates is None
        else pyro.plate(PARTICLES, size, dim=-1 - plates)(problem.model)
    )
    again = poutine.trace(poutine.condition(model, data=drawn | moved))
    return _log_prob_by_site(again.get_trace(*problem.args, **problem.kwargs), size, plates)


def _value(name: str, trace: Trace, size: int, shape: torch.Size) -> Tensor:
    """The draws of a site, without the dimensions of size one that vectorising brings in."""
    value = trace.nodes[name]["value"]
    if value.numel() == shape.numel():  # the same for all draws, as a point estimate is
        return value.reshape(1, *shape).expand(size, *shape)
    if value.numel() != size * shape.numel():
        raise ValueError(
            f"the model's latent site {name!r} changes its shape from run to run, from "
            f"{tuple(shape)} to {tuple(value.shape)}: a guide needs latents of one shape"
        )
    return value.reshape(size, *shape)


def _log_prob_by_site(trace: Trace, size: int, plates: int | None) -> dict[str, Tensor]:
    """The log density of each draw at each sample site, shape (size,), −inf off its support."""
    trace = prune_subsample_sites(trace)
    trace.compute_log_prob()
    by_site = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample":
            continue
        log_prob = site["log_prob"].double()
        if (outside := _outside(site)) is not None:
            log_prob = log_prob.masked_fill(outside, -torch.inf)
        if plates is None:
            by_site[name] = log_prob.sum().reshape(1)
        else:
            draws_first = log_prob.movedim(-1 - plates, 0) if plates else log_prob
            by_site[name] = draws_first.reshape(size, -1).sum(1)
    return by_site


def _outside(site: dict[str, Any]) -> Tensor | None:
    """Where a value is off its support, if that is a matter of its numbers one by one.

    A simplex or a Cholesky factor is not checked: in float32 a guide's own transforms miss the
    tolerances of torch, by rounding.
    """
    try:
        support = site["fn"].support
    except NotImplementedError:
        return None
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.real or support.event_dim > 0:
        return None
    outside = ~support.check(site["value"])
    outside = outside.flatten(-site["fn"].event_dim).any(-1) if site["fn"].event_dim else outside
    return outside if site["mask"] is None else outside & site["mask"]
