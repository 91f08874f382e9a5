"""Fits to densities with mass at the edges of a support: right, or not called good."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow

from pyroflow import AutoPlanarFlow, diagnose, fit_guide
from pyroflow.diagnostics import Report
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw


def log_beta(*a: float) -> float:
    return sum(map(math.lgamma, a)) - math.lgamma(sum(a))


def t(*x: float) -> torch.Tensor:
    return torch.tensor(x if len(x) > 1 else x[0])


def beta(a: float) -> None:
    pyro.sample("x", dist.Beta(t(a), t(a)))


def betas_in_a_plate() -> None:
    with pyro.plate("rows", 2):
        beta(0.1)


def kumaraswamy() -> None:
    pyro.sample("x", dist.Kumaraswamy(t(0.1), t(0.1)))


def half_cauchy() -> None:
    pyro.sample("x", dist.HalfCauchy(t(1.0)))


def dirichlet() -> None:
    pyro.sample("x", dist.Dirichlet(torch.full((3,), 0.1)))


def lkj(eta: float) -> None:
    pyro.sample("x", dist.LKJCholesky(5, t(eta)))


def gamma() -> None:
    pyro.sample("x", dist.Gamma(t(0.05), t(1.0)))


def beta_bernoulli() -> None:
    x = pyro.sample("x", dist.Beta(t(0.1), t(0.1)))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Bernoulli(x), obs=torch.ones(3))


def dirichlet_categorical() -> None:
    x = pyro.sample("x", dist.Dirichlet(torch.full((3,), 0.1)))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Categorical(x.unsqueeze(-2)), obs=torch.tensor([0, 0, 0, 1]))


def gamma_poisson() -> None:
    x = pyro.sample("x", dist.Gamma(t(0.5), t(1.0)))
    with pyro.plate("data", 2):
        pyro.sample("y", dist.Poisson(x), obs=torch.zeros(2))


def digammas(*a: float) -> torch.Tensor:
    return torch.digamma(torch.tensor(a, dtype=torch.float64))


def spread(*a: float) -> float:
    return torch.polygamma(1, torch.tensor(a, dtype=torch.float64)).sum().sqrt().item()


def logit(a: float, b: float) -> tuple[float, float]:
    """Mean and standard deviation of the logit of Beta(a, b)."""
    mean = digammas(a, b)
    return (mean[0] - mean[1]).item(), spread(a, b)


def stick(a: float, b: float) -> tuple[float, float]:
    mean, sd = logit(a, b)
    return mean + math.log(2), sd


# By model: log evidence, and mean and standard deviation of the first unconstrained latent.
MODELS: dict[str, tuple[Callable, float, tuple[float, float]]] = {
    "Beta(0.1, 0.1)": (lambda: beta(0.1), 0.0, logit(0.1, 0.1)),
    "Beta(0.01, 0.01)": (lambda: beta(0.01), 0.0, logit(0.01, 0.01)),
    "Beta in a plate": (betas_in_a_plate, 0.0, logit(0.1, 0.1)),
    "Dirichlet(0.1)": (dirichlet, 0.0, stick(0.1, 0.2)),
    "Kumaraswamy(0.1, 0.1)": (kumaraswamy, 0.0, (0.0, math.inf)),
    "half-Cauchy": (half_cauchy, 0.0, (0.0, math.pi / 2)),
    "Gamma(0.05)": (gamma, 0.0, (digammas(0.05).item(), spread(0.05))),
    # r = tanh z with (1 + r)/2 ~ Beta(η + 3/2, η + 3/2): z is half a logit
    "LKJ(5, 1)": (lambda: lkj(1.0), 0.0, (0.0, spread(2.5, 2.5) / 2)),
    "LKJ(5, 0.1)": (lambda: lkj(0.1), 0.0, (0.0, spread(1.6, 1.6) / 2)),
    "Beta-Bernoulli": (beta_bernoulli, log_beta(3.1, 0.1) - log_beta(0.1, 0.1), logit(3.1, 0.1)),
    "Dirichlet-categorical": (
        dirichlet_categorical,
        log_beta(3.1, 1.1, 0.1) - log_beta(0.1, 0.1, 0.1),
        stick(3.1, 1.2),
    ),
    "Gamma-Poisson": (
        gamma_poisson,
        -0.5 * math.log(3),
        (digammas(0.5).item() - math.log(3), spread(0.5)),
    ),
}


def fitted(model: Callable, seed: int, steps: int = 800) -> tuple[AutoPlanarFlow, Report]:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = AutoPlanarFlow(model, num_layers=8)
    fit_guide(model, guide, steps=steps, seed=seed, progress=False)
    return guide, diagnose(model, guide)


LONG_TAIL = "Gamma(0.05)"  # of its logarithm, longer than few layers bend in few steps


@pytest.mark.slow
@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MODELS)
def test_fits_are_right_or_not_called_good(name: str, seed: int) -> None:
    model, log_evidence, (mean, sd) = MODELS[name]
    guide, report = fitted(model, seed)
    assert report.num_nonfinite == 0
    assert not report.rounded_sites  # none of these likelihoods minds
    assert report.draws.sites["x"].isfinite().all()
    if name == LONG_TAIL:
        assert report.level != "good"
    else:
        assert report.level == ("resample" if name == "LKJ(5, 0.1)" else "good")
        assert report.log_evidence == pytest.approx(log_evidence, abs=0.05)
        torch.manual_seed(0)
        z = guide.get_posterior().sample((20_000,))[:, 0].double()
        assert z.mean().item() == pytest.approx(mean, abs=0.1 * sd)


def beta_seen_by_its_logit() -> None:
    x = pyro.sample("x", dist.Beta(t(0.1), t(0.1)))
    pyro.sample("y", dist.Normal(x.log() - (-x).log1p(), 30.0), obs=t(40.0))


def gamma_seen_by_its_logarithm() -> None:
    x = pyro.sample("x", dist.Gamma(t(0.02), t(1.0)))
    pyro.sample("y", dist.Normal(x.log(), 40.0), obs=t(-100.0))


def dirichlet_seen_by_its_logarithm() -> None:
    x = pyro.sample("x", dist.Dirichlet(torch.full((3,), 0.02)))
    pyro.sample("y", dist.Normal(x[..., 0].log(), 40.0), obs=t(-100.0))


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize(
    "model",
    [
        beta_seen_by_its_logit,
        slow(gamma_seen_by_its_logarithm),
        slow(dirichlet_seen_by_its_logarithm),
    ],
)
def test_a_likelihood_that_needs_more_digits_than_there_are_is_no_good_fit(model: Callable) -> None:
    _, report = fitted(model, seed=0, steps=300)
    assert report.level == "bad"
    assert report.rounded_sites["x"] > 0.01 * report.num_samples
    assert "edge" in str(report)
    assert "float64" in " ".join(report.advice)


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize(
    "name", ["Beta(0.01, 0.01)", slow("Dirichlet-categorical"), slow("Gamma-Poisson")]
)
def test_a_likelihood_that_does_not_mind_the_edge_is_not_held_against_the_fit(name: str) -> None:
    _, report = fitted(MODELS[name][0], seed=0, steps=300)
    assert not report.rounded_sites
    assert report.num_nonfinite == 0


@pytest.mark.usefixtures("float32")
def test_guide_density_of_its_own_draws_is_that_of_their_latents() -> None:
    guide = AutoPlanarFlow(dirichlet, num_layers=2, init_scale=3.0).setup()
    draws = draw(BoundModel.for_weights(dirichlet, guide), 500, seed=0)
    torch.testing.assert_close(
        guide.log_prob(draws.sites).double(), draws.log_q, rtol=1e-3, atol=1e-3
    )
