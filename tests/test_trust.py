"""The targets of known answer: model and answer belong together; what the harness counts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pyro
import pytest
import torch
from benchmarks import posteriors, runs, trust
from benchmarks.judging import columns, judge
from benchmarks.known import SEVEN, TARGETS, THOUSAND
from benchmarks.known.grids import Grid, Gridded, half_normal
from benchmarks.known.target import Target
from benchmarks.problems import POSTERIORS, Problem
from benchmarks.runs import Answer
from cases import slow
from pyro import poutine
from torch import Tensor
from typer.testing import CliRunner

from pyroflow.model.supports import bijection
from pyroflow.targets import eight_schools_exact

NUM = 1000
ONE_BY_ONE = {"shares-counts_5"}  # torch's Multinomial does not run under vmap
FIRST = set({name.split("-")[0]: name for name in reversed(TARGETS)}.values())  # of each family


def log_joint(target: Target) -> Callable[[Tensor], Tensor]:
    """The model's log density of one vector of unconstrained numbers."""
    model, args = target.build()
    trace = poutine.trace(model).get_trace(*args)
    sites = dict(trace.iter_stochastic_nodes())
    sites = {name: site for name, site in sites.items() if not poutine.util.site_is_subsample(site)}
    maps = {name: bijection(site["fn"].support) for name, site in sites.items()}
    shapes = {name: maps[name].inverse_shape(site["fn"].shape()) for name, site in sites.items()}
    sizes = [shape.numel() for shape in shapes.values()]

    def density(z: Tensor) -> Tensor:
        values, total = {}, 0.0
        for (name, shape), part in zip(shapes.items(), z.split(sizes), strict=True):
            inner = part.reshape(shape)
            values[name] = maps[name](inner)
            total = total + maps[name].log_abs_det_jacobian(inner, values[name]).sum()
        conditioned = poutine.condition(model, data=values)
        return total + poutine.trace(conditioned).get_trace(*args).log_prob_sum()

    return density


def scores(target: Target, z: Tensor) -> tuple[Tensor, Tensor]:
    """Log density and its gradient at points z (S, D)."""
    scored = torch.func.grad_and_value(log_joint(target))
    with pyro.validation_enabled(False):
        if target.name in ONE_BY_ONE:
            found = [scored(point) for point in z]
            return tuple(map(torch.stack, zip(*found, strict=True)))
        return torch.vmap(scored)(z)


def is_zero(x: Tensor) -> bool:
    """Whether means over draws x (S, C) are zero within five standard errors."""
    return bool((x.mean(0).abs() <= 5 * x.std(0) / len(x) ** 0.5).all())


@pytest.mark.parametrize("name", [n if n in FIRST else slow(n) for n in TARGETS])
def test_model_and_answer_belong_together(name: str) -> None:
    target = TARGETS[name]
    reference = target.reference(5000)
    num = NUM // 4 if name in ONE_BY_ONE else NUM
    z = columns(target.draws(num, seed=1), reference.supports)
    assert reference.quantiles.isfinite().all()
    assert reference.sd.min() > 0
    assert reference.sd.isfinite().all()
    gradient, value = scores(target, z)
    if target.smooth:  # Stein's identities, E dlog p/dz_i = 0 and E z_i dlog p/dz_i = -1
        assert is_zero(gradient)
        assert is_zero(gradient * (z - z.median(0).values) + 1)
    if target.exact.moments() is not None:  # those of the quadrature are those of the draws
        assert is_zero(z - reference.mean)
        assert is_zero((z - reference.mean) ** 2 - reference.sd**2)
    if isinstance(target.exact, Gridded) and target.exact.in_columns:
        torch.testing.assert_close(value, target.exact.grid.log_density(*z.T))


def test_there_are_as_many_as_were_wanted() -> None:
    assert len(TARGETS) >= 60
    assert {*SEVEN, THOUSAND} <= TARGETS.keys()
    assert len(POSTERIORS) == 29


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("modes-60_40_5", [0.6, 0.4]),
        ("modes-90_10_5", [0.9, 0.1]),
        ("modes-ten_uneven_2", [i / 55 for i in range(1, 11)]),
        ("modes-very_far_3", [0.4, 0.6]),
    ],
)
def test_modes_have_their_weights(name: str, weights: list[float]) -> None:
    """In the model's density as in the draws: Stein's identities do not see them."""
    target = TARGETS[name]
    _, (_, centres, scales) = target.build()
    values = scores(target, centres)[1] + centres.shape[1] * (
        scales.log() + 0.5 * math.log(2 * math.pi)
    )
    expected = torch.tensor(weights)
    torch.testing.assert_close(values.exp(), expected, rtol=1e-3, atol=0)
    nearest = torch.cdist(target.draws(20_000)["x"], centres).argmin(1)
    found = nearest.bincount(minlength=len(weights)) / 20_000
    assert ((found - expected).abs() < 5 * (expected / 20_000).sqrt()).all()


