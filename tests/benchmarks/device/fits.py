"""Fits on a device: how good they are, and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

import pyroflow as pf
from pyroflow.inference import launches
from pyroflow.targets import eight_schools_noncentered as schools

from .. import scale
from ..known import TARGETS, THOUSAND
from .models import groups, regression, schools_data
from .parts import Cases, Record

SCHOOLS = "eight_schools-centred_10"  # whose evidence is that of the other form too
DRAWS, LAYERS, STEPS = 128, 16, 600
SIMULATED = 1000  # data sets of a calibration
EARLY = 20  # steps, over which rounding has not grown
QUIET = {"progress": False, "seed": 0}
GUIDES = {
    "planar": partial(pf.AutoPlanarFlow, num_layers=LAYERS),
    "Sylvester": pf.AutoSylvesterFlow,
}


def fits(device: str, quick: bool) -> Cases:
    """Fits of each kind, with how far off they are where the answer is known, in nats."""
    yield "sine density", partial(of_density, device, 10 if quick else None)
    at = schools_data(device=device)
    for name, make in GUIDES.items():
        known = partial(of_guide, schools, make, at, 10 if quick else None, SCHOOLS)
        yield f"eight schools, {name}", known
    y, s = (t[: 30 if quick else None].to(device) for t in TARGETS[THOUSAND].build()[1])
    options = (10, None) if quick else (None, THOUSAND)
    yield (
        "1,000 groups, structured",
        partial(of_guide, groups, pf.AutoStructuredFlow, (y, s), *options),
    )
    yield "logistic regression", partial(of_posterior, device, 500 if quick else 100_000)
    yield "calibration, eight schools", partial(of_calibration, at, 20 if quick else SIMULATED)


def of_density(device: str, steps: int | None) -> Record:
    """The gap of log q to log p over fresh points."""
    flow, y = pf.planar_flow(2, LAYERS), pf.datasets.sine(10_000, seed=100)
    fit = pf.fit_density(flow, y, steps=steps, polish=steps, device=device, **QUIET)
    fresh = pf.datasets.sine(100_000, seed=10**6)
    with torch.no_grad():
        log_q = flow().log_prob(fresh.to(device)).cpu()
    gap = (pf.datasets.sine_log_prob(fresh) - log_q).mean().item()
    return {"gap": gap, **course(fit)}


def of_guide(
    model: Callable, make: Callable, args: tuple, steps: int | None, known: str | None
) -> Record:
    """How far the bound is below the evidence, and the verdict."""
    guide, start = make(model), time.perf_counter()
    fit = pf.fit_guide(model, guide, args, steps=steps, **QUIET)
    seconds = {"seconds in all": time.perf_counter() - start}
    report = pf.diagnose(model, guide, args, seed=1)
    evidence = TARGETS[known].exact.log_evidence if known else report.log_evidence
    said = {"gap": float(evidence - report.elbo), "level": report.level}
    return said | course(fit) | seconds


def of_posterior(device: str, rows: int) -> Record:
    """The verdict on a logistic regression, and KL(q ‖ p)."""
    x, y = scale.data("logistic", rows)
    start = time.perf_counter()
    post = pf.posterior(regression, (x.to(device), y.to(device)), **QUIET)
    seconds, draws = time.perf_counter() - start, post.report.draws
    own = {name: value.cpu() for name, value in draws.sites.items()}
    there = SimpleNamespace(draws=SimpleNamespace(sites=own, log_q=draws.log_q.cpu()))
    with torch.device("cpu"):
        judged = scale.judge("logistic", x.cpu(), y.cpu(), there)
    return {"gap": judged["KL"], "level": post.level, "seconds in all": seconds}


def of_calibration(args: tuple, num: int) -> Record:
    """Seconds that the fits to so many simulated data sets take, and the verdict."""
    start = time.perf_counter()
    found = pf.calibrate(schools, pf.AutoPlanarFlow, args, num_simulations=num, **QUIET)
    seconds = {"seconds in all": time.perf_counter() - start}
    return {"data sets": num, "fits": found.fits, "calibrated": found.calibrated, **seconds}


def course(fit: pf.Fit) -> Record:
    """How long a fit took, and how it ended."""
    rate = {"steps a second": fit.steps / fit.seconds} if fit.steps else {}
    return {"seconds": fit.seconds, **rate, "end": fit.stopped}


def steps(device: str, quick: bool) -> Cases:
    """Steps a second of each kind of fit, 128 draws or rows each."""
    num = 20 if quick else STEPS
    kinds = {"density": density_steps, "energy": energy_steps}
    kinds |= {f"eight schools, {name}": partial(guide_steps, name) for name in GUIDES}
    kinds |= {"1,000 groups": group_steps, "seed None": partial(guide_steps, "planar", seed=None)}
    density_steps(device, 5)  # after which the device is awake
    for name, fit in kinds.items():
        yield name, partial(of_steps, fit, device, num)


def of_steps(fit: Callable[[str, int], pf.Fit], device: str, num: int) -> Record:
    """Steps a second one by one and by launches of a graph, and how far their losses are apart."""
    with patch.object(launches, "_is_one_gpu", lambda devices: False):
        plain = fit(device, num)
    launched = fit(device, num)
    found = {"steps a second": num / plain.seconds, "by launches": num / launched.seconds}
    pairs = list(zip(plain.losses, launched.losses, strict=True))
    for name, some in (("first", pairs[:EARLY]), ("all", pairs)):
        found[f"losses apart, {name}"] = max(abs(a - b) / (1 + abs(a)) for a, b in some)
    found["scores apart"] = abs(plain.best_loss - launched.best_loss)
    return found | {"launches": launched.launches, "skipped": launched.skipped}


def density_steps(device: str, num: int) -> pf.Fit:
    """Maximum likelihood."""
    flow, y = pf.planar_flow(2, LAYERS), pf.datasets.sine(10_000, seed=100)
    options = {"steps": num, "polish": 0, "batch_size": DRAWS, "device": device}
    return pf.fit_density(flow, y, **options, **QUIET)


def energy_steps(device: str, num: int) -> pf.Fit:
    """Reverse KL."""
    flow, options = pf.planar_flow(2, LAYERS), {"steps": num, "num_particles": DRAWS}
    return pf.fit_energy(flow, pf.targets.energy(1), device=device, **options, **QUIET)


def guide_steps(name: str, device: str, num: int, **options: Any) -> pf.Fit:
    """The bound of a guide."""
    options = QUIET | {"steps": num, "num_particles": DRAWS, "early_stop": False} | options
    return pf.fit_guide(schools, GUIDES[name](schools), schools_data(device=device), **options)


def group_steps(device: str, num: int) -> pf.Fit:
    """The bound of a guide for many groups."""
    options = {"steps": num, "num_particles": DRAWS, "early_stop": False}
    args = tuple(t[: max(30, num)].to(device) for t in TARGETS[THOUSAND].build()[1])
    return pf.fit_guide(groups, pf.AutoStructuredFlow(groups), args, **options, **QUIET)


def chains(device: str) -> Record:
    """Chains over a guide."""
    guide, args = pf.AutoPlanarFlow(schools, 2), schools_data(device=device)
    pf.fit_guide(schools, guide, args, steps=50, **QUIET)
    made = pf.mcmc(schools, guide, args, num_samples=200, num_chains=32, **QUIET)
    return {"level": made.level, "acceptance": float(made.acceptance)}


def by_default(device: str, quick: bool) -> Cases:
    """Fits where all is made under ``torch.set_default_device``."""
    num = 10 if quick else 100
    torch.set_default_device(device)
    for name, fit in (("density", density_steps), ("energy", energy_steps)):
        yield name, lambda fit=fit: course(fit(device, num))
    for name in GUIDES:
        yield f"eight schools, {name}", lambda name=name: course(guide_steps(name, device, num))
    yield "chains", partial(chains, device)
    yield "logistic regression", partial(of_posterior, device, 500)
