"""A posterior in one call, against exact answers; what it refuses, and how it ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from pyro import poutine
from row_cases import poisson_rows
from torch import Tensor

import pyroflow as pf
from pyroflow.chains import Chains, mcmc
from pyroflow.ladder import checks, climb
from pyroflow.ladder.checks import apart, unsettled
from pyroflow.model.bound import BoundModel
from pyroflow.targets import eight_schools_centered

QUIET = {"seed": 0, "progress": False}


def gaussian() -> None:
    factor = torch.eye(10) + 0.8 * torch.ones(10, 10).tril(-1)
    pyro.sample("x", dist.MultivariateNormal(torch.arange(10.0), scale_tril=factor))


@cache
def of_gaussian() -> pf.Posterior:
    return pf.posterior(gaussian, **QUIET)


def separate(weights: tuple[float, ...], dim: int) -> Callable:
    """Normal modes of unlike sizes, 8 apart and more, on a line."""

    def model() -> None:
        places = 8 * torch.arange(len(weights), dtype=torch.get_default_dtype())
        loc = places[:, None].expand(-1, dim)
        scale = torch.linspace(1.0, 0.5, len(weights))[:, None].expand(-1, dim)
        parts = dist.Independent(dist.Normal(loc, scale), 1)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor(weights)), parts))

    return model


def wide() -> None:
    """One per cent of the mass in a part ten times as wide."""
    scale = torch.tensor([[1.0], [10.0]]).expand(2, 3)
    parts = dist.Independent(dist.Normal(torch.zeros(2, 3), scale), 1)
    pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.99, 0.01])), parts))


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", 20):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def test_a_gaussian_posterior_takes_no_step() -> None:
    post = of_gaussian()
    assert post.level == "good"
    assert [rung.name for rung in post.rungs] == ["flow, 0 steps"]
    assert post.log_evidence == pytest.approx(0, abs=1e-3)
    x = post.draws["x"]
    torch.testing.assert_close(x.mean(0), torch.arange(10.0), atol=0.15, rtol=0)
    assert post.error == pytest.approx(0.01, rel=0.01)


def drawn_from_all(weights: tuple[float, ...], dim: int) -> pf.Posterior:
    """The posterior of separate modes, whose evidence is 1, with the weights of its draws right."""
    post = pf.posterior(separate(weights, dim), **QUIET)
    assert post.level in ("good", "resample")
    assert post.log_evidence == pytest.approx(0, abs=0.05)
    nearest = (post.draws["x"][:, 0] / 8).round().long().clamp(min=0)
    found = nearest.bincount().double() / len(nearest)
    torch.testing.assert_close(found, torch.tensor(weights).double(), atol=0.02, rtol=0)
    return post


@pytest.mark.parametrize(("weights", "dim"), [slow((0.6, 0.4), 5), ((0.9, 0.1), 2)])
def test_separate_modes_are_all_drawn(weights: tuple[float, ...], dim: int) -> None:
    post = drawn_from_all(weights, dim)
    assert "another mode" in post.rungs[0].verdict


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 20])
def test_five_modes_are_all_drawn(dim: int) -> None:
    weights = (0.3, 0.25, 0.2, 0.15, 0.1)
    drawn_from_all(weights, dim)


@pytest.mark.slow
def test_a_light_wide_part_is_not_missed() -> None:
    post = pf.posterior(wide, num_samples=20_000, **QUIET)
    assert post.level in ("good", "resample")
    sd = post.draws["x"].std()
    assert sd == pytest.approx(math.sqrt(0.99 + 1), rel=0.1)  # 1.0 without it


@pytest.mark.slow
def test_a_funnel_is_right() -> None:
    post = pf.posterior(funnel, **QUIET)
    assert post.level == "good"
    v = post.draws["v"]
    assert v.mean() == pytest.approx(0, abs=0.12)
    assert v.std() == pytest.approx(3, rel=0.04)


def test_chains_that_are_far_out_leave_a_standard_deviation_unsettled() -> None:
    post = of_gaussian()
    found = mcmc(gaussian, post.guide, num_samples=200, num_chains=64, progress=False)
    problem = BoundModel.for_weights(gaussian, post.guide)
    assert not unsettled(post.report, found, problem)
    far = {name: value.clone() for name, value in found.draws.items()}
    name = next(iter(far))
    far[name][:200] += 30 * far[name].std()  # the first chain
    assert "a few chains are far out" in unsettled(post.report, replace(found, draws=far), problem)


@pytest.mark.parametrize(
    ("factor", "said"),
    [(1.0, ""), (0.87, ""), (1.17, "correct the sd of x"), (0.78, "correct the sd of x")],
)
def test_wider_draws_are_held_against_chains(factor: float, said: str) -> None:
    """A larger standard deviation is what chains lack; a smaller one is mostly a lost weight."""
    post = of_gaussian()
    found = mcmc(gaussian, post.guide, num_samples=200, progress=False)
    report, problem = post.report, BoundModel.for_weights(gaussian, post.guide)
    smoothed = report.wide.marginals.smoothed
    sure = torch.full_like(smoothed.sd, 0.001)
    told = smoothed._replace(sd=factor * smoothed.sd, sd_error=sure)
    wide = replace(report.wide, marginals=replace(report.wide.marginals, smoothed=told))
    words = apart(replace(report, wide=wide), found, problem)
    assert (said in words) if said else not words


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_eight_schools_as_written(seed: int) -> None:
    post = pf.posterior(eight_schools_centered, seed=seed, progress=False)
    assert post.level in ("good", "resample")
    assert post.log_evidence == pytest.approx(-31.312, abs=0.03)
    log_tau = post.draws["tau"].log()
    assert log_tau.std() == pytest.approx(1.172, rel=0.05)


def test_the_same_seed_gives_the_same_draws_and_leaves_the_global_generator() -> None:
    before = torch.get_rng_state()
    again = pf.posterior(gaussian, **QUIET)
    assert torch.equal(again.draws["x"], of_gaussian().draws["x"])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_result_says_how_it_was_reached(capsys: pytest.CaptureFixture) -> None:
    post = pf.posterior(gaussian, seed=0)
    assert "posterior: flow, 0 steps" in "".join(capsys.readouterr())
    text = str(post)
    for part in ("verdict", post.verdict, "log evidence", "flow, 0 steps"):
        assert part in text
    posterior = post.to_arviz(50)["posterior"]
    assert posterior["x"].shape == (1, 50, 10)


def rows(y: Tensor, size: int | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y), subsample_size=size) as index:
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y[index])


def with_parameter() -> None:
    scale = pyro.param("scale", torch.tensor(1.0))
    pyro.sample("x", dist.Normal(0.0, scale))


def discrete() -> None:
    pyro.sample("k", dist.Poisson(3.0))


@pytest.mark.parametrize(
    ("model", "args", "said"),
    [
        (rows, (torch.zeros(20), 5), "the plate 'rows' takes 5 of 20 rows"),
        (with_parameter, (), "the model has parameters"),
        (discrete, (), "'k'"),
        (poutine.condition(gaussian, {"x": torch.zeros(10)}), (), "no latent"),
    ],
    ids=["subsampled", "parameter", "discrete", "no latents"],
)
def test_what_it_cannot_treat_is_refused(model: Callable, args: tuple, said: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=said):
        pf.posterior(model, args, **QUIET)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="num_samples"):
        pf.posterior(gaussian, seed=0, num_samples=10)
    with pytest.raises(TypeError, match="args must be a tuple"):
        pf.posterior(rows, args=torch.zeros(5), seed=0)
    with pytest.raises(TypeError, match="model must be a Pyro model"):
        pf.posterior(None, seed=0)


def test_an_interrupt_gives_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(climb.Mixing, "add", interrupted)
    post = pf.posterior(separate((0.6, 0.4), 2), **QUIET)
    assert post.level == "bad"
    assert post.verdict.endswith("it was interrupted")
    assert post.error == math.inf
    fit_flow = climb.fit_flow

    def cut_off(*args: object, **kwargs: object) -> None:
        fit_flow(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(climb, "fit_flow", cut_off)
    post = pf.posterior(gaussian, **QUIET)
    assert (post.level, post.rungs[0].name) == ("good", "flow, cut off")
    monkeypatch.setattr(climb, "fit_flow", interrupted)
    with pytest.raises(KeyboardInterrupt):  # nothing to give yet
        pf.posterior(gaussian, **QUIET)


@pytest.mark.slow
def test_many_independent_rows_are_treated_as_such() -> None:
    exact = poisson_rows(300)
    post = pf.posterior(exact.model, **QUIET)
    assert isinstance(post.guide, pf.AutoStructuredFlow)
    assert (post.level, post.chains.method) == ("good", "globals and rows")
    mean, sd = exact.mu
    assert post.draws["mu"].mean().item() == pytest.approx(mean, abs=0.05 * sd)
    assert post.draws["mu"].std().item() == pytest.approx(sd, rel=0.05)
    rows, spread = exact.theta
    assert ((post.draws["theta"].mean(0) - rows).abs() < 0.15 * spread).all()
    assert post.log_evidence == pytest.approx(exact.evidence, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("refuted", [False, True])
def test_chains_of_rows_have_the_last_word(monkeypatch: pytest.MonkeyPatch, refuted: bool) -> None:
    """Where they cannot be run, a second set of draws has it."""
    exact, found = poisson_rows(12), []

    def chains_over(*args: object) -> Chains | None:
        found.append(checks.chains_over(*args))
        bad = replace(found[-1], level="bad", verdict="do not trust: R-hat 1.2")
        return bad if refuted else None

    monkeypatch.setattr(climb, "_is_wide", lambda dim: True)
    monkeypatch.setattr(climb, "chains_over", chains_over)
    monkeypatch.setattr(climb, "STEPS", (300,))
    post = pf.posterior(exact.model, **QUIET)
    assert (found[0].level, found[0].method) == ("good", "globals and rows")
    assert found[0].draws["mu"].std().item() == pytest.approx(exact.mu[1], rel=0.05)
    if refuted:
        assert (post.level, post.verdict) == ("bad", "do not trust: R-hat 1.2")
    else:
        assert post.level in ("good", "resample")
        assert [rung.name for rung in post.rungs][1:] == ["the same, other draws"]


@pytest.mark.slow
def test_rows_that_depend_on_each_other_are_right() -> None:
    """A Gaussian walk, whose covariance is known."""

    def model() -> None:
        with pyro.plate("steps", 60):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("walk", -2 * x.diff(dim=-1).square().sum(-1))

    differences = torch.eye(60, dtype=torch.float64).diff(dim=0)
    covariance = (torch.eye(60) + 4 * differences.mT @ differences).inverse()
    post = pf.posterior(model, **QUIET)
    assert post.level in ("good", "resample"), post.verdict
    sd = covariance.diagonal().sqrt()
    assert (post.draws["x"].mean(0).abs() < 0.1 * sd).all()
    assert ((post.draws["x"].std(0) / sd).log().abs() < 0.1).all()


@pytest.mark.slow
@pytest.mark.parametrize(("spread", "seed"), [(0.15, 1), (0.5, 2)])
def test_a_scale_that_piles_up_at_zero(spread: float, seed: int) -> None:
    """300 groups of one weak row each: log tau has a long tail, exact on a grid."""
    generator = torch.Generator().manual_seed(seed)
    y = 1 + math.sqrt(1 + spread**2) * torch.randn(300, generator=generator, dtype=torch.float64)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(torch.full((), 5.0, dtype=torch.float64)))
        with pyro.plate("groups", 300):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    log_tau = torch.linspace(-14, 4, 6001, dtype=torch.float64)
    variance = (2 * log_tau).exp() + 1  # of a row given mu, which is integrated out
    squares, n = (y - y.mean()).square().sum(), len(y)
    log_p = -(n - 1) / 2 * variance.log() - squares / variance / 2
    log_p = log_p + dist.Normal(0.0, (25 + variance / n).sqrt()).log_prob(y.mean())
    log_p = log_p + dist.HalfNormal(5.0).log_prob(log_tau.exp()) + log_tau
    weights = log_p.softmax(0)
    mean = weights @ log_tau
    sd = (weights @ (log_tau - mean).square()).sqrt()
    post = pf.posterior(model, **QUIET)
    found = post.draws["tau"].log()
    assert (post.level, post.chains.method) == ("good", "globals and rows")
    assert found.mean().item() == pytest.approx(mean.item(), abs=0.05 * sd.item())
    assert found.std().item() == pytest.approx(sd.item(), rel=0.06)
