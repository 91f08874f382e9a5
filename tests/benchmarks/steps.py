"""Steps per second of fit_guide beside Pyro's SVI, on eight schools with eight particles.

And of a full affine layer alone beside ``AutoMultivariateNormal``, both in Pyro's SVI, with 1,000
latents; of fits of 1,500 steps that are recorded after the first, beside steps as they come, with
all that a fit does between its steps; of an amortised guide at 1,000 rows, beside the same with a
table for its network, and Pyro's SVI of it; and of ``calibrate``, beside its fits one by one.
``python tests/benchmarks/steps.py`` writes
``notebooks/results/steps.json``: medians over rounds in which all contenders take turns, and the
ratios of their times to ours.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import iterated, planar
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoNormalizingFlow
from torch import Tensor

import pyroflow as pf
from pyroflow.inference import recorded_step
from pyroflow.inference.guide import inspected
from pyroflow.inference.minibatches import MinibatchBound
from pyroflow.inference.row_adam import RowAdam
from pyroflow.seeds import between_draws, seeded
from pyroflow.targets import eight_schools_noncentered as model

PARTICLES, STEPS, ROUNDS = 8, 200, 5
WIDE, WIDE_STEPS = 1000, 50
QUIET: dict[str, Any] = {"progress": False, "seed": 0}
OUT = Path(__file__).parents[2] / "notebooks" / "results" / "steps.json"


def wide_model() -> None:
    """A Gaussian with many latents, which costs next to nothing by itself."""
    z = pyro.sample("z", dist.Normal(torch.zeros(WIDE), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(WIDE))


def rows_model(x: Tensor) -> None:
    """Each row has a latent of its own."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


ROWS = (torch.linspace(-2.0, 4.0, 1000),)


def amortised(context: str | None) -> float:
    """Seconds a step, without the scores between steps."""
    guide = pf.AmortizedPlanarGuide(rows_model, "rows", context)
    with seeded(0), between_draws():
        problem, _ = inspected(rows_model, guide, ROWS, {})
        bound = MinibatchBound(problem, "elbo", 1, 16, seed=0)
        optimizer = RowAdam(bound.parameters(), lr=1e-3)

        def step() -> None:
            optimizer.zero_grad()
            bound.loss(1.0).backward()
            optimizer.step()

        return seconds_of(step, WIDE_STEPS)


def seconds_of(step: Callable[[], object], num: int) -> float:
    """Of one of so many steps, after some to warm up."""
    for _ in range(10):
        step()
    start = time.perf_counter()
    for _ in range(num):
        step()
    return (time.perf_counter() - start) / num


def ours() -> float:
    """Seconds a step of the training loop, with 25 scores of the bound by 2048 draws among them."""
    guide = pf.AutoPlanarFlow(model, 16)
    options = {"num_particles": PARTICLES, "early_stop": False}
    return pf.fit_guide(model, guide, steps=STEPS, **options, **QUIET).seconds / STEPS


def svi(
    make: Callable,
    model: Callable = model,
    steps: int = STEPS,
    args: tuple = (),
    num: int = PARTICLES,
) -> float:
    """Seconds a step of Pyro's SVI, after some to warm up."""
    elbo = Trace_ELBO(num_particles=num, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, make(model), pyro.optim.Adam({"lr": 1e-3}), elbo)
    return seconds_of(partial(svi.step, *args), steps)


MANY = {"steps": 1500} | QUIET


def planar_guide() -> pf.Fit:
    return pf.fit_guide(model, pf.AutoPlanarFlow(model, 16), early_stop=False, **MANY)


def sylvester_guide() -> pf.Fit:
    return pf.fit_guide(model, pf.AutoSylvesterFlow(model), early_stop=False, **MANY)


def density() -> pf.Fit:
    return pf.fit_density(pf.planar_flow(2, 32), pf.datasets.sine(2000), polish=0, **MANY)


def many(fit: Callable[[], pf.Fit], first: int) -> float:
    """Seconds a step of a fit whose steps are recorded from one on."""
    before, recorded_step.FROM = recorded_step.FROM, first
    try:
        found = fit()
    finally:
        recorded_step.FROM = before
    return found.seconds / found.steps


def calibrated(num: int, fit: Callable | None = None) -> float:
    """Seconds a data set of ``calibrate``."""
    start = time.perf_counter()
    pf.calibrate(model, pf.AutoPlanarFlow, num_simulations=num, fit=fit, **QUIET)
    return (time.perf_counter() - start) / num


def compare(contenders: dict[str, Callable[[], float]], unit: str = "step") -> dict[str, dict]:
    """Medians, and their ratios to the time of "pyroflow" in the same round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            pyro.clear_param_store()
            times[name].append(contender())
    medians = {name: statistics.median(values) for name, values in times.items()}
    found = {f"milliseconds a {unit}": {name: round(1e3 * t, 3) for name, t in medians.items()}}
    found["times ours"] = {name: round(t / medians["pyroflow"], 2) for name, t in medians.items()}
    ratios = {
        n: sorted(t / o for t, o in zip(v, times["pyroflow"], strict=True))
        for n, v in times.items()
    }
    found["quartiles"] = {n: [round(r[1], 2), round(r[-2], 2)] for n, r in ratios.items()}
    return found


def main() -> None:
    """Time all, print and write."""
    chain = partial(AutoNormalizingFlow, init_transform_fn=partial(iterated, 16, planar))
    contenders = {"pyroflow": ours, "AutoNormal": partial(svi, AutoNormal)}
    contenders["16 planar"] = partial(svi, chain)
    gaussians = {"pyroflow": partial(pf.AutoPlanarFlow, num_layers=0)}
    gaussians["AutoMultivariateNormal"] = AutoMultivariateNormal
    wide = {n: partial(svi, make, wide_model, WIDE_STEPS) for n, make in gaussians.items()}
    found = compare(contenders) | {f"a Gaussian of {WIDE} latents": compare(wide)}
    by_traces = partial(pf.AmortizedPlanarGuide, plate="rows", context="x")
    rows = {"pyroflow": partial(amortised, "x"), "a table": partial(amortised, None)}
    rows["by Pyro's SVI"] = partial(svi, by_traces, rows_model, WIDE_STEPS, ROWS, 16)
    found["an amortised guide of 1,000 rows"] = compare(rows)
    for fit in (planar_guide, sylvester_guide, density):
        ways = {"pyroflow": recorded_step.FROM, "as they come": MANY["steps"]}
        found[f"{fit.__name__.replace('_', ' ')}, 1,500 steps"] = compare(
            {name: partial(many, fit, first) for name, first in ways.items()}
        )
    alone = partial(pf.fit_guide, steps=500, num_particles=32, progress=False)
    ways = {"pyroflow": partial(calibrated, 100), "one by one": partial(calibrated, 5, alone)}
    found["calibration by 100 data sets"] = compare(ways, "data set")
    found |= {
        "particles": PARTICLES,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
