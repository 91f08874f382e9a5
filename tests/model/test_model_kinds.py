"""Pyro's own kinds of models, from the fit to ArviZ and predictions, with exact posteriors."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from pyro.contrib.forecast import ForecastingModel
from pyro.contrib.gp.kernels import RBF
from pyro.contrib.gp.models import GPRegression
from pyro.infer import Predictive
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

import pyroflow as pf


class Network(PyroModule):
    """A network whose weights are latent: nn.Linear knows no batch of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        loc = self.linear(x).squeeze(-1)
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


@pytest.mark.slow
def test_a_network_with_latent_weights_is_exact_all_the_way() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(50, 2), torch.randn(50) + 1
    network = Network()
    guide = pf.AutoPlanarFlow(network, 0)
    fit = pf.fit_guide(network, guide, (x, y), steps=10, seed=0, progress=False)
    design = torch.cat([x, torch.ones(50, 1)], 1)
    exact = dist.MultivariateNormal(torch.zeros(50), torch.eye(50) + design @ design.T).log_prob(y)
    assert -fit.best_loss == pytest.approx(exact.item(), abs=2e-3)
    report = pf.diagnose(network, guide, (x, y), num_samples=500)
    assert report.level == "good"
    idata = pf.to_arviz(network, guide, (x, y), num_samples=400, predictions_args=(x[:3],), seed=0)
    precision = torch.eye(3) + design.T @ design
    mean = torch.linalg.solve(precision, design.T @ y)
    posterior = torch.as_tensor(idata["posterior"]["linear.weight"].values)[0, :, 0]
    assert torch.allclose(posterior.mean(0), mean[:2], atol=0.05)
    predicted = torch.as_tensor(idata["predictions"]["y"].values)[0]
    assert torch.allclose(predicted.mean(0), design[:3] @ mean, atol=0.25)
    assert Predictive(network, guide=guide, num_samples=4)(x)["y"].shape == (4, 50)


class Level(ForecastingModel):
    """Observations around one level."""

    def model(self, zero_data: Tensor, covariates: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        self.predict(
            dist.Normal(0.0, 1.0), level.unsqueeze(-1).unsqueeze(-1).expand(len(zero_data), 1)
        )


def test_a_forecasting_model_is_exact_all_the_way() -> None:
    data, covariates = torch.full((20, 1), 0.7), torch.zeros(20, 0)
    model = Level()
    guide = pf.AutoPlanarFlow(model, 0)
    fit = pf.fit_guide(model, guide, (data, covariates), steps=60, seed=0, progress=False)
    exact = dist.MultivariateNormal(torch.zeros(20), torch.eye(20) + 1.0).log_prob(data[:, 0])
    assert -fit.best_loss == pytest.approx(exact.item(), abs=2e-3)
    idata = pf.to_arviz(model, guide, (data, covariates), num_samples=400, seed=0)
    assert idata["posterior"]["level"].values.mean() == pytest.approx(14 / 21, abs=0.04)
    assert idata["log_likelihood"]["residual"].shape[:2] == (1, 400)


def test_a_gaussian_process_is_diagnosed_and_exported() -> None:
    """Of contrib.gp, with a parameter of its own and a latent length."""
    x = torch.linspace(0.0, 5.0, 20)
    process = GPRegression(x, torch.sin(x), RBF(1), noise=torch.tensor(0.1))
    process.kernel.lengthscale = PyroSample(dist.LogNormal(0.0, 1.0))
    guide = pf.AutoPlanarFlow(process.model, 0)
    pf.fit_guide(process.model, guide, steps=5, seed=0, progress=False)
    report = pf.diagnose(process.model, guide, num_samples=200, max_sets=1)
    length = report.draws.sites["kernel.lengthscale"]
    gram = (-0.5 * ((x - x[:, None]) / length[:, None, None]) ** 2).exp()
    gram = process.kernel.variance.detach() * gram
    gram = gram + (process.noise.detach() + process.jitter) * torch.eye(20)
    expected = dist.MultivariateNormal(torch.zeros(20), gram).log_prob(torch.sin(x))
    expected = expected + dist.LogNormal(0.0, 1.0).log_prob(length)
    assert torch.allclose(report.draws.log_p, expected)
    idata = pf.to_arviz(process.model, guide, num_samples=30, seed=0)
    assert idata["posterior_predictive"]["y"].shape == (1, 30, 20)


EMPTY = {
    "batch": dist.Normal(torch.zeros(0), 1.0),
    "event": dist.Normal(torch.zeros(0), 1.0).to_event(1),
    "matrix": dist.Normal(torch.zeros(3, 0), 1.0).to_event(2),
    "positive": dist.HalfNormal(torch.ones(0)).to_event(1),
    "simplex of one": dist.Dirichlet(torch.ones(1)),
}


@pytest.mark.parametrize(
    "prior",
    [p if name in ("batch", "simplex of one") else slow(p) for name, p in EMPTY.items()],
    ids=EMPTY,
)
def test_a_site_without_a_number_to_infer_changes_nothing(prior: dist.Distribution) -> None:
    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("empty", prior)
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(0.5))

    guide = pf.AutoPlanarFlow(model, num_layers=2)
    pf.fit_guide(model, guide, steps=5, seed=0, progress=False)
    report = pf.diagnose(model, guide, num_samples=500)
    assert report.level == "good"
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(torch.tensor(0.5)).item()
    assert report.log_evidence == pytest.approx(exact, abs=1e-4)
    shape = prior.shape()
    assert report.resample(7)["empty"].shape == (7, *shape)
    assert guide.median()["empty"].shape == guide.quantiles([0.5])["empty"][0].shape == shape
    found = pf.to_arviz(model, guide, num_samples=20)["posterior"]["empty"]
    assert found.shape == (1, 20, *shape)
