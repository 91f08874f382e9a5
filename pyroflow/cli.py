"""The command line: its options, messages and exit codes; torch is imported by a command's run."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pyroflow.distribution import VERSION

app = typer.Typer(no_args_is_help=True, epilog="Exit codes: 0 done, 1 failed, 2 called wrongly.")

FlowFile = Annotated[Path, typer.Argument(metavar="FLOW", help="File of a flow, from fit.")]
Table = Annotated[
    Path,
    typer.Argument(
        metavar="DATA", help="Table: .csv, .tsv, .txt, .parquet, .npy; - is CSV on standard input."
    ),
]
TableOut = Annotated[
    Path, typer.Option(metavar="FILE", help="Table to write; - is CSV on standard output.")
]
Columns = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="Columns to use: names, or positions where there are none."),
]
Header = Annotated[
    bool | None,
    typer.Option("--header/--no-header", help="Whether the first line holds names; else found."),
]
Delimiter = Annotated[str | None, typer.Option(help="What is between the cells; else found.")]
Decimal = Annotated[
    str | None, typer.Option(help="What is before decimals, . or a comma; else found.")
]
Seed = Annotated[int | None, typer.Option(min=0, max=2**31, help="Makes it reproducible.")]
Force = Annotated[bool, typer.Option("--force", help="Write over an existing file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no words beside results.")]


class Kind(str, Enum):
    """The families of flows."""

    planar = "planar"
    sylvester = "sylvester"
    radial = "radial"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pyroflow {VERSION}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Planar normalizing flows for Pyro."""


@app.command()
def fit(
    data: Table,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File of the flow to write.")],
    columns: Columns = None,
    kind: Annotated[Kind, typer.Option(help="Family of the layers.")] = Kind.planar,
    layers: Annotated[int | None, typer.Option(min=0, help="By default 16; Sylvester 4.")] = None,
    units: Annotated[int | None, typer.Option(min=1, help="Of Sylvester layers.")] = None,
    support: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=BOUNDS", help="As in x=positive or x=0,1; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of the fit.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Of Adam; by default 1000.")] = None,
    polish: Annotated[
        int | None, typer.Option(min=0, help="Evaluations for L-BFGS after them; by default 1000.")
    ] = None,
    tails: Annotated[bool, typer.Option("--tails", help="A layer for heavy tails.")] = False,
    double: Annotated[bool, typer.Option("--double", help="Fit in float64.")] = False,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", help="New file to save the fit to as it goes.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Checkpoint of this fit to go on from.")
    ] = None,
    header: Header = None,
    delimiter: Delimiter = None,
    decimal: Decimal = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit a flow to the columns of a table by maximum likelihood, and save it."""
    with _reported(quiet):
        from pyroflow import commands

        commands.target(out, force)
        if checkpoint is not None:
            if resume is not None:
                raise typer.BadParameter("--checkpoint and --resume exclude each other: give one")
            if checkpoint.exists():
                raise typer.BadParameter(
                    f"--checkpoint {checkpoint} exists: go on from it with --resume, or name "
                    "another file"
                )
        if resume is not None and not resume.is_file():
            raise typer.BadParameter(f"--resume: there is no file {resume}; --checkpoint makes one")
        report = commands.fit(
            commands.Source(data, columns, header, delimiter, decimal),
            out,
            kind.value,
            {"num_layers": layers, "num_units": units, "tails": tails},
            support or [],
            double,
            {
                "steps": steps,
                "polish": polish,
                "seed": seed,
                "device": device,
                "checkpoint": checkpoint or resume,
                "progress": not quiet and not as_json and sys.stderr.isatty(),
            },
        )
        lines = (
            f"{out}: a {kind.value} flow of {report['parameters']} parameters, fitted to "
            f"{report['rows']} rows",
            f"held-out mean of -log density: {report['held_out_nats']:.4f} nats",
            f"stopped after {report['steps']} steps and {report['seconds']} s: {report['stopped']}",
        )
        _tell(report, as_json, quiet, *lines)


@app.command()
def sample(
    flow: FlowFile,
    num: Annotated[int, typer.Option("-n", "--num", min=1, help="How many rows.")] = 1000,
    seed: Seed = None,
    out: TableOut = Path("-"),
    delimiter: Annotated[str | None, typer.Option(help="Between cells; else a comma.")] = None,
    decimal: Annotated[str, typer.Option(help="Before decimals.")] = ".",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw rows from a flow: CSV on standard output, or a table in a file."""
    with _reported(quiet):
        from pyroflow import commands

        commands.target(out, force, commands.TABLES)
        draws, names = commands.sample(flow, num, seed)
        report = {"columns": list(draws.columns), "rows": num, "file": str(out)}
        if as_json and out == commands.PIPE:
            report |= {"file": None, "draws": draws.to_numpy().tolist()}
        else:
            marks = {} if delimiter is None else {"sep": delimiter}
            commands.write_table(draws, out, names, decimal=decimal, **marks)
        _tell(report, as_json, quiet or out == commands.PIPE, f"{out}: {num} rows")


