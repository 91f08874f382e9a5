"""The outputs that the notebooks hold: complete, and of today's code."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.])")
SECONDS = re.compile(r"[\d.]+ s\b|seconds +[\d.]+|<.* at 0x\w+>|\d+ steps")
RELATIVE, ABSOLUTE = 0.3, 0.05  # of numbers: other machines round otherwise

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def texts(cell: nbformat.NotebookNode) -> list[str]:
    """What a cell printed, without what depends on the machine's speed."""
    found = [out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell.outputs]
    return [SECONDS.sub("", line) for line in "".join(found).splitlines()]


def differences(stored: list[str], found: list[str]) -> list[str]:
    """Lines with other words, or with numbers beyond the tolerance."""
    if len(stored) != len(found):
        return [f"{len(stored)} lines, and now {len(found)}: {found}"]
    return [
        f"{then!r}, and now {now!r}"
        for then, now in zip(stored, found, strict=True)
        if NUMBER.sub("", then).split() != NUMBER.sub("", now).split() or not near(then, now)
    ]


def near(then: str, now: str) -> bool:
    found = [[float(n.replace(",", "")) for n in NUMBER.findall(t)] for t in (then, now)]
    return len(found[0]) == len(found[1]) and all(
        abs(a - b) <= ABSOLUTE + RELATIVE * max(abs(a), abs(b)) for a, b in zip(*found, strict=True)
    )


def test_differences_are_seen() -> None:
    line = "KL(p || q) = 0.0120 +/- 0.0005 nats of 10,000, k-hat -0.14"
    assert not differences([line], [line.replace("0.0120", "0.0131")])
    assert differences([line], [line.replace("0.0120", "0.1120")])
    assert differences([line], [line.replace("10,000", "1,000")])
    assert differences([line], [line.replace("-0.14", "0.14")])
    assert differences([line], [line.replace("nats", "bits")])
    assert differences([line], [line, line])


@each_notebook
def test_outputs_are_of_one_run_from_top_to_bottom(path: Path) -> None:
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [out for cell in cells for out in cell.outputs]
    assert {out.output_type for out in outputs} <= {"stream", "execute_result", "display_data"}
    assert not [out.text for out in outputs if out.get("name") == "stderr"]


@pytest.mark.slow
@each_notebook
def test_outputs_are_of_todays_code(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYROFLOW_QUICK", raising=False)
    stored = nbformat.read(path, as_version=4)
    now = copy.deepcopy(stored)
    place = {"metadata": {"path": str(path.parent)}}
    NotebookClient(now, timeout=1200, resources=place).execute()
    pairs = zip(stored.cells, now.cells, strict=True)
    cells = [(texts(a), texts(b)) for a, b in pairs if a.cell_type == "code"]
    found = [difference for pair in cells for difference in differences(*pair)]
    assert not found, "\n".join(["make notebooks stores them anew", *found])
