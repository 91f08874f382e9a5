"""What the experiments share: which runs, and a file of results that is added to."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from rezende_mohamed_2015 import results
from rezende_mohamed_2015.results import (
    Options,
    Results,
    checkpoint_folder,
    machine,
)

RUNS = [
    {"energy": "U1", "kind": "planar", "K": 2, "seed": 0},
    {"energy": "U1", "kind": "planar", "K": 20, "seed": 0},
    {"energy": "U2", "kind": "NICE", "K": 2, "seed": 1},
]


@pytest.mark.parametrize(
    ("only", "selected"),
    [
        ((), RUNS),
        (("planar",), RUNS[:2]),
        (("K=2",), [RUNS[0], RUNS[2]]),  # and not K=20
        (("K=20",), RUNS[1:2]),
        (("NICE", "U1 planar K=2"), [RUNS[2], RUNS[0]]),  # in the order that they are asked for
        (("planar", "U1"), RUNS[:2]),
    ],
)
def test_only_selects_by_parts_of_labels(only: tuple[str, ...], selected: list[dict]) -> None:
    assert Options(Path("out"), only=only).selected(iter(RUNS)) == selected


def test_only_that_matches_nothing_is_refused() -> None:
    options = Options(Path("out"), only=("planar", "K=3"))
    with pytest.raises(ValueError, match=r"--only 'K=3' is part of no run; there are \['U1 planar"):
        options.selected(RUNS)


SETTINGS = {"steps": 10, "quick": True, "layers": (2, 8)}


def test_a_file_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "new" / "figure.json"
    first = Results(path, SETTINGS)
    assert not path.exists()
    first.add({"K": 2}, {"kl": 0.25, "curve": (1.0, 0.5)})
    again = Results(path, SETTINGS)
    here = {"machine": machine()}
    two = {"K": 2} | here | {"kl": 0.25, "curve": [1.0, 0.5]}
    assert again.runs == first.runs == [two]
    again.add({"K": 8}, {"kl": 0.03})
    again.add({"K": 2}, {"kl": 0.24})
    runs = [{"K": K} | here | {"kl": kl} for K, kl in ((2, 0.24), (8, 0.03))]
    assert Results(path, SETTINGS).runs == runs
    planned = [{"K": K} for K in (8, 4, 2)]
    assert again.find({"K": 2}) == runs[0]
    assert again.find({"K": 4}) is None
    assert again.missing(planned) == [{"K": 4}]
    assert again.ordered(planned) == runs[::-1]
    assert again.ordered(planned[:1]) == runs[::-1]  # others than these stay


def test_the_file_holds_settings_summary_and_runs(tmp_path: Path) -> None:
    path = tmp_path / "figure.json"
    kept = Results(path, SETTINGS)
    kept.add({"K": 2}, {"kl": 0.25})
    kept.write(best=0.25, median=0.3)
    Results(path, SETTINGS).write(median=0.31)
    Results(path, SETTINGS).add({"K": 8}, {"kl": 0.03})
    assert json.loads(path.read_text()) == {
        "settings": {"steps": 10, "quick": True, "layers": [2, 8]},
        "best": 0.25,
        "median": 0.31,
        "runs": [{"K": K, "machine": machine(), "kl": kl} for K, kl in ((2, 0.25), (8, 0.03))],
    }


def test_a_run_keeps_the_machine_it_was_done_on(tmp_path: Path) -> None:
    """Whatever the machine that adds other runs, or writes the summary."""
    path = tmp_path / "figure.json"
    Results(path, SETTINGS).add({"K": 2}, {"machine": "abacus, 2 beads", "kl": 0.25})
    Results(path, SETTINGS).add({"K": 8}, {"kl": 0.03})
    Results(path, SETTINGS).write(best=0.03)
    two, eight = Results(path, SETTINGS).runs
    assert two["machine"] == "abacus, 2 beads"
    for fact in (f"{os.cpu_count()} cores", "1 thread,", f"torch {torch.__version__}"):
        assert fact in eight["machine"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SETTINGS | {"steps": 20}, r"is of a run with steps=10 \(now 20\): name another --out"),
        ({"quick": True, "layers": [2, 8]}, r"steps=10 \(now None\)"),
        (SETTINGS | {"lr": 0.1, "quick": False}, r"lr=None \(now 0.1\), quick=True \(now False\)"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, settings: dict, message: str) -> None:
    path = tmp_path / "figure.json"
    Results(path, SETTINGS).add({"K": 2}, {"kl": 0.25})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        Results(path, settings)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2]", "3", '{"runs": []}', '{"settings": {}}', "\xff"]
)
def test_a_broken_file_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    path = tmp_path / "figure.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"figure\.json is no file of results: name another --out"):
        Results(path, SETTINGS)
    assert path.read_bytes() == content.encode("latin-1")


@pytest.mark.parametrize(
    "content",
    [
        '{"settings": [1], "runs": []}',
        '{"settings": {}, "runs": 3}',
        '{"settings": {}, "runs": {"K=2": {"kl": 0.25}}}',
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "figure.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is no file of results"):
        Results(path, {})


def test_two_that_share_a_file_keep_all_runs(tmp_path: Path) -> None:
    path = tmp_path / "figure.json"
    one, two = Results(path, SETTINGS), Results(path, SETTINGS)
    one.add({"K": 2}, {"kl": 0.25})
    two.add({"K": 8}, {"kl": 0.03})
    one.write(best=0.03)
    two.add({"K": 32}, {"kl": 0.01})
    assert [run["K"] for run in two.runs] == [2, 8, 32]
    assert Results(path, SETTINGS).runs == two.runs
    assert json.loads(path.read_text())["best"] == 0.03


def _add_runs(path: Path, name: str) -> None:
    shared = Results(path, SETTINGS)
    for k in range(20):
        shared.add({"kind": name, "K": k}, {"kl": k})


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_that_share_a_file_keep_all_runs(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    path = tmp_path / "figure.json"
    workers = [fork.Process(target=_add_runs, args=(path, name)) for name in ("planar", "NICE")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    expected = {(name, k) for name in ("planar", "NICE") for k in range(20)}
    runs = Results(path, SETTINGS).runs
    assert {(run["kind"], run["K"]) for run in runs} == expected
    assert len(runs) == len(expected)


def test_a_write_that_is_cut_off_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "figure.json"
    kept = Results(path, SETTINGS)
    kept.add({"K": 2}, {"kl": 0.25})
    before = path.read_bytes()

    def cut_off(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results.os, "replace", cut_off)
        with pytest.raises(KeyboardInterrupt):
            kept.add({"K": 8}, {"kl": 0.03})
    assert path.read_bytes() == before
    kept.add({"K": 8}, {"kl": 0.03})  # the lock was given back
    assert [run["K"] for run in Results(path, SETTINGS).runs] == [2, 8]


def test_what_is_no_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "figure.json"
    kept = Results(path, SETTINGS)
    with pytest.raises(TypeError, match="Tensor"):
        kept.add({"K": 8}, {"kl": torch.tensor(0.03)})
    with pytest.raises(TypeError, match="Tensor"):
        kept.write(best=torch.tensor(0.03))
    assert not path.exists()
    kept.add({"K": 2}, {"kl": 0.25})
    assert Results(path, SETTINGS).runs == [{"K": 2, "machine": machine(), "kl": 0.25}]


def test_only_the_file_is_left_beside_what_git_ignores(tmp_path: Path) -> None:
    Results(tmp_path / "figure.json", SETTINGS).add({"K": 2}, {"kl": 0.25})
    left = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    ignored = {name for name in left if name.endswith(".partial")}
    assert left - ignored == {"figure.json"}
    assert not any(name.endswith("json.partial") for name in ignored)


def test_checkpoints_have_their_folder(tmp_path: Path) -> None:
    for _ in range(2):
        folder = checkpoint_folder(Options(tmp_path / "out"), "mnist")
        assert folder == tmp_path / "out" / "checkpoints" / "mnist"
        assert folder.is_dir()
