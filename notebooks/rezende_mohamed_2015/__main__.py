"""The command that repeats an experiment, by its name."""

from __future__ import annotations

from enum import Enum
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from rezende_mohamed_2015.results import Options
from rezende_mohamed_2015.side_by_side import MOST_RUNS
from rezende_mohamed_2015.tables import frame

EXPERIMENTS = {
    "figure1": "planar and radial layers on a Gaussian and a uniform (Figure 1)",
    "figure3": "the four energies of Table 1, planar beside NICE (Figure 3)",
    "mnist": "a deep latent Gaussian model of MNIST (Figure 4, Table 2); needs --data",
    "mnist_validation": "its draws of the training images, on images held out; needs --data",
    "mnist_speed": "an update of that model, beside one with Pyro's planar layers",
    "sylvester": "Sylvester flows on the same model of MNIST; needs --data",
    "cifar": "patches of natural images (Table 3); needs --data",
}


class Device(str, Enum):
    """Where to compute."""

    cpu = "cpu"
    cuda = "cuda"


class Draws(str, Enum):
    """When training images are drawn from their grey values."""

    fresh = "fresh"
    static = "static"


app = typer.Typer(add_completion=False)


def experiment(name: str) -> ModuleType:
    """The module of an experiment, with ``run(options) -> report``."""
    return import_module(f"rezende_mohamed_2015.{name}")


@app.command(
    help="Repeat an experiment of Rezende & Mohamed 2015; a rerun goes on where it was.\n\n"
    + "\n\n".join(f"{name}: {what}" for name, what in EXPERIMENTS.items())
)
def reproduce(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(EXPERIMENTS)}.")],
    out: Annotated[
        Path, typer.Option(help="Folder of NAME.json, the figures and checkpoints/.")
    ] = Path("results"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A short run whose numbers mean nothing.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds 0, 1, ...; by default the experiment's own.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the data files.")] = None,
    only: Annotated[
        str | None,
        typer.Option(help='Runs to do, in this order: "planar K=8,NICE", parts of labels.'),
    ] = None,
    device: Annotated[
        Device | None, typer.Option(help="By default a GPU if there is one; mnist and sylvester.")
    ] = None,
    draws: Annotated[
        Draws, typer.Option(help="Training images anew in every batch, or drawn once; likewise.")
    ] = Draws.fresh,
    jobs: Annotated[
        int, typer.Option(min=1, max=MOST_RUNS // 2, help="Runs at a time, on a GPU.")
    ] = 1,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="After so many no new run begins.")
    ] = None,
) -> None:
    """Repeat an experiment of the paper."""
    if name not in EXPERIMENTS:
        raise typer.BadParameter(f"NAME must be one of {', '.join(EXPERIMENTS)}; got {name!r}")
    parts = tuple(part.strip() for part in (only or "").split(",") if part.strip())
    if only is not None and not parts:
        raise typer.BadParameter(f"--only must name parts of labels, got {only!r}")
    options = Options(
        out=out,
        quick=quick,
        seeds=seeds,
        data=data,
        only=parts,
        device=device and device.value,
        draws=draws.value,
        jobs=jobs,
        seconds=seconds,
    )
    try:
        report = experiment(name).run(options)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    except FloatingPointError as error:
        typer.echo(f"{error}\nwhat was finished is in {out}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what was finished is in {out}, and a rerun goes on from there")
        raise typer.Exit(130) from None
    if report is not None:
        typer.echo("\n" + frame(name, report).to_string(index=False))
        typer.echo(f"numbers and figures are in {out}")


if __name__ == "__main__":
    app()
