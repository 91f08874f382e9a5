"""The tables of the paper's experiments, from the files that they wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from rezende_mohamed_2015 import figure3, mnist_drawing
from rezende_mohamed_2015.sylvester import THEIRS

HEAD = ("experiment", "paper", "pyroflow", "seeds", "updates", "seconds")
COMMANDS = {
    "figure1": "python -m rezende_mohamed_2015 figure1",
    "figure3": "python -m rezende_mohamed_2015 figure3",
    "mnist": "python -m rezende_mohamed_2015 mnist --data DIR",
    "mnist_speed": "python -m rezende_mohamed_2015 mnist_speed",
    "sylvester": "python -m rezende_mohamed_2015 sylvester --data DIR",
}
NOTHING = "–"

Row = tuple[str, ...]


def tables(folder: Path) -> str:
    """A Markdown table for each experiment that has a file in the folder, its command above it.

    Args:
        folder: where they wrote, ``results`` by default.

    Raises:
        OSError, ValueError: a file that cannot be read, or one of a quick run.
    """
    parts = []
    for name, command in COMMANDS.items():
        file = folder / f"{name}.json"
        if file.exists():
            report = json.loads(file.read_text())
            if report["settings"].get("quick"):
                raise ValueError(f"{file} is of a --quick run, whose numbers mean nothing")
            rows = [HEAD, ("---",) * len(HEAD), *ROWS[name](report)]
            lines = ["| " + " | ".join(row) + " |" for row in rows]
            where = "; ".join(sorted({run["machine"] for run in report["runs"].values()}))
            parts.append(f"`{command}` ({where})\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _figure1(report: Mapping[str, Any]) -> Iterator[Row]:
    seconds = f"{sum(run['seconds'] for run in report['runs'].values()):.0f}"
    worst = f"{report['worst_error']:.1e}"
    name = f"Figure 1: worst error of ∫ q_K = 1 over {len(report['runs'])} panels"
    yield name, "a picture", worst, "1", NOTHING, seconds


def _figure3(report: Mapping[str, Any]) -> Iterator[Row]:
    for number in figure3.ENERGIES:
        for kind in figure3.KINDS:
            runs = _runs(report, f"U{number} {kind} K=")
            cells = [report["summary"].get(f"U{number} {kind} K={K}") for K in figure3.LENGTHS]
            if runs:
                floor = f"; no NICE below {report['nice_floors'][f'U{number}']:.3f}"
                yield (
                    f"Figure 3: KL of U{number}, {kind}, K = 2 / 8 / 32: median (range)",
                    "a picture" + floor * kind.startswith("NICE"),
                    " / ".join(map(_cell, cells)),
                    _span([cell["seeds"] for cell in cells if cell]),
                    str(runs[0]["updates"]),
                    _span([run["seconds"] for run in runs]),
                )


def _cell(cell: Mapping[str, Any] | None) -> str:
    return f"{cell['median']:.3f} ({cell['low']:.3f}–{cell['high']:.3f})" if cell else NOTHING


def _mnist(report: Mapping[str, Any]) -> Iterator[Row]:
    for kind, paper in mnist_drawing.PAPER.items():
        for place, K in enumerate(mnist_drawing.LENGTHS):
            runs = _runs(report, f"{kind} K={K} seed=")
            if runs:
                theirs = " / ".join(f"{paper[name][place]:.2f}" for name in mnist_drawing.NAMES)
                yield _scored(f"{kind}, K = {K}: −ELBO / KL / −ln p", theirs, runs)


def _mnist_speed(report: Mapping[str, Any]) -> Iterator[Row]:
    for units, run in report["runs"].items():
        low, high = run["ratio_range"]
        ours = f"{run['ratio']:.2f} ({low:.2f}–{high:.2f})"
        ours += f"; of the layers alone {run['ratio_of_the_layers']:.1f}"
        name = f"An update, planar K = 40, {units}: Pyro's chain / ours"
        yield name, NOTHING, ours, NOTHING, str(run["updates"]), f"{run['seconds']:.0f}"


def _sylvester(report: Mapping[str, Any]) -> Iterator[Row]:
    flows = dict.fromkeys(key.rpartition(" seed=")[0] for key in report["runs"])
    for flow in flows:
        theirs = f"stronger model: {THEIRS[flow.split()[0]]}"
        yield _scored(f"{flow}: −ELBO / KL / −ln p", theirs, _runs(report, f"{flow} seed="))


def _runs(report: Mapping[str, Any], prefix: str) -> list[Mapping[str, Any]]:
    return [run for key, run in report["runs"].items() if key.startswith(prefix)]


def _scored(name: str, paper: str, runs: list[Mapping[str, Any]]) -> Row:
    ours = (
        f"{mean(run[part] for run in runs):.2f} ± {runs[0][f'{part}_se']:.2f}"
        for part in mnist_drawing.NAMES
    )
    seconds = _span([run["seconds"] for run in runs])
    return name, paper, " / ".join(ours), str(len(runs)), str(runs[0]["updates"]), seconds


def _span(seconds: list[float]) -> str:
    low, high = f"{min(seconds):.0f}", f"{max(seconds):.0f}"
    return low if low == high else f"{low}–{high}"


ROWS = {
    "figure1": _figure1,
    "figure3": _figure3,
    "mnist": _mnist,
    "mnist_speed": _mnist_speed,
    "sylvester": _sylvester,
}


if __name__ == "__main__":
    print(tables(Path("results")))
