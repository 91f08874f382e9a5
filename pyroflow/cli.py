"""The command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pyroflow.experiments.reproduce import EXPERIMENTS, experiment

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Planar normalizing flows for Pyro."
)


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


@app.command(
    help="Repeat an experiment of Rezende & Mohamed 2015; a rerun goes on where it was.\n\n"
    + "\n\n".join(f"{name}: {what}" for name, what in EXPERIMENTS.items())
)
def reproduce(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(EXPERIMENTS)}.")],
    out: Annotated[
        Path, typer.Option(help="Folder of NAME.json, the figures and checkpoints/.")
    ] = Path("notebooks/results"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A short run whose numbers mean nothing.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds 0, 1, ...; by default as in README.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the data files.")] = None,
    only: Annotated[
        str | None, typer.Option(help='Runs to do: "planar K=8,NICE", parts of keys.')
    ] = None,
) -> None:
    """Repeat an experiment of the paper."""
    from pyroflow.experiments.results import Options

    if name not in EXPERIMENTS:
        raise typer.BadParameter(f"NAME must be one of {', '.join(EXPERIMENTS)}; got {name!r}")
    parts = tuple(part.strip() for part in (only or "").split(",") if part.strip())
    if only is not None and not parts:
        raise typer.BadParameter(f"--only must name parts of keys, got {only!r}")
    options = Options(out=out, quick=quick, seeds=seeds, data=data, only=parts)
    module = experiment(name)
    try:
        report = module.run(options)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    except FloatingPointError as error:
        typer.echo(f"{error}\nwhat was finished is in {out}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what was finished is in {out}, and a rerun goes on from there")
        raise typer.Exit(130) from None
    if report is not None:
        typer.echo("\n" + module.table(report))
        typer.echo(f"numbers and figures are in {out}")
