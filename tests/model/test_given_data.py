"""Arrays among a model's arguments, and data that were forgotten."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from torch import Tensor

import pyroflow as pf

X = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, -1.0]])
Y = np.array([0.3, -0.4, 0.1, 1.2])
FIT = {"steps": 2, "num_particles": 8, "warm_start": False, "seed": 0, "progress": False}


def regression(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((x @ w.unsqueeze(-1)).squeeze(-1), 0.5), obs=y)


def groups(index: np.ndarray, size: np.int64, y: Tensor | None = None) -> None:
    with pyro.plate("groups", size):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(index)):
        pyro.sample("y", dist.Normal(loc[..., index], 1.0), obs=y)


def tensors(*arrays: np.ndarray) -> tuple[Tensor, ...]:
    return tuple(map(torch.as_tensor, arrays))


AS_X, AS_Y = "torch.as_tensor(x, dtype=torch.float64)", "torch.as_tensor(y, dtype=torch.float64)"


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((torch.as_tensor(X), Y), {}, f"argument 'y' is a numpy ndarray, .* pass {AS_Y}"),
        ((torch.as_tensor(X),), {"y": Y}, f"argument 'y' is a numpy ndarray, .* pass {AS_Y}"),
        ((X, torch.as_tensor(Y)), {}, f"argument 'x' is a numpy ndarray, .* pass {AS_X}"),
        ((X.astype(int), torch.as_tensor(Y)), {}, f"argument 'x' is a numpy ndarray, .* {AS_X}"),
        ((X, Y), {}, f"'x' is a numpy ndarray and 'y' is a numpy ndarray, .* {AS_X}, {AS_Y}"),
        (
            (torch.as_tensor(X), pd.Series(Y)),
            {},
            r"'y' is a pandas Series, .* torch.as_tensor(y.to_numpy(), dtype=torch.float64)",
        ),
        (
            (pd.DataFrame(X), torch.as_tensor(Y)),
            {},
            r"'x' is a pandas DataFrame, .* torch.as_tensor(x.to_numpy(), dtype=torch.float64)",
        ),
    ],
)
def test_an_array_that_a_model_fails_by_is_named(args: tuple, kwargs: dict, said: str) -> None:
    guide = pf.AutoPlanarFlow(regression, 0).setup(*tensors(X, Y))
    options = {"args": args, "kwargs": kwargs}
    said = said.replace("(", r"\(").replace(")", r"\)")
    for call in (
        lambda: pf.fit_guide(regression, pf.AutoPlanarFlow(regression, 0), **options),
        lambda: pf.fit_guide(regression, guide, **options),
        lambda: pf.diagnose(regression, guide, **options),
        lambda: pf.to_arviz(regression, guide, **options),
        lambda: pf.mcmc(regression, guide, **options),
        lambda: pf.posterior(regression, **options),
    ):
        with pytest.raises(TypeError, match=said) as caught:
            call()
        assert caught.value.__cause__ is not None


def test_float32_is_what_the_default_dtype_asks_for(float32: None) -> None:
    with pytest.raises(TypeError, match=r"as_tensor\(y, dtype=torch.float32\)$"):
        pf.posterior(regression, torch.as_tensor(X).float(), Y)


def test_arrays_that_a_model_can_use_stay_as_they_are() -> None:
    index, size, y = np.array([0, 1, 1, 0]), np.int64(2), torch.as_tensor(Y)
    guide = pf.AutoPlanarFlow(groups, 0)
    fit = pf.fit_guide(groups, guide, index, size, y, **FIT)
    assert fit.steps == 2
    with pytest.raises(TypeError, match=r"argument 'y' is a numpy ndarray, .* pass torch[^,]*, d"):
        pf.fit_guide(groups, guide, index, size, Y, **FIT)


def test_other_failures_of_a_model_with_arrays_are_its_own() -> None:
    def model(index: np.ndarray) -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))
        raise LookupError("of its own")

    with pytest.raises(LookupError, match="of its own"):
        pf.posterior(model, np.arange(3))
    with pytest.raises(ValueError, match="max_sets"):
        pf.diagnose(groups, pf.AutoPlanarFlow(groups), np.arange(2), 2, max_sets=0)


def of_rows(x: Tensor, y: Tensor | None = None, batch: int | None = None) -> None:
    """Data whose rows the model counts and picks."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    loc = pyro.sample("loc", dist.Normal(0.0, scale))
    size = len(x) if y is None else y.shape[0]
    with pyro.plate("rows", size, subsample_size=batch) as rows:
        pyro.sample("data", dist.Normal(loc, 1.0), obs=None if y is None else y[rows])


def counts(x: Tensor, *, y: Tensor | None = None) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("counts", dist.Poisson(rate), obs=y)


FORGOTTEN = "observes nothing, so that its prior is fitted: argument 'y', the data of site"


@pytest.mark.parametrize(("model", "site"), [(regression, "y"), slow(of_rows, "data")])
def test_forgotten_data_are_named(model: Callable, site: str) -> None:
    for options in ({}, {"kwargs": {"y": None}}):
        pyro.clear_param_store()
        with pytest.warns(UserWarning, match=f"{FORGOTTEN} '{site}'") as caught:
            pf.fit_guide(model, pf.AutoPlanarFlow(model, 0), torch.as_tensor(X), **options, **FIT)
        assert [w.filename for w in caught] == [__file__]


def test_forgotten_counts_are_named_before_they_are_refused_as_latents() -> None:
    guide, x = pf.AutoPlanarFlow(counts), torch.as_tensor(Y)
    for call in (lambda: pf.fit_guide(counts, guide, x), lambda: pf.posterior(counts, x)):
        with (
            pytest.warns(UserWarning, match=f"{FORGOTTEN} 'counts'") as caught,
            pytest.raises(ValueError, match="'counts'"),
        ):
            call()
        assert [w.filename for w in caught] == [__file__]


def with_other_data(x: Tensor, y: Tensor | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(loc, 1.0).expand([len(x)]).to_event(1), obs=x)
    pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def with_a_factor(x: Tensor, y: Tensor | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.factor("x", -(loc - x.mean()).square())
    pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def density(x: Tensor, scale: Tensor | None = None, size: int | None = None) -> None:
    """A model of no data, whose other arguments are none either."""
    with pyro.plate("rows", size or 2):
        pyro.sample("z", dist.Normal(x.mean(), 1.0 if scale is None else scale))


@pytest.mark.parametrize("model", [with_other_data, with_a_factor, density])
def test_nothing_is_said_where_no_data_are_missing(model: Callable) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pf.fit_guide(model, pf.AutoPlanarFlow(model, 0), torch.as_tensor(Y), **FIT)


def test_the_look_for_data_changes_no_fit() -> None:
    """Of a model with parameters and latents, which it runs by itself."""
    found = []
    for model in (with_other_data, lambda x: with_other_data(x)):
        pyro.clear_param_store()
        guide = pf.AutoPlanarFlow(model, 1)
        fit = pf.fit_guide(model, guide, torch.as_tensor(Y), **FIT)
        found.append([fit.best_loss, guide.median()["loc"].item()])
    assert found[0] == found[1]
