"""The demo on the command line, with fits of a few steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pyroflow import demo
from pyroflow.cli import app

STAGES = ("sine", "toy", "eight_schools")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch, float32: None) -> None:
    short = {"steps": 5, "num_particles": 4, "warm_start": False}
    sizes = {"fresh": 500, "density": {"steps": 5, "polish": 5}, "toy": short}
    schools = {"non-centred": short, "centred": short}
    monkeypatch.setattr(demo, "FULL", sizes | {"schools": schools})
    monkeypatch.setattr(demo, "QUICK", sizes | {"schools": {"non-centred": short}})


def invoke(out: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["demo", "--out", str(out), *options])


def test_writes_figures_numbers_and_a_table(tmp_path: Path) -> None:
    result = invoke(tmp_path / "new" / "folder", "--seed", "3")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "new" / "folder" / "report.json").read_text())
    assert report["complete"]
    assert report["seed"] == 3
    assert tuple(report["stages"]) == STAGES
    assert report["stages"]["toy"]["log_evidence"] == pytest.approx(-1.690890, abs=1e-6)
    assert report["stages"]["eight_schools"]["log_evidence"] == pytest.approx(-31.311, abs=1e-2)
    rows = [row for stage in report["stages"].values() for row in stage["rows"]]
    assert len(rows) == 9
    for row in rows:
        assert row["quantity"] in result.output
        assert f"{row['ours']:.4f}" in result.output
    figures = {file.name for file in (tmp_path / "new" / "folder").glob("*.png")}
    assert figures == {
        "sine_density.png",
        "sine_loss.png",
        "toy_posterior.png",
        "toy_bending.png",
        "eight_schools_non-centred.png",
        "eight_schools_centred.png",
    }


@pytest.mark.slow
def test_same_seed_same_numbers(tmp_path: Path) -> None:
    reports = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        invoke(tmp_path, "--quick")
        stages = json.loads((tmp_path / "report.json").read_text())["stages"]
        reports.append([[row["ours"] for row in stages[name]["rows"]] for name in STAGES])
    assert reports[0] == reports[1]


def test_interruption_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(settings: demo.Settings) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "toy", interrupted)
    result = invoke(tmp_path)
    assert result.exit_code == 130
    assert f"interrupted; finished and kept in {tmp_path}: sine" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["complete"]
    assert tuple(report["stages"]) == ("sine",)
    assert (tmp_path / "sine_density.png").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_out_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = invoke(tmp_path / "file")
    assert result.exit_code == 2
    assert "must be a folder" in result.output
    assert (tmp_path / "file").read_text() == "in the way"
