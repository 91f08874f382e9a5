"""What the harness says of guides on posteriordb, and what it keeps."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from benchmarks.posteriordb import rivals
from benchmarks.posteriordb import run as harness
from benchmarks.posteriordb.__main__ import app
from benchmarks.posteriordb.judge import effective_share, judge
from benchmarks.posteriordb.models import FOLDER, Port, Posterior, load
from benchmarks.posteriordb.rivals import at_most
from benchmarks.posteriordb.run import QUICK, Settings
from benchmarks.posteriordb.table import bars, markdown
from pyro.infer.autoguide import AutoNormal
from typer.testing import CliRunner

needs_data = pytest.mark.skipif(
    not FOLDER.exists(), reason=f"the posteriors of posteriordb are not in {FOLDER}"
)


def standard_normal() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def gaussian(loc: float, scale: float) -> Callable:
    return lambda: pyro.sample("z", dist.Normal(torch.full((2,), loc), scale).to_event(1))


@pytest.fixture
def normal() -> Posterior:
    """Two standard normal latents and no data, log Z = 0."""
    draws = torch.randn(10_000, 2)
    draws = (draws - draws.mean(0)) / draws.std(0)
    port, density = Port(standard_normal, lambda data: ()), torch.zeros(10_000)
    return Posterior("normal", port, (), ("z[1]", "z[2]"), draws, {"z": draws}, density, 0, 0, 0)


def test_judge_knows_the_exact_guide(normal: Posterior) -> None:
    found = judge(normal, gaussian(0.0, 1.0), 20_000, 10_000, seed=0)
    assert found["kl"] == 0
    assert found["ess"] == pytest.approx(1)
    assert max(found["mean error"], found["sd error"]) < 0.02
    assert found["nonfinite"] == 0


def test_judge_knows_kl_and_ess_of_a_shift(normal: Posterior) -> None:
    found = judge(normal, gaussian(0.5, 1.0), 20_000, 10_000, seed=0)
    assert found["kl"] == pytest.approx(0.25, abs=5 * found["elbo_se"])  # D m² / 2
    assert found["elbo_se"] == pytest.approx(math.sqrt(0.5 / 20_000), rel=0.05)
    assert found["ess"] == pytest.approx(math.exp(-0.5), rel=0.1)  # exp(-D m²)
    assert found["mean error"] == pytest.approx(0.5, abs=0.03)
    assert found["mean error, weighted"] < 0.05
    assert found["khat"] < 0.7


def test_judge_knows_a_narrow_guide(normal: Posterior) -> None:
    found = judge(normal, gaussian(0.0, 0.5), 20_000, 10_000, seed=0)
    assert found["kl"] == pytest.approx(2 * (math.log(2) - 0.375), abs=5 * found["elbo_se"])
    assert found["sd error"] == pytest.approx(math.log(2), abs=0.02)
    assert found["khat"] > 0.6  # 1 - scale² = 0.75 in the limit
    assert found["sd error, weighted"] < found["sd error"] / 2


def test_judge_survives_weights_that_are_not_numbers(normal: Posterior) -> None:
    found = judge(normal, gaussian(math.nan, 1.0), 1000, 500, seed=0)
    assert found["nonfinite"] == 1000
    assert found["kl"] is found["khat"] is found["mean error"] is None


def test_effective_share_of_few_weights() -> None:
    assert effective_share(torch.zeros(8)) == pytest.approx(1)
    assert effective_share(torch.tensor([0.0, -torch.inf])) == pytest.approx(0.5)
    assert effective_share(torch.tensor([3.0, 1.0]).log()) == pytest.approx(0.8)


def test_at_most_ends_what_takes_longer() -> None:
    with pytest.raises(TimeoutError, match=r"0\.05 s"), at_most(0.05):
        time.sleep(5)
    with at_most(0.05):
        pass
    time.sleep(0.06)


@pytest.mark.slow
@needs_data
def test_ours_is_fitted_and_judged() -> None:
    few = Settings({"steps": 5, "num_particles": 4}, num_samples=500, num_weights=500)
    found = harness.measure(load("mesquite-logmesquite_logvolume"), "pyroflow", 0, 0.0, few)
    assert found["steps"] <= 5
    assert found["stopped"]
    assert found["kl"] > 0


@needs_data
def test_run_fills_in_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fitted(posterior: Posterior, *options: object) -> tuple[Callable, dict[str, float]]:
        return AutoNormal(posterior.model), {"seconds": 0.1}

    monkeypatch.setattr(harness, "_fit_ours", fitted)
    out, runner = tmp_path / "found.json", CliRunner()
    command = f"run --quick --only mesquite --seeds 1 --threads 1 --out {out} --methods".split()

    def run(*methods: str) -> tuple[dict, str]:
        said = runner.invoke(app, [*command, *methods], catch_exceptions=False).output
        return json.loads(out.read_text())["results"]["mesquite-logmesquite_logvolume"], said

    with pytest.raises(ValueError, match="the budget of AutoNormal .* add it to the methods"):
        run("AutoNormal")
    first, said = run("pyroflow,AutoNormal,NUTS")
    assert set(first) == {"pyroflow", "AutoNormal", "NUTS"}
    assert first["AutoNormal"]["0"]["budget"] == 0.1
    assert first["AutoNormal"]["0"]["seconds"] >= 0.1
    assert all(first[method]["0"]["mean error"] > 0 for method in first)
    assert "| mesquite-logmesquite_logvolume |" in said
    second, _ = run("pyroflow,AutoNormal,planar")
    assert second == second | first
    assert second["16 planar"]["0"]["kl"] > 0
    third, _ = run("AutoNormal", "--fresh")
    assert third["AutoNormal"] != second["AutoNormal"]
    assert third["pyroflow"] == second["pyroflow"]


@needs_data
def test_failures_are_written_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*options: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(harness, "fit_rival", broken)
    assert harness.attempt(load("arK-arK"), "AutoNormal", 0, 1.0, QUICK)["error"] == ("out of luck")


@needs_data
def test_rival_that_meets_nan_says_when(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [math.nan if i == 15 else 1.0 for i in range(30)]
    monkeypatch.setattr(rivals, "svi", lambda *_, **__: iter(losses))
    record = rivals.fit_rival(load("arK-arK"), "AutoNormal", seconds=10)[1]
    assert record["error"] == "NaN at step 16"


def test_unknown_names_are_refused() -> None:
    refused = CliRunner().invoke(app, ["run", "--only", "arK,none"])
    assert refused.exit_code == 2
    assert "got 'none'" in " ".join(refused.output.split())


def record(kl: float, **other: float) -> dict[str, float]:
    plain = {"khat": 0.5, "ess": 0.9, "mean error": 0.02, "sd error": 0.01, "seconds": 20.0}
    weighted = {"mean error, weighted": 0.01, "sd error, weighted": 0.01, "elbo_se": 0.001}
    return {"kl": kl, **plain, **weighted, **other}


RESULTS = {
    "arK-arK": {
        "pyroflow": {"0": record(0.010), "1": record(0.020), "2": record(0.014, seconds=61.0)},
        "AutoNormal": {"0": record(4.0), "1": record(5.0), "2": record(3.0)},
        "AutoMultivariateNormal": {"0": record(0.011), "1": record(0.015), "2": record(0.016)},
        "NUTS": {"0": {"mean error": 0.1, "sd error": 0.05, "seconds": 12.3, "draws": 1000}},
    },
    "garch-garch11": {
        "pyroflow": {"0": record(0.05, khat=0.8, ess=0.96)},
        "AutoNormal": {"0": {"seconds": 20.0, "error": "NaN at step 3"}},
        "NUTS": {"0": {"seconds": 600.0, "error": "stopped after 600 s"}},
    },
    "gp_pois_regr-gp_pois_regr": {"pyroflow": {"0": record(0.3, khat=0.8)}},
}


def test_table_says_median_range_and_best_rival() -> None:
    said = markdown({"results": RESULTS}).splitlines()
    ark = next(line for line in said if line.startswith("| arK-arK | 0.0"))
    assert ark.startswith("| arK-arK | 0.014 (0.010 to 0.020) | 0.500 | 0.900 | 0.020 |")
    assert ark.endswith(
        "| 20.0 (20.0 to 61.0) | 0.015 (0.011 to 0.016) AutoMultivariateNormal |"
        " 0.100, 0.050, 12.3 |"
    )
    garch = next(line for line in said if line.startswith("| garch-garch11 | 0.05"))
    assert garch.endswith("| – | stopped after 600 s |")
    rivals_of_garch = next(line for line in said if line.startswith("| garch-garch11 | fails"))
    assert rivals_of_garch == "| garch-garch11 | fails | – | – | – |"
    assert markdown({"results": {}}) == "there are no results of pyroflow yet"


def test_table_says_which_bars_are_met() -> None:
    assert bars(RESULTS) == [
        "KL ≤ 0.03, every seed: 1 of 2; not garch-garch11",
        "KL ≤ 0.2, every seed: 0 of 1; not gp_pois_regr-gp_pois_regr",
        "k-hat < 0.7 or ESS ≥ 0.95, every seed: 2 of 3; not gp_pois_regr-gp_pois_regr",
        "means within 0.05 sd, every seed: 3 of 3",
        "sds within 5 %, every seed: 3 of 3",
        "within 60 s, every seed: 2 of 3; not arK-arK",
        "KL not above the best rival's, beyond noise, every seed: 2 of 3; not arK-arK",
    ]
