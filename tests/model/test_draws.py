"""Draws with their densities, and what a report makes of those that fail."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor

import pyroflow as pf
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw


def conjugate() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


def z_only() -> None:
    pyro.sample("z", dist.Normal(0.5, 1.0))


class TestDraws:
    def test_densities_are_those_of_the_values(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def model() -> None:
            scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
            with pyro.plate("rows", 3):
                x = pyro.sample("x", dist.Normal(0.0, scale))
                pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor([1.0, 2.0, 3.0]))

        guide = AutoNormal(model, init_scale=0.3)
        problem = BoundModel(model, guide)
        monkeypatch.setattr("pyroflow.model.runs.CHUNK", 20)
        draws = draw(problem, 50)
        scale, x = draws.sites["scale"], draws.sites["x"]
        assert (scale.shape, x.shape, len(draws)) == ((50,), (50, 3), 50)
        log_p = dist.Gamma(2.0, 1.0).log_prob(scale)
        log_p = log_p + dist.Normal(0.0, scale[:, None]).log_prob(x).sum(1)
        log_p = log_p + dist.Normal(x, 1.0).log_prob(torch.tensor([1.0, 2.0, 3.0])).sum(1)
        log_q = dist.LogNormal(guide.locs.scale, guide.scales.scale).log_prob(scale)
        log_q = log_q + dist.Normal(guide.locs.x, guide.scales.x).log_prob(x).sum(1)
        torch.testing.assert_close(draws.log_p, log_p.detach())
        torch.testing.assert_close(draws.log_q, log_q.detach())

    def test_singleton_plate_dimensions_are_removed(self) -> None:
        def model() -> None:
            pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("outer", 2, dim=-2):
                pyro.sample("b", dist.Dirichlet(torch.ones(3)))
                with pyro.plate("inner", 4, dim=-1):
                    pyro.sample("c", dist.Normal(0.0, 1.0))

        draws = draw(BoundModel(model, AutoNormal(model), ()), 7)
        shapes = {name: tuple(value.shape) for name, value in draws.sites.items()}
        assert shapes == {"a": (7,), "b": (7, 2, 1, 3), "c": (7, 2, 4)}


class TestNonFinite:
    def test_outside_the_support_the_weight_is_zero(self) -> None:
        def model() -> None:
            pyro.sample("z", dist.Exponential(1.0))

        report = pf.diagnose(model, lambda: pyro.sample("z", dist.Normal(1.0, 1.5)))
        outside = int((report.draws.sites["z"] < 0).sum())
        assert outside > 1000
        assert report.num_nonfinite == report.nonfinite_sites["z"] == outside
        assert report.elbo == -math.inf
        assert abs(report.log_evidence) < 4 * report.log_evidence_se
        assert (report.resample(1000)["z"] >= 0).all()
        assert "'z'" in report.advice[0]

    @pytest.mark.parametrize(("bound", "level"), [(-1.9, "bad"), (-3.5, "good")])
    def test_nan_is_counted_by_site(self, bound: float, level: str) -> None:
        def model() -> None:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(0.0 * (z - bound).sqrt(), 1.0), obs=torch.tensor(0.0))

        report = pf.diagnose(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
        below = int((report.draws.sites["z"] < bound).sum())
        assert below > 0
        assert report.nonfinite_sites == {"y": below}
        assert report.level == level
        assert f"{below} draws were not finite" in report.verdict
        assert math.isfinite(report.elbo)

    def test_nan_for_every_draw_is_refused_by_site(self) -> None:
        def model() -> None:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("penalty", (-1.0 - z.abs()).log())

        with pytest.raises(ValueError, match="site 'penalty' is NaN or infinite for all 100 "):
            pf.diagnose(model, AutoNormal(model), num_samples=100)


def no_latents() -> None:
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


def subsampled() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 10, subsample_size=2) as index:
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(10)[index])


def changing() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if z > 0:
        pyro.sample("sometimes", dist.Normal(0.0, 1.0))


def two_sites() -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("sometimes", dist.Normal(0.0, 1.0))


def triple() -> Tensor:
    return pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))


class TestRefusals:
    @pytest.mark.parametrize(
        ("model", "guide", "match"),
        [
            (no_latents, lambda: None, "no latent sites"),
            (subsampled, z_only, "without subsample_size"),
            (changing, two_sites, "'sometimes'"),
            (conjugate, two_sites, "guide samples site 'sometimes'"),
            (conjugate, triple, "site 'z' with shape"),
            (two_sites, z_only, "does not sample the model's latent site 'sometimes'"),
            (conjugate, AutoDelta(conjugate), "one point for site 'z'"),
        ],
        ids=["no latents", "subsampled", "changing", "extra", "shape", "missing", "point"],
    )
    def test_models_and_guides(self, model: Callable, guide: Callable, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            pf.diagnose(model, guide)

    @pytest.mark.parametrize("options", [{"num_samples": 50}, {"max_sets": 0}])
    def test_options(self, options: dict[str, int]) -> None:
        with pytest.raises(ValueError, match=next(iter(options))):
            pf.diagnose(conjugate, z_only, **options)
