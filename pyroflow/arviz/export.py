"""A Pyro model and its guide as a table of groups for ArviZ."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyroflow.arviz.labels import (
    Coords,
    Dims,
    Group,
    as_array,
    datasets,
    drawn,
    drawn_sites,
    log_likelihood,
    named_arguments,
    observed_values,
    renamed,
)
from pyroflow.checks import check_count
from pyroflow.diagnostics.psis import pareto_smooth, systematic
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import Draws, draw
from pyroflow.model.records import Sites, is_factor
from pyroflow.model.runs import Runs
from pyroflow.seeds import seeded
from pyroflow.threads import one_at_a_time

if TYPE_CHECKING:
    from arviz import InferenceData
    from xarray import Dataset, DataTree


@one_at_a_time
def to_arviz(
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    num_samples: int = 1000,
    *,
    resample: bool = False,
    seed: int | None = 0,
    dims: Dims | None = None,
    coords: Coords | None = None,
    predictions_args: tuple | None = None,
    predictions_kwargs: dict[str, Any] | None = None,
    predictions_coords: Coords | None = None,
) -> InferenceData | DataTree:
    r"""Draw from a fitted guide, and put into one object what ArviZ wants to know of the draws.

    Groups, each left out where it would be empty:

    - ``posterior``: the model's latent and deterministic sites at S draws of the guide.
    - ``posterior_predictive``: the observed sites, sampled anew at the same draws.
    - ``log_likelihood``: log p(y_i | z) of every independent element of the data at these draws.
    - ``sample_stats``: by draw ``lp`` = log p(x, z), ``lq`` = log q(z), and ``weight``, the Pareto
      smoothed importance weight, which sums to one; its attribute ``khat`` says how far to trust
      them all. It is infinite below 25 draws, NaN for a guide with one point.
    - ``prior`` and ``prior_predictive``: as many draws from the model alone.
    - ``observed_data``: the values of the observed sites.
    - ``constant_data``: tensors and arrays among the arguments that are not observed values, by
      their name in the model's signature, those in a dictionary by their key.
    - ``predictions`` and ``predictions_constant_data``: with ``predictions_args``, the sites that
      are no latents of the posterior, sampled for the new arguments at the same draws.

    There is one chain. Batch dimensions are named by their plates and event dimensions
    ``{site}_dim_0`` and so on, or by ``infer={"event_dims": [...]}`` at the site; what
    ``pyro.factor`` adds is in ``lp`` and not among the data.

    Args:
        model: a Pyro model.
        guide: a guide for its latents, fitted.
        args: arguments of both, with the data.
        kwargs: keyword arguments of both.
        num_samples: S.
        resample: whether the draws are resampled by ``weight``, so that they follow the posterior
            where k-hat is good; then all weights are 1/S.
        seed: makes the result reproducible, without touching the global generator;
            None for other draws each time.
        dims: by site or argument, names for all its dimensions instead of those from the plates.
        coords: by dimension, its labels; 0, 1, … otherwise.
        predictions_args: arguments for predictions. The latents keep the draws, so that new data
            must not change their shapes.
        predictions_kwargs: keyword arguments for predictions.
        predictions_coords: labels in the groups of predictions; ``coords`` otherwise, where their
            length fits.

    Returns:
        An ``InferenceData`` with ArviZ 0.x, a ``DataTree`` with ArviZ 1.x.

    Raises:
        ValueError: a latent site without draws (an enumerated one); a plate that subsamples; names
            or labels that do not fit; a latent whose shape is another for the predictions; a
            model that is NaN or infinite for every draw.

    Warns:
        UserWarning: where a model cannot be sampled, for an improper prior or a likelihood without
            a sampler; its predictive groups are left out.

    References:
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024),
        https://www.jmlr.org/papers/v25/19-556.html

    Example:
        >>> import pyroflow as pf
        >>> from pyroflow.targets import eight_schools_noncentered as model
        >>> guide = pf.AutoPlanarFlow(model, num_layers=0)
        >>> idata = pf.to_arviz(model, guide, num_samples=50, seed=0)
        >>> idata["posterior"]["theta"].dims, idata["posterior"]["theta"].shape
        (('chain', 'draw', 'schools'), (1, 50, 8))
    """
    check_count("num_samples", num_samples, 1)
    ahead = predictions_args is not None or predictions_kwargs is not None
    with torch.no_grad(), poutine.block(), seeded(seed):
        problem = BoundModel.for_weights(model, guide, args, kwargs)
        draws, stats, khat = _weighted(draw(problem, num_samples), resample)
        runs = problem.runs
        groups = _fitted(runs, draws) | {"sample_stats": stats}
        if ahead:
            new = tuple(predictions_args or ()), dict(predictions_kwargs or {})
            groups |= _predicted(Runs(model, *new, problem.runs.plates, predict=True), draws)
    groups = renamed({name: group for name, group in groups.items() if group}, dims or {})
    tables = datasets(groups, coords or {}, predictions_coords or {})
    tables["sample_stats"].attrs |= {"khat": khat, "resampled": int(resample)}
    return _container(tables)


def _container(tables: dict[str, Dataset]) -> InferenceData | DataTree:
    if _arviz_generation() == 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.x announces 1.x
            from arviz import InferenceData
        return InferenceData(**tables)
    from xarray import DataTree

    return DataTree.from_dict(tables)


def _arviz_generation() -> int:
    """The first number of ArviZ's version; where only its newer parts are installed, 1."""
    try:
        return int(version("arviz").split(".")[0])
    except PackageNotFoundError:
        return 1


