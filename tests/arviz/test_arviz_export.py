"""The groups that ArviZ gets: values, rows that belong together, and that ArviZ reads them."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from arviz_groups import rows, variables
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyroflow as pf
from pyroflow.targets import (
    EIGHT_SCHOOLS_SIGMA,
    EIGHT_SCHOOLS_Y,
    eight_schools_exact,
    eight_schools_noncentered,
)

OLD_ARVIZ = find_spec("arviz") is not None and importlib.metadata.version("arviz")[0] == "0"
needs_old_arviz = pytest.mark.skipif(not OLD_ARVIZ, reason="is about ArviZ 0.x")
needs_new_arviz = pytest.mark.skipif(
    OLD_ARVIZ or find_spec("arviz_base") is None or find_spec("arviz_stats") is None,
    reason="is about ArviZ 1.x, or its packages arviz-base and arviz-stats",
)


@pytest.fixture(scope="module")
def schools() -> Any:
    """Eight schools under a Gaussian guide with the moments of the exact posterior."""
    torch.set_default_dtype(torch.float64)
    idata = pf.to_arviz(eight_schools_noncentered, schools_guide(), num_samples=2000, seed=3)
    torch.set_default_dtype(torch.float32)
    return idata


def schools_guide(shift: float = 0.0) -> Callable:
    exact, _ = eight_schools_exact(20_000)
    standardised = (exact["theta"] - exact["mu"][:, None]) / exact["tau"][:, None]
    z = torch.cat([exact["mu"][:, None], exact["tau"].log()[:, None], standardised], 1)
    guide = AutoMultivariateNormal(eight_schools_noncentered)
    guide()
    guide.loc.data = z.mean(0)
    guide.loc.data[0] += shift
    factor = torch.linalg.cholesky(z.T.cov())
    guide.scale = factor.diagonal()
    guide.scale_tril = factor / factor.diagonal()[:, None]
    return guide


def test_eight_schools_has_every_group_with_dims_from_the_plates(schools: Any) -> None:
    sampled = ("chain", "draw")
    by_school = (*sampled, "schools")
    expected = {
        "posterior": dict(mu=sampled, tau=sampled, theta_trans=by_school, theta=by_school),
        "prior": dict(mu=sampled, tau=sampled, theta_trans=by_school, theta=by_school),
        "posterior_predictive": {"y": by_school},
        "prior_predictive": {"y": by_school},
        "log_likelihood": {"y": by_school},
        "observed_data": {"y": ("schools",)},
        "sample_stats": dict(lp=sampled, lq=sampled, weight=sampled),
    }
    sizes = {"chain": 1, "draw": 2000, "schools": 8}
    for group, dims in expected.items():
        found = variables(schools, group)
        assert {name: array.dims for name, array in found.items()} == dims, group
        for array in found.values():
            assert array.shape == tuple(sizes[dim] for dim in array.dims)
    assert "constant_data" not in schools
    np.testing.assert_array_equal(schools["posterior"]["schools"], range(8))
    np.testing.assert_array_equal(schools["observed_data"]["y"], EIGHT_SCHOOLS_Y)


def test_a_row_has_the_same_latents_in_every_group(schools: Any) -> None:
    mu, tau, z = (rows(schools, "posterior", name) for name in ("mu", "tau", "theta_trans"))
    theta = rows(schools, "posterior", "theta")
    torch.testing.assert_close(theta, mu[:, None] + tau[:, None] * z)

    y, sigma = torch.tensor(EIGHT_SCHOOLS_Y), torch.tensor(EIGHT_SCHOOLS_SIGMA)
    log_like = torch.distributions.Normal(theta, sigma).log_prob(y)
    torch.testing.assert_close(rows(schools, "log_likelihood", "y"), log_like)

    prior = torch.distributions.Normal(0.0, 5.0).log_prob(mu)
    prior = prior + torch.distributions.HalfCauchy(5.0).log_prob(tau)
    prior = prior + torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(rows(schools, "sample_stats", "lp"), prior + log_like.sum(1))

    guide = schools_guide()
    latent = torch.cat([mu[:, None], tau.log()[:, None], z], 1)
    log_q = guide.get_posterior().log_prob(latent) - tau.log()
    torch.testing.assert_close(rows(schools, "sample_stats", "lq"), log_q.detach())

    noise = (rows(schools, "posterior_predictive", "y") - theta) / sigma
    assert noise.mean().abs() < 4 / 16_000**0.5
    assert (noise.std() - 1).abs() < 4 / 32_000**0.5


def test_predictive_noise_is_independent_of_the_guides(schools: Any) -> None:
    theta = rows(schools, "posterior", "theta")
    noise = (rows(schools, "posterior_predictive", "y") - theta) / torch.tensor(EIGHT_SCHOOLS_SIGMA)
    latent = torch.cat([rows(schools, "posterior", "theta_trans"), noise], 1)
    between = latent.T.corrcoef()[:8, 8:]
    assert between.abs().max() < 4.5 / 2000**0.5


def test_the_prior_is_the_models(schools: Any) -> None:
    tau, mu = rows(schools, "prior", "tau"), rows(schools, "prior", "mu")
    assert abs((tau < 5).double().mean() - 0.5) < 4 * 0.5 / 2000**0.5  # the median of HalfCauchy(5)
    assert abs(mu.std() - 5) < 4 * 5 / 4000**0.5
    theta = mu[:, None] + tau[:, None] * rows(schools, "prior", "theta_trans")
    torch.testing.assert_close(rows(schools, "prior", "theta"), theta)
    noise = (rows(schools, "prior_predictive", "y") - theta) / torch.tensor(EIGHT_SCHOOLS_SIGMA)
    assert abs(noise.std() - 1) < 4 / 32_000**0.5


def test_weights_sum_to_one_and_follow_the_log_ratio(schools: Any) -> None:
    weight = rows(schools, "sample_stats", "weight")
    assert weight.sum() == pytest.approx(1)
    ratio = rows(schools, "sample_stats", "lp") - rows(schools, "sample_stats", "lq")
    low = ratio < ratio.median()  # below the tail that is smoothed
    factor = (weight[low].log() - ratio[low]).diff()
    assert factor.abs().max() < 1e-8
    assert 0 < schools["sample_stats"].attrs["khat"] < 1
    assert schools["sample_stats"].attrs["resampled"] == 0


def test_resampling_mends_a_shifted_guide_and_keeps_rows_together() -> None:
    guide = schools_guide(shift=2.0)
    plain, resampled = (
        pf.to_arviz(eight_schools_noncentered, guide, num_samples=4000, seed=1, resample=flag)
        for flag in (False, True)
    )
    exact = eight_schools_exact(100_000)[0]["mu"].mean()
    assert abs(rows(plain, "posterior", "mu").mean() - exact) > 1.5
    assert abs(rows(resampled, "posterior", "mu").mean() - exact) < 0.4
    theta, y = rows(resampled, "posterior", "theta"), torch.tensor(EIGHT_SCHOOLS_Y)
    log_like = dist.Normal(theta, torch.tensor(EIGHT_SCHOOLS_SIGMA)).log_prob(y)
    torch.testing.assert_close(rows(resampled, "log_likelihood", "y"), log_like)
    drawn = {(lp.item(), mu.item()) for lp, mu in pairs(plain)}
    assert {(lp.item(), mu.item()) for lp, mu in pairs(resampled)} < drawn
    np.testing.assert_allclose(rows(resampled, "sample_stats", "weight"), 1 / 4000)
    assert resampled["sample_stats"].attrs["resampled"] == 1
    assert resampled["sample_stats"].attrs["khat"] == plain["sample_stats"].attrs["khat"]


def pairs(idata: Any) -> Any:
    return zip(rows(idata, "sample_stats", "lp"), rows(idata, "posterior", "mu"), strict=True)


def test_seeds_reproduce_and_leave_the_generator_alone() -> None:
    guide = AutoNormal(eight_schools_noncentered)
    guide()
    before = torch.get_rng_state()
    one, two, other = (
        pf.to_arviz(eight_schools_noncentered, guide, num_samples=10, seed=seed)
        for seed in (5, 5, 6)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for group, name in [("posterior", "mu"), ("posterior_predictive", "y"), ("prior", "tau")]:
        assert torch.equal(rows(one, group, name), rows(two, group, name))
        assert not torch.equal(rows(one, group, name), rows(other, group, name))


def test_importing_pyroflow_does_not_import_arviz() -> None:
    code = "import sys, pyroflow; sys.exit('arviz' in sys.modules or 'xarray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def exact_elpd(loo: Callable, wrap: Callable) -> float:
    theta = eight_schools_exact(4000, seed=1)[0]["theta"]
    log_like = torch.distributions.Normal(theta, torch.tensor(EIGHT_SCHOOLS_SIGMA))
    values = log_like.log_prob(torch.tensor(EIGHT_SCHOOLS_Y))[None].numpy()
    return loo(wrap(theta[None].numpy(), values))


@needs_old_arviz
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_arviz_0_reads_it(schools: Any) -> None:
    import arviz as az
    import matplotlib.pyplot as plt

    assert isinstance(schools, az.InferenceData)
    summary = az.summary(schools, var_names=["mu", "theta"])
    mean = rows(schools, "posterior", "mu").mean().item()
    assert list(summary.index) == ["mu", *(f"theta[{i}]" for i in range(8))]
    assert summary.loc["mu", "mean"] == pytest.approx(mean, abs=1e-3)
    az.plot_trace(schools, var_names=["mu", "tau"])
    az.plot_ppc(schools, num_pp_samples=20)
    az.plot_ppc(schools, num_pp_samples=20, group="prior")
    plt.close("all")


@needs_old_arviz
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # draws that repeat are a tail
def test_loo_of_resampled_draws_is_that_of_exact_ones() -> None:
    import arviz as az

    guide = schools_guide(shift=0.3)
    idata = pf.to_arviz(eight_schools_noncentered, guide, num_samples=4000, seed=2, resample=True)
    exact = exact_elpd(az.loo, lambda t, v: az.from_dict({"t": t}, log_likelihood={"y": v}))
    found = az.loo(idata)
    assert found.n_data_points == 8
    assert found.elpd_loo == pytest.approx(exact.elpd_loo, abs=0.15)
    assert found.p_loo == pytest.approx(exact.p_loo, abs=0.15)


@needs_old_arviz
def test_arviz_1_gets_a_tree_of_the_same_groups(
    schools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xarray import DataTree

    monkeypatch.setattr("pyroflow.arviz.export.version", lambda package: "1.2.0")
    tree = pf.to_arviz(eight_schools_noncentered, schools_guide(), num_samples=2000, seed=3)
    assert isinstance(tree, DataTree)
    assert set(tree.children) == set(schools.groups())
    for group in tree.children:
        assert tree[group].to_dataset().equals(schools[group]), group


@needs_new_arviz
def test_arviz_1_reads_it(schools: Any) -> None:
    import arviz_base
    import arviz_stats
    from xarray import DataTree

    assert isinstance(schools, DataTree)
    summary = arviz_stats.summary(schools, var_names=["mu", "theta"])
    assert list(summary.index) == ["mu", *(f"theta[{i}]" for i in range(8))]
    guide = schools_guide(shift=0.3)
    idata = pf.to_arviz(eight_schools_noncentered, guide, num_samples=4000, seed=2, resample=True)
    exact = exact_elpd(
        arviz_stats.loo,
        lambda t, v: arviz_base.from_dict({"posterior": {"t": t}, "log_likelihood": {"y": v}}),
    )
    found = arviz_stats.loo(idata)
    assert found.n_data_points == 8
    assert found.elpd == pytest.approx(exact.elpd, abs=0.15)
    assert arviz_base.extract(schools, var_names=["theta"]).sizes["schools"] == 8
