"""Densities of small tables by held-out score: flows, Gaussians, their mixtures and kernels.

``python -m benchmarks.densities run``, in the folder tests, adds to
notebooks/results/densities.json what it lacks; ``table`` prints it. The tables are those that
scikit-learn brings along, so that nothing is fetched.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from sklearn import datasets
from sklearn.base import BaseEstimator
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, ShuffleSplit
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import pyroflow as pf
from pyroflow.flows.cells import few_valued

from . import tables
from .posteriordb.models import ROOT
from .records import choose, machine, read, write

OUT = ROOT / "notebooks" / "results" / "densities.json"
SPLITS = ShuffleSplit(5, test_size=0.2, random_state=0)
SHORT = {"steps": 250, "polish": 250}  # a quarter of the defaults, as the rows are few
FOLDS = 5  # of the training rows, for what a rival chooses
COVARIANCES = ("full", "tied", "diag", "spherical")
COMPONENTS = tuple(range(1, 9))
BANDWIDTHS = tuple(np.geomspace(0.1, 2.0, 40).round(3))  # in sds

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


def flow(kind: str) -> BaseEstimator:
    """One whose depth is found on a tenth of the rows that it is given."""
    return pf.FlowDensity(kind=kind, num_layers="auto", random_state=0, **SHORT)


def mixture() -> BaseEstimator:
    """Components and covariances by cross-validation."""
    grid = {"n_components": COMPONENTS, "covariance_type": COVARIANCES}
    return GridSearchCV(GaussianMixture(random_state=0), grid, cv=FOLDS)


def kernels() -> BaseEstimator:
    """Gaussian kernels, the bandwidth by cross-validation."""
    return GridSearchCV(KernelDensity(), {"bandwidth": BANDWIDTHS}, cv=FOLDS)


PLANAR = "planar"
WAYS: dict[str, Callable[[], BaseEstimator]] = {
    PLANAR: lambda: flow("planar"),
    "Sylvester": lambda: flow("sylvester"),
    "full Gaussian": GaussianMixture,
    "mixture": mixture,
    "kernels": kernels,
}
SETS: dict[str, Callable[..., Any]] = {
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "diabetes": lambda: datasets.load_diabetes(scaled=False),
    "breast cancer": datasets.load_breast_cancer,
}


def columns(name: str) -> tuple[np.ndarray, list[str]]:
    """The columns that have a density (N, D), and the names of those left out.

    These have few or often repeated values, in all rows or in the training rows of a split.
    """
    found = SETS[name]()
    rows = [np.arange(len(found.data)), *(train for train, _ in SPLITS.split(found.data))]
    left_out = [
        j
        for j, column in enumerate(torch.tensor(found.data).T)
        if any(few_valued(column[part]) for part in rows)
    ]
    return np.delete(found.data, left_out, 1), [str(found.feature_names[j]) for j in left_out]


def measure(way: str, data: np.ndarray, split: int) -> dict[str, Any]:
    """The mean log density of the test rows, standardised on the training rows, and what it is."""
    train, test = list(SPLITS.split(data))[split]
    start = time.perf_counter()
    density = make_pipeline(StandardScaler(), WAYS[way]()).fit(data[train])
    seconds = time.perf_counter() - start
    score = float(density.score_samples(data[test]).mean())
    return {"score": score, "chosen": chosen(density[-1]), "seconds": seconds}


def chosen(density: BaseEstimator) -> dict[str, Any]:
    """What an estimator found for itself."""
    if isinstance(density, pf.FlowDensity):
        return {"num_layers": density.fit_.num_layers}
    return getattr(density, "best_params_", {})


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="JSON file that is added to.")] = OUT,
    only: Annotated[str, typer.Option(help='Tables: "iris,wine".')] = "",
    ways: Annotated[str, typer.Option(help='Of density estimation: "planar,mixture".')] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Redo what is chosen.")] = False,
) -> None:
    """Fit and score; a rerun does what is missing."""
    torch.set_num_threads(1)
    found = read(out)
    found["machine"] = machine() | {"scikit-learn": version("scikit-learn")}
    for name in choose(only, tuple(SETS), "--only"):
        data, left_out = columns(name)
        part = found["results"].setdefault(name, {"ways": {}})
        part |= {"rows": len(data), "columns": data.shape[1], "left out": left_out}
        for way in choose(ways, tuple(WAYS), "--ways"):
            splits = part["ways"].setdefault(way, {})
            for split in (i for i in range(SPLITS.n_splits) if fresh or str(i) not in splits):
                splits[str(split)] = measure(way, data, split)
                write(found, out)
                typer.echo(f"{name}, {way}, split {split}: {splits[str(split)]}")
    typer.echo(markdown(read(out)))


@app.command()
def table(results: Annotated[Path, typer.Argument(help="What run has written.")] = OUT) -> None:
    """Print the Markdown table."""
    typer.echo(markdown(read(results)))


def markdown(stored: dict[str, Any]) -> str:
    """A row a table of data: each way's score, and planar's less that of the best other."""
    found = {name: _scores(part["ways"]) for name, part in stored["results"].items()}
    known = [way for way in WAYS if any(way in scores for scores in found.values())]
    rows = []
    for name, scores in found.items():
        part = stored["results"][name]
        row = {"data": name, "rows": str(part["rows"]), "columns": str(part["columns"])}
        row |= {way: _with_error(scores[way]) if way in scores else "–" for way in known}
        others = [way for way in scores if way != PLANAR]
        if others and PLANAR in scores:
            best = max(others, key=lambda way: mean(scores[way]))
            gains = [a - b for a, b in zip(scores[PLANAR], scores[best], strict=True)]
            seconds = [split["seconds"] for split in part["ways"][PLANAR].values()]
            row["planar less the best other"] = f"{_with_error(gains)} ({best})"
            row["seconds of planar"] = f"{mean(seconds):.0f}"
        rows.append(row)
    return tables.markdown(pd.DataFrame(rows).fillna("–")) if rows else "there are no results yet"


def _scores(ways: dict[str, Any]) -> dict[str, list[float]]:
    """Of the ways that have all splits, by split."""
    order = [str(split) for split in range(SPLITS.n_splits)]
    whole = {way: splits for way, splits in ways.items() if len(splits) == len(order)}
    return {way: [splits[i]["score"] for i in order] for way, splits in whole.items()}


def _with_error(values: list[float]) -> str:
    """The mean and its standard error over the splits."""
    return f"{mean(values):.2f} ± {stdev(values) / math.sqrt(len(values)):.2f}"


if __name__ == "__main__":
    app()
