"""Models of all sorts as ArviZ gets them, and those that are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_groups import rows
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value
from torch import Tensor

import pyroflow as pf
from pyroflow.targets import (
    EIGHT_SCHOOLS_SIGMA,
    EIGHT_SCHOOLS_Y,
    eight_schools_noncentered,
)


def test_models_that_mix_vectorised_draws_run_one_by_one() -> None:
    def mixing() -> None:  # right alone; side by side it would sum over all draws
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(3))
        pyro.deterministic("total", z.sum())

    def leftmost() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.deterministic("total", z[0] + z[1] + z[2])
        pyro.sample("y", dist.Normal(z[0], 1.0), obs=torch.tensor(0.0))
        pyro.sample("late", dist.Normal(z[2], 0.01), obs=torch.tensor(0.0))

    for model in (mixing, leftmost):
        idata = pf.to_arviz(model, AutoNormal(model, init_scale=1.0), num_samples=30)
        z, total = rows(idata, "posterior", "z"), rows(idata, "posterior", "total")
        torch.testing.assert_close(total, z.sum(1))
        torch.testing.assert_close(rows(idata, "prior", "total"), rows(idata, "prior", "z").sum(1))
    torch.testing.assert_close(
        rows(idata, "log_likelihood", "y"), dist.Normal(z[:, 0], 1.0).log_prob(torch.tensor(0.0))
    )
    assert (rows(idata, "posterior_predictive", "late") - z[:, 2]).abs().max() < 0.05


def test_control_flow_is_that_of_each_draw_of_the_prior_too() -> None:
    """Where all draws of the posterior take one branch, and those of the prior both."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        scale = 0.01 if bool((z > 0).all()) else 9.0
        pyro.sample("y", dist.Normal(z, scale), obs=torch.tensor(3.0))

    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"z": torch.tensor(3.0)}))
    idata = pf.to_arviz(model, guide, num_samples=100)
    z = rows(idata, "prior", "z")
    far = (rows(idata, "prior_predictive", "y") - z).abs() > 0.1
    assert not far[z > 0].any()
    assert far[z < 0].sum() > 30


def scaled_walk(x: Tensor, y: Tensor | None = None) -> None:
    """Singular in float32 where the length is large, as its prior has it."""
    length = pyro.sample("length", dist.LogNormal(9.0, 1.0))
    factor = torch.linalg.cholesky((-0.5 * ((x - x[:, None]) / length) ** 2).exp())
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), scale_tril=factor), obs=y)


def shifted(y: Tensor | None = None) -> None:
    shift = pyro.get_param_store()["shift"]
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(loc + shift, 1.0), obs=y)


@pytest.mark.usefixtures("float32")
def test_predictions_run_at_the_draws_and_the_parameters_of_the_fit() -> None:
    x = torch.linspace(0.0, 5.0, 6)
    start = init_to_value(values={"length": torch.tensor(0.5)})
    guide = AutoNormal(scaled_walk, init_loc_fn=start)
    idata = pf.to_arviz(scaled_walk, guide, (x, torch.sin(x)), None, 30, predictions_args=(x + 1,))
    assert rows(idata, "predictions", "y").isfinite().all()

    pyro.get_param_store()["shift"] = torch.tensor(50.0)
    guide = AutoNormal(shifted)
    idata = pf.to_arviz(shifted, guide, (torch.tensor(50.0),), None, 30, predictions_args=())
    assert (rows(idata, "predictions", "y") > 30).all()


def test_chunks_of_vectorised_draws_line_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyroflow.model.runs.CHUNK", 7)
    idata = pf.to_arviz(
        eight_schools_noncentered, AutoNormal(eight_schools_noncentered), (), None, 20
    )
    theta = rows(idata, "posterior", "theta")
    log_like = dist.Normal(theta, torch.tensor(EIGHT_SCHOOLS_SIGMA)).log_prob(
        torch.tensor(EIGHT_SCHOOLS_Y)
    )
    torch.testing.assert_close(rows(idata, "log_likelihood", "y"), log_like)


def test_factors_are_no_data_and_deterministic_sites_no_likelihood() -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.factor("penalty", -(scale**2))
        pyro.deterministic("variance", scale**2)
        pyro.sample("fixed", dist.Delta(scale + 1), obs=scale + 1)
        with pyro.plate("rows", 4), poutine.mask(mask=torch.tensor([True, True, False, True])):
            pyro.sample("y", dist.Normal(0.0, scale), obs=torch.tensor(1.5))

    idata = pf.to_arviz(model, AutoNormal(model), num_samples=50)
    scale = rows(idata, "posterior", "scale")
    assert set(idata["posterior"].data_vars) == {"scale", "variance", "fixed"}
    torch.testing.assert_close(rows(idata, "posterior", "fixed"), scale + 1)
    for group in ("log_likelihood", "observed_data", "posterior_predictive", "prior_predictive"):
        assert list(idata[group].data_vars) == ["y"], group
    np.testing.assert_array_equal(idata["observed_data"]["y"], np.full(4, 1.5))
    log_like = rows(idata, "log_likelihood", "y")
    expected = dist.Normal(0.0, scale).log_prob(torch.tensor(1.5))
    torch.testing.assert_close(log_like, expected[:, None] * torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert not torch.allclose(rows(idata, "sample_stats", "lp"), log_like.sum(1))


def test_a_conditioned_model_is_sampled_all_the_same() -> None:
    def joint() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(loc, 1.0))

    model = poutine.condition(joint, data={"y": torch.tensor(5.0)})
    idata = pf.to_arviz(model, AutoNormal(model), num_samples=30)
    assert idata["observed_data"]["y"].item() == 5
    assert rows(idata, "posterior_predictive", "y").unique().numel() == 30


