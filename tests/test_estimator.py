"""``FlowDensity`` keeps scikit-learn's rules, and says what ``fit_density`` says."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimators_dtypes, parametrize_with_checks

import pyroflow as pf

TINY: dict[str, Any] = {"num_layers": 2, "steps": 2, "polish": 0, "random_state": 0}
FEW_VALUES = "integers of three values have no density, and are refused unless dequantize is given"


@parametrize_with_checks(
    [pf.FlowDensity(**TINY)],
    expected_failed_checks=lambda _: {"check_estimators_dtypes": FEW_VALUES},
)
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def test_integers_have_probabilities_where_they_are_dequantized() -> None:
    check_estimators_dtypes("FlowDensity", pf.FlowDensity(**TINY, dequantize=True))


@pytest.mark.parametrize(("kind", "units"), [("planar", None), ("radial", None), ("sylvester", 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_is_fit_density(kind: str, units: int | None, dtype: type) -> None:
    X = pf.datasets.sine(200).numpy().astype(dtype)
    found = pf.FlowDensity(kind=kind, **TINY).fit(X)
    make = getattr(pf, f"{kind}_flow")
    flow = make(2, num_layers=2) if units is None else make(2, units, num_layers=2)
    flow = flow.to(getattr(torch, np.dtype(dtype).name))
    fit = pf.fit_density(flow, X, steps=2, polish=0, seed=0, progress=False)
    scores = found.score_samples(X)
    assert (scores.shape, scores.dtype) == ((200,), dtype)
    assert np.array_equal(scores, flow.log_prob(X).numpy())
    assert (found.fit_.best_loss, found.score(X)) == (fit.best_loss, float(scores.mean()))
    assert np.array_equal(found.sample(7, random_state=3), flow.sample(7, seed=3).numpy())


def test_without_layers_it_is_a_gaussian() -> None:
    X = np.random.default_rng(0).normal(size=(600, 3)) @ np.array([[2, 1, 0], [0, 1, 1], [0, 0, 3]])
    found = pf.FlowDensity(num_layers=0, steps=20, polish=20, random_state=0).fit(X)
    gaussian = GaussianMixture(1).fit(X)
    assert found.score(X) == pytest.approx(gaussian.score(X), abs=0.01)
    draws = found.sample(20_000, random_state=0)
    assert np.allclose(np.cov(draws.T), gaussian.covariances_[0], rtol=0.1, atol=0.2)


def test_searches_over_pipelines_choose_by_the_mean_log_density() -> None:
    X = pf.datasets.sine(400).numpy()
    short = pf.FlowDensity(num_layers=0, steps=40, polish=20, random_state=0)
    pipeline = make_pipeline(StandardScaler(), short)
    grid = {"flowdensity__num_layers": [0, 8]}
    search = GridSearchCV(pipeline, grid, cv=2).fit(X)
    assert search.best_params_ == {"flowdensity__num_layers": 8}
    scores = cross_val_score(clone(search.best_estimator_), X, cv=2)
    assert scores.mean() == pytest.approx(search.best_score_, abs=1e-12)
    scaled = search.best_estimator_[0].transform(X)
    assert search.score(X) == pytest.approx(search.best_estimator_[1].score_samples(scaled).mean())


def test_the_depth_is_found_by_itself() -> None:
    X = np.random.default_rng(0).normal(size=(200, 2))
    found = pf.FlowDensity(steps=5, polish=0, lr=1e-4, random_state=0).fit(X)
    assert (found.num_layers, found.fit_.num_layers) == ("auto", 0)
    again = pickle.loads(pickle.dumps(found))
    assert np.array_equal(again.score_samples(X), found.score_samples(X))
    assert again.fit_.depths == found.fit_.depths


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_columns_are_known_by_name(kind: str) -> None:
    values = np.random.default_rng(0).normal(size=(200, 2))
    columns = {"dose": np.exp(values[:, 0]), "effect": values[:, 1]}
    frame = pytest.importorskip(kind).DataFrame(columns)
    found = pf.FlowDensity(**TINY, support={"dose": "positive"}).fit(frame)
    assert list(found.feature_names_in_) == ["dose", "effect"]
    assert found.flow_.columns == ("dose", "effect")
    assert found.n_features_in_ == 2
    draws = found.sample(500, random_state=0)
    assert isinstance(draws, np.ndarray)
    assert draws[:, 0].min() > 0 > draws[:, 1].min()
    scores = found.score_samples(frame)
    assert np.array_equal(scores, found.flow_.log_prob(frame).numpy())
    with pytest.raises(ValueError, match="feature names should match"):
        found.score_samples(frame[["effect", "dose"]])
    with pytest.raises(ValueError, match="column 'dose'"):
        found.score_samples(pd.DataFrame(columns).assign(dose=-1.0))
    found.set_params(support=None).fit(values)
    assert not hasattr(found, "feature_names_in_")


def test_random_states_are_scikit_learns() -> None:
    X = pf.datasets.sine(100).numpy()
    found = pf.FlowDensity(**TINY | {"random_state": np.random.RandomState(1)}).fit(X)
    again = pf.FlowDensity(**TINY | {"random_state": np.random.RandomState(1)}).fit(X)
    assert found.fit_.losses == again.fit_.losses
    assert np.array_equal(found.sample(4, random_state=0), found.sample(4, random_state=0))
    before, state = torch.get_rng_state(), np.random.get_state()
    try:
        np.random.seed(5)
        drawn = [found.sample(4), found.sample(4)]
        np.random.seed(5)
        assert np.array_equal(drawn, [found.sample(4), found.sample(4)])
    finally:
        np.random.set_state(state)
    assert not np.array_equal(*drawn)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "spline"}, "kind must be one of 'planar', 'radial', 'sylvester'; got 'spline'"),
        ({"num_units": 2}, "num_units is of Sylvester flows, got 2 for kind 'planar'"),
        ({"num_layers": -1}, "num_layers must be an integer of at least 0"),
        ({"support": {"x": "positive"}}, "'x'"),
    ],
)
def test_bad_parameters_are_refused_when_it_is_fitted(options: dict, message: str) -> None:
    density = pf.FlowDensity(**TINY | options)
    with pytest.raises(ValueError, match=message):
        density.fit(pf.datasets.sine(50).numpy())


def test_n_samples_is_a_count() -> None:
    found = pf.FlowDensity(**TINY).fit(pf.datasets.sine(50).numpy())
    with pytest.raises(ValueError, match="n_samples must be an integer of at least 1, got 0"):
        found.sample(0)


def test_without_scikit_learn_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    file = sys.modules[pf.FlowDensity.__module__].__file__
    spec = importlib.util.spec_from_file_location("estimator_alone", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ImportError, match=r'pip install "pyroflow-ppl\[sklearn\]"'):
        module.FlowDensity(num_layers=2)
