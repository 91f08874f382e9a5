"""Every table of the experiments, from their reports: of the screen, the notebook, the docs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from rezende_mohamed_2015 import cifar, figure1, figure3, sylvester
from rezende_mohamed_2015.mnist_drawing import LENGTHS, by_draws
from rezende_mohamed_2015.mnist_drawing import PAPER as MNIST

Report = Mapping[str, Any]

SCORES = {"free_energy": "−ELBO", "kl": "KL", "nll": "−ln p"}
NOTHING = "–"


def load(name: str, folder: Path) -> dict[str, Any]:
    """The report of an experiment as its JSON file has it.

    Args:
        name: Of the experiment.
        folder: Where it wrote.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is no JSON, or of a quick run.
    """
    file = folder / f"{name}.json"
    report = json.loads(file.read_text(encoding="utf-8"))
    if report["settings"].get("quick"):
        raise ValueError(f"{file} is of a --quick run, whose numbers mean nothing")
    if name == "sylvester":
        report["planar"] = sylvester.planar(folder / "mnist.json", report["settings"])
    return report


def frame(name: str, report: Report) -> pd.DataFrame:
    """The table of an experiment, with cells of text."""
    return TABLES[name](report).astype(str)


def span(values: Iterable[float]) -> str:
    """The least and the largest number, rounded; one number if they are the same, or a dash."""
    ends = [f"{value:.0f}" for value in sorted(values)]
    return "–".join(dict.fromkeys([*ends[:1], *ends[-1:]])) or NOTHING


def _figure1(report: Report) -> pd.DataFrame:
    runs = pd.DataFrame(report["runs"]).set_index(["base", "kind", "K"])
    rows = []
    for base in figure1.BASES:
        for kind in figure1.LAYERS:
            found = {K: runs.integral.get((base, kind, K)) for K in figure1.LENGTHS}
            cells = {f"K = {K}": _number(value, 5) for K, value in found.items()}
            seconds = sum(runs.seconds.get((base, kind, K), 0.0) for K in figure1.LENGTHS)
            name = {"∫ q_K(z) dz": f"{base} {kind}"}
            rows.append(name | cells | {"seconds": f"{seconds:.1f}"})
    return pd.DataFrame(rows)


def _figure3(report: Report) -> pd.DataFrame:
    cells = figure3.summarise(report["runs"]).set_index(figure3.CELL)
    rows = []
    for name in figure3.ENERGIES:
        for K, reference in zip(figure3.LENGTHS, figure3.REFERENCE[name], strict=True):
            found = {kind: cells.T.get((name, kind, K)) for kind in figure3.KINDS}
            done = [cell for cell in found.values() if cell is not None]
            best = None if found["planar"] is None else found["planar"].best_of_three
            rows.append(
                {"KL, nats": f"{name}, K = {K}", "a plain recipe": f"{reference:.3f}"}
                | {"planar, best of 3": _number(best, 4)}
                | {kind: _range(cell) for kind, cell in found.items()}
                | {"no NICE below": f"{report['nice_floors'][name]:.3f}"}
                | {"seeds": span(cell.seeds for cell in done)}
                | {"seconds": span(t for cell in done for t in (cell.fastest, cell.slowest))}
            )
    return pd.DataFrame(rows)


def _range(cell: pd.Series | None) -> str:
    if cell is None:
        return NOTHING
    return f"{cell['median']:.3f} ({cell.low:.3f}–{cell.high:.3f})"


def _mnist(report: Report) -> pd.DataFrame:
    theirs = {
        (kind, K): " / ".join(f"{paper[score][place]:.2f}" for score in SCORES)
        for kind, paper in MNIST.items()
        for place, K in enumerate(LENGTHS)
    }
    kinds = list(MNIST)
    runs = sorted(report["runs"], key=lambda run: (kinds.index(run["kind"]), run["K"]))
    return _of_draws(runs, ["kind", "K"], theirs, "the paper")


def _mnist_validation(report: Report) -> pd.DataFrame:
    table = _of_draws(report["runs"], ["kind", "K"], {}, "")
    return table.drop(columns=["", "−ln p, S = 5,000"])


def _cifar(report: Report) -> pd.DataFrame:
    theirs = {("planar", K): f"{nll:.1f}" for K, nll in cifar.PAPER.items()}
    runs = sorted(report["runs"], key=lambda run: run["K"])
    return _scored(runs, ["kind", "K"], theirs, "the paper: −ln p")


def _sylvester(report: Report) -> pd.DataFrame:
    runs = [{"M": 1, "L": run.get("K")} | run for run in [*report["planar"], *report["runs"]]]
    theirs = {(run["kind"], run["M"], run["L"]): sylvester.THEIRS[run["kind"]] for run in runs}
    whose = "2018, a stronger model: −ELBO / −ln p"
    return _of_draws(runs, ["kind", "M", "L"], theirs, whose)


def _of_draws(
    runs: Iterable[Report], columns: list[str], theirs: Mapping[tuple, str], whose: str
) -> pd.DataFrame:
    """The rows of flows on fresh draws of the training images, then of those on static ones."""
    tables = []
    for draws, some in by_draws(list(runs)).items():
        table = _scored(some, columns, theirs, whose)
        groups = [found for _, found in pd.DataFrame(some).groupby(columns, sort=False)]
        table.insert(len(columns), "draws", draws)
        place = table.columns.get_loc("−ln p") + 1
        more = [_number(_column(found, "nll_more").mean(), 2) for found in groups]
        table.insert(place, "−ln p, S = 5,000", more)
        largest = [_number(_column(found, "free_energy_largest").max(), 0) for found in groups]
        table.insert(place, "largest −ELBO", largest)
        batch = [found.batch_size.iloc[0] for found in groups]
        table.insert(table.columns.get_loc("updates") + 1, "batch", batch)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _column(found: pd.DataFrame, name: str) -> pd.Series:
    """A column that not all runs have, or none."""
    return found[name] if name in found else pd.Series(dtype=float)


def _scored(
    runs: Iterable[Report], columns: list[str], theirs: Mapping[tuple, str], whose: str
) -> pd.DataFrame:
    """A row for each flow: means over its seeds, ± one standard error over the test images."""
    rows = []
    for flow, found in pd.DataFrame(runs).groupby(columns, sort=False):
        ours = {
            label: f"{found[score].mean():.2f} ± {found[f'{score}_se'].iloc[0]:.2f}"
            for score, label in SCORES.items()
        }
        rows.append(
            dict(zip(columns, flow, strict=True))
            | ours
            | {whose: theirs.get(flow, NOTHING), "parameters": f"{found.parameters.iloc[0]:,}"}
            | {"seeds": len(found), "updates": found.updates.iloc[0]}
            | {"seconds": span(found.seconds)}
        )
    return pd.DataFrame(rows)


def _mnist_speed(report: Report) -> pd.DataFrame:
    rows = []
    for run in report["runs"]:
        low, high = run["ratio_range"]
        times = {f"{name}, ms": f"{t:.2f}" for name, t in run["milliseconds"].items()}
        rows.append(
            {"an update, K = 40": f"{run['hidden']} hidden units"}
            | times
            | {"Pyro / pyroflow": f"{run['ratio']:.2f} ({low:.2f}–{high:.2f})"}
            | {"of the layers alone": f"{run['ratio_of_the_layers']:.1f}"}
            | {"updates": run["updates"], "seconds": f"{run['seconds']:.0f}"}
        )
    return pd.DataFrame(rows)


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None or pd.isna(value) else f"{value:.{digits}f}"


TABLES: dict[str, Callable[[Report], pd.DataFrame]] = {
    "figure1": _figure1,
    "figure3": _figure3,
    "mnist": _mnist,
    "mnist_validation": _mnist_validation,
    "mnist_speed": _mnist_speed,
    "sylvester": _sylvester,
    "cifar": _cifar,
}
