"""README's table of the paper's experiments comes from their files, cell by cell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rezende_mohamed_2015 import summary

ROOT = Path(__file__).resolve().parents[2]
MACHINE = "abacus, 2 cores, 1 thread"


def scored(nll: float, seconds: float = 100.0) -> dict[str, float]:
    errors = {"free_energy_se": 0.25, "kl_se": 0.03, "nll_se": 0.24}
    return {
        "free_energy": nll + 5,
        "kl": 5.0,
        "nll": nll,
        "updates": 8000,
        "seconds": seconds,
        "machine": MACHINE,
        **errors,
    }


def rows(folder: Path) -> list[list[str]]:
    lines = summary.tables(folder).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]


def test_readme_has_the_tables_of_the_files_beside_it() -> None:
    text = summary.tables(ROOT / "notebooks" / "results")
    for name, command in summary.COMMANDS.items():
        assert f"`{command}`" in text, name
    assert text in (ROOT / "README.md").read_text()


def test_a_row_for_each_flow(tmp_path: Path) -> None:
    runs = {"planar K=0 seed=0": scored(90.0), "NICE K=40 seed=0": scored(88.125, 250.4)}
    (tmp_path / "mnist.json").write_text(json.dumps({"settings": {}, "runs": runs}))
    head, _, first, second = rows(tmp_path)
    assert head == list(summary.HEAD)
    assert first[1:3] == ["96.75 / 6.83 / 89.90", "95.00 ± 0.25 / 5.00 ± 0.03 / 90.00 ± 0.24"]
    assert first[3:] == ["1", "8000", "100"]
    assert second[0] == "NICE, K = 40: −ELBO / KL / −ln p"
    assert second[1] == "93.00 / 5.69 / 87.30"
    assert second[-1] == "250"


def test_seeds_are_one_row(tmp_path: Path) -> None:
    runs = {f"qr M=8 L=5 seed={s}": scored(88.0 + s, 100 + s) for s in (0, 1, 2)}
    (tmp_path / "sylvester.json").write_text(json.dumps({"settings": {}, "runs": runs}))
    *_, row = rows(tmp_path)
    assert row[0].startswith("qr M=8 L=5")
    assert row[1] == "stronger model: 83.32 / 80.22"
    assert row[2].endswith("89.00 ± 0.24")
    assert row[3:] == ["3", "8000", "100–102"]


def test_the_command_and_the_machine_stand_above(tmp_path: Path) -> None:
    runs = {"qr M=8 L=5 seed=0": scored(88.0), "qr M=8 L=5 seed=1": scored(88.0)}
    runs["qr M=8 L=5 seed=1"]["machine"] = "slide rule"
    (tmp_path / "sylvester.json").write_text(json.dumps({"settings": {}, "runs": runs}))
    first = summary.tables(tmp_path).splitlines()[0]
    assert first == f"`python -m rezende_mohamed_2015 sylvester --data DIR` ({MACHINE}; slide rule)"


def test_a_quick_run_is_no_row(tmp_path: Path) -> None:
    report = {"settings": {"quick": True}, "runs": {"planar K=0 seed=0": scored(90.0)}}
    (tmp_path / "mnist.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"mnist\.json is of a --quick run"):
        summary.tables(tmp_path)


def test_figure3_may_be_unfinished(tmp_path: Path) -> None:
    run = {"machine": MACHINE, "updates": 3000, "seconds": 14.4}
    cell = {"seeds": 2, "median": 0.25, "low": 0.2, "high": 0.3}
    report = {
        "settings": {},
        "nice_floors": {"U1": 0.009},
        "summary": {"U1 NICE orthogonal K=8": cell},
        "runs": {f"U1 NICE orthogonal K=8 seed={seed}": run for seed in (0, 1)},
    }
    (tmp_path / "figure3.json").write_text(json.dumps(report))
    *_, row = rows(tmp_path)
    assert row[1:] == [
        "a picture; no NICE below 0.009",
        "– / 0.250 (0.200–0.300) / –",
        "2",
        "3000",
        "14",
    ]


def test_no_files_no_tables(tmp_path: Path) -> None:
    assert summary.tables(tmp_path) == ""


def test_a_file_that_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "figure1.json").write_text("not json")
    with pytest.raises(ValueError, match="Expecting value"):
        summary.tables(tmp_path)