def test_wide_part_has_one_percent() -> None:
    target = TARGETS["wide-1_percent_5"]
    far = torch.zeros(2, 5)
    far[0, 0], far[1, 1] = 10.0, 30.0
    wide = torch.distributions.Normal(0.0, 10.0)
    expected = math.log(0.01) + wide.log_prob(far).sum(-1)
    torch.testing.assert_close(scores(target, far)[1], expected)
    x = target.draws(100_000)["x"]
    part = (x.norm(dim=1) > 6).double().mean().item()
    assert part == pytest.approx(0.01, rel=0.15)  # 98 % of the wide part, none of the other


def test_schools_are_those_of_the_package() -> None:
    draws, log_evidence = eight_schools_exact(100_000)
    target = TARGETS["eight_schools-centred_10"]
    assert target.exact.log_evidence == pytest.approx(log_evidence, abs=1e-5)
    found = judge(draws, target.reference())
    assert found["mean error"] < 0.015
    assert found["sd error"] < 0.015


def test_evidence_of_the_rows_is_that_of_their_joint() -> None:
    """p(y | tau, mu) p(mu, tau) / p(mu, tau | y), with theta integrated out in the rows."""
    target = TARGETS["groups-rows_8"]
    _, (group, y) = target.build()
    total = []
    for u in target.exact.grid.points[:, 0][::20]:
        same = (group[:, None] == group).double()
        covariance = 25 + u.exp() ** 2 * same + torch.eye(len(y))
        data = torch.distributions.MultivariateNormal(torch.zeros(len(y)), covariance)
        total.append(data.log_prob(y) + half_normal(2.0)(u))
    step = 20 * (target.exact.grid.axes[0][1] - target.exact.grid.axes[0][0])
    found = torch.stack(total).logsumexp(0) + step.log()
    assert target.exact.log_evidence == pytest.approx(found.item(), abs=1e-6)


def test_grid_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="axis 0 of the grid ends where the density is 6"):
        Grid(lambda x: -0.5 * x**2, (-1.0, 8.0, 50))


def record(level: str, mean: float | None, sd: float | None) -> dict:
    return {"level": level, "mean error": mean, "sd error": sd, "seconds": 2.0}


def test_rates_count_what_is_trusted_and_what_is_right() -> None:
    records = [
        record("good", 0.1, 0.1),
        record("good", 0.3, 0.1),
        record("resample", 0.1, None),
        record("bad", 0.1, 0.1),
        record("bad", 0.1, 0.3),
        {"error": "refused", "seconds": 1.0},
    ]
    wrong, alarms, _ = trust.rates(records)
    assert wrong == "called good or usable, and wrong: 2 of 3 (66.7%)"
    assert alarms == "right, and called bad: 1 of 2 (50.0%)"
    assert "| good | 1 | 1 |" in trust.verdicts(records)
    assert "| error | 0 | 1 |" in trust.verdicts(records)
    found = posteriors.rates(records)
    assert found[0] == "means within 0.1 sd and sds within 10%: 2 of 6 runs"
    assert found[1].endswith(": 2")
    assert found[2].endswith(": 1")


def exact_way(problem: Problem, seed: int, budget: float) -> Answer:
    """Exact draws, called bad with the second seed."""
    draws = TARGETS[problem.name].draws(2000, seed=seed + 5)
    return Answer(draws, "bad" if seed else "good", "said", problem.log_evidence)


def test_a_run_is_written_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runs.WAYS, "posterior", exact_way)
    out, runner = tmp_path / "found.json", CliRunner()
    command = f"run --only banana-mild --seeds 2 --out {out}".split()
    said = runner.invoke(trust.app, command, catch_exceptions=False).output
    first = json.loads(out.read_text())
    found = first["results"]["posterior"]["banana-mild_2"]
    assert [found[seed]["level"] for seed in "01"] == ["good", "bad"]
    assert max(found["0"]["mean error"], found["0"]["sd error"]) < 0.1
    assert found["0"]["log evidence off"] == 0
    assert "| banana-mild_2 | curved | good, bad |" in said
    assert "right, and called bad: 1 of 2 (50.0%)" in said
    monkeypatch.setitem(runs.WAYS, "posterior", None)
    runner.invoke(trust.app, command, catch_exceptions=False)
    assert json.loads(out.read_text())["results"] == first["results"]


def test_posteriors_stand_beside_rivals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> Answer:
        raise ValueError("no such thing")

    monkeypatch.setitem(runs.WAYS, "posterior", exact_way)
    monkeypatch.setitem(runs.WAYS, "NUTS", refused)
    out, runner = tmp_path / "found.json", CliRunner()
    command = f"run --only modes-60 --seeds 1 --out {out} --ways".split()
    said = runner.invoke(posteriors.app, [*command, "posterior,NUTS"], catch_exceptions=False)
    assert "| modes-60_40_5 | good | 0.0" in said.output
    assert "| no such thing |" in said.output
    assert "sds within 10%: 1 of 1 runs" in said.output


def test_a_rival_needs_the_time_of_ours() -> None:
    with pytest.raises(ValueError, match="the budget of AutoNormal .* run it first"):
        runs.complete([("AutoNormal", "ring_2", 0)], {}, 1, 1.0, print, print)
