"""What a device gives, beside others: values, steps, fits, speed, memory, and the tests of devices.

``python -m benchmarks.device run``, in the folder tests, adds to notebooks/results/device.json what
it finds on the GPU if there is one, else on the CPU; ``table`` prints it. Each part has a process
of its own, which is stopped when its time is over; what it has found by then is kept.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from .. import tables
from ..posteriordb.models import ROOT
from ..records import choose, machine, read, write
from .fits import by_default, fits, steps
from .parts import Part, Record, measured
from .speed import speed
from .suite import suite
from .values import values

OUT = ROOT / "notebooks" / "results" / "device.json"
LEFT_OUT = ("log", "took, s")  # of the table

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


# Each with the seconds that it may take, a start included.
PARTS: dict[str, tuple[Part, float]] = {
    "values": (values, 45.0),
    "steps": (steps, 95.0),
    "speed": (speed, 80.0),
    "by default": (by_default, 60.0),
    "tests": (suite, 120.0),
    "fits": (fits, 190.0),
}


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="JSON file that is added to.")] = OUT,
    device: Annotated[str, typer.Option(help="As torch names it.")] = "",
    only: Annotated[str, typer.Option(help='Parts: "values,speed".')] = "",
    most: Annotated[float, typer.Option(help="Seconds for all parts.")] = math.inf,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes and few steps.")] = False,
) -> None:
    """Measure the parts, each anew, for as long as there is time."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    stored, end = read(out), time.monotonic() + most
    here = stored["results"].setdefault(label(device), {})
    here["machine"] = machine() | {"python": sys.version.split()[0]}
    for name in choose(only, tuple(PARTS), "--only"):
        part, limit = PARTS[name]
        here[name] = {}
        for case, record in measured(
            part, device, quick, min(limit, max(0.0, end - time.monotonic()))
        ):
            here[name][case] = record
            write(stored, out)
            typer.echo(f"{name}: {case}: {brief(record)}")
    typer.echo(markdown(stored))


@app.command()
def table(results: Annotated[Path, typer.Argument(help="What run has written.")] = OUT) -> None:
    """Print the Markdown table."""
    typer.echo(markdown(read(results)))


def label(device: str) -> str:
    """What a column is called."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def brief(record: Record) -> str:
    """One line of a record; of an error, the last of its lines."""
    if "error" in record:
        return record["error"].strip().splitlines()[-1]
    return ", ".join(f"{key} {text(value)}" for key, value in record.items() if key != "log")


def text(value: Any) -> str:
    """A number with three digits, or what else it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(stored: dict[str, Any]) -> str:
    """A row for each number that was measured, a column for each device."""
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for device, parts in stored["results"].items():
        for part, cases in parts.items():
            for case, record in cases.items() if part != "machine" else ():
                said = {"": brief(record)} if "error" in record else record
                for key in (key for key in said if key not in LEFT_OUT):
                    cells.setdefault((part, case, key), {})[device] = text(said[key])
    columns = ["part", "case", "", *stored["results"]]
    rows = [[*at, *(found.get(d, "–") for d in columns[3:])] for at, found in cells.items()]
    return (
        tables.markdown(pd.DataFrame(rows, columns=columns)) if rows else "there are no results yet"
    )


if __name__ == "__main__":
    app()
