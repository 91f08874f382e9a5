"""``python -m benchmarks.posteriordb run`` and ``table``, in the folder tests; see CONTRIBUTING."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..records import choose, machine, read, write
from .models import FOLDER, NAMES, ROOT, load
from .run import METHODS, QUICK, Settings, complete
from .table import markdown

OUT = ROOT / "notebooks" / "results" / "posteriordb.json"

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.command()
def run(
    out: Annotated[
        Path | None, typer.Option(help=f"JSON file that is added to; {OUT.name} by default.")
    ] = None,
    only: Annotated[str, typer.Option(help='Posteriors: "arK,garch", parts of names.')] = "",
    methods: Annotated[str, typer.Option(help=f"Of {', '.join(METHODS)}; parts of names.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Fits of each method: seeds 0, 1, ...")] = 3,
    limit: Annotated[float, typer.Option(min=1, help="Seconds for one fit or chain.")] = 600.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 2,
    fresh: Annotated[bool, typer.Option("--fresh", help="Redo what is chosen.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few steps and draws.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the files of posteriordb are.")] = FOLDER,
) -> None:
    """Fit and judge; a rerun does what is missing in the JSON file."""
    names, chosen = choose(only, NAMES, "--only"), choose(methods, METHODS, "--methods")
    settings = QUICK if quick else Settings(limit=limit)
    out = out or (OUT.with_stem(f"{OUT.stem}-quick") if quick else OUT)
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float64)
    found = read(out)
    found["machine"] = machine()
    if fresh:
        forget(found["results"], names, chosen)
    for name in names:
        posterior = load(name, folder)
        complete(
            posterior,
            chosen,
            seeds,
            found["results"],
            settings,
            save=lambda: write(found, out),
            say=typer.echo,
        )
    typer.echo(markdown(read(out)))


@app.command()
def table(results: Annotated[Path, typer.Argument(help="What run has written.")] = OUT) -> None:
    """Print the Markdown tables."""
    typer.echo(markdown(read(results)))


def forget(results: dict[str, Any], names: tuple[str, ...], methods: tuple[str, ...]) -> None:
    """Drop the results of these methods on these posteriors."""
    for name in names:
        for method in methods:
            results.get(name, {}).pop(method, None)


if __name__ == "__main__":
    app()
