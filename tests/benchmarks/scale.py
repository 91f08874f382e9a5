"""``posterior`` on regressions of 20 coefficients with 1,000 to 1,000,000 rows.

``python -m benchmarks.scale run``, in the folder tests, adds to notebooks/results/scale.json what
it lacks; ``table`` prints it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
import typer
from torch import Tensor

import pyroflow as pf
from pyroflow.diagnostics import Report

from . import tables
from .posteriordb.models import ROOT
from .records import apart, choose, machine, peak, read, write

OUT = ROOT / "notebooks" / "results" / "scale.json"
COEFFICIENTS = 20
ROWS = (1_000, 10_000, 100_000, 1_000_000)
DRAWS, NUMBERS = (2000, 50_000), 2 * 10**9  # behind the reference, and of their rows together
AT_ONCE = 2**20  # numbers of the reference at once
NEWTON = 60  # steps to the mode

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


# The likelihood of y by the linear predictor.
FAMILIES: dict[str, Callable[[Tensor], dist.Distribution]] = {
    "logistic": lambda eta: dist.Bernoulli(logits=eta),
    "normal": lambda eta: dist.Normal(eta, 1.0),
    "Poisson": lambda eta: dist.Poisson((eta / 2).exp()),
    "Student t": lambda eta: dist.StudentT(4.0, eta, 1.0),
}


def data(family: str, rows: int) -> tuple[Tensor, Tensor]:
    """Design (N, 20) and y (N,), from half of the coefficients' prior."""
    pyro.set_rng_seed(0)
    x, w = torch.randn(rows, COEFFICIENTS), torch.randn(COEFFICIENTS) / 2
    return x, FAMILIES[family](x @ w).sample()


def model(family: str, x: Tensor, y: Tensor) -> None:
    """Standard normal coefficients; the rows are independent."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", FAMILIES[family](x @ w), obs=y)


def log_joint(family: str, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Log p(y, w) at w (S, 20), in float64 by hand."""
    step = max(1, AT_ONCE // len(w))
    value = dist.Normal(0.0, 1.0).log_prob(w).sum(-1)
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        eta = w @ x[rows].double().mT
        value = value + FAMILIES[family](eta).log_prob(y[rows].double()).sum(-1)
    return value


def newton(family: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The mode (20,) and the precision there, by half steps that all ascend."""
    w = torch.zeros(COEFFICIENTS, dtype=torch.float64)
    for step in range(NEWTON + 1):
        gradient, precision = -w, torch.eye(COEFFICIENTS, dtype=torch.float64)
        for start in range(0, len(x), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            part = x[rows].double()
            eta = (part @ w).requires_grad_()
            value = FAMILIES[family](eta).log_prob(y[rows].double()).sum()
            (slope,) = torch.autograd.grad(value, eta, create_graph=True)
            (curvature,) = torch.autograd.grad(slope.sum(), eta)
            curvature = -curvature.abs() if step < NEWTON else curvature
            gradient = gradient + part.mT @ slope.detach()
            precision = precision - part.mT @ (part * curvature.unsqueeze(-1))
        if step < NEWTON:
            w = w + torch.linalg.solve(precision, gradient) / 2
    return w, precision


def judge(family: str, x: Tensor, y: Tensor, report: Report) -> dict[str, float]:
    """KL(q ‖ p) of the guide in nats, its ELBO by its own draws, in float64.

    The evidence is that of weighted draws around the mode: their weights are even where the
    likelihood is normal, and nearly even, as "effective" says, where the posterior is nearly so.
    """
    with torch.random.fork_rng():
        torch.manual_seed(1)
        loc, precision = newton(family, x, y)
        q = dist.MultivariateNormal(loc, precision_matrix=precision)
        num = min(max(DRAWS[0], NUMBERS // len(x)), DRAWS[1])
        w = q.sample((num,))
    log_weights = log_joint(family, x, y, w) - q.log_prob(w)
    log_evidence = log_weights.logsumexp(0) - math.log(num)
    own = report.draws.sites["w"].double()
    bound = (log_joint(family, x, y, own) - report.draws.log_q).mean()
    effective = 1 / log_weights.softmax(0).square().sum() / num
    return {"KL": float(log_evidence - bound), "effective": float(effective)}


def measure(family: str, rows: int, threads: int) -> dict[str, Any]:
    """One posterior in this process: seconds, peak memory, and how far off it is."""
    torch.set_num_threads(threads)
    x, y = data(family, rows)
    before, start, began = peak(), time.perf_counter(), time.process_time()
    post = pf.posterior(model, (family, x, y), seed=0, progress=False)
    seconds = {"seconds": time.perf_counter() - start, "CPU seconds": time.process_time() - began}
    said = seconds | {"MiB": peak(), "MiB before": before, "level": post.level}
    said["draws"] = post.report.num_samples
    return said | judge(family, x, y, post.report)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="JSON file that is added to.")] = OUT,
    only: Annotated[str, typer.Option(help='Likelihoods: "logistic,normal".')] = "",
    most: Annotated[int, typer.Option(help="Rows at most.")] = ROWS[-1],
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Redo what is chosen.")] = False,
) -> None:
    """Measure, each run in a process of its own; a rerun does what is missing."""
    found = read(out)
    found["machine"] = found.get("machine", {}) | machine()
    for family in choose(only, tuple(FAMILIES), "--only"):
        part = found["results"].setdefault(family, {}).setdefault(str(threads), {})
        for rows in (n for n in ROWS if n <= most and (fresh or str(n) not in part)):
            part[str(rows)] = apart(measure, family, rows, threads)
            write(found, out)
            typer.echo(f"{family}, {rows} rows: {part[str(rows)]}")
    typer.echo(markdown(read(out)))


@app.command()
def table(results: Annotated[Path, typer.Argument(help="What run has written.")] = OUT) -> None:
    """Print the Markdown table."""
    typer.echo(markdown(read(results)))


def markdown(stored: dict[str, Any]) -> str:
    """A row a likelihood and number of rows; seconds by threads."""
    rows = [
        {
            "likelihood": family,
            "rows": f"{int(size):,}",
            "threads": threads,
            "verdict": found["level"],
            "seconds": f"{found['seconds']:.1f}",
            "of the CPU": f"{found['CPU seconds']:.1f}",
            "peak memory, MiB (before)": f"{found['MiB']:.0f} ({found['MiB before']:.0f})",
            "KL, nats": f"{found['KL']:.4f}",
            "draws a check": f"{found['draws']:,}",
        }
        for family, by_threads in stored["results"].items()
        for threads, by_size in by_threads.items()
        for size, found in by_size.items()
    ]
    return tables.markdown(pd.DataFrame(rows)) if rows else "there are no results yet"


if __name__ == "__main__":
    app()
