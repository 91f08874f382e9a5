"""Verdicts on guides that are right or wrong in a known way, by their own draws and beyond."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from torch import Tensor

import pyroflow as pf
from pyroflow.diagnostics import Report
from pyroflow.diagnostics.marginals import Columns, Moments, disagreement, marginals
from pyroflow.diagnostics.psis import pareto_smooth, tail_shapes
from pyroflow.diagnostics.wider import wide_draws
from pyroflow.model.bound import BoundModel
from pyroflow.model.log_joint import LogJoint

Density = Callable[[Tensor], Tensor]


def model_of(dim: int, log_density: Density, prior_sd: float = 10.0) -> Callable:
    """A model whose posterior is a density, with a wide prior to start from."""

    def model() -> None:
        prior = dist.Normal(torch.zeros(dim), prior_sd).to_event(1)
        z = pyro.sample("z", prior)
        pyro.factor("density", log_density(z) - prior.log_prob(z))

    return model


def normals(locs: list[float], scales: list[float], weights: list[float]) -> Density:
    """A mixture of N(loc·1, scale² I)."""

    def log_density(z: Tensor) -> Tensor:
        parts = [
            dist.Normal(loc, scale).log_prob(z).sum(-1) + math.log(weight)
            for loc, scale, weight in zip(locs, scales, weights, strict=True)
        ]
        return torch.stack(parts).logsumexp(0)

    return log_density


def gaussian(model: Callable, loc: Tensor, scale: Tensor) -> pf.AutoPlanarFlow:
    guide = pf.AutoPlanarFlow(model, num_layers=0).setup()
    guide.affine.start_from(loc, scale)
    return guide


def on_first(dim: int, log_density: Density) -> Report:
    """The report on N(0, I), the first part of a mixture."""
    model = model_of(dim, log_density)
    return pf.diagnose(model, gaussian(model, torch.zeros(dim), torch.eye(dim)))


class TestMissedModes:
    @pytest.mark.parametrize("share", [0.4, 0.1])
    def test_a_missing_mode_is_named_with_its_share(self, share: float) -> None:
        report = on_first(5, normals([0.0, 8 / 5**0.5], [1.0, 1.0], [1 - share, share]))
        assert report.ess_fraction > 0.999
        assert report.level == "bad"
        assert report.missed_share == pytest.approx(share, abs=0.01)
        assert f"another mode with about {100 * share:.0f} % of the mass" in report.verdict
        assert len(report.modes) == 2
        assert "2 modes" in str(report)

    def test_a_small_mode_is_mentioned_and_condemns_if_it_is_far(self) -> None:
        near = on_first(5, normals([0.0, 3.6], [1.0, 1.0], [0.995, 0.005]))
        assert near.level == "good"
        assert "miss 0.5% of the mass" in near.verdict
        far = on_first(5, normals([0.0, 12.0], [1.0, 1.0], [0.985, 0.015]))
        assert far.level == "bad"
        assert "another mode with about 1.5 % of the mass" in far.verdict

    def test_a_narrow_mode_far_away(self) -> None:
        report = on_first(3, normals([0.0, 5.0], [1.0, 0.1], [0.7, 0.3]))
        assert report.level == "bad"
        assert report.missed_share == pytest.approx(0.3, abs=0.01)

    def test_ten_far_modes(self) -> None:
        centres = 20 * torch.randn(10, 3, generator=torch.Generator().manual_seed(3))

        def log_density(z: Tensor) -> Tensor:
            parts = dist.Normal(centres, 1.0).log_prob(z.unsqueeze(-2)).sum(-1)
            return parts.logsumexp(-1) - math.log(10)

        model = model_of(3, log_density, 20.0)
        report = pf.diagnose(model, gaussian(model, centres[0], torch.eye(3)))
        assert report.level == "bad"
        assert report.missed_share > 0.5
        assert "other modes" in report.verdict

    def test_covered_modes_are_not_missed(self) -> None:
        model = model_of(1, normals([-2.0, 2.0], [0.7, 0.7], [0.5, 0.5]))
        report = pf.diagnose(model, gaussian(model, torch.zeros(1), 2.2 * torch.eye(1)))
        assert len(report.modes) == 2
        assert report.missed == []
        assert report.level == "resample"

    def test_exchangeable_labels_are_named(self) -> None:
        y = torch.cat([torch.linspace(-3, -1, 20), torch.linspace(1, 3, 20)])

        def model() -> None:
            weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
            with pyro.plate("parts", 2):
                loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
            parts = dist.Normal(loc, 0.7)
            with pyro.plate("rows", 40):
                pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=y)

        guide = pf.AutoPlanarFlow(model, num_layers=4)
        pf.fit_guide(model, guide, steps=100, seed=0, progress=False)
        report = pf.diagnose(model, guide)
        assert report.level == "bad"
        assert report.missed_share == pytest.approx(0.5, abs=0.05)
        (advice,) = (line for line in report.advice if "labels" in line)
        assert "the 2 rows of 'weights', 'loc' can be exchanged" in advice

    @pytest.mark.parametrize("product", [slow(False), True])
    def test_signs_that_cancel_are_named(self, product: bool) -> None:
        def model() -> None:
            a = pyro.sample("a", dist.Normal(0.0, 2.0))
            b = pyro.sample("b", dist.Normal(0.0, 2.0))
            value = a * b if product else a**2 + 0 * b
            pyro.sample("y", dist.Normal(value, 1.0), obs=torch.tensor(4.0))

        guide = pf.AutoPlanarFlow(model, num_layers=0)
        pf.fit_guide(model, guide, steps=2, seed=0, progress=False)
        report = pf.diagnose(model, guide)
        assert report.level == "bad"
        assert report.missed_share > 0.25
        (advice,) = (line for line in report.advice if "signs" in line)
        assert ("'a', 'b'" if product else "'a' ") in advice


class TestTails:
    @pytest.mark.parametrize("dim", [1, 5, 20])
    def test_a_light_and_wide_part_that_makes_the_sd(self, dim: int) -> None:
        """One draw in a hundred comes from a part ten times wider: the sd is 1.41."""
        report = on_first(dim, normals([0.0, 0.0], [1.0, 10.0], [0.99, 0.01]))
        assert report.ess_fraction > 0.98
        assert report.level == "bad"

    def test_a_part_that_no_draw_of_the_guide_shows(self) -> None:
        """After it was fitted to the middle, a wider part is beyond its draws; sd 1.41."""
        model = model_of(2, normals([0.0, 0.0], [1.0, 10.0], [0.99, 0.01]))
        guide = gaussian(model, torch.zeros(2), 0.85 * torch.eye(2))
        report = pf.diagnose(model, guide)
        assert report.khat < 0.5
        assert report.level == "bad"
        assert "wider draws" in report.verdict

    def test_a_heavy_tail_too_light_to_matter(self) -> None:
        """A thousandth of the draws from a part four times wider: k-hat is high, sd 0.7 % off."""
        log_density = normals([0.0, 0.0], [1.0, 4.0], [0.999, 0.001])
        report = on_first(3, log_density)
        assert report.khat > 0.7
        assert report.level == "good"
        model = model_of(3, log_density)
        plain = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        alone = pf.diagnose(model, lambda: pyro.sample("z", plain))
        assert alone.wide is None  # nothing but its own draws speaks for this guide
        assert alone.ess_fraction > 0.95
        assert alone.level == "bad"

    @pytest.mark.parametrize(
        ("tail", "levels"),
        [
            (dist.Cauchy(0.0, 1.0), {"bad"}),
            (dist.StudentT(2.0), {"bad"}),
            (dist.Laplace(0.0, 1.0), {"resample", "bad"}),
            (dist.StudentT(30.0), {"good", "resample"}),
        ],
        ids=["cauchy", "t2", "laplace", "t30"],
    )
    def test_a_gaussian_for_known_tails(self, tail: dist.Distribution, levels: set) -> None:
        model = model_of(3, lambda z: tail.log_prob(z).sum(-1))
        guide = pf.AutoPlanarFlow(model, num_layers=0)
        pf.fit_guide(model, guide, steps=2, seed=0, progress=False)
        report = pf.diagnose(model, guide)
        assert report.level in levels
        if report.level == "resample":
            sd = report.marginals.smoothed.sd
            torch.testing.assert_close(
                sd, torch.full_like(sd, tail.variance.sqrt().item()), rtol=0.12, atol=0
            )

    def test_an_exact_guide_without_a_variance_is_good(self) -> None:
        report = pf.diagnose(
            lambda: pyro.sample("z", dist.Cauchy(torch.zeros(2), 1.0).to_event(1)),
            lambda: pyro.sample("z", dist.Cauchy(torch.zeros(2), 1.0).to_event(1)),
        )
        assert report.level == "good"

    @pytest.mark.parametrize("bend", [0.2, 1.0])
    def test_a_gaussian_for_a_banana(self, bend: float) -> None:
        def log_density(z: Tensor) -> Tensor:
            first = dist.Normal(0.0, 1.0).log_prob(z[..., 0])
            return first + dist.Normal(bend * z[..., 0] ** 2, 1.0).log_prob(z[..., 1])

        model = model_of(2, log_density)
        loc = torch.tensor([0.0, bend])
        guide = gaussian(model, loc, torch.tensor([1.0, math.sqrt(1 + 2 * bend**2)]).diag())
        report = pf.diagnose(model, guide)
        assert report.level == ("bad" if bend == 1.0 else "resample")

    def test_a_gaussian_for_a_funnel(self) -> None:
        def model() -> None:
            v = pyro.sample("v", dist.Normal(0.0, 3.0))
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()).expand([4]).to_event(1))

        guide = pf.AutoPlanarFlow(model, num_layers=0, centring=None)
        pf.fit_guide(model, guide, steps=2, seed=0, progress=False)
        assert pf.diagnose(model, guide).level == "bad"


class TestRightGuides:
    @pytest.mark.parametrize("dim", [1, 10, slow(100)])
    def test_an_exact_gaussian_is_good(self, dim: int) -> None:
        scale = torch.linalg.cholesky(torch.eye(dim) + 2 * torch.ones(dim, dim))
        posterior = dist.MultivariateNormal(torch.zeros(dim), scale_tril=scale)
        model = lambda: pyro.sample("z", posterior)  # noqa: E731
        for seed in range(3 if dim < 100 else 1):
            report = pf.diagnose(model, gaussian(model, torch.zeros(dim), scale), seed=seed)
            assert report.level == "good"
            assert (report.missed, report.advice) == ([], [])
            assert report.wide.sound
            assert report.census == "one mode"

    @pytest.mark.parametrize("num_samples", [100, 400, 2000])
    def test_few_draws_of_a_nearly_exact_guide(self, num_samples: int) -> None:
        model = model_of(50, normals([0.0], [1.0], [1.0]))
        guide = gaussian(model, torch.full((50,), 0.01), torch.eye(50))
        assert pf.diagnose(model, guide, num_samples=num_samples).level == "good"

    def test_edges_and_constraints(self) -> None:
        def model() -> None:
            pyro.sample("rate", dist.Gamma(3.0, 1.0))
            pyro.sample("parts", dist.Dirichlet(torch.tensor([3.0, 4.0, 5.0])))

        guide = pf.AutoPlanarFlow(model, num_layers=8)
        pf.fit_guide(model, guide, steps=300, seed=0, progress=False)
        report = pf.diagnose(model, guide)
        assert report.level in ("good", "resample")
        draws = report.resample(10_000, seed=0)
        assert draws["rate"].std().item() == pytest.approx(3**0.5, rel=0.05)
        assert report.marginals.names == ["rate", "parts[0]", "parts[1]"]


class TestParts:
    def test_many_khats_at_once_are_those_of_arviz(self) -> None:
        rows = torch.randn(20, 1000) * torch.linspace(0.1, 4, 20).unsqueeze(-1)
        expected = [pareto_smooth(row)[2] for row in rows]
        torch.testing.assert_close(tail_shapes(rows), torch.tensor(expected))

    def test_rows_without_a_tail(self) -> None:
        rows = torch.full((3, 200), -torch.inf)
        rows[0], rows[1, :10] = 1.0, torch.randn(10)
        assert tail_shapes(rows).tolist() == [-math.inf, math.inf, math.inf]

    def test_moments_and_their_errors(self) -> None:
        """Draws of N(0, 1.2²) weighed to N(0.3, 1), against repetitions."""
        found = []
        for _ in range(200):
            z = 1.2 * torch.randn(2000, 1)
            log_weights = dist.Normal(0.3, 1.0).log_prob(z) - dist.Normal(0.0, 1.2).log_prob(z)
            found.append(marginals([Columns(z, ["z"])], [log_weights.squeeze(-1)]))
        means = torch.cat([f.smoothed.mean for f in found])
        sds = torch.cat([f.smoothed.sd for f in found])
        assert means.mean().item() == pytest.approx(0.3, abs=0.01)
        assert sds.mean().item() == pytest.approx(1.0, abs=0.01)
        assert means.std().item() == pytest.approx(found[0].smoothed.mean_error.item(), rel=0.2)
        assert sds.std().item() == pytest.approx(found[0].smoothed.sd_error.item(), rel=0.2)
        moved = torch.cat([f.smoothed.mean - f.plain.mean for f in found])
        assert moved.std().item() == pytest.approx(found[0].moved[0].item(), rel=0.2)

    def test_a_disagreement_names_the_worst_latent(self) -> None:
        z = torch.randn(4000, 3)
        one = marginals([Columns(z, ["a", "b", "c"])], [torch.zeros(4000)])
        other = marginals([Columns(z * torch.tensor([1, 1, 1.5]), [])], [torch.zeros(4000)])
        none = torch.zeros(3), torch.zeros(3)
        size, words = disagreement(one.names, one.smoothed, other.smoothed, none)
        assert size == pytest.approx(math.log(1.5) / 0.1)
        assert words == "the sd of c by a factor of 1.50"
        assert disagreement(one.names, one.smoothed, one.smoothed, none)[0] <= 0

    def test_thousands_of_latents_do_not_disagree_by_chance(self) -> None:
        num, error = 10_000, 0.05
        names, one, noise = [str(i) for i in range(num)], torch.ones(num), torch.full((num,), error)
        exact = Moments(torch.zeros(num), one, noise, noise)
        for seed in range(5):
            torch.manual_seed(seed)
            off = exact._replace(mean=error * torch.randn(num), sd=(error * torch.randn(num)).exp())
            assert disagreement(names, off, exact, (noise, noise))[0] < 1
        off.mean[17] = 0.4
        size, words = disagreement(names, off, exact, (noise, noise))
        assert size > 1
        assert words == "the mean of 17 by 0.40 sd"

    @pytest.mark.parametrize("df", [None, 5.0])
    def test_wider_draws_have_the_density_that_they_are_weighed_by(self, df: float | None) -> None:
        """The weights of a posterior that is known to be 1 have mean 1, and give its moments."""
        model = model_of(3, normals([0.5], [1.5], [1.0]))
        guide = pf.AutoPlanarFlow(model, num_layers=0, base_df=df).setup()
        guide.affine.start_from(torch.zeros(3), torch.eye(3))
        bound = BoundModel(model, guide)
        columns, log_weights = wide_draws(bound, LogJoint(bound, guide, 128), 20_000)
        weights = log_weights.exp()
        error = weights.std() / math.sqrt(len(weights))
        assert abs(weights.mean() - 1) < 4 * error
        assert error < 0.05
        mean = (weights.unsqueeze(-1) * columns.z).mean(0)
        assert (mean - 0.5).abs().max() < 0.1
