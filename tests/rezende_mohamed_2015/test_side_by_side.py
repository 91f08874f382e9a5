"""Runs side by side: who goes on when, and that each ends as it would alone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from image_cases import write_mnist
from torch import Tensor

from pyroflow.inference import launches
from pyroflow.inference.launches import ONE_LAUNCH
from pyroflow.transforms.kernels import autograd
from rezende_mohamed_2015 import dlgm_study, mnist
from rezende_mohamed_2015.results import Options
from rezende_mohamed_2015.side_by_side import Turns, side_by_side

CPU = torch.device("cpu")


@pytest.fixture
def tf32() -> Iterator[Callable[[], bool]]:
    """What it is set to."""
    before = torch.backends.cuda.matmul.allow_tf32
    yield lambda: torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_a_run_is_alone_while_it_starts(tf32: Callable[[], bool]) -> None:
    """And has TF32 then, but not later."""
    going, inside, most = threading.Lock(), set(), []

    def do(task: int, between: Callable[[], None]) -> None:
        with going:
            assert not inside, "another one goes on"
        assert tf32()
        time.sleep(0.01)
        with going:
            assert not inside, "another one has gone on"
        for _ in range(20):
            between()
            assert not tf32()
            with going:
                inside.add(task)
                most.append(len(inside))
            time.sleep(0.001)
            with going:
                inside.remove(task)

    side_by_side(range(5), do, 3, CPU)
    assert 1 < max(most) <= 3


def test_an_error_leaves_the_others_alone(
    tf32: Callable[[], bool], capfd: pytest.CaptureFixture
) -> None:
    done = []

    def do(task: int, between: Callable[[], None]) -> None:
        if task == 1:
            raise FloatingPointError("no finite gradient")
        between()
        done.append(task)

    with pytest.raises(FloatingPointError, match="no finite gradient"):
        side_by_side(range(4), do, 2, CPU)
    assert sorted(done) == [0, 2, 3]
    assert "FloatingPointError: no finite gradient" in capfd.readouterr().err


def test_runs_end_at_their_next_pause(tf32: Callable[[], bool]) -> None:
    turns, came = Turns(), []

    def run() -> None:
        with turns.run():
            came.append("begun")
            turns.pause()
            turns.end()
            turns.pause()
            came.append("gone on")

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run()
    assert came == ["begun"]


# the study


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("data"), 1000, 100)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, float32: None) -> None:
    """The CPU as a GPU, whose graphs Python plays."""

    def played(step: Callable[[], None], idle: Tensor) -> Callable[[], None]:
        idle.fill_(True)
        for _ in range(launches.WARM_UP):
            step()
        idle.fill_(False)
        return step

    monkeypatch.setattr(autograd, "_constrain_rows", lambda w, u: None)
    monkeypatch.setattr(launches, "capture", played)
    monkeypatch.setattr(launches, "_is_one_gpu", lambda devices: True)
    for module in (dlgm_study, mnist):
        monkeypatch.setattr(module, "one_gpu", lambda ours: True)


ONLY = ("planar K=10", "planar K=0", "NICE K=10")


def run(out: Path, data: Path, **options: Any) -> dict[str, Any]:
    options = {"only": ONLY, "progress": False} | options
    return mnist.run(Options(out=out, quick=True, data=data, **options))


@pytest.mark.usefixtures("gpu")
def test_runs_end_as_they_would_alone(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture
) -> None:
    alone = run(tmp_path / "alone", data, only=ONLY[:2])["runs"]
    together = run(tmp_path / "together", data, only=ONLY[:2], jobs=2, progress=True)["runs"]
    assert [(r["kind"], r["K"]) for r in together] == [("planar", 0), ("planar", 10)]
    timed = {"seconds", "seconds_of_scoring"}
    for found, expected in zip(together, alone, strict=True):
        assert {k: v for k, v in found.items() if k not in timed} == {
            k: v for k, v in expected.items() if k not in timed
        }
        facts = (found["draws"], found["updates"], found["batch_size"], found["launches"])
        assert facts == ("fresh", 25, 200, ONE_LAUNCH)
        assert found["free_energy_largest"] > found["free_energy"]
        assert found.get("more_samples") == (None if found["K"] == 10 else 20)
    assert not list((tmp_path / "together" / "checkpoints" / "mnist").iterdir())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert sum("planar K=10 fresh seed=0: −ELBO" in line for line in lines) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
def test_a_file_has_what_was_finished(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever became of another run; a rerun does what is left."""
    train = dlgm_study.train

    def fails(dlgm: Any, *args: Any, **options: Any) -> Any:
        if options["name"].startswith("planar K=10"):
            raise FloatingPointError("no finite gradient")
        return train(dlgm, *args, **options)

    monkeypatch.setattr(dlgm_study, "train", fails)
    with pytest.raises(FloatingPointError):
        run(tmp_path, data, jobs=2)
    kept = json.loads((tmp_path / "mnist.json").read_text())["runs"]
    assert sorted((r["kind"], r["K"]) for r in kept) == [("NICE", 10), ("planar", 0)]
    names: list[str] = []
    monkeypatch.setattr(
        dlgm_study, "train", lambda *a, **o: (names.append(o["name"]), train(*a, **o))[1]
    )
    again = run(tmp_path, data, jobs=2)["runs"]
    assert names == ["planar K=10 fresh seed=0"]
    assert [r for r in again if r["K"] != 10 or r["kind"] == "NICE"] == [
        r for r in sorted(kept, key=lambda r: r["K"])
    ]


@pytest.mark.usefixtures("gpu")
def test_after_some_seconds_no_run_begins(tmp_path: Path, data: Path) -> None:
    assert run(tmp_path, data, seconds=0.0, only=ONLY[1:2]) == {"runs": []}


def test_several_at_a_time_need_a_gpu(tmp_path: Path, data: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="--jobs 2 needs a GPU"):
        run(tmp_path, data, jobs=2)
    with pytest.raises(ValueError, match="--device cuda needs a GPU"):
        run(tmp_path, data, device="cuda")


def test_draws_have_names(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ValueError, match="draws must be one of 'static', 'fresh'; got 'new'"):
        run(tmp_path, data, draws="new")
