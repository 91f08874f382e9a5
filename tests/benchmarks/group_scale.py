"""Guides of 100 to 100,000 groups with 1,000 to 1,000,000 rows, beside exact posteriors.

``python -m benchmarks.group_scale run``, in the folder tests, fits AutoStructuredFlow with its
defaults, and three of Pyro's guides for the same seconds; it adds to notebooks/results/scale.json
what that lacks, and draws scale.png. ``table`` prints it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import pyro
import torch
import typer
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal, AutoStructured
from torch import Tensor

import pyroflow as pf
from pyroflow.plots import drawing

from . import groups, tables
from .records import apart, choose, machine, peak, read, write
from .scale import OUT

FIGURE = OUT.with_suffix(".png")
EACH = 10  # rows of a group, as groups grow
SIZES: dict[str, tuple[tuple[int, int], ...]] = {  # groups and rows
    "normal": (
        *((J, EACH * J) for J in (100, 1_000, 10_000, 100_000)),
        *((1_000, N) for N in (1_000, 100_000, 1_000_000)),
    ),
    "Poisson": tuple((J, EACH * J) for J in (100, 1_000, 10_000)),
    "Bernoulli": tuple((J, EACH * J) for J in (100, 1_000, 10_000)),
}
OURS = "AutoStructuredFlow"
RATE = 0.03  # Adam's highest, of Pyro's guides; it falls with a cosine over the seconds
DRAWS, NUMBERS = (200, 1000), 3 * 10**8  # of a guide that is judged, and of their rows
LARGEST_RANK = 10_000  # groups, above which a low-rank Gaussian has 10⁷ numbers

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


def structured(model: Callable) -> AutoStructured:
    """Normal conditionals, and rows that depend linearly on the globals."""
    conditionals = dict.fromkeys(("mu", "tau", "theta"), "normal")
    linear = {"tau": {"mu": "linear"}, "theta": {"mu": "linear", "tau": "linear"}}
    return AutoStructured(model, conditionals=conditionals, dependencies=linear)


WAYS: dict[str, Callable] = {
    OURS: pf.AutoStructuredFlow,
    "AutoNormal": AutoNormal,
    "AutoStructured": structured,
    "AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal,
}


def fit(model: Callable, guide: Callable, args: tuple, seconds: float | None) -> int:
    """Fit ours by ``fit_guide``, or one of Pyro's for so many seconds; the steps taken."""
    if seconds is None:
        return pf.fit_guide(model, guide, args, seed=0, progress=False).steps
    began, steps, bound = time.perf_counter(), 0, Trace_ELBO()
    guide(*args)
    optimizer = torch.optim.Adam(guide.parameters(), lr=RATE)
    while (done := (time.perf_counter() - began) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * done)) / 2
        optimizer.zero_grad()
        bound.differentiable_loss(model, guide, *args).backward()
        optimizer.step()
        steps += 1
    return steps


