"""The command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Planar normalizing flows for Pyro."
)


@app.callback()
def _commands() -> None:
    """Keep ``demo`` a subcommand while it is the only one."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for figures and report.json.")] = Path(
        "demo-results"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Short fits, under a minute.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of data and fits.")] = 0,
) -> None:
    """Fit the sine density, a toy posterior and eight schools; write figures and numbers."""
    from pyroflow.experiments import demo as experiment

    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"--out must be a folder, {out} is a file")
    settings = experiment.Settings(out=out, seed=seed, quick=quick)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--out cannot be made: {error}") from None
    try:
        report = experiment.run(settings)
    except KeyboardInterrupt:
        finished = json.loads((out / "report.json").read_text())
        typer.echo("\n" + experiment.table(finished))
        names = ", ".join(finished["stages"]) or "nothing yet"
        typer.echo(f"interrupted; finished and kept in {out}: {names}")
        raise typer.Exit(130) from None
    typer.echo("\n" + experiment.table(report))
    typer.echo(f"figures and report.json are in {out}")
