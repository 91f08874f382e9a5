"""``python -m benchmarks.speed run`` and ``table``, in the folder tests; see CONTRIBUTING."""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..remote import JAX_PYTHON, connect
from .accuracy import accuracy, check_agreement
from .contenders import FLOOR, FLOWJAX, contenders
from .growth import growth, plot
from .memory import SHAPES as MEMORY_SHAPES
from .memory import memory
from .operations import operations, ratios
from .problem import SHAPES, Problem, Shape, reference
from .remote import Flowjax
from .table import markdown
from .timing import interleave, spread

ROOT = Path(__file__).resolve().parents[3]
OUT = ROOT / "notebooks" / "results" / "benchmarks.json"
MOST_SECONDS = 60.0  # for the rounds of one shape, once there are three
BUSY = 0.5  # load above which threads wait for each other
SETTING = (
    "float32; ratios of medians over rounds, in each of which every contender had one slice; the "
    "noise is drawn before the timing and is the same for all; all compute the same function"
)

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="JSON file; the figure stands beside it.")] = OUT,
    shapes: Annotated[
        str, typer.Option(help='Shapes "N,D,K;N,D,K;..." in place of the nine.')
    ] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Slices of every contender.")] = 7,
    seconds: Annotated[float, typer.Option(min=1e-4, help="Length of a slice.")] = 0.2,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 2,
    jax_python: Annotated[
        Path, typer.Option(help="Python of an environment with flowjax.")
    ] = JAX_PYTHON,
    quick: Annotated[bool, typer.Option("--quick", help="Short slices and curves.")] = False,
) -> None:
    """Time every contender at every shape, then measure memory and growth."""
    chosen = parse(shapes) if shapes else SHAPES
    if quick:
        rounds, seconds = min(rounds, 3), min(seconds, 0.02)
    torch.set_num_threads(threads)
    remote, note = connect(Flowjax, jax_python)
    typer.echo(note)
    results: dict[str, Any] = {"machine": machine(note), "setting": SETTING, "shapes": []}
    try:
        for shape in chosen:
            results["shapes"].append(measure(shape, remote, rounds, seconds))
            write(results, out)
            typer.echo(f"done: {tuple(shape)}")
    finally:
        if remote is not None:
            remote.close()
    results["memory"] = {
        str(tuple(shape)): memory(shape) for shape in (chosen if quick else MEMORY_SHAPES)
    }
    results["growth"] = growth(min(rounds, 5), seconds / 4, quick)
    plot(results["growth"]["curves"], out.with_name("growth.png"))
    write(results, out)
    typer.echo(markdown(json.loads(out.read_text())))


@app.command()
def table(results: Annotated[Path, typer.Argument(help="What run has written.")] = OUT) -> None:
    """Print the Markdown tables."""
    typer.echo(markdown(json.loads(results.read_text())))


def parse(shapes: str) -> tuple[Shape, ...]:
    """Shapes from the command line."""
    try:
        found = tuple(Shape(*map(int, part.split(","))) for part in shapes.split(";"))
    except (TypeError, ValueError):
        found = ()
    if not found or min(min(shape) for shape in found) < 1:
        raise typer.BadParameter(f'--shapes must be "N,D,K;N,D,K" in whole numbers, got {shapes!r}')
    return found


def measure(shape: Shape, remote: Flowjax | None, rounds: int, seconds: float) -> dict[str, Any]:
    """Times, ratios and errors at one shape."""
    problem = Problem.draw(shape)
    stacks = contenders(problem)
    exact = reference(*problem.parameters, problem.x)
    for name, stack in stacks.items():
        if name != FLOOR:
            check_agreement(name, *stack.forward(problem.x), exact)
    timed, forms = operations(problem, stacks), None
    if remote is not None:
        forms, y, log_det = remote.load(problem)
        check_agreement(FLOWJAX, y, log_det, exact)
        timed |= {(operation, FLOWJAX): remote.timed(operation) for operation in forms}
    taken = interleave(timed, rounds, seconds, most=MOST_SECONDS)
    milliseconds: dict[str, Any] = {}
    for (operation, name), values in taken.items():
        milliseconds.setdefault(operation, {})[name] = spread(values, 1e3)
    return {
        "shape": shape,
        "milliseconds": milliseconds,
        "ratios": ratios(taken),
        "flowjax's form": forms,
        "errors": accuracy(problem, stacks),
    }


def machine(note: str) -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {}
    for name in ("torch", "pyro-ppl", "normflows"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    load = os.getloadavg()[0]
    if load > BUSY:
        typer.echo(f"the load is {load:.1f} before the run: others slow it, small shapes tenfold")
    facts = {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "load before": load}
    return facts | versions | {"flowjax": note}


def write(results: dict[str, Any], out: Path) -> None:
    """Write with four digits: more would be noise."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(_rounded(results), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    app()
