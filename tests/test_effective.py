"""Effective draws of a chain, and the seconds that they cost beside those of others."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from benchmarks import effective, runs
from benchmarks.judging import from_draws, least_ess
from benchmarks.known import TARGETS
from benchmarks.numpyro_nuts.remote import Numpyro
from benchmarks.posteriordb.rivals import chain
from benchmarks.problems import Problem
from benchmarks.remote import connect
from benchmarks.runs import Answer, measure
from pyro.distributions import constraints
from torch import Tensor


def persistent(rho: float, num: int) -> Tensor:
    """An AR(1) chain of unit variance, whose ESS is num (1 - rho) / (1 + rho)."""
    x = torch.randn(num)
    for t in range(1, num):
        x[t] = rho * x[t - 1] + (1 - rho**2) ** 0.5 * x[t]
    return x


def test_ess_is_that_of_the_worst_column() -> None:
    num, rho = 20_000, 0.8
    draws = {"a": torch.randn(num, 2), "s": persistent(rho, num).exp()}
    supports = {"a": constraints.independent(constraints.real, 1), "s": constraints.positive}
    reference = from_draws(draws, supports)
    assert least_ess(draws, reference) == pytest.approx(num * (1 - rho) / (1 + rho), rel=0.15)
    draws["a"][:, 1] = 3.0  # a chain that does not move
    assert math.isnan(least_ess(draws, reference))


def test_warm_up_of_a_chain_is_a_part_of_its_seconds() -> None:
    problem = Problem("", *TARGETS["regression-5"].build(), None, None)
    draws, few, in_all = chain(problem, 10, 50)
    assert draws["beta"].shape == (50, 5)
    assert 0 < few < in_all
    _, many, in_all = chain(problem, 50, 1)
    assert in_all / 2 < many < in_all


def test_record_of_a_chain_has_its_ess_and_the_seconds_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def way(problem: Problem, seed: int, budget: float) -> Answer:
        draws = TARGETS[problem.name].draws(1000, seed=5)
        return Answer(draws, warmup=2.0, seconds=3.0) if seed else Answer(draws, ess=700.0)

    monkeypatch.setitem(runs.WAYS, "NUTS", way)
    said = measure(("NUTS", "modes-60_40_5", 0), math.nan, 60.0)
    assert (said["ess"], "warmup seconds" in said) == (700, False)
    assert 0 < said["seconds"] < 3
    found = measure(("NUTS", "modes-60_40_5", 1), math.nan, 60.0)
    assert (found["warmup seconds"], found["seconds"]) == (2, 3)
    assert found["ess"] == pytest.approx(1000, rel=0.3)  # the least of five columns


def record(
    seconds: float, ess: float | None, warmup: float | None = None, off: float = 0.1
) -> dict:
    errors = {"mean error": off, "sd error": 0.1, "sd noise": 0.02, "draws": 1000}
    chain = {} if warmup is None else {"warmup seconds": warmup}
    return {"seconds": seconds, "ess": ess, **errors, **chain}


def test_seconds_to_400_effective_draws() -> None:
    assert effective.seconds_to(record(10.0, 100.0, warmup=4.0)) == 4 + 6 * 4
    assert effective.seconds_to(record(10.0, 1000.0, warmup=4.0)) == pytest.approx(4 + 6 * 0.4)
    assert effective.seconds_to(record(10.0, 5000.0)) == 10  # what ours took, be they more
    assert effective.seconds_to(record(10.0, 0.0)) is None  # a verdict of bad
    assert effective.seconds_to(record(10.0, None, warmup=4.0)) is None
    assert effective.seconds_to({"seconds": 10.0, "error": "stopped"}) is None


def test_wrong_is_what_few_draws_do_not_explain() -> None:
    assert not effective.is_wrong(record(10.0, 100.0, off=0.39))  # 4 / sqrt(100) is 0.4
    assert effective.is_wrong(record(10.0, 100.0, off=0.41))
    assert effective.is_wrong(record(10.0, 10_000.0, off=0.21))
    assert not effective.is_wrong(record(10.0, 10_000.0, off=0.19))
    assert effective.is_wrong(record(10.0, None, off=0.3))
    assert effective.is_wrong(record(10.0, 100.0) | {"sd error": 0.26})  # 4 * 0.02 * sqrt(10)
    assert not effective.is_wrong(record(10.0, 100.0) | {"sd error": 0.25})
    assert effective.is_wrong(record(10.0, 100.0) | {"sd error": None})  # it is infinite


def test_table_has_ratios_and_counts_only_what_is_right() -> None:
    a, b = "modes-60_40_5", "funnel-3_10"
    found = {
        "posterior": {a: {"0": record(5.0, 500.0)}, b: {"0": record(2.0, 400.0)}},
        "AutoNormal": {a: {"0": record(5.0, None)}},
        "NUTS": {
            a: {"0": record(10.0, 200.0, warmup=4.0, off=0.7)},
            b: {"0": record(10.0, 200.0, warmup=2.0), "1": record(8.0, 400.0, warmup=2.0)},
        },
        "numpyro": {b: {"0": record(1.0, 800.0, warmup=0.5)}},
    }
    text = effective.markdown(found)
    assert f"| {b} | 2.0 | 400 | 200 | 2 | 9.0 | 300 | 35 | 13 | 1.0 | 800 | 800 | 0.75 |" in text
    assert "| 6.5 | 0.38 |" in text
    assert f"| {a} | 5.0 | 500 | 100 | 5 | 10.0 *wrong* | 200 | 20 | 16 |" in text
    assert "NUTS, seconds to 400 over those of posterior: median 6.5 of 1 posteriors" in text
    assert "AutoNormal" not in text
    assert effective.markdown({"posterior": {a: {"0": {"seconds": 5.0, "error": "no"}}}}) == ""


def test_an_environment_that_is_missing_is_named(tmp_path: Path) -> None:
    remote, note = connect(Numpyro, tmp_path / "python")
    assert remote is None
    assert note.startswith(f"numpyro is left out: there is no {tmp_path / 'python'}")
