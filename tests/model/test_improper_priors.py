"""Priors that cannot be sampled, with posteriors that are proper and known."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_feasible, init_to_median, init_to_value
from torch import Tensor

import pyroflow as pf

Y = torch.tensor([0.3, -1.2, 2.0, 0.8, -0.4, 1.5], dtype=torch.float64)
N, MEAN, QUIET = len(Y), Y.mean().item(), {"seed": 0, "progress": False}


def location() -> None:
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("rows", N):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)


def scale() -> None:
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("rows", N):
        pyro.sample("y", dist.Normal(0.0, sigma), obs=Y)


def in_a_plate() -> None:
    with pyro.plate("rows", N):
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)


class Tilted(dist.TorchDistribution):
    """A density of the user's, exp(x), that nothing can be drawn from."""

    support = constraints.real
    arg_constraints = {}

    def log_prob(self, value: Tensor) -> Tensor:
        return value

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> Tilted:
        return Tilted(batch_shape)


def tilted() -> None:
    mu = pyro.sample("mu", Tilted())
    with pyro.plate("rows", N):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)


def normal_evidence() -> float:
    """Of a flat location: ∫ Π N(y | μ, 1) dμ."""
    squares = float((Y - Y.mean()).square().sum())
    return -(N - 1) / 2 * math.log(2 * math.pi) - math.log(N) / 2 - squares / 2


S, K = float(Y.square().sum()), (N - 1) / 2
SCALE_EVIDENCE = -N / 2 * math.log(2 * math.pi) - K * math.log(S / 2) + math.lgamma(K)
SCALE_MEAN = math.sqrt(S / 2) * math.exp(math.lgamma(K - 0.5) - math.lgamma(K))
MODELS = {
    "location": (location, normal_evidence(), "mu", MEAN),
    "scale": (scale, SCALE_EVIDENCE - math.log(2), "sigma", SCALE_MEAN),
    "plate": (in_a_plate, 0.0, "mu", MEAN),
    "tilted": (
        tilted,
        normal_evidence() + MEAN + 1 / (2 * N),
        "mu",
        MEAN + 1 / N,
    ),
}


@pytest.mark.parametrize(
    ("name", "init"),
    [
        *((name, init_to_median) for name in MODELS),
        ("location", init_to_feasible),
        *(slow(name, init_to_feasible) for name in list(MODELS)[1:]),
    ],
)
def test_the_whole_way(name: str, init: Callable, tmp_path: Path) -> None:
    model, evidence, site, mean = MODELS[name]
    guide = pf.AutoPlanarFlow(model, num_layers=4, init_loc_fn=init)
    pf.fit_guide(model, guide, steps=400, **QUIET)
    report = pf.diagnose(model, guide)
    assert report.level in ("good", "resample")
    assert report.log_evidence == pytest.approx(evidence, abs=0.02)
    assert float(report.resample(10_000, seed=0)[site].mean()) == pytest.approx(mean, abs=0.03)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        groups = list(pf.to_arviz(model, guide, num_samples=50).groups())
    assert "posterior_predictive" in groups
    assert "prior" not in groups
    assert any("prior and prior_predictive are left out" in str(w.message) for w in caught)
    pf.save(guide, tmp_path / "guide.pt")
    loaded = pf.load(tmp_path / "guide.pt", model=model)
    pf.fit_guide(model, loaded, steps=10, **QUIET)
    assert pf.diagnose(model, loaded).log_evidence == pytest.approx(evidence, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("make", [AutoNormal, pf.AutoPlanarFlow])
def test_by_pyro_s_traces(make: Callable) -> None:
    """A model with a parameter, and a guide of Pyro's that starts at a value."""

    def model() -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
        sd = pyro.param("sd", torch.tensor(2.0), constraint=constraints.positive)
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Normal(mu, sd), obs=Y)

    guide = make(model, init_loc_fn=init_to_value(values={"mu": torch.tensor(0.0)}))
    pf.fit_guide(model, guide, steps=600, num_particles=32, **QUIET)
    draws = pf.diagnose(model, guide).resample(5000, seed=0)["mu"]
    assert float(draws.mean()) == pytest.approx(MEAN, abs=0.05)
    assert pyro.param("sd").item() == pytest.approx(float(Y.std()), rel=0.1)


def test_a_start_beyond_all_reach_is_refused_with_the_way_out() -> None:
    """Finite only from a million on: the prior cannot say so, and the guide starts near zero."""

    def model() -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
        pyro.factor("far", torch.where(mu > 1e6, -mu, -torch.inf))

    with pytest.raises(ValueError, match=r"look at 'far'.*init_loc_fn"):
        pf.fit_guide(model, pf.AutoPlanarFlow(model), **QUIET)
