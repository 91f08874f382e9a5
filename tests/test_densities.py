"""The comparison of densities scores what it says, on columns that all ways can take."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from benchmarks import densities
from torch.distributions import MultivariateNormal
from typer.testing import CliRunner


def test_columns_without_a_density_are_left_out() -> None:
    data, left_out = densities.columns("diabetes")
    assert (data.shape, left_out) == ((442, 8), ["sex", "s4"])


def test_a_gaussian_has_the_score_of_its_formula() -> None:
    data, _ = densities.columns("iris")
    train, test = (data[rows] for rows in next(iter(densities.SPLITS.split(data))))
    mean, sd = train.mean(0), train.std(0)
    train, test = (torch.tensor((rows - mean) / sd) for rows in (train, test))
    exact = MultivariateNormal(train.mean(0), train.T @ train / len(train)).log_prob(test).mean()
    found = densities.measure("full Gaussian", data, 0)
    assert found["score"] == pytest.approx(exact.item(), abs=1e-3)
    assert found["chosen"] == {}


def test_rivals_choose_on_training_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(densities, "BANDWIDTHS", (0.01, 0.3, 5.0))
    out = tmp_path / "densities.json"
    command = ["run", "--out", str(out), "--only", "iris", "--ways", "kernels"]
    result = CliRunner().invoke(densities.app, command)
    assert result.exit_code == 0, result.output
    splits = json.loads(out.read_text())["results"]["iris"]["ways"]["kernels"]
    assert list(splits) == ["0", "1", "2", "3", "4"]
    assert all(split["chosen"] == {"bandwidth": 0.3} for split in splits.values())
    before = out.read_text()
    assert CliRunner().invoke(densities.app, command).exit_code == 0
    assert out.read_text() == before  # a rerun has nothing to do


def test_the_table_compares_by_splits() -> None:
    ways = {
        "planar": [1.0, 2.0, 3.0, 4.0, 5.0],
        "mixture": [0.0, 2.0, 2.5, 3.0, 5.0],
        "kernels": [0.0, 0.0, 0.0, 0.0, 0.0],
        "full Gaussian": [9.0],  # a run that was ended
    }
    part = {"rows": 10, "columns": 2, "left out": []}
    part["ways"] = {
        way: {str(i): {"score": s, "chosen": {}, "seconds": 2.0} for i, s in enumerate(scores)}
        for way, scores in ways.items()
    }
    head, _, line = densities.markdown({"results": {"made": part}}).splitlines()
    assert head.startswith("| data | rows | columns | planar | mixture | kernels | planar less")
    scores = (3.0, math.sqrt(2.5 / 5)), (2.5, math.sqrt(3.25 / 5)), (0.0, 0.0), (0.5, 0.5 / 5**0.5)
    cells = " | ".join(f"{mean:.2f} ± {error:.2f}" for mean, error in scores)
    assert line == f"| made | 10 | 2 | {cells} (mixture) | 2 |"