@torch.no_grad()
def judge(model: Callable, guide: Callable, args: tuple, exact: groups.Exact) -> dict[str, float]:
    """KL(q ‖ p) in nats, the effective part of the draws, and errors of the hyperparameters."""
    rows = len(args[1]) + args[2]
    num = min(max(DRAWS[0], NUMBERS // rows), DRAWS[1])
    log_weights, drawn = torch.zeros(num, dtype=torch.float64), {"mu": [], "tau": []}
    for i in range(num):
        q = poutine.trace(guide).get_trace(*args)
        p = poutine.trace(poutine.replay(model, q)).get_trace(*args)
        log_weights[i] = _log_prob(p) - _log_prob(q)
        for name, values in drawn.items():
            values.append(p.nodes[name]["value"].double())
    values = {name: torch.stack(each) for name, each in drawn.items()}
    errors = exact.errors(values)
    ratios = {name: (values[name].std() / exact.sd[name]).item() for name in values}
    return {
        "KL": exact.log_evidence - log_weights.mean().item(),
        "KL se": (log_weights.std() / math.sqrt(num)).item(),
        "ESS": (1 / log_weights.softmax(0).square().sum() / num).item(),
        "error": max(errors.values()),
        "sd": max(ratios.values(), key=lambda ratio: abs(math.log(ratio))),
        "draws": num,
    }


def _log_prob(trace: poutine.Trace) -> Tensor:
    """Of all sites, summed in float64."""
    trace.compute_log_prob()
    sites = [s for s in trace.nodes.values() if s["type"] == "sample"]
    return sum(s["log_prob"].double().sum() for s in sites)


def measure(
    family: str, size: tuple[int, int], way: str, seconds: float | None, threads: int
) -> dict[str, Any]:
    """One fit in this process: seconds, peak memory, and how far off it is."""
    torch.set_num_threads(threads)
    pyro.set_rng_seed(0)
    found = groups.data(family, *size)
    exact = groups.exact(family, found)
    model = partial(groups.model, family)
    guide = WAYS[way](model)
    before, start, began = peak(), time.perf_counter(), time.process_time()
    steps = fit(model, guide, tuple(found), seconds)
    said = {"seconds": time.perf_counter() - start, "CPU seconds": time.process_time() - began}
    said |= {"MiB": peak(), "MiB before": before, "steps": steps, "threads": threads}
    return said | judge(model, guide, tuple(found), exact)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="JSON file that is added to.")] = OUT,
    only: Annotated[str, typer.Option(help='Families: "normal,Poisson".')] = "",
    ways: Annotated[str, typer.Option(help="Guides, by parts of their names.")] = "",
    most: Annotated[int, typer.Option(help="Groups at most.")] = 10**6,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 2,
) -> None:
    """Measure, each run in a process of its own; a rerun does what is missing."""
    found = read(out)
    found["machine"] = found.get("machine", {}) | machine()
    for family in choose(only, tuple(SIZES), "--only"):
        for size in (size for size in SIZES[family] if size[0] <= most):
            cell = found.setdefault("groups", {}).setdefault(family, {})
            cell = cell.setdefault(f"{size[0]} {size[1]}", {})
            for way in choose(ways, tuple(WAYS), "--ways"):
                if way in cell or (way.startswith("AutoLowRank") and size[0] > LARGEST_RANK):
                    continue
                seconds = None if way == OURS else cell.get(OURS, {}).get("seconds")
                if way != OURS and seconds is None:
                    raise typer.BadParameter(f"--ways must have {OURS} first, for its seconds")
                cell[way] = apart(measure, family, size, way, seconds, threads)
                write(found, out)
                typer.echo(f"{family}, {size[0]} groups, {size[1]} rows, {way}: {cell[way]}")
    draw(found, out.with_suffix(".png"))
    typer.echo(markdown(found))


@app.command()
def table(results: Annotated[Path, typer.Argument(help="What run has written.")] = OUT) -> None:
    """Print the Markdown table."""
    typer.echo(markdown(read(results)))


def _cells(stored: dict[str, Any]) -> list[dict[str, Any]]:
    """A record a run, with what it is of."""
    return [
        {"family": family, "groups": int(J), "rows": int(N), "way": way} | found
        for family, by_size in stored.get("groups", {}).items()
        for size, by_way in sorted(
            by_size.items(), key=lambda item: [int(n) for n in item[0].split()]
        )
        for J, N in [size.split()]
        for way, found in by_way.items()
    ]


def markdown(stored: dict[str, Any]) -> str:
    """A row a run."""
    rows = [
        {
            "rows are": cell["family"],
            "groups": f"{cell['groups']:,}",
            "rows": f"{cell['rows']:,}",
            "guide": f"`{cell['way']}`",
            "seconds": f"{cell['seconds']:.1f}",
            "steps": f"{cell['steps']:,}",
            "peak memory, MiB (before)": f"{cell['MiB']:.0f} ({cell['MiB before']:.0f})",
            "KL, nats": f"{cell['KL']:.3f} ± {cell['KL se']:.3f}",
            "ESS": f"{cell['ESS']:.1%}",
            "worst error of a mean, sd": f"{cell['error']:.3f}",
            "worst ratio of sds": f"{cell['sd']:.3f}",
        }
        for cell in _cells(stored)
    ]
    return tables.markdown(pd.DataFrame(rows)) if rows else "there are no results yet"


def draw(stored: dict[str, Any], path: Path) -> None:
    """Seconds and memory of ours by family, and KL of all guides, against groups and rows."""
    frame = pd.DataFrame(_cells(stored))
    figure = drawing.ShownFigure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(2, 3)
    grown = {"groups": frame.rows == EACH * frame.groups, "rows": frame.groups == 1_000}
    for row, (along, chosen) in zip(axes, grown.items(), strict=True):
        ours, normal = (
            frame[chosen & (frame.way == OURS)],
            frame[chosen & (frame.family == "normal")],
        )
        for axis, value in zip(row, ("seconds", "MiB", "KL"), strict=True):
            lines, by = (normal, "way") if value == "KL" else (ours, "family")
            for name, part in lines.groupby(by, sort=False):
                part = part.sort_values(along)
                axis.plot(part[along], part[value].clip(lower=1e-3), "o-", label=name)
            label = "KL(q ‖ p), nats, normal rows" if value == "KL" else f"{value}, {OURS}"
            axis.set(xscale="log", yscale="log", xlabel=along, ylabel=label)
            if len(lines):
                free = (0.25, 0.12) if value == "KL" else "best"  # of lines
                axis.legend(fontsize=7, loc=free)
    drawing.save_figure(figure, path)


if __name__ == "__main__":
    app()
