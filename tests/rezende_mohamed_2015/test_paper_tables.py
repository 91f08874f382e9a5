"""The tables of the paper's experiments come from their files, cell by cell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rezende_mohamed_2015 import tables

SCORES = {"free_energy_se": 0.25, "kl": 5.0, "kl_se": 0.03, "nll_se": 0.24}


def scored(nll: float, seconds: float = 100.0, **columns: object) -> dict[str, object]:
    facts = {"parameters": 1234, "updates": 8000, "batch_size": 100, "seconds": seconds}
    facts |= {"draws": "static"}
    return facts | columns | {"free_energy": nll + 5, "nll": nll} | SCORES | facts


def cells(name: str, report: dict) -> list[list[str]]:
    return tables.frame(name, report).to_numpy().tolist()


def test_a_row_for_each_flow_in_the_order_of_the_paper() -> None:
    runs = [
        scored(88.125, 250.4, kind="NICE", K=40, seed=0),
        scored(89.0, kind="planar", K=10, seed=0),
        scored(90.0, kind="planar", K=0, seed=0),
    ]
    found = cells("mnist", {"runs": runs})
    assert [row[:2] for row in found] == [["planar", "0"], ["planar", "10"], ["NICE", "40"]]
    assert found[0][2:] == [
        "static",
        "95.00 ± 0.25",
        "5.00 ± 0.03",
        "90.00 ± 0.24",
        "–",
        "–",
        "96.75 / 6.83 / 89.90",
        "1,234",
        "1",
        "8000",
        "100",
        "100",
    ]
    assert found[1][8] == "93.55 / 6.04 / 87.50"
    assert found[2][8] == "93.00 / 5.69 / 87.30"
    assert found[2][-1] == "250"


def test_fresh_draws_stand_before_static_ones() -> None:
    """With what a mean hides: the largest of all seeds, and what more samples would say."""
    more = {"draws": "fresh", "batch_size": 200, "updates": 60_000, "nll_more": 84.5}
    runs = [
        scored(87.0, kind="planar", K=80, seed=0),
        scored(85.0, kind="planar", K=80, seed=0) | more | {"free_energy_largest": 512.4},
        scored(86.0, kind="planar", K=80, seed=1) | more | {"free_energy_largest": 301.0},
        scored(86.0, kind="NICE", K=10, seed=0) | {"draws": "fresh"},
    ]
    found = cells("mnist", {"runs": runs})
    told = [[row[2], row[5], row[6], row[7], *row[10:13]] for row in found]
    assert told == [
        ["fresh", "85.50 ± 0.24", "512", "84.50", "2", "60000", "200"],
        ["fresh", "86.00 ± 0.24", "–", "–", "1", "8000", "100"],
        ["static", "87.00 ± 0.24", "–", "–", "1", "8000", "100"],
    ]


def test_the_paper_s_numbers_stand_in_the_rows_of_their_lengths() -> None:
    """Table 2, and what can be read off Figure 4, to 0.05 nats."""
    runs = [scored(90.0, kind=kind, K=K, seed=0) for kind in ("planar", "NICE") for K in (20, 80)]
    assert [row[8] for row in cells("mnist", {"runs": runs})] == [
        "91.95 / 5.43 / 86.50",
        "89.60 / 4.43 / 85.10",
        "93.95 / 6.01 / 87.90",
        "92.85 / 5.56 / 87.20",
    ]


def test_seeds_are_one_row() -> None:
    runs = [scored(88.0 + s, 100 + s, kind="qr", M=8, L=5, seed=s) for s in (0, 1, 2)]
    planar = [scored(87.0, kind="planar", K=40, seed=0)]
    first, row = cells("sylvester", {"planar": planar, "runs": runs})
    assert first[:3] == ["planar", "1", "40"]
    assert row[:3] == ["qr", "8", "5"]
    assert row[6] == "89.00 ± 0.24"
    assert row[9] == "83.32 / 80.22"
    assert row[11:] == ["3", "8000", "100", "100–102"]


def test_cifar_stands_beside_table_3() -> None:
    runs = [scored(nll, kind="planar", K=2, seed=s) for s, nll in enumerate((0.0, 1.0))]
    ((*_, nll, theirs, _, seeds, _, _),) = cells("cifar", {"runs": runs})
    assert (nll, theirs, seeds) == ("0.50 ± 0.24", "-308.6", "2")


def test_a_quick_run_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "mnist.json").write_text(json.dumps({"settings": {"quick": True}, "runs": []}))
    with pytest.raises(ValueError, match=r"mnist\.json is of a --quick run"):
        tables.load("mnist", tmp_path)


def test_a_file_that_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "figure1.json").write_text("not json")
    with pytest.raises(ValueError, match="Expecting value"):
        tables.load("figure1", tmp_path)
