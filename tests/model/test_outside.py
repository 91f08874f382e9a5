"""Draws without a density: runs are not validated, and torch's formulas go on beyond a support."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from pyro.distributions import transforms as T
from torch import Tensor

import pyroflow as pf
from pyroflow.model.runs import Runs

LATENT = torch.tensor([-1.0, 0.3, 0.7, 2.0])
DATA = torch.tensor([0.5, 1.2, 0.9])


def shifted(base: dist.Distribution, z: Tensor) -> dist.Distribution:
    return dist.TransformedDistribution(base, [T.AffineTransform(z, 1.0)])


# The density of the data at a latent, where there is one: for z below 0.5, or z in the domain.
CASES: dict[str, tuple[Callable, Callable[[float], bool]]] = {
    "exponential": (lambda z: shifted(dist.Exponential(1.0), z), lambda z: z < 0.5),
    "gamma": (lambda z: shifted(dist.Gamma(1.0, 1.0), z), lambda z: z < 0.5),
    "weibull": (lambda z: shifted(dist.Weibull(1.0, 1.0), z), lambda z: z < 0.5),
    "masked": (lambda z: shifted(dist.Exponential(1.0), z).mask(True), lambda z: z < 0.5),
    "two transforms": (
        lambda z: dist.TransformedDistribution(
            dist.Exponential(1.0), [T.AffineTransform(z.exp(), 1.0), T.AffineTransform(-1.0, 1.0)]
        ),
        lambda z: math.exp(z) - 1 < 0.5,
    ),
    "pareto": (lambda z: dist.Pareto(z.exp(), 2.0), lambda z: math.exp(z) < 0.5),
    "scale": (lambda z: dist.Normal(0.0, z), lambda z: z > 0),
    "rate": (lambda z: dist.Exponential(z), lambda z: z > 0),
    "event": (lambda z: dist.Gamma(z.expand(3), 1.0).to_event(1), lambda z: z > 0),
    "anywhere": (lambda z: dist.LogNormal(z, 1.0), lambda z: True),
}


@pytest.mark.parametrize("name", CASES)
def test_density_is_zero_outside_and_the_distribution_s_own_inside(name: str) -> None:
    make, inside = CASES[name]

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        fn = make(z)
        with pyro.plate("rows", 1 if fn.event_dim else 3):
            pyro.sample("y", fn, obs=DATA)

    found = Runs(model, depth=1).evaluate({"z": LATENT}, len(LATENT))["y"].by_draw()
    for value, z in zip(found, LATENT, strict=True):
        if inside(z.item()):
            assert value.item() == pytest.approx(make(z).log_prob(DATA).sum().item())
        else:
            assert value == -torch.inf


def test_a_probability_may_round_over_one_and_nan_shows_itself() -> None:
    def model(bound: float) -> None:
        p = pyro.sample("p", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Bernoulli(probs=p * bound), obs=torch.tensor(1.0))

    p = torch.tensor([0.5, 1.0, 1.5])
    found = Runs(model, (1 + 1e-7,), depth=0).evaluate({"p": p}, 3)["y"].by_draw()
    assert found.isfinite().tolist() == [True, True, False]
    found = Runs(model, (math.nan,), depth=0).evaluate({"p": p}, 3)["y"].by_draw()
    assert found.isnan().all()


@pytest.mark.parametrize("family", [dist.Bernoulli, slow(dist.Poisson)])
def test_a_parameter_out_of_its_domain_is_never_good(family: Callable) -> None:
    data = torch.ones(3) if family is dist.Bernoulli else torch.zeros(3)

    def model() -> None:
        p = pyro.sample("p", dist.Normal(0.5, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", family(p), obs=data)

    guide = pf.AutoPlanarFlow(model, 4)
    pf.fit_guide(model, guide, steps=200, seed=0, progress=False)
    report = pf.diagnose(model, guide, num_samples=2000, max_sets=1)
    p = torch.linspace(0.0, 1.0 if family is dist.Bernoulli else 9.0, 20_001)
    joint = dist.Normal(0.5, 1.0).log_prob(p) + (3 * p.log() if data.any() else -3 * p)
    exact = torch.trapezoid(joint.exp(), p).log().item()
    assert report.level != "good"
    assert report.outside < 0.1
    assert report.log_evidence == pytest.approx(exact, abs=0.05)


def test_a_parameter_of_more_dimensions_than_its_constraint_says_counts_once() -> None:
    """``MixtureOfDiagNormals`` declares its scales, K × D numbers, positive one by one."""
    locs, scales = torch.zeros(2, 3), torch.ones(2, 3)

    def model(scales: torch.Tensor = scales) -> None:
        pyro.sample("x", dist.MixtureOfDiagNormals(locs, scales, torch.zeros(2)))

    x = torch.randn(4, 3)
    expected = dist.Normal(0.0, 1.0).log_prob(x).sum(-1)
    for way in ("by_vmap", "in_plate", "one_by_one"):
        runs = Runs(model, depth=0)
        torch.testing.assert_close(runs.log_joint({"x": x}, 4, getattr(runs, way)), expected)
    runs = Runs(model, (-scales,), depth=0)
    assert bool(runs.log_joint({"x": x}, 4, runs.one_by_one).isneginf().all())
