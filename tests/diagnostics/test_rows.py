"""Weights by rows of structured guides, against exact evidence and moments, right and wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import amortized_cases
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from row_cases import Exact, fitted, normal_rows, number, poisson_rows
from torch.nn.functional import softplus

import pyroflow as pf
from pyroflow.diagnostics import Report
from pyroflow.transforms.affine import inverse_softplus

F64 = torch.float64


@torch.no_grad()
def spoil(guide: pf.AutoStructuredFlow, kind: str) -> None:
    """Make a guide wrong, in one row, in all, or in the globals."""
    affine, G = guide.affine, len(guide.affine.leading())
    width = softplus(affine.raw_scale)
    if kind == "a row off":
        affine.offset[affine.rows()[0][3, 0]] += 0.3 * width[G + 3]
    if kind == "rows narrow":
        width[G:] *= 0.9
    if kind == "rows a little off":
        affine.offset[affine.rows()[0][:, 0]] += 0.03 * width[G:]
    if kind == "globals narrow":
        width[:G] *= 0.5
    affine.raw_scale.copy_(inverse_softplus(width))


def noise(report: Report) -> float:
    """By which the log evidence may be off, and by rounding where all weights are equal."""
    return 4 * report.log_evidence_se + 1e-9


def check_moments(report: Report, exact: Exact) -> None:
    """Resampled draws have the exact means and sds, within their Monte Carlo errors."""
    draws = report.resample(4000, seed=1)
    error = 1 / math.sqrt(report.ess)
    mean, sd = exact.mu
    assert draws["mu"].mean().item() == pytest.approx(mean, abs=4.5 * error * sd)
    assert draws["mu"].std().item() == pytest.approx(sd, rel=4.5 * error)
    rows, spread = exact.theta
    assert ((draws["theta"].mean(0) - rows).abs() < 5.5 * error * spread).all()
    assert ((draws["theta"].std(0) / spread).log().abs() < 5.5 * error).all()


@pytest.mark.parametrize(
    ("family", "num"),
    [(normal_rows, 8), slow(normal_rows, 200), slow(poisson_rows, 8), slow(poisson_rows, 200)],
)
def test_right_guides_have_exact_evidence(family: Callable, num: int) -> None:
    exact = family(num)
    skewed = family is poisson_rows
    guide = fitted(exact.model, steps=150 if skewed else 40, tails=skewed)
    report = pf.diagnose(exact.model, guide, num_samples=2000)
    assert report.rows is not None, report.by_rows
    assert report.level in ("good", "resample"), report
    assert report.log_evidence == pytest.approx(exact.evidence, abs=noise(report))
    check_moments(report, exact)


@pytest.mark.parametrize("seed", [0, slow(1)])
@pytest.mark.parametrize("kind", ["a row off", slow("rows narrow"), slow("rows a little off")])
def test_what_reweighting_repairs_is_not_good(kind: str, seed: int) -> None:
    exact = normal_rows(200)
    guide = fitted(exact.model)
    spoil(guide, kind)
    report = pf.diagnose(exact.model, guide, num_samples=2000, seed=seed)
    assert report.level == "resample", report.verdict
    assert report.log_evidence == pytest.approx(exact.evidence, abs=noise(report))
    check_moments(report, exact)
    if kind == "a row off":
        assert report.rows.names[report.rows.worst[0]] == "theta[3]"


@pytest.mark.parametrize("seed", [0, slow(1)])
@pytest.mark.parametrize("num", [8, slow(200)])
def test_narrow_globals_are_not_good(num: int, seed: int) -> None:
    exact = normal_rows(num)
    guide = fitted(exact.model)
    spoil(guide, "globals narrow")
    report = pf.diagnose(exact.model, guide, num_samples=2000, seed=seed)
    assert report.level != "good"
    assert report.khat > 0.4


def test_a_row_with_two_modes_is_not_good() -> None:
    """The data of row 5 say θ² only, and the guide is at one of the roots."""
    num = 40
    sign = torch.ones(num, dtype=F64)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(number(0.0), number(1.0)))
        with pyro.plate("groups", num):
            theta = pyro.sample("theta", dist.Normal(mu, number(1.0)))
            seen = torch.where(torch.arange(num) == 5, theta.square(), theta)
            pyro.sample("y", dist.Normal(seen, 0.3), obs=sign)

    guide = pf.AutoStructuredFlow(model, num_layers=0, init_loc_fn=lambda site: site["fn"].mean + 1)
    pf.fit_guide(model, guide, steps=20, seed=0, progress=False)
    report = pf.diagnose(model, guide, num_samples=2000)
    assert report.rows is not None, report.by_rows
    assert report.level == "bad", report.verdict
    # What wider draws of single rows say of it, without the search for modes.
    assert report.wide.unseen.startswith("wider draws of theta[5] find")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["indexed", slow("nested"), slow("beside")])
def test_other_shapes(kind: str) -> None:
    """Rows by an index have their exact evidence, others that of many joint weights."""
    if kind == "indexed":
        exact = poisson_rows(30, indexed=True)
        guide, evidence = fitted(exact.model), exact.evidence
        model = exact.model
    else:
        model = nested if kind == "nested" else beside
        guide = fitted(model, 100)
        joint = pf.diagnose(model, guide, num_samples=20_000)
        evidence = joint.log_evidence
        with torch.no_grad():
            for p in guide.affine.rows():
                guide.affine.offset[p] += 0.05
    report = pf.diagnose(model, guide, num_samples=2000)
    assert report.rows is not None, report.by_rows
    assert report.rows.num_candidates > 1 or kind == "indexed"
    error = math.hypot(report.log_evidence_se, 0.003)
    assert report.log_evidence == pytest.approx(evidence, abs=4 * error)
    assert report.level in ("good", "resample")


def nested() -> None:
    top = pyro.sample("top", dist.Normal(number(0.0), number(1.0)))
    with pyro.plate("districts", 20, dim=-2):
        a = pyro.sample("a", dist.Normal(top, 0.5))
        with pyro.plate("schools", 3, dim=-1):
            b = pyro.sample("b", dist.Normal(a, 0.5))
            data = torch.linspace(-1, 1, 60, dtype=F64).reshape(20, 3)
            pyro.sample("y", dist.Normal(b, 0.5), obs=data)


def beside() -> None:
    scale = pyro.sample("scale", dist.LogNormal(number(0.0), number(0.5)))
    with pyro.plate("cats", 30):
        a = pyro.sample("a", dist.Normal(number(0.0), scale))
        pyro.sample("x", dist.Normal(a, 0.5), obs=torch.linspace(-1, 1, 30, dtype=F64))
    with pyro.plate("dogs", 20):
        b = pyro.sample("b", dist.Normal(number(0.0), scale))
        pyro.sample("y", dist.Normal(b, 0.5), obs=torch.linspace(-2, 1, 20, dtype=F64))


def test_joint_weights_where_rows_are_not_apart() -> None:
    site, year = torch.arange(40) % 8, torch.arange(40) // 8

    def model() -> None:
        with pyro.plate("sites", 8):
            a = pyro.sample("a", dist.Normal(number(0.0), number(1.0)))
        with pyro.plate("years", 5):
            b = pyro.sample("b", dist.Normal(number(0.0), number(1.0)))
        both = torch.cat([a[site] + b[year], a])
        pyro.factor("y", -both.square().sum())

    guide = fitted(model, 20)
    assert guide.affine.rows()
    report = pf.diagnose(model, guide, num_samples=1000)
    assert report.rows is None
    assert "site 'y' has a term of several rows" in report.by_rows
    assert "several rows" in str(report)
    assert report.level == "good"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["right", "a row off", "rows narrow", "globals narrow"])
def test_two_thousand_rows(kind: str) -> None:
    exact = normal_rows(2000)
    guide = fitted(exact.model)
    spoil(guide, kind)
    report = pf.diagnose(exact.model, guide, num_samples=2000)
    levels = {"right": ("good",), "globals narrow": ("bad", "resample")}
    assert report.level in levels.get(kind, ("resample",)), report
    if kind != "globals narrow":
        assert report.log_evidence == pytest.approx(exact.evidence, abs=noise(report))
        check_moments(report, exact)


def test_rows_of_an_amortised_guide_are_weighed_by_themselves() -> None:
    """One row whose network reads another number is named, and joint weights are not needed."""
    y = torch.randn(24, generator=torch.Generator().manual_seed(0))
    guide, evidence = amortized_cases.exact_effects(y)
    options = {"num_samples": 1000, "max_sets": 1}
    report = pf.diagnose(amortized_cases.effects_model, guide, y, **options)
    assert report.level == "good"
    assert report.log_evidence == pytest.approx(evidence, abs=noise(report))
    assert report.wide.log_evidence == pytest.approx(evidence, abs=0.05)
    off = torch.zeros(24).index_fill(0, torch.tensor(7), 0.7)
    guide.context.positions, guide.context.function = {}, (lambda y: y + off,)
    report = pf.diagnose(amortized_cases.effects_model, guide, y, **options)
    assert report.rows.names[report.rows.worst[0]] == "z[7]"
    assert report.rows.ess_fraction.argsort()[1] != 7
    assert report.rows.ess_fraction[7] < 0.5
    assert report.rows.ess_fraction.sort().values[1] > 0.99
    assert report.log_evidence == pytest.approx(evidence, abs=noise(report) + 0.02)


@pytest.mark.slow
def test_rows_of_two_plates_beside_each_other_and_of_no_globals() -> None:
    def model() -> None:
        for name, num in (("a", 5), ("b", 3)):
            with pyro.plate(f"{name}s", num):
                x = pyro.sample(name, dist.Normal(0.0, 1.0).expand([2]).to_event(1))
                pyro.sample(f"y_{name}", dist.Normal(x, 1.0).to_event(1), obs=torch.ones(num, 2))

    guide = pf.AmortizedPlanarGuide(model, ["as", "bs"], num_layers=1).setup()
    with torch.no_grad():
        for flow in guide.local_flow:
            flow.affine.raw_scale.fill_(amortized_cases.raw(0.6))
            flow.affine.offset.fill_(0.5)
    report = pf.diagnose(model, guide, num_samples=4000, max_sets=1)
    exact = 16 * dist.Normal(0.0, 2**0.5).log_prob(torch.ones(())).item()
    assert report.log_evidence == pytest.approx(exact, abs=noise(report) + 0.02)
    assert len(report.rows.names) == 8
