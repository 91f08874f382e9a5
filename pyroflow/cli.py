"""The command line."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """Planar normalizing flows for Pyro."""


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

    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"--out must be a folder, {out} is a file")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--out cannot be made: {error}") from None
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
