"""Mixtures of flows: densities, draws, weights against known answers, files."""

from __future__ import annotations

import copy
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflow as pf
from pyroflow.guides.mixture import FlowMixture, MixtureGuide
from pyroflow.inference.gaussian_start import Gaussian
from pyroflow.inference.mixture import fit_part, mixed
from pyroflow.model.bound import BoundModel

WEIGHTS = torch.tensor([0.7, 0.3], dtype=torch.float64)
CENTRES = torch.tensor([[0.0, 0.0, 0.0], [7.0, -5.0, 3.0]], dtype=torch.float64)
SCALES = torch.tensor([[1.0, 0.5, 2.0], [0.3, 1.0, 1.0]], dtype=torch.float64)


def model() -> None:
    """Two modes with evidence 1 and a prior that is a mixture."""
    parts = dist.Independent(dist.Normal(CENTRES, SCALES), 1)
    pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(WEIGHTS), parts))


def gaussians() -> MixtureGuide:
    """The exact guide: two Gaussians at the modes."""
    guides = []
    for loc, scale in zip(CENTRES, SCALES, strict=True):
        guide = pf.AutoFlow(model, []).setup()
        guide.affine.start_from(loc, scale.diag())
        guides.append(guide)
    return MixtureGuide(model, guides, 2 * WEIGHTS)


def test_density_and_draws_are_those_of_torchs_mixture() -> None:
    guide = gaussians()
    parts = dist.Independent(dist.Normal(CENTRES, SCALES), 1)
    expected = dist.MixtureSameFamily(dist.Categorical(WEIGHTS), parts)
    with pf.seeds.seeded(0):
        z = expected.sample((50,))
        drawn = guide.get_posterior().sample((40_000,))
    torch.testing.assert_close(guide.log_prob({"z": z}), expected.log_prob(z))
    torch.testing.assert_close(drawn.mean(0), expected.mean, atol=0.06, rtol=0)
    torch.testing.assert_close(drawn.std(0), expected.stddev, atol=0.06, rtol=0)
    batch = guide.get_posterior().expand((4,))
    assert isinstance(batch, FlowMixture)
    assert batch.sample((2,)).shape == (2, 4, 3)


def test_an_exact_mixture_is_good() -> None:
    report = pf.diagnose(model, gaussians(), num_samples=1000)
    assert report.level == "good"
    assert report.gap == pytest.approx(0, abs=1e-6)
    assert report.log_evidence == pytest.approx(0, abs=1e-5)


def test_a_mixture_that_misses_a_mode_is_bad() -> None:
    guide = MixtureGuide(model, gaussians().guides[:1], torch.ones(1))
    report = pf.diagnose(model, guide, num_samples=2000)
    assert report.level == "bad"
    assert "another mode" in report.verdict
    assert report.missed_share == pytest.approx(0.3, abs=0.02)


def test_weights_of_fitted_parts() -> None:
    guide = gaussians().guides[0]
    problem = BoundModel(model, guide)
    starts = [Gaussian(loc + 0.3, torch.eye(3), 0.0) for loc in CENTRES]
    parts = [
        fit_part(problem, guide, start, pf.AutoPlanarFlow(model, num_layers=2), 100, 0)
        for start in starts
    ]
    with pf.seeds.seeded(0):
        found = mixed(model, parts)
    torch.testing.assert_close(found.weights, WEIGHTS, atol=0.01, rtol=0)
    report = pf.diagnose(model, found, num_samples=2000)
    assert report.log_evidence == pytest.approx(0, abs=0.05)


def test_copies_and_files(tmp_path: Path) -> None:
    guide = gaussians()
    values = guide()
    pf.save(guide, tmp_path / "mixture.pt")
    for other in (pf.load(tmp_path / "mixture.pt"), copy.deepcopy(guide)):
        torch.testing.assert_close(other.log_prob(values), guide.log_prob(values))
        torch.testing.assert_close(other.weights, WEIGHTS)
        assert other.median()["z"].shape == (3,)


@pytest.mark.parametrize("weights", [torch.ones(3), torch.tensor([1.0, 0.0])])
def test_weights_that_do_not_fit_are_refused(weights: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="a positive number for each of 2 guides"):
        MixtureGuide(model, gaussians().guides, weights)


def test_priors_that_are_mixtures_may_be_independent_and_in_plates() -> None:
    def model() -> None:
        parts = dist.LogNormal(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 0.2]))
        prior = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.5, 0.5])), parts)
        pyro.sample("event", prior.expand([3]).to_event(1))
        with pyro.plate("plate", 2):
            pyro.sample("rows", prior.expand([2]))

    guide = pf.AutoPlanarFlow(model, num_layers=1).setup()
    draws = guide()
    assert draws["event"].shape == (3,)
    assert bool((draws["event"] > 0).all())
    assert draws["rows"].shape == (2,)
    assert pf.diagnose(model, guide, num_samples=200).num_nonfinite == 0
