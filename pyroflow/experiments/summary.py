"""README's table of the paper's experiments, from the files that ``pyroflow reproduce`` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from pyroflow.experiments import figure3, mnist_drawing
from pyroflow.experiments.sylvester import THEIRS

HEAD = ("experiment", "paper", "pyroflow", "seeds", "updates", "seconds")
COMMANDS = {
    "figure1": "pyroflow reproduce figure1",
    "figure3": "pyroflow reproduce figure3",
    "mnist": "pyroflow reproduce mnist --data DIR",
    "sylvester": "pyroflow reproduce sylvester --data DIR",
}

Row = tuple[str, ...]


def tables(folder: Path) -> str:
    """A Markdown table for each experiment that has a file in the folder, its command above it.

    Args:
        folder: where ``pyroflow reproduce`` wrote; ``notebooks/results`` by default.

    Raises:
        OSError, ValueError: a file that cannot be read.
    """
    parts = []
    for name, command in COMMANDS.items():
        file = folder / f"{name}.json"
        if file.exists():
            report = json.loads(file.read_text())
            rows = [HEAD, ("---",) * len(HEAD), *ROWS[name](report)]
            lines = ["| " + " | ".join(row) + " |" for row in rows]
            where = "; ".join(sorted({run["machine"] for run in report["runs"].values()}))
            parts.append(f"`{command}` ({where})\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _figure1(report: Mapping[str, Any]) -> Iterator[Row]:
    seconds = f"{sum(run['seconds'] for run in report['runs'].values()):.0f}"
    worst = f"{report['worst_error']:.1e}"
    yield "Figure 1: worst error of ∫ q_K = 1, 12 panels", "a picture", worst, "1", "0", seconds


def _figure3(report: Mapping[str, Any]) -> Iterator[Row]:
    for number in figure3.ENERGIES:
        for kind in figure3.KINDS:
            cells = [report["summary"][f"U{number} {kind} K={K}"] for K in figure3.LENGTHS]
            prefix = f"U{number} {kind} "
            runs = [run for key, run in report["runs"].items() if key.startswith(prefix)]
            floor = f"; no NICE below {report['nice_floors'][f'U{number}']:.3f}"
            yield (
                f"Figure 3: KL of U{number}, {kind}, K = 2 / 8 / 32; median (range)",
                "a picture" + floor * kind.startswith("NICE"),
                " / ".join(f"{c['median']:.3f} ({c['low']:.3f}–{c['high']:.3f})" for c in cells),
                str(cells[0]["seeds"]),
                str(runs[0]["updates"]),
                _span([run["seconds"] for run in runs]),
            )


def _mnist(report: Mapping[str, Any]) -> Iterator[Row]:
    for kind, paper in mnist_drawing.PAPER.items():
        for place, K in enumerate(mnist_drawing.LENGTHS):
            runs = _runs(report, f"{kind} K={K} seed=")
            if runs:
                theirs = " / ".join(f"{paper[name][place]:.2f}" for name in mnist_drawing.NAMES)
                yield _scored(f"{kind}, K = {K}: −ELBO / KL / −ln p", theirs, runs)


def _sylvester(report: Mapping[str, Any]) -> Iterator[Row]:
    flows = dict.fromkeys(key.rpartition(" seed=")[0] for key in report["runs"])
    for flow in flows:
        theirs = f"stronger model: {THEIRS[flow.split()[0]]}"
        yield _scored(f"{flow}: −ELBO / KL / −ln p", theirs, _runs(report, f"{flow} seed="))


def _runs(report: Mapping[str, Any], prefix: str) -> list[Mapping[str, Any]]:
    return [run for key, run in report["runs"].items() if key.startswith(prefix)]


def _scored(name: str, paper: str, runs: list[Mapping[str, Any]]) -> Row:
    ours = (
        f"{median(run[part] for run in runs):.2f} ± {runs[0][f'{part}_se']:.2f}"
        for part in mnist_drawing.NAMES
    )
    seconds = _span([run["seconds"] for run in runs])
    return name, paper, " / ".join(ours), str(len(runs)), str(runs[0]["updates"]), seconds


def _span(seconds: list[float]) -> str:
    low, high = f"{min(seconds):.0f}", f"{max(seconds):.0f}"
    return low if low == high else f"{low}–{high}"


ROWS = {"figure1": _figure1, "figure3": _figure3, "mnist": _mnist, "sylvester": _sylvester}


if __name__ == "__main__":
    print(tables(Path("notebooks/results")))
