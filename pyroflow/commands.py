"""What the commands of the shell do: tables in, flows in files, tables and figures out."""

from __future__ import annotations

import csv
import io
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pyroflow import plots
from pyroflow.datasets.tables import TEXT, read_named
from pyroflow.distribution import VERSION
from pyroflow.flows import Flow, make_flow
from pyroflow.frames import column_names, listed, named
from pyroflow.inference import fit_density
from pyroflow.io import read_data, write_whole
from pyroflow.plots.compared import MOST
from pyroflow.plots.drawing import save_figure
from pyroflow.saving import load, save
from pyroflow.seeds import seeded

PIPE = Path("-")
TABLES, FIGURES = (*TEXT, ".parquet", ".npy"), (".png", ".pdf", ".svg")
DRAWN = 10_000  # samples behind a figure
Report = dict[str, Any]


class Source(NamedTuple):
    """A table, or standard input, and how to read it; None where that is found out."""

    path: Path
    columns: str | None
    header: bool | None
    delimiter: str | None
    decimal: str | None

    def read(self, own: Sequence[str] | None = None) -> pd.DataFrame | Tensor:
        """The numbers in float64: a frame if the columns have names, else a tensor.

        ``own`` are the columns of a flow, which are taken of a table that has names.

        Raises:
            ValueError: If a number is missing, or the table cannot be read.
        """
        path, content = self.path, None
        if path == PIPE:
            path, content = Path("standard input"), sys.stdin.buffer.read()
        elif not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        chosen = partial(_chosen, path, self.columns, own)
        marks = (self.header, self.delimiter, self.decimal)
        numbers, names = read_named(path, chosen, torch.float64, *marks, content)
        gaps = {j: column.isnan() for j, column in enumerate(numbers.T)}
        if missing := {j: gap for j, gap in gaps.items() if gap.any()}:
            found = ", ".join(
                f"{named(j, names)} ({int(gap.sum())}, the first in row {int(gap.int().argmax())})"
                for j, gap in missing.items()
            )
            raise ValueError(
                f"{path} has missing values in {found}, rows counted from 0: take these rows out, "
                "fill them in, or choose other --columns"
            )
        return numbers if names is None else pd.DataFrame(numbers.numpy(), columns=list(names))


def target(out: Path, force: bool, endings: Sequence[str] | None = None) -> None:
    """Refuse, before any work, a file that may not or cannot be written."""
    if out == PIPE and endings == TABLES:
        return
    if endings is not None and out.suffix.lower() not in endings:
        raise typer.BadParameter(f"--out must end in one of {', '.join(endings)}, got {out}")
    if not out.parent.is_dir():
        raise typer.BadParameter(f"--out {out} is in a folder that does not exist: make it first")
    if out.is_dir() or (out.exists() and not force):
        raise typer.BadParameter(f"--out {out} exists: name another file, or give --force")


def write_table(frame: pd.DataFrame, out: Path, names: bool, **marks: str) -> None:
    """Write a table whole, in the format of the file's ending, or as CSV to standard output."""
    ending, buffer = out.suffix.lower(), io.BytesIO()
    if ending == ".npy":
        np.save(buffer, frame.to_numpy())
    elif ending == ".parquet":
        frame.rename(columns=str).to_parquet(buffer, index=False)
    else:
        marks = ({"sep": "\t"} if ending == ".tsv" else {}) | marks
        text = frame.to_csv(index=False, header=names, lineterminator="\n", **marks)
        if out == PIPE:
            typer.echo(text, nl=False)
            return
        buffer.write(text.encode())
    write_whole(out, buffer.getvalue())


def fit(
    source: Source,
    out: Path,
    kind: str,
    form: Mapping[str, Any],
    support: Sequence[str],
    double: bool,
    options: Mapping[str, Any],
) -> Report:
    """Fit a flow to a table by maximum likelihood, and save it.

    The form is what :func:`~pyroflow.flows.families.make_flow` takes; a support is as in
    "share=0,1"; the options are those of :func:`~pyroflow.fit_density`.
    """
    table = source.read()
    width, names = table.shape[1], column_names(table)
    bounds = dict(_bounds(text, names) for text in support)
    if len(bounds) < len(support):
        raise typer.BadParameter(f"--support names a column twice, got {listed(support)}")
    try:
        flow = make_flow(kind, width, **form, support=bounds or None)
        if flow.outer_support is not None:
            flow.outer_support.placed(names)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    result = fit_density(flow.double() if double else flow, table, **options)
    save(flow, out)
    return {
        "file": str(out),
        "kind": kind,
        "columns": names,
        "rows": len(table),
        "parameters": sum(p.numel() for p in flow.parameters()),
        "held_out_nats": result.best_loss,
        "steps": result.steps,
        "stopped": result.stopped,
        "seconds": round(result.seconds, 2),
    }


def load_flow(path: Path) -> Flow:
    """A flow of a file, without a context."""
    flow = load(path)
    if not isinstance(flow, Flow):
        raise ValueError(
            f"{path} holds a guide, {type(flow).__name__}: this command is for flows; 'pyroflow "
            "info' shows a guide, and pyroflow.load opens it in Python"
        )
    if flow.conditional:
        raise ValueError(f"{path} holds a conditional flow: give it a context in Python")
    return flow


