"""Reports on guides whose every number has a closed form."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from cases import slow
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import LocScaleReparam

import pyroflow as pf
from pyroflow.diagnostics.causes import find_funnels, scale_pairs
from pyroflow.diagnostics.psis import khat_interval, khat_threshold, pareto_smooth, systematic
from pyroflow.guides.mixture import MixtureGuide
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw
from pyroflow.targets import (
    eight_schools_centered,
    eight_schools_exact,
    eight_schools_noncentered,
)

MEAN, SD = 0.5, math.sqrt(0.5)  # of the posterior of conjugate
LOG_EVIDENCE = scipy.stats.norm(0, math.sqrt(2)).logpdf(1.0)


def conjugate() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


def normal_guide(shift: float = 0.0, ratio: float = 1.0) -> Callable:
    """The posterior, moved by so many of its standard deviations and widened so many times."""
    return lambda: pyro.sample("z", dist.Normal(MEAN + shift * SD, ratio * SD))


class TestClosedForms:
    @pytest.mark.parametrize(
        ("shift", "ratio", "level"),
        [
            (0.0, 2.0, "resample"),
            (1.0, 1.0, "resample"),
            (0.0, 0.93, "good"),
            (0.0, 0.85, "resample"),
            (0.5, 1.5, "resample"),
        ],
        ids=["wide", "shifted", "near", "narrow", "both"],
    )
    def test_elbo_evidence_and_ess(self, shift: float, ratio: float, level: str) -> None:
        report = pf.diagnose(conjugate, normal_guide(shift, ratio))
        num = report.num_samples
        kl = -math.log(ratio) + (ratio**2 + shift**2 - 1) / 2
        variance = (1 - ratio**2) ** 2 / 2 + (ratio * shift) ** 2
        second = ratio**2 / math.sqrt(2 * ratio**2 - 1) * math.exp(shift**2 / (2 * ratio**2 - 1))
        assert report.elbo_se == pytest.approx(math.sqrt(variance / num), rel=0.1)
        assert report.log_evidence_se == pytest.approx(math.sqrt((second - 1) / num), rel=0.15)
        assert abs(report.elbo - (LOG_EVIDENCE - kl)) < 4 * report.elbo_se
        assert abs(report.log_evidence - LOG_EVIDENCE) < 4 * report.log_evidence_se
        assert report.ess_fraction == pytest.approx(1 / second, rel=0.05)
        assert report.ess == pytest.approx(report.ess_fraction * num)
        assert report.gap == pytest.approx(kl, abs=4 * report.elbo_se + 0.01)
        assert report.level == level

    def test_an_exact_guide(self) -> None:
        report = pf.diagnose(conjugate, normal_guide())
        assert (report.level, report.num_sets, report.advice) == ("good", 1, [])
        assert report.elbo == pytest.approx(LOG_EVIDENCE, abs=1e-12)
        assert report.log_evidence == pytest.approx(LOG_EVIDENCE, abs=1e-12)
        assert report.ess_fraction == pytest.approx(1.0)
        assert report.khat == -math.inf
        assert report.verdict.startswith("good")

    @pytest.mark.parametrize("ratio", [0.3, 0.4])
    def test_a_narrow_guide_is_condemned(self, ratio: float) -> None:
        """Its weights have a Pareto tail with k = 1 − r²."""
        report = pf.diagnose(conjugate, normal_guide(ratio=ratio))
        assert report.level == "bad"
        assert report.khat == pytest.approx(1 - ratio**2, abs=0.2)
        assert report.verdict.startswith(f"do not trust: k-hat {report.khat:.2f} is above 0.70")
        assert "a richer guide: AutoSylvesterFlow" in report.advice[-1]
        assert not any("fit_guide" in line for line in report.advice)  # which has nothing to train

    def test_a_wide_guide_has_bounded_weights(self) -> None:
        assert pf.diagnose(conjugate, normal_guide(ratio=2.0)).khat < 0

    def test_resampled_draws_have_the_posterior(self) -> None:
        report = pf.diagnose(conjugate, normal_guide(shift=1.0, ratio=1.5), num_samples=40_000)
        z = report.resample(20_000, seed=0)["z"]
        error = math.sqrt(1 / 20_000 + 1 / report.ess)
        assert z.mean().item() == pytest.approx(MEAN, abs=4 * SD * error)
        assert z.std().item() == pytest.approx(SD, rel=4 * error)
        assert torch.equal(z, report.resample(20_000, seed=0)["z"])
        assert abs(torch.corrcoef(torch.stack([z[1:], z[:-1]]))[0, 1]) < 0.03

    def test_the_report_is_a_table(self) -> None:
        report = pf.diagnose(conjugate, normal_guide(ratio=0.4))
        text = repr(report)
        for part in ("verdict", f"{report.elbo:.3f} ± {report.elbo_se:.3f}", "k-hat", "try next"):
            assert part in text

    def test_seeds(self) -> None:
        before = torch.get_rng_state()
        one, two = (pf.diagnose(conjugate, normal_guide(1.0), num_samples=200) for _ in range(2))
        assert one.elbo == two.elbo
        assert torch.equal(before, torch.get_rng_state())
        free = [
            pf.diagnose(conjugate, normal_guide(1.0), num_samples=200, seed=None) for _ in range(2)
        ]
        assert free[0].elbo != free[1].elbo


class TestPsis:
    @pytest.mark.parametrize(("shape", "num"), [(0.3, 1000), (0.7, 1000), (0.7, 10_000)])
    def test_the_interval_covers_known_tails(self, shape: float, num: int) -> None:
        hits = []
        for _ in range(150):
            weights = ((1 - torch.rand(num)) ** -shape - 1) / shape
            low, high = khat_interval(pareto_smooth(weights.log())[2], num)
            hits.append(low < shape < high)
        assert 0.82 < sum(hits) / len(hits) < 0.97

    def test_the_interval_is_as_wide_as_the_khats_of_a_guide_scatter(self) -> None:
        problem = BoundModel(conjugate, normal_guide(ratio=0.6), ())
        khats = [pareto_smooth(draw(problem, 1000).log_weights)[2] for _ in range(60)]
        low, high = khat_interval(statistics.mean(khats), 1000)
        assert (high - low) / (2 * 1.645) == pytest.approx(statistics.stdev(khats), rel=0.3)

    def test_sets_narrow_it(self) -> None:
        low, high = khat_interval(0.5, 10_000, num_sets=4)
        wide_low, wide_high = khat_interval(0.5, 10_000)
        assert high - low == pytest.approx((wide_high - wide_low) / 2)

    def test_threshold(self) -> None:
        assert khat_threshold(100) == pytest.approx(0.5)
        assert khat_threshold(1000) == pytest.approx(2 / 3)
        assert khat_threshold(100_000) == 0.7

    def test_the_sum_is_that_of_the_weights_below_the_tail(self) -> None:
        log_weights = torch.randn(2000) - 1234.0
        smoothed, log_sum, _ = pareto_smooth(log_weights)
        body = log_weights < log_weights.quantile(0.9)
        torch.testing.assert_close(smoothed[body], log_weights[body] - log_sum)
        assert smoothed.logsumexp(0).item() == pytest.approx(0.0, abs=1e-12)

    def test_bounded_weights_that_tie_have_no_tail(self) -> None:
        log_weights = torch.randn(1000).clamp(max=0.0)
        smoothed, log_sum, khat = pareto_smooth(log_weights)
        assert khat == -math.inf
        torch.testing.assert_close(smoothed + log_sum, log_weights)

    def test_systematic_counts_differ_by_less_than_one(self) -> None:
        weights = torch.rand(50).pow(3)
        counts = torch.bincount(systematic(weights.log(), 1000), minlength=50)
        assert (counts - 1000 * weights / weights.sum()).abs().max() < 1


class TestEightSchools:
    """Gaussian guides with the moments of the exact posterior; no fit, so no luck of one."""

    @staticmethod
    def guide(model: Callable) -> pf.AutoPlanarFlow:
        draws, _ = eight_schools_exact(50_000)
        theta = draws["theta"]
        if model is eight_schools_noncentered:
            theta = (theta - draws["mu"][:, None]) / draws["tau"][:, None]
        z = torch.cat([draws["mu"][:, None], draws["tau"].log()[:, None], theta], dim=1)
        guide = pf.AutoPlanarFlow(model, num_layers=0).setup()
        guide.affine.start_from(z.mean(0), torch.linalg.cholesky(z.T.cov()))
        return guide

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("model", "level"),
        [
            pytest.param(eight_schools_centered, "bad", id="centred"),
            pytest.param(eight_schools_noncentered, "resample", id="non-centred"),
        ],
    )
    def test_the_verdict_does_not_flip(self, model: Callable, level: str) -> None:
        guide = self.guide(model)
        reports = [pf.diagnose(model, guide, seed=seed) for seed in range(8)]
        assert {report.level for report in reports} == {level}
        exact = eight_schools_exact(1)[1]
        if level == "resample":
            errors = [(r.log_evidence - exact) / r.log_evidence_se for r in reports]
            assert max(map(abs, errors)) < 5
        advised = [any("LocScaleReparam" in line for line in r.advice) for r in reports]
        assert set(advised) == {model is eight_schools_centered}

    def test_the_advice_names_sites_and_works(self) -> None:
        guide = self.guide(eight_schools_centered)
        advice = pf.diagnose(eight_schools_centered, guide).advice[0]
        assert "{'theta': LocScaleReparam(0.0)}" in advice
        mended = poutine.reparam(eight_schools_centered, {"theta": LocScaleReparam(0.0)})
        report = pf.diagnose(mended, AutoNormal(mended), num_samples=1000)
        assert "theta_decentered" in report.draws.sites
        assert not any("LocScaleReparam" in line for line in report.advice)


def hierarchy(num: int = 8) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", num):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 0.1), obs=torch.arange(float(num)))


def angle() -> None:
    a = pyro.sample("a", dist.VonMises(0.0, 1.0))
    pyro.sample("y", dist.Normal(a, 0.1), obs=torch.tensor(1.0))


def subsampling() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", 20, subsample_size=5) as index:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 0.1), obs=torch.arange(20.0)[index])


def fixed(model: Callable) -> Callable:
    def guide() -> None:
        for name, shape in (("mu", ()), ("z", (8,))):
            pyro.sample(name, dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape)))

    return guide


def mixture(model: Callable) -> MixtureGuide:
    return MixtureGuide(model, [pf.AutoPlanarFlow(model, 1).setup()], torch.ones(1))


GUIDES: dict[str, Callable] = {
    "Planar": lambda model: pf.AutoPlanarFlow(model, 1).setup(),
    "Sylvester": lambda model: pf.AutoSylvesterFlow(model, num_layers=1).setup(),
    "Sylvester, tails": lambda model: pf.AutoSylvesterFlow(model, num_layers=1, tails=True).setup(),
    "Structured": lambda model: pf.AutoStructuredFlow(model, num_layers=1).setup(),
    "AutoFlow": lambda model: pf.AutoFlow(model, []).setup(),
    "amortised, Planar": lambda model: pf.AmortizedPlanarGuide(model, "rows", num_layers=1),
    "mixture": mixture,
    "AutoNormal": AutoNormal,
    "function": fixed,
}
SYLVESTER, STRUCTURED = "AutoSylvesterFlow", "AutoStructuredFlow"
ADVISED = {
    "hierarchy": (hierarchy, GUIDES, [SYLVESTER, "", "", *[SYLVESTER] * 3, "", *[SYLVESTER] * 2]),
    "angle": (angle, {"AutoNormal": AutoNormal}, [""]),
    "many rows": (partial(hierarchy, 300), {"AutoNormal": AutoNormal}, [STRUCTURED]),
    "subsampling": (
        subsampling,
        {name: GUIDES[name] for name in ("Structured", "amortised, Planar")},
        ["", STRUCTURED],
    ),
}


class TestFunnels:
    def test_scales_are_found_through_functions_and_independents(self) -> None:
        def model() -> None:
            v = pyro.sample("v", dist.Normal(0.0, 3.0))
            a = pyro.sample("a", dist.Normal(v, 1.0))
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()).expand([3]).to_event(1))
            pyro.sample("t", dist.StudentT(4.0, 0.0, a.exp() + 1.0))
            pyro.sample("y", dist.Normal(0.0, v.exp()), obs=torch.tensor(0.0))

        problem = BoundModel(model, AutoNormal(model), ())
        draws = draw(problem, 500, seed=0)
        assert scale_pairs(problem, draws) == {"x": (["v"], False), "t": (["a"], False)}

    def test_even_weights_are_no_signature(self) -> None:
        """A funnel by its form, of which the guide is exactly the prior."""

        def model() -> None:
            v = pyro.sample("v", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, v.exp()))
            pyro.sample("w", dist.Normal(0.0, 1.0))

        def guide() -> None:
            v = pyro.sample("v", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, v.exp()))
            pyro.sample("w", dist.Normal(1.0, 1.0))

        problem = BoundModel(model, guide)
        draws = draw(problem, 2000, seed=0)
        assert scale_pairs(problem, draws) == {"x": (["v"], False)}
        assert find_funnels(problem, draws) == {}

    @pytest.mark.parametrize("kind", ["covariance", "scale_tril", "low rank", "student", "lkj"])
    def test_matrix_scales_are_found(self, kind: str) -> None:
        """A funnel in s, by a covariance that s multiplies; the guide is far too even for it."""

        def model() -> None:
            s = pyro.sample("s", dist.Normal(0.0, 2.0)).exp()[..., None, None]
            eye = torch.eye(3)
            fn = {
                "covariance": lambda: dist.MultivariateNormal(torch.zeros(3), s**2 * eye),
                "scale_tril": lambda: dist.MultivariateNormal(torch.zeros(3), scale_tril=s * eye),
                "low rank": lambda: dist.LowRankMultivariateNormal(
                    torch.zeros(3), s * torch.ones(3, 1), s[..., 0] ** 2 * torch.ones(3)
                ),
                "student": lambda: dist.MultivariateStudentT(9.0, torch.zeros(3), s * eye),
                "lkj": lambda: dist.MultivariateNormal(
                    torch.zeros(3), scale_tril=s * pyro.sample("L", dist.LKJCholesky(3, 2.0))
                ),
            }[kind]()
            pyro.sample("x", fn)

        report = pf.diagnose(model, AutoNormal(model, init_scale=1.0), num_samples=2000)
        assert report.level != "good"
        (advice,) = (line for line in report.advice if "funnel" in line)
        assert "funnel in" in advice
        assert "s: write 'x' as loc + scale_tril @ eps" in advice or kind == "lkj"
        assert "LocScaleReparam" not in advice

    @pytest.mark.parametrize("kind", [slow(k) if k == "hierarchy" else k for k in ADVISED])
    def test_no_advice_is_of_the_guide_in_use_or_of_one_that_refuses(self, kind: str) -> None:
        model, guides, expected = ADVISED[kind]
        for (name, make), richer in zip(guides.items(), expected, strict=True):
            guide = make(model)
            report = pf.diagnose(model, guide, num_samples=200, max_sets=1)
            assert report.level == "bad", name
            named = [line for line in report.advice if "richer" in line]
            assert [line.split()[3].rstrip(",") for line in named] == ([richer] if richer else [])
            assert richer != type(guide).__name__
            for made in [getattr(pf, richer)] if richer else []:
                assert made(model).setup().latents.sites
            layers = any("more layers" in line for line in report.advice)
            assert layers == ("Planar" in name or "Sylvester" in name or "Structured" in name)
            assert any("tails=True" in line for line in report.advice) == (name == "Sylvester")

    def test_no_advice_costs_the_report(self) -> None:
        """NumPy refuses tensors with gradients, which only the search for funnels has."""

        def model() -> None:
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.factor("f", torch.as_tensor(-10 * x.numpy() ** 2))

        report = pf.diagnose(model, AutoNormal(model, init_scale=1.0), num_samples=200)
        assert report.level == "bad"
        assert report.advice

    def test_a_distribution_whose_properties_fail(self) -> None:
        class Broken(dist.Normal):
            @property
            def covariance_matrix(self) -> None:
                raise RuntimeError("no covariance")

            mean = covariance_matrix

        def model() -> None:
            v = pyro.sample("v", dist.Normal(0.0, 3.0))
            pyro.sample("x", Broken(0.0, (v / 2).exp()))

        problem = BoundModel(model, AutoNormal(model), ())
        assert scale_pairs(problem, draw(problem, 500, seed=0)) == {"x": (["v"], False)}