def test_improper_priors_are_left_out_with_a_warning() -> None:
    def model() -> None:
        loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))

    guide = pf.AutoPlanarFlow(model, init_loc_fn=lambda site: torch.tensor(1.0))
    with pytest.warns(UserWarning, match="prior and prior_predictive are left out"):
        idata = pf.to_arviz(model, guide, num_samples=30)
    assert "prior" not in idata
    assert "prior_predictive" not in idata
    assert rows(idata, "posterior_predictive", "y").shape == (30,)


def test_a_model_without_data_has_a_prior() -> None:
    """With its latents given nothing is random, and draws run in a way that cannot sample them."""

    def model() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.zeros(3), v.exp()).to_event(1))

    idata = pf.to_arviz(model, AutoNormal(model), num_samples=30)
    assert idata["prior"]["x"].shape == (1, 30, 3)
    assert rows(idata, "prior", "v").unique().numel() == 30


def test_a_likelihood_without_sampler_costs_only_its_predictive_groups() -> None:
    class Scored(dist.Normal):
        def rsample(self, *args: Any) -> Tensor:
            raise NotImplementedError("no sampler")

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("y", Scored(loc, 1.0), obs=torch.tensor(1.0))

    with pytest.warns(UserWarning, match="left out, as the model cannot be sampled.*no sampler"):
        idata = pf.to_arviz(model, AutoNormal(model), num_samples=30)
    assert "posterior_predictive" not in idata
    assert idata["log_likelihood"]["y"].shape == (1, 30)


def test_a_discrete_site_that_the_guide_samples() -> None:
    def model() -> None:
        kind = pyro.sample("kind", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(kind, 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.sample("kind", dist.Bernoulli(torch.tensor(1 / (1 + np.exp(-0.5)))))

    idata = pf.to_arviz(model, guide, num_samples=100)
    assert set(rows(idata, "posterior", "kind").tolist()) == {0.0, 1.0}
    assert idata["sample_stats"].attrs["khat"] == -np.inf  # the guide is exact: equal weights


def test_point_guides_have_no_weights() -> None:
    guide = AutoDelta(eight_schools_noncentered)
    idata = pf.to_arviz(eight_schools_noncentered, guide, num_samples=10)
    assert np.isnan(idata["sample_stats"].attrs["khat"])
    assert rows(idata, "sample_stats", "weight").isnan().all()
    with pytest.raises(ValueError, match="resample=True needs weights.*one point for site 'mu'"):
        pf.to_arviz(eight_schools_noncentered, guide, num_samples=10, resample=True)


@pytest.mark.parametrize("num_samples", [1, 2, 5, 30])
def test_few_draws(num_samples: int) -> None:
    guide = AutoNormal(eight_schools_noncentered)
    idata = pf.to_arviz(eight_schools_noncentered, guide, num_samples=num_samples, resample=True)
    assert idata["posterior"]["theta"].shape == (1, num_samples, 8)
    assert np.isfinite(idata["sample_stats"].attrs["khat"]) == (num_samples >= 25)


def test_subsampled_plates_are_refused_by_name() -> None:
    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("patients", 100, subsample_size=10) as index:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.zeros(100)[index])

    with pytest.raises(ValueError, match="the plate 'patients' takes 10 of 100 rows"):
        pf.to_arviz(model, AutoNormal(model))


def test_enumerated_sites_are_refused_by_name() -> None:
    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        kind = pyro.sample("kind", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(loc + kind, 1.0), obs=torch.tensor(1.0))

    guide = AutoNormal(poutine.block(model, hide=["kind"]))
    with pytest.raises(ValueError, match="does not sample the model's latent site 'kind'"):
        pf.to_arviz(model, guide)


def test_shapes_that_change_are_refused_by_name() -> None:
    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        count = 2 if loc.flatten()[0] > 0 else 3
        pyro.sample("y", dist.Normal(loc, 1.0).expand([count]).to_event(1), obs=torch.zeros(count))

    with pytest.raises(ValueError, match="site 'y' is not in every run with the same shape"):
        pf.to_arviz(model, AutoNormal(model, init_scale=1.0), num_samples=50)


def test_a_density_that_is_nan_everywhere_is_refused_by_name() -> None:
    def model() -> None:
        pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.factor("broken", torch.tensor(torch.nan))

    def guide() -> None:
        pyro.sample("loc", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="site 'broken' is NaN or infinite for all 50 draws"):
        pf.to_arviz(model, guide, num_samples=50)


def test_draws_that_are_nan_have_no_weight() -> None:
    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.factor("cut", torch.where(loc > 0, 0.0, torch.nan))

    def guide() -> None:
        pyro.sample("loc", dist.Normal(0.0, 1.0))

    idata = pf.to_arviz(model, guide, num_samples=200, resample=True)
    assert (rows(idata, "posterior", "loc") > 0).all()
    assert "log_likelihood" not in idata
    assert "observed_data" not in idata
