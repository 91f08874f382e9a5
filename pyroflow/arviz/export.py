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

from pyroflow.arviz import labels
from pyroflow.checks import check_count
from pyroflow.diagnostics.psis import pareto_smooth, systematic
from pyroflow.guides.arguments import data_into_args
from pyroflow.model.arguments import parameters_of, takes
from pyroflow.model.bound import BoundModel
from pyroflow.model.comparison import FAILURES
from pyroflow.model.draws import Draws, draw
from pyroflow.model.program import rows_of
from pyroflow.model.records import Sites, is_factor
from pyroflow.model.runs import CHUNK, Runs
from pyroflow.seeds import one_at_a_time, seeded

if TYPE_CHECKING:
    from arviz import InferenceData
    from xarray import Dataset, DataTree


@data_into_args("num_samples")
@one_at_a_time
def to_arviz(
    model: Callable,
    guide: Callable,
    *data: Any,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    num_samples: int = 1000,
    resample: bool = False,
    seed: int | None = 0,
    dims: labels.Dims | None = None,
    coords: labels.Coords | None = None,
    predictions_args: tuple | None = None,
    predictions_kwargs: dict[str, Any] | None = None,
    predictions_coords: labels.Coords | None = None,
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
        model: A Pyro model.
        guide: A guide for its latents, fitted.
        data: Arguments of both, with the data, as in Pyro's ``svi.step(x, y)``. A tuple or list in
            first place is taken as ``args``, and a dict or None after it as ``kwargs``.
        args: The same as a tuple: for a model whose first argument is a tuple or list.
        kwargs: Keyword arguments of both.
        num_samples: S.
        resample: Whether the draws are resampled by ``weight``, so that they follow the posterior
            where k-hat is good; then all weights are 1/S.
        seed: Makes the result reproducible, without touching the global generator;
            None for other draws each time.
        dims: By site or argument, names for all its dimensions instead of those from the plates.
        coords: By dimension, its labels; 0, 1, … otherwise.
        predictions_args: Arguments for predictions. The latents keep the draws, so that new data
            must not change their shapes.
        predictions_kwargs: Keyword arguments for predictions.
        predictions_coords: Labels in the groups of predictions; ``coords`` otherwise, where their
            length fits.

    Returns:
        An ``InferenceData`` with ArviZ 0.x, a ``DataTree`` with ArviZ 1.x.

    Raises:
        ValueError: If a latent site has no draws (an enumerated one), a plate subsamples, names
            or labels do not fit, a latent has another shape for the predictions, or the model is
            NaN or infinite for every draw.

    Warns:
        UserWarning: Where a model cannot be sampled, for an improper prior or a likelihood without
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
    check_new(model, predictions_args, predictions_kwargs)
    with torch.no_grad(), poutine.block(), seeded(seed):
        bound = BoundModel.for_weights(model, guide, args, kwargs)
        draws, stats, khat = _weighted(draw(bound, num_samples, keep_all=True), resample)
        groups = predicted(model, predictions_args, predictions_kwargs, draws.sites)
        groups = _fitted(bound, draws) | {"sample_stats": stats} | groups
    groups = {name: group for name, group in groups.items() if group}
    tables = labels.datasets(groups, dims or {}, coords or {}, predictions_coords or {})
    tables["sample_stats"].attrs |= {"khat": khat, "resampled": int(resample)}
    return container(tables)


def container(tables: dict[str, Dataset]) -> InferenceData | DataTree:
    """One object of several datasets: of the kind that the installed ArviZ takes."""
    try:
        old = version("arviz").startswith("0.")
    except PackageNotFoundError:  # only the parts of ArviZ 1.x are installed
        old = False
    if not old:
        from xarray import DataTree

        return DataTree.from_dict(tables)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.x announces 1.x
        from arviz import InferenceData
    return InferenceData(**tables)


def _weighted(draws: Draws, resample: bool) -> tuple[Draws, labels.Group, float]:
    """The draws, resampled if asked for; their log densities and weights; k-hat."""
    draws.check_weighted()
    if point := draws.point:
        if resample:
            raise ValueError(
                f"resample=True needs weights, but the guide has one point for site {point!r}, no "
                "density: leave resample out, or fit a guide with a density, such as AutoPlanarFlow"
            )
        smoothed, khat = torch.full_like(draws.log_weights, torch.nan), math.nan
    else:
        smoothed, _, khat = pareto_smooth(draws.log_weights)
    if resample:
        draws = draws.at(systematic(smoothed, len(draws)))
        smoothed = torch.full_like(smoothed, -math.log(len(draws)))
    stats = {"lp": draws.log_p, "lq": draws.log_q, "weight": smoothed.exp()}
    return draws, {name: ([], labels.as_array(values)) for name, values in stats.items()}, khat


def _fitted(bound: BoundModel, draws: Draws) -> dict[str, labels.Group]:
    """The groups for the arguments of the fit."""
    sites, data = draws.all_sites, bound.observed
    others = [name for name in sites if name not in data and not is_factor(sites[name].record)]
    # What runs where the latents are given need not run where they are sampled. Nor is it then
    # right there, if control flow depends on them, which vmap does not take.
    ahead, anew = bound.runs.predictive(), bound.runs.predictive()
    predictive = _tried([ahead], draws.sites, len(draws), "posterior_predictive is")
    prior_runs = [ahead, anew] if ahead.right_by_vmap else [anew]
    prior = _tried(prior_runs, {}, len(draws), "prior and prior_predictive are")
    observed = {name: labels.observed_values(sites[name].record) for name in data}
    return {
        "posterior": labels.drawn_sites(sites, others),
        "posterior_predictive": labels.drawn_sites(predictive, data),
        "log_likelihood": {name: labels.log_likelihood(sites[name]) for name in data},
        "prior": labels.drawn_sites(prior, others),
        "prior_predictive": labels.drawn_sites(prior, data),
        "observed_data": observed,
        "constant_data": _constants(bound, [values for _, values in observed.values()]),
    }


def _tried(ahead: list[Runs], latents: dict[str, Tensor], size: int, groups: str) -> Sites:
    """The sites with the data sampled; none, and a warning, where the model has no sampler."""
    for runs in ahead:
        try:
            return runs.evaluate(latents, size)
        except FAILURES as error:
            why = f"{groups} left out, as the model cannot be sampled: {error!r}"
    warnings.warn(why, stacklevel=6)
    return {}


def check_new(model: Callable, args: tuple | None, kwargs: dict[str, Any] | None) -> None:
    """Raise ``TypeError`` for arguments of predictions that the model does not take."""
    if not isinstance(args, tuple | list | None):
        raise TypeError(
            f"predictions_args must be a tuple, as in predictions_args=(x_new,), got "
            f"{type(args).__name__}"
        )
    given = args is not None or kwargs is not None
    if given and not takes(model, tuple(args or ()), kwargs or {}):
        raise TypeError(
            f"predictions_args must be the model's arguments, {', '.join(parameters_of(model))}, "
            f"got {len(args or ())} of them and the keywords {sorted(kwargs or {})}"
        )


def predicted(
    model: Callable, args: tuple | None, kwargs: dict[str, Any] | None, draws: dict[str, Tensor]
) -> dict[str, labels.Group]:
    """The groups for new arguments, if there are any, at draws of the latents (N, ...) by site."""
    if args is None and kwargs is None:
        return {}
    first = {name: values[0] for name, values in draws.items()}
    new = BoundModel(model, None, tuple(args or ()), kwargs, first)
    records = new.model_trace.nodes
    for name in (name for name in draws if name in records):
        fitted, shape = draws[name].shape[1:], records[name]["fn"].shape()
        if fitted != shape:
            raise ValueError(
                f"the latent site {name!r} has shape {tuple(fitted)} in the fit and {tuple(shape)} "
                "with predictions_args, so that its draws do not fit: give predictions_args that "
                "leave the latents as they are, and change the data only"
            )
    parts, num = {}, len(next(iter(draws.values())))
    for start in range(0, num, CHUNK):
        rows = range(start, min(start + CHUNK, num))
        sites = new.runs.predictive().evaluate(rows_of(draws, rows), len(rows))
        others = [name for name in sites if name not in draws]
        others = [name for name in others if not is_factor(sites[name].record)]
        for name, variable in labels.drawn_sites(sites, others).items():
            parts.setdefault(name, []).append(variable)
    return {
        "predictions": {name: labels.joined(found) for name, found in parts.items()},
        "predictions_constant_data": _constants(new, []),
    }


def _constants(bound: BoundModel, observed: list[np.ndarray]) -> labels.Group:
    """Tensors and arrays among the arguments, save the observed ones."""
    named = labels.named_arguments(bound.model, bound.args, bound.kwargs).items()
    arrays = {n: labels.as_array(v) for n, v in named if isinstance(v, Tensor | np.ndarray)}
    return {
        name: ([f"{name}_dim_{i}" for i in range(array.ndim)], array)
        for name, array in arrays.items()
        if not any(np.array_equal(array.ravel(), o.ravel(), equal_nan=True) for o in observed)
    }
