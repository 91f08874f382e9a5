"""The posteriors that people bring, in one call: posteriordb's ten, eleven hierarchies, and eight.

``python -m benchmarks.posteriors run``, in the folder tests, adds to
notebooks/results/posteriors.json what it lacks; ``table`` prints it.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Annotated, Any

import pandas as pd
import typer

from . import effective, tables
from .numpyro_nuts.remote import Numpyro
from .posteriordb.models import ROOT
from .problems import POSTERIORS
from .records import choose, machine, read, write
from .remote import connect
from .runs import (
    NUMPYRO,
    POSTERIOR,
    RIGHT,
    TRUSTED,
    WAYS,
    WRONG,
    Record,
    alone,
    complete,
    missing,
    within,
    worst,
)

OUT = ROOT / "notebooks" / "results" / "posteriors.json"

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="JSON file that is added to.")] = OUT,
    only: Annotated[str, typer.Option(help='Posteriors: "radon,garch", parts of names.')] = "",
    ways: Annotated[str, typer.Option(help=f"Of {', '.join(WAYS)}; parts of names.")] = POSTERIOR,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each: seeds 0, 1, ...")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    limit: Annotated[float, typer.Option(min=1, help="Seconds for one run.")] = 600.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Redo what is chosen.")] = False,
) -> None:
    """Run and judge; a rerun does what is missing in the JSON file."""
    names, chosen = choose(only, POSTERIORS, "--only"), choose(ways, tuple(WAYS), "--ways")
    alone()
    found = read(out)
    found["machine"] = found.get("machine", {}) | machine()
    if NUMPYRO in chosen:
        found["machine"] |= _numpyro()
    if fresh:
        for way in chosen:
            for name in names:
                found["results"].get(way, {}).pop(name, None)
    runs = missing(chosen, names, seeds, found["results"])
    complete(runs, found["results"], jobs, limit, lambda: write(found, out), typer.echo)
    typer.echo(markdown(read(out)))


def _numpyro() -> dict[str, str]:
    """Versions of numpyro's environment."""
    remote, note = connect(Numpyro)
    if remote is None:
        raise typer.BadParameter(f"--ways: {note}")
    with remote:
        return remote.versions


@app.command()
def table(results: Annotated[Path, typer.Argument(help="What run has written.")] = OUT) -> None:
    """Print the Markdown tables."""
    typer.echo(markdown(read(results)))


def markdown(stored: dict[str, Any]) -> str:
    """A row a posterior, the others beside ours, how often ours is right, and who is first."""
    results = stored["results"]
    ours = results.get(POSTERIOR, {})
    names = [name for name in POSTERIORS if any(name in found for found in results.values())]
    if not names:
        return "there are no results yet"
    others = [way for way in WAYS if way != POSTERIOR and way in results]
    lines = [
        [
            name,
            *_cells(ours.get(name, {})),
            *(_errors(results[way].get(name, {})) for way in others),
        ]
        for name in names
    ]
    columns = ["posterior", "verdicts", "mean, sds", "sd", "seconds"]
    columns += [f"{way}: mean, sd, seconds" for way in others]
    records = [record for found in ours.values() for record in found.values()]
    rated = "\n".join(f"- {line}" for line in rates(records))
    parts = [
        tables.markdown(pd.DataFrame(lines, columns=columns)),
        rated,
        effective.markdown(results),
    ]
    return "\n\n".join(part for part in parts if part)


def _cells(seeds: dict[str, Record]) -> list[str]:
    """Verdicts by seed, the worst errors of any, the median of the seconds and the longest."""
    if not seeds:
        return ["–"] * 4
    records = [seeds[seed] for seed in sorted(seeds, key=int)]
    said = ", ".join(record.get("level") or record.get("error", "–") for record in records)
    seconds = [record["seconds"] for record in records]
    return [said, *worst(records), f"{median(seconds):.1f} to {max(seconds):.1f}"]


def _errors(seeds: dict[str, Record]) -> str:
    if not seeds:
        return "–"
    records = list(seeds.values())
    if all("error" in record for record in records):
        return records[0]["error"]
    seconds = median(record["seconds"] for record in records)
    return ", ".join([*worst(records), f"{seconds:.1f}"])


def rates(records: list[Record]) -> list[str]:
    """How many runs are right, trusted while wrong, and called bad while right."""
    if not records:
        return []
    trusted = [record for record in records if record.get("level") in TRUSTED]
    right = [record for record in records if within(record, RIGHT)]
    wrong = sum(not within(record, WRONG) for record in trusted)
    alarms = sum(record.get("level") == "bad" for record in right)
    seconds = [record["seconds"] for record in records]
    return [
        f"means within {RIGHT} sd and sds within {RIGHT:.0%}: {len(right)} of {len(records)} runs",
        f"called good or usable, and off by more than {WRONG} sd or {WRONG:.0%}: {wrong}",
        f"called bad, and within {RIGHT} sd and {RIGHT:.0%}: {alarms}",
        f"seconds: median {median(seconds):.1f}, worst {max(seconds):.1f}",
    ]


if __name__ == "__main__":
    app()
