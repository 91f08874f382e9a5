"""The measurement of a device sees what is wrong there, and keeps what it has when it stops."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from benchmarks.device.__main__ import app, markdown
from benchmarks.device.fits import of_guide, steps
from benchmarks.device.models import groups, schools_data
from benchmarks.device.parts import Cases, found, measured
from benchmarks.device.speed import speed
from benchmarks.device.values import compared, values
from torch import Tensor, nn
from typer.testing import CliRunner

import pyroflow as pf


def cases(device: str, quick: bool) -> Cases:
    """A part of a measurement: one case goes well, one wrong, one takes too long."""
    yield "right", lambda: {"device": device, "quick": quick}
    yield "wrong", lambda: {"quotient": 1 / 0}
    yield "long", lambda: time.sleep(600)


@pytest.mark.slow
def test_parts_keep_what_they_have_found() -> None:
    records = dict(measured(cases, "cpu", True, limit=9.0))
    assert list(records) == ["right", "wrong", "stopped"]
    assert records["right"]["device"] == "cpu"
    assert "ZeroDivisionError" in records["wrong"]["error"]
    assert records["stopped"]["error"] == "after 9 s"


def broken(device: str, quick: bool) -> Cases:
    """A part that fails before its first case."""
    raise LookupError("no data")


@pytest.mark.slow
def test_a_part_that_fails_says_why() -> None:
    records = dict(measured(broken, "cpu", True, limit=60.0))
    assert "LookupError: no data" in records["stopped"]["error"]


def test_values_of_the_cpu_are_those_of_the_cpu() -> None:
    for name, measure in values("cpu", quick=True):
        record, most = measure(), 0.0 if "float64" in name else 1e-4
        assert record, name
        assert all(error <= most for error in record.values()), name


def test_wrong_values_and_places_are_seen() -> None:
    def evaluate(_: nn.Module, x: Tensor) -> dict[str, Tensor]:
        return {"double": 2 * x if x.dtype == torch.float64 else 3 * x}

    x = torch.ones(3, dtype=torch.float64)
    record = compared(evaluate, nn.Identity(), (x,), "cpu", torch.float32)
    assert record["double"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="double is in torch.float64"):
        compared(lambda _, x: {"double": x.double()}, nn.Identity(), (x,), "cpu", torch.float32)


def test_steps_and_speed_are_counted() -> None:
    _, measure = next(steps("cpu", quick=True))
    assert measure()["steps a second"] > 0
    records = [measure() for _, measure in speed("cpu", quick=True)]
    for record in records:
        assert record["train / floor"] == pytest.approx(
            record["train, ms"] / record["floor, train, ms"]
        )
        off = [value for name, value in record.items() if name.startswith("error")]
        assert len(off) == 7
        assert 0 < max(off) < 1e-4
    assert records[0]["held / (N K)"] > 0


@pytest.mark.slow
def test_a_fit_is_judged_by_the_evidence() -> None:
    record = of_guide(groups, pf.AutoPlanarFlow, (torch.ones(3), torch.ones(3)), 30, None)
    assert abs(record["gap"]) < 0.5
    assert record["level"] in ("good", "resample", "bad")
    assert len(schools_data()) == 2


def test_a_run_adds_to_the_file(tmp_path: Path) -> None:
    out = tmp_path / "device.json"
    other = {"values": {"planar": {"forward": 0.5, "took, s": 1.0}, "radial": {"error": "a\nb"}}}
    out.write_text(json.dumps({"results": {"other": other}}))
    options = ["run", "--quick", "--device", "cpu", "--only", "tests", "--out", str(out)]
    result = CliRunner().invoke(app, [*options, "--most", "0"])
    assert result.exit_code == 0, result.output
    stored = json.loads(out.read_text())["results"]
    assert stored["other"] == other
    assert stored["cpu"]["tests"]["stopped"]["error"] == "after 0 s"
    assert "| values | planar | forward | 0.5 | – |" in markdown({"results": stored})
    assert "| values | radial |  | b | – |" in markdown({"results": stored})
    assert "took" not in markdown({"results": stored})


def test_the_error_of_a_case_is_its_record() -> None:
    assert "KeyError" in found(lambda: {}["missing"])["error"]
