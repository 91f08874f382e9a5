"""Guides fitted to data that their model has simulated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import nn

from pyroflow.calibration.batched import Batched, Simulated
from pyroflow.calibration.result import Calibration, summarise
from pyroflow.checks import check_args, check_count, check_fraction, known_options
from pyroflow.inference.callbacks import part_of_a_whole
from pyroflow.inference.guide import fit_guide
from pyroflow.model.bound import BoundModel, signature_of
from pyroflow.model.draws import draw
from pyroflow.model.records import Values, is_factor
from pyroflow.progress import progress_bar
from pyroflow.seeds import one_at_a_time, seeded

PARTICLES = 32  # of the default fit
# The names of sites whose values become data, each with the model's argument that takes them too.
SimulatedSites = dict[str, str | None]


@known_options
@one_at_a_time
def calibrate(
    model: Callable,
    make_guide: Callable[[Callable], Callable],
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    *,
    data: Mapping[str, str] | Iterable[str] | None = None,
    num_simulations: int = 100,
    num_samples: int = 1000,
    fit: Callable[[Callable, Callable, tuple, dict[str, Any]], Any] | None = None,
    steps: int = 500,
    level: float = 0.05,
    seed: int | None = None,
    progress: bool = True,
) -> Calibration:
    r"""Fit a guide to data sets that the model made, and ask where the true values lie in it.

    M times, latents θ₀ are drawn from the prior and data from the model, a new guide is fitted
    to the data, and p = Pr_q(θ < θ₀) is estimated for every scalar. Of an exact posterior p is
    uniform. Where p and 1 − p are not distributed alike, the guide is biased: this is the test
    of Yao et al., with its p-value from random reflections p ↦ 1 − p, which is right for any M
    (the two samples depend on each other, so that the tables of the two-sample test are not).
    The spread of p about ½ tells guides that are too narrow or too wide.

    Unlike :func:`~pyroflow.diagnose` it takes M fits and speaks of the average over the prior, not
    of the data at hand, but of each latent by itself, and it sees modes that were missed.

    Args:
        model: A Pyro model; its data are simulated at the observed sites.
        make_guide: From a model to a new guide, such as :class:`~pyroflow.AutoPlanarFlow`. It
            gets the model with the simulated data observed.
        args: Positional arguments of model and guide, with data of the shape to simulate.
        kwargs: Keyword arguments, likewise.
        data: The sites to simulate; by default those that are observed. A mapping from site to
            the name of a model's argument hands the simulated data to that argument too: for
            data that are used elsewhere than in ``obs=``, or by the guide.
        num_simulations: M.
        num_samples: The guide's draws for each p.
        fit: Called as fit(model, guide, args, kwargs); by default
            :func:`~pyroflow.fit_guide` with 32 particles, or, of a flow over all latents and a
            model that can be recorded with its data as inputs, the same for all data sets at once
            (``fits`` of the result says so), without a stop rule. Ctrl-C in a fit ends all.
        steps: Of the default fit.
        level: False alarm rate of all verdicts together, which is shared out evenly.
        seed: Makes the result reproducible, without touching the global generator. The data sets
            of a seed do not depend on how the guides are fitted.
        progress: Show a progress bar, in a notebook or on a terminal.

    Returns:
        The probabilities, the tests of every scalar and a verdict on each site.

    Raises:
        ValueError: If there is no site to simulate, or one is not in the model; if the model has
            no latents, does not take a named argument, has a factor or an improper prior, which
            cannot be drawn from, or a plate that subsamples; if an option is out of range.

    Warns:
        UserWarning: If the data sets are too few to judge by, with how many would do.

    References:
        Yao, Vehtari, Simpson and Gelman, Yes, but Did It Work?: Evaluating Variational Inference,
        2018, https://arxiv.org/abs/1802.02538, section 4 and algorithm 2.

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflow as pf
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> options = {"num_simulations": 3, "steps": 5, "seed": 0, "progress": False}
        >>> result = pf.calibrate(model, pf.AutoPlanarFlow, (torch.zeros(4),), **options)
        >>> result.probabilities["loc"].shape
        torch.Size([3])
    """
    check_count("num_simulations", num_simulations, 2)
    check_count("num_samples", num_samples, 1)
    check_count("steps", steps, 1)
    check_fraction("level", level)
    if isinstance(make_guide, nn.Module) or not callable(make_guide):
        raise TypeError(
            "make_guide must make a new guide for each data set, such as AutoPlanarFlow or "
            "lambda model: AutoPlanarFlow(model, 8), got "
            f"{type(make_guide).__name__}, made already"
        )
    args, kwargs = check_args(args), dict(kwargs or {})
    with seeded(seed):  # by itself, as this run of the model is no simulation
        sites = _sites_to_simulate(BoundModel(model, None, args, kwargs), data)
    lifted = poutine.condition(model, data=dict.fromkeys(sites))

    def bound_to(values: Values) -> tuple[Callable, tuple, dict[str, Any]]:
        observed = poutine.condition(model, data=values)
        return observed, *_with_data(model, args, kwargs, sites, values)

    def simulate(number: int) -> Simulated:
        with seeded(seeds[number]), torch.no_grad(), poutine.block():
            nodes = poutine.trace(lifted).get_trace(*args, **kwargs).nodes
        truth = {n: node["value"] for n, node in nodes.items() if node["type"] == "sample"}
        values = {name: truth[name] for name in sites}
        return Simulated(truth, values, *bound_to(values))

    def fitted(number: int) -> Values:
        # A store of its own, or each guide would go on from the parameters of the last.
        with pyro.get_param_store().scope():
            truth, _, observed, *arguments = simulate(number)
            guide = make_guide(observed)
            if not callable(guide):
                raise TypeError(
                    "make_guide must return a guide when it is called with a model, got "
                    f"{type(guide).__name__}: for a guide that is a function itself, give "
                    "lambda model: guide"
                )
            alone(observed, guide, *arguments)
            draws = draw(BoundModel.for_weights(observed, guide, *arguments), num_samples).sites
        return {n: (v < truth[n]).double().sum(0) for n, v in draws.items()}

    alone = fit or partial(fit_guide, steps=steps, num_particles=PARTICLES, progress=False)
    options = {"steps": steps, "num_particles": PARTICLES, "num_samples": num_samples}
    batched, found = Batched(simulate, bound_to, make_guide, **options), {}
    bar = progress_bar("calibrate", num_simulations, progress)
    with seeded(seed), bar, part_of_a_whole():
        seeds = torch.randint(2**31, (num_simulations,), device="cpu").tolist()
        if fit is None:
            found = batched.below(range(num_simulations), bar.update)
        fits = _how(len(found), num_simulations, batched.why or "by the fit given")
        for number in range(num_simulations):
            if number not in found:
                found[number] = fitted(number)
                bar.update()
        rows = [found[number] for number in range(num_simulations)]
        below = {n: torch.stack([row[n] for row in rows]) for n in rows[0]}
        found = {n: (b + 0.5) / (num_samples + 1) for n, b in below.items()}
        result = summarise(found, level, fits)
    if result.too_few:
        warnings.warn(f"{result.too_few}: raise num_simulations", stacklevel=4)
    return result


def _how(together: int, num: int, why: str) -> str:
    """How data sets were fitted, in words."""
    if together == num:
        return "together"
    some = f"{together} together, {num - together} " if together else ""
    return f"{some}one by one: {why}"


def _sites_to_simulate(
    bound: BoundModel, data: Mapping[str, str] | Iterable[str] | None
) -> SimulatedSites:
    """The sites to simulate; what has no sampler is refused."""
    records = prune_subsample_sites(bound.model_trace).nodes
    sampled = {name: record for name, record in records.items() if record["type"] == "sample"}
    if data is None or isinstance(data, str):
        data = bound.observed if data is None else [data]
    sites = dict(data) if isinstance(data, Mapping) else dict.fromkeys(data)
    factors = [name for name, record in sampled.items() if is_factor(record)]
    if factors:
        raise ValueError(
            f"site {factors[0]!r} is a pyro.factor, which no data can be drawn from: write it as "
            "an observed sample site"
        )
    if not sites:
        raise ValueError(
            "data: the model observes nothing when it is called with these arguments: name the "
            f"sites to simulate, out of {list(sampled)}"
        )
    for name in sites:
        if name not in sampled:
            raise ValueError(f"data must name sample sites out of {list(sampled)}, got {name!r}")
    for name in [*bound.latents, *sites]:
        try:
            sampled[name]["fn"]()
        except NotImplementedError as error:
            raise ValueError(
                f"site {name!r} cannot be drawn from, as an improper prior cannot: give it a "
                "distribution with a sampler"
            ) from error
    return sites


def _with_data(
    model: Callable, args: tuple, kwargs: dict[str, Any], sites: SimulatedSites, values: Values
) -> tuple[tuple, dict[str, Any]]:
    """The arguments, with the simulated data in those that take them."""
    named = {site: argument for site, argument in sites.items() if argument is not None}
    if not named:
        return args, kwargs
    signature = signature_of(model)
    bound = signature.bind_partial(*args, **kwargs)
    for site, argument in named.items():
        if argument not in signature.parameters:
            raise ValueError(
                f"data: site {site!r} maps to argument {argument!r}, and the model takes "
                f"{list(signature.parameters)}"
            )
        bound.arguments[argument] = values[site]
    return bound.args, bound.kwargs
