"""The command that repeats an experiment, with a made-up experiment behind it."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from rezende_mohamed_2015 import __main__ as command
from rezende_mohamed_2015.__main__ import EXPERIMENTS, experiment
from rezende_mohamed_2015.results import Options, Results, label
from rezende_mohamed_2015.tables import TABLES

RUNS = [
    {"kind": kind, "K": K, "seed": 0} for kind, K in (("planar", 2), ("planar", 8), ("NICE", 2))
]
LABELS = ["planar K=2 seed=0", "planar K=8 seed=0", "NICE K=2 seed=0"]


class Experiment(ModuleType):
    """Three runs whose result is the length of their label."""

    def __init__(self) -> None:
        super().__init__("made_up")
        self.options: Options | None = None
        self.done: list[str] = []
        self.fails: BaseException | None = None
        self.silent = False

    def run(self, options: Options) -> dict[str, Any] | None:
        self.options = options
        results = Results(options.out / "made_up.json", {"quick": options.quick})
        for run in results.missing(options.selected(RUNS)):
            if self.fails is not None and run["K"] == 8:
                raise self.fails
            self.done.append(label(run))
            results.add(run, {"kl": len(label(run))})
        return None if self.silent else {"runs": results.runs}


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Experiment:
    module = Experiment()
    monkeypatch.setattr(command, "experiment", lambda name: module)
    monkeypatch.setattr(command, "frame", lambda name, report: pd.DataFrame(report["runs"]))
    return module


def reproduce(*arguments: Any) -> tuple[int, str]:
    """The exit code, and the output without typer's colours and the frame around an error."""
    result = CliRunner().invoke(command.app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    plain = re.sub(r"\x1b\[[\d;]*m", "", result.output)
    return result.exit_code, " ".join(re.sub(r"[^\w\s!-~]", " ", plain).split())


def test_prints_the_table_and_where_the_numbers_are(made_up: Experiment, tmp_path: Path) -> None:
    code, output = reproduce("figure3", "--out", tmp_path)
    assert code == 0, output
    assert made_up.done == LABELS
    assert re.search(r"planar 2 0 .* 17 planar 8 0 .* 17 NICE 2 0 .* 15", output)
    assert re.search(r"numbers and figures are in /.*", output)
    assert (tmp_path / "made_up.json").exists()


def test_hands_the_options_on(
    made_up: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reproduce("figure3")[0] == 0
    assert made_up.options == Options(out=Path("results"))
    reproduce("mnist", "--out", "there", "--quick", "--seeds", 3, "--data", "mnist")
    assert made_up.options == Options(Path("there"), quick=True, seeds=3, data=Path("mnist"))
    reproduce("mnist", "--out", "there", "--quick", "--only", " planar K=2, NICE,")
    assert made_up.options.only == ("planar K=2", "NICE")
    given = ("--device", "cuda", "--draws", "static", "--jobs", 4, "--seconds", 30)
    reproduce("mnist", "--out", "there", *given)
    options = {"device": "cuda", "draws": "static", "jobs": 4, "seconds": 30.0}
    assert made_up.options == Options(Path("there"), **options)
    for refused in (("--device", "tpu"), ("--draws", "new"), ("--jobs", 0), ("--seconds", -1)):
        assert reproduce("mnist", *refused)[0] == 2


def test_only_some_runs(made_up: Experiment, tmp_path: Path) -> None:
    assert reproduce("figure3", "--out", tmp_path, "--only", "NICE,K=8")[0] == 0
    assert made_up.done == LABELS[:0:-1]


def test_only_that_matches_nothing(made_up: Experiment, tmp_path: Path) -> None:
    code, output = reproduce("figure3", "--out", tmp_path, "--only", "K=16")
    assert code == 2
    assert "--only 'K=16' is part of no run; there are" in output
    assert "planar K=8 seed=0" in output
    assert not made_up.done


def test_unknown_names_are_refused(made_up: Experiment) -> None:
    code, output = reproduce("figure2")
    assert code == 2
    assert f"NAME must be one of {', '.join(EXPERIMENTS)}; got 'figure2'" in output
    assert made_up.options is None


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("figure3", "--seeds", "0"),
        ("figure3", "--K", "8"),
        ("figure3", "--only", " , "),
        ("figure3", "--only", ""),
    ],
)
def test_wrong_usage_is_refused(made_up: Experiment, arguments: tuple[str, ...]) -> None:
    code, output = reproduce(*arguments)
    assert code == 2
    assert "Usage:" in output
    assert made_up.options is None


@pytest.mark.parametrize(
    "error",
    [
        ValueError("--data must be the folder of MNIST, got None"),
        FileNotFoundError("mnist: there is no train-images-idx3-ubyte.gz in here"),
        NotADirectoryError(20, "Not a directory", "file/checkpoints"),
    ],
)
def test_what_a_run_refuses_is_an_error_of_usage(
    made_up: Experiment, tmp_path: Path, error: Exception
) -> None:
    made_up.fails = error
    code, output = reproduce("mnist", "--out", tmp_path)
    assert code == 2
    assert str(error) in output
    assert "Traceback" not in output


def test_a_training_that_is_lost_says_so(made_up: Experiment, tmp_path: Path) -> None:
    made_up.fails = FloatingPointError("planar K=8 seed=0: no finite gradient in 100 updates")
    code, output = reproduce("mnist", "--out", tmp_path)
    assert code == 1
    assert "planar K=8 seed=0: no finite gradient in 100 updates" in output
    assert f"what was finished is in {tmp_path}" in output
    assert "Traceback" not in output


def test_a_fault_of_ours_is_no_error_of_usage(made_up: Experiment, tmp_path: Path) -> None:
    made_up.fails = ZeroDivisionError("ours")
    result = CliRunner().invoke(command.app, ["mnist", "--out", str(tmp_path)])
    assert result.exception is made_up.fails


def test_settings_of_another_run_are_an_error_of_usage(made_up: Experiment, tmp_path: Path) -> None:
    reproduce("figure3", "--out", tmp_path)
    code, output = reproduce("figure3", "--out", tmp_path, "--quick")
    assert code == 2
    assert "is of a run with quick=False (now True): name another --out to start anew" in output


def test_out_that_is_a_file(made_up: Experiment, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code, output = reproduce("figure3", "--out", tmp_path / "file")
    assert code == 2
    assert "File exists" in output
    assert (tmp_path / "file").read_text() == "in the way"


def test_interruption_keeps_what_is_finished_and_a_rerun_goes_on(
    made_up: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made_up.fails = KeyboardInterrupt()
    code, output = reproduce("figure3", "--out", "here")
    assert code == 130
    assert "interrupted; what was finished is in here, and a rerun goes on from there" in output
    assert made_up.done == LABELS[:1]
    made_up.fails = None
    assert reproduce("figure3", "--out", "here")[0] == 0
    assert made_up.done == LABELS


def test_other_ranks_print_nothing(made_up: Experiment, tmp_path: Path) -> None:
    made_up.silent = True
    assert reproduce("mnist", "--out", tmp_path) == (0, "")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_help_names_every_experiment(name: str) -> None:
    code, output = reproduce("--help")
    assert code == 0
    assert f"{name}: {EXPERIMENTS[name].split(' (')[0]}" in output


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_have_what_the_command_calls(name: str) -> None:
    assert callable(experiment(name).run)
    assert name in TABLES