def sample(path: Path, num: int, seed: int | None) -> tuple[pd.DataFrame, bool]:
    """Draws of a flow, and whether its columns have names."""
    flow = load_flow(path)
    draws = flow.sample(num, seed=seed)
    return pd.DataFrame(draws), flow.columns is not None


def score(path: Path, source: Source) -> pd.DataFrame:
    """The log density of each row of a table."""
    flow = load_flow(path)
    found = flow.log_prob(source.read(flow.columns))
    return pd.DataFrame({"log_prob": found.numpy()})


def plot(path: Path, source: Source, out: Path, seed: int | None) -> Report:
    """Draw data beside samples of a flow, for some of its columns if the source has their names."""
    flow, asked = load_flow(path), _cells(source.columns or "")
    some = bool(asked) and set(asked) <= set(flow.columns or ())
    table = (source._replace(columns=None) if some else source).read(flow.columns)
    names = flow.columns or column_names(table) or tuple(map(str, range(flow.input_dim)))
    shown = asked if some else list(names[:MOST])
    with seeded(seed):
        columns = [names.index(name) for name in shown]
        figure = plots.plot_pairs(flow, table, columns=columns, num_samples=DRAWN)
    save_figure(figure, out)
    return {"file": str(out), "rows": len(table), "samples": DRAWN, "columns": shown}


def info(path: Path) -> Report:
    """What is in a file of :func:`~pyroflow.save`."""
    held = load(path)  # refuses what is damaged
    file = read_data(path)
    report = {"file": str(path), "kind": file["kind"], "class": type(held).__name__}
    report |= _of_flow(held, file["content"]) if isinstance(held, Flow) else {}
    if not isinstance(held, Flow):
        sites = file["content"]["sites"]
        report["sites"] = {s["name"]: s["batch_shape"] + s["event_shape"] for s in sites}
    return report | {
        "parameters": sum(p.numel() for p in held.parameters()),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in held.parameters()}),
        "written_by": f"pyroflow {file['pyroflow']}",
        "format": file["format"],
        "read_by": {"pyroflow": VERSION} | {name: version(name) for name in ("torch", "pyro-ppl")},
    }


def _of_flow(flow: Flow, content: Mapping[str, Any]) -> Report:
    parts = content["parts"]["arguments"]["transforms"]
    parts = tree_map_only(Tensor, Tensor.tolist, parts)
    support = flow.outer_support
    return {
        "dimensions": flow.input_dim,
        "columns": flow.columns,
        "context_columns": flow.context_columns,
        "conditional": flow.conditional,
        "layers": [part for part in parts if part["kind"] != "pyroflow.Support"],
        "support": None if support is None else [list(bounds) for bounds in support.bounds],
        "fitted": flow.fitted,
    }


def _cells(line: str) -> list[str]:
    """The cells of a line of CSV."""
    return next(csv.reader([line], skipinitialspace=True), [])


def _chosen(
    path: Path, given: str | None, own: Sequence[str] | None, names: list[str] | None
) -> list[int | str] | None:
    """The columns to read of a table with these names, or with none."""
    if given is None:
        if own is None or names is None:
            return None
        if missing := [name for name in own if name not in names]:
            raise ValueError(f"{path} has no column {listed(missing)}, which the flow is of")
        if others := [name for name in names if name not in own]:
            warnings.warn(f"{path}: columns {listed(others)} are not the flow's", stacklevel=2)
        return list(own)
    asked = _cells(given)
    if names is None:
        if not all(column.isdecimal() for column in asked):
            raise typer.BadParameter(
                f"--columns expects positions from 0, as {path} has no names, got {listed(asked)}"
            )
        return [int(column) for column in asked]
    if wrong := [column for column in asked if column not in names]:
        raise typer.BadParameter(
            f"--columns: {path} has no {listed(wrong)}; its columns are {listed(names)}"
        )
    return asked


def _bounds(text: str, names: Sequence[str] | None) -> tuple[int | str, Any]:
    """A column and its support, from "share=0,1" or "bmi=positive"."""
    column, _, bound = text.rpartition("=")
    known = "a column's position from 0" if names is None else "a column's name"
    try:
        at = int(column) if names is None else column
        bounds = bound if bound == "positive" else tuple(map(float, bound.split(",")))
        if not column:
            raise ValueError
    except ValueError:
        raise typer.BadParameter(
            f"--support expects {known} and bounds, as in 'x=positive' or 'x=0,1', got {text!r}"
        ) from None
    return at, bounds


def lines(report: Mapping[str, Any]) -> list[str]:
    """What :func:`info` found, in words."""
    found = []
    for name, value in report.items():
        if name == "layers":
            value = [_called(part) for part in value]
        elif name == "support" and value is not None:
            value = [f"({low:g}, {high:g})" for low, high in value]
        elif isinstance(value, Mapping):
            value = [f"{key} {part}" for key, part in value.items()]
        if isinstance(value, list | tuple):
            value = ", ".join(map(str, value))
        if value is not None:
            found.append(f"{name.replace('_', ' ')}: {value}")
    return found


def _called(part: Mapping[str, Any]) -> str:
    """A described transform as a call."""
    if "arguments" not in part:
        return str(part)
    inner = (
        f"{k}={_called(v) if isinstance(v, dict) else v}" for k, v in part["arguments"].items()
    )
    return f"{part['kind'].rpartition('.')[2]}({', '.join(inner)})"
