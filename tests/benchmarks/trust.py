"""Can a verdict be trusted? Small posteriors with exact answers, each judged against its answer.

``python -m benchmarks.trust run``, in the folder tests, adds to notebooks/results/trust.json what
it lacks; ``table`` prints it. An answer is wrong if a mean is off by more than 0.2 sd, or an sd
by more than 20 %.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import pandas as pd
import typer

from . import tables
from .known import TARGETS
from .posteriordb.models import ROOT
from .records import choose, machine, read, write
from .runs import (
    POSTERIOR,
    SYLVESTER,
    TRUSTED,
    WRONG,
    Record,
    alone,
    complete,
    missing,
    within,
    worst,
)

OUT = ROOT / "notebooks" / "results" / "trust.json"

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="JSON file that is added to.")] = OUT,
    only: Annotated[str, typer.Option(help='Targets: "modes,ring", parts of names.')] = "",
    guide: Annotated[str, typer.Option(help=f'"{SYLVESTER}" for fit_guide and diagnose.')] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each target: seeds 0, 1, ...")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    limit: Annotated[float, typer.Option(min=1, help="Seconds for one run.")] = 600.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Redo what is chosen.")] = False,
) -> None:
    """Run and judge; a rerun does what is missing in the JSON file."""
    if guide not in ("", SYLVESTER):
        raise typer.BadParameter(f"--guide must be {SYLVESTER}, or left out; got {guide!r}")
    names, way = choose(only, tuple(TARGETS), "--only"), guide or POSTERIOR
    alone()
    found = read(out)
    found["machine"] = machine()
    if fresh:
        for name in names:
            found["results"].get(way, {}).pop(name, None)
    runs = missing([way], names, seeds, found["results"])
    complete(runs, found["results"], jobs, limit, lambda: write(found, out), typer.echo)
    typer.echo(markdown(read(out)))


@app.command()
def table(results: Annotated[Path, typer.Argument(help="What run has written.")] = OUT) -> None:
    """Print the Markdown tables."""
    typer.echo(markdown(read(results)))


def markdown(stored: dict[str, Any]) -> str:
    """For each way: the verdicts, the two rates, and a row a target."""
    parts = []
    for way, found in stored["results"].items():
        found = {name: found[name] for name in TARGETS if name in found}
        records = [record for seeds in found.values() for record in seeds.values()]
        if records:
            parts += [f"`{way}`, {len(found)} targets, {len(records)} runs:", verdicts(records)]
            parts += ["\n".join(f"- {line}" for line in rates(records)), rows(found)]
    return "\n\n".join(parts) or "there are no results yet"


def is_right(record: Record) -> bool:
    """Whether all means and sds are as near as an answer must be."""
    return within(record, WRONG)


def level(record: Record) -> str:
    """The verdict of a run, or that it ended in an error."""
    return record.get("level") or "error"


def verdicts(records: list[Record]) -> str:
    """How many of each verdict are right and wrong."""
    counts = Counter((level(record), is_right(record)) for record in records)
    lines = [
        [name, str(counts[name, True]), str(counts[name, False])]
        for name in (*TRUSTED, "bad", "error")
    ]
    return tables.markdown(pd.DataFrame(lines, columns=["verdict", "right", "wrong"]))


def rates(records: list[Record]) -> list[str]:
    """The two rates, and the seconds."""
    trusted = [record for record in records if level(record) in TRUSTED]
    right = [record for record in records if is_right(record)]
    seconds = [record["seconds"] for record in records]
    return [
        _share("called good or usable, and wrong", [not is_right(r) for r in trusted]),
        _share("right, and called bad", [level(r) == "bad" for r in right]),
        f"seconds: median {median(seconds):.1f}, worst {max(seconds):.1f}",
    ]


def _share(label: str, marks: list[bool]) -> str:
    part = f" ({sum(marks) / len(marks):.1%})" if marks else ""
    return f"{label}: {sum(marks)} of {len(marks)}{part}"


def rows(found: dict[str, dict[str, Record]]) -> str:
    """A row a target: verdicts by seed, worst errors, median seconds."""
    lines = []
    for name, seeds in found.items():
        records = [seeds[seed] for seed in sorted(seeds, key=int)]
        wrong = sum(not is_right(record) for record in records)
        lines.append(
            [
                name,
                TARGETS[name].kind,
                ", ".join(level(record) for record in records),
                *worst(records),
                f"{median(record['seconds'] for record in records):.1f}",
                f"{wrong} of {len(records)}" if wrong else "–",
            ]
        )
    columns = ["target", "kind", "verdicts", "mean, sds", "sd", "seconds", "wrong"]
    return tables.markdown(pd.DataFrame(lines, columns=columns))


if __name__ == "__main__":
    app()