@app.command()
def score(
    flow: FlowFile,
    data: Table,
    out: TableOut = Path("-"),
    columns: Columns = None,
    header: Header = None,
    delimiter: Delimiter = None,
    decimal: Decimal = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the log density, in nats, of each row of a table under a flow."""
    with _reported(quiet):
        from pyroflow import commands

        commands.target(out, force, commands.TABLES)
        found = commands.score(flow, commands.Source(data, columns, header, delimiter, decimal))
        rows, mean = len(found), float(found["log_prob"].mean())
        report = {"rows": rows, "mean_log_prob": mean, "file": str(out)}
        if as_json and out == commands.PIPE:
            report |= {"file": None, "log_prob": found["log_prob"].tolist()}
        else:
            commands.write_table(found, out, True)
        if as_json:
            _tell(report, True, quiet)
        elif not quiet:
            typer.echo(f"mean log density of {rows} rows: {mean:.4f} nats", err=True)


@app.command()
def plot(
    flow: FlowFile,
    data: Table,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Figure: .png, .pdf or .svg.")],
    columns: Columns = None,
    seed: Seed = 0,
    header: Header = None,
    delimiter: Delimiter = None,
    decimal: Decimal = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw data beside samples of a flow: each column, and each pair of columns."""
    with _reported(quiet):
        from pyroflow import commands

        commands.target(out, force, commands.FIGURES)
        source = commands.Source(data, columns, header, delimiter, decimal)
        report = commands.plot(flow, source, out, seed)
        line = f"{out}: {report['rows']} rows beside {report['samples']} samples"
        _tell(report, as_json, quiet, f"{line}, columns {', '.join(report['columns'])}")


@app.command()
def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Of a flow or a guide.")],
    as_json: Json = False,
) -> None:
    """Say what is in a file: kind, sizes, columns, supports and versions."""
    with _reported(False):
        from pyroflow import commands

        report = commands.info(file)
        _tell(report, as_json, False, *commands.lines(report))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for figures and report.json.")] = Path(
        "demo-results"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Short fits, under a minute.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of data and fits.")] = 0,
) -> None:
    """Fit the sine density, a toy posterior and eight schools; write figures and numbers."""
    from pyroflow import demo as stages

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--out must be a folder, and cannot be: {error}") from None
    sizes = stages.QUICK if quick else stages.FULL
    with suppress(KeyboardInterrupt):  # what is finished is in the report
        stages.run(stages.Settings(out, seed, quick, **sizes))
    report = json.loads((out / "report.json").read_text())
    # As wide as the table, which a narrower terminal wraps and a file has in full.
    typer.echo()
    Console(width=120).print(stages.table(report))
    if not report["complete"]:
        names = ", ".join(report["stages"]) or "nothing yet"
        typer.echo(f"interrupted; finished and kept in {out}: {names}")
        raise typer.Exit(130)
    typer.echo(f"figures and report.json are in {out}")


@contextmanager
def _reported(quiet: bool) -> Iterator[None]:
    """Errors and warnings as one line each on standard error, and an exit code."""

    def say(what: str, message: object) -> None:
        typer.echo(f"pyroflow: {what}: {' '.join(str(message).split())}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: None if quiet else say("warning", message)
        try:
            yield
        except (typer.Exit, typer.Abort, BrokenPipeError):  # typer ends quietly on a broken pipe
            raise
        except typer.BadParameter as error:
            say("error", error.message)
            raise typer.Exit(2) from None
        except (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError) as error:
            say("error", error or type(error).__name__)
            raise typer.Exit(1) from None


def _tell(report: Mapping[str, Any], as_json: bool, quiet: bool, *lines: str) -> None:
    """Print a report: in words, or as JSON, with null for infinities and NaN."""
    if as_json:
        finite = json.loads(json.dumps(report), parse_constant=lambda _: None)
        typer.echo(json.dumps(finite))
    elif not quiet:
        typer.echo("\n".join(lines))