def _weighted(draws: Draws, resample: bool) -> tuple[Draws, Group, float]:
    """The draws, resampled if asked for; their log densities and weights; k-hat."""
    log_weights = draws.log_weights
    if not log_weights.isfinite().any():
        worst = max(draws.nonfinite, key=draws.nonfinite.get)
        raise ValueError(
            f"the log density of site {worst!r} is NaN or infinite for all {len(draws)} draws, so "
            "there is nothing to export: mend the model there, or fit the guide first"
        )
    if point := _point(draws.sites):
        if resample:
            raise ValueError(
                f"resample=True needs weights, but the guide has one point for site {point!r}, no "
                "density: leave resample out, or fit a guide with a density, such as AutoPlanarFlow"
            )
        smoothed, khat = torch.full_like(log_weights, torch.nan), math.nan
    else:
        usable = log_weights.masked_fill(~log_weights.isfinite(), -torch.inf)
        smoothed, _, khat = pareto_smooth(usable)
    if resample:
        rows = systematic(smoothed, len(draws))
        sites = {name: values[rows.to(values.device)] for name, values in draws.sites.items()}
        draws = Draws(sites, draws.log_p[rows], draws.log_q[rows])
        smoothed = torch.full_like(smoothed, -math.log(len(draws)))
    stats = {"lp": draws.log_p, "lq": draws.log_q, "weight": smoothed.exp()}
    return draws, {name: drawn([], values) for name, values in stats.items()}, khat


def _point(sites: dict[str, Tensor]) -> str | None:
    """A site that has one value in all draws, if there is one."""
    for name, values in sites.items():
        if len(values) > 1 and bool((values == values[0]).all()):
            return name
    return None


def _fitted(runs: Runs, draws: Draws) -> dict[str, Group]:
    """The groups for the arguments of the fit."""
    latents, size = draws.sites, len(draws)
    sites = runs.evaluate(latents, size)
    sites = {name: site for name, site in sites.items() if not is_factor(site.record)}
    data = [name for name, site in sites.items() if site.log_prob is not None]
    data = [name for name in data if name not in latents]
    others = [name for name in sites if name not in data]
    predictive = _tried(runs, latents, size, "posterior_predictive is")
    prior = _tried(runs, {}, size, "prior and prior_predictive are")
    observed = {name: observed_values(sites[name].record) for name in data}
    return {
        "posterior": drawn_sites(sites, others),
        "posterior_predictive": drawn_sites(predictive, data),
        "log_likelihood": {name: log_likelihood(sites[name]) for name in data},
        "prior": drawn_sites(prior, others),
        "prior_predictive": drawn_sites(prior, data),
        "observed_data": observed,
        "constant_data": _constants(runs, [values for _, values in observed.values()]),
    }


def _tried(runs: Runs, latents: dict[str, Tensor], size: int, groups: str) -> Sites:
    """The sites with the data sampled; none, and a warning, where the model has no sampler."""
    try:
        ahead = Runs(runs.model, runs.args, runs.kwargs, runs.plates, predict=True)
        return ahead.evaluate(latents, size)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        warnings.warn(f"{groups} left out, as the model cannot be sampled: {error!r}", stacklevel=4)
        return {}


def _predicted(ahead: Runs, draws: Draws) -> dict[str, Group]:
    """The groups for new arguments."""

    def check(record: dict[str, Any]) -> dict[str, Any]:
        name = record["name"]
        if name in draws.sites:
            _check_same(name, draws.sites[name].shape[1:], record["fn"].shape())
        return {}

    model = poutine.infer_config(ahead.model, check)
    checked = Runs(model, ahead.args, ahead.kwargs, ahead.plates, predict=True)
    sites = checked.evaluate(draws.sites, len(draws))
    others = [name for name in sites if name not in draws.sites]
    return {
        "predictions": drawn_sites(sites, [n for n in others if not is_factor(sites[n].record)]),
        "predictions_constant_data": _constants(ahead, []),
    }


def _check_same(name: str, fitted: torch.Size, new: torch.Size) -> None:
    if fitted != new:
        raise ValueError(
            f"the latent site {name!r} has shape {tuple(fitted)} in the fit and {tuple(new)} with "
            "predictions_args, so that its draws do not fit: give predictions_args that leave the "
            "latents as they are, and change the data only"
        )


def _constants(runs: Runs, observed: list[np.ndarray]) -> Group:
    """Tensors and arrays among the arguments, save the observed ones."""
    group = {}
    for name, value in named_arguments(runs.model, runs.args, runs.kwargs):
        if isinstance(value, Tensor | np.ndarray):
            array = as_array(value)
            if not any(_same(array, data) for data in observed):
                group[name] = ([f"{name}_dim_{i}" for i in range(array.ndim)], array)
    return group


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.size == other.size and np.array_equal(one.ravel(), other.ravel(), equal_nan=True)
