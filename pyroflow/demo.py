"""The demo: a density, a toy posterior and eight schools, each against what is known of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions import TransformedDistribution
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from rich.table import Table
from torch import Tensor

from pyroflow import datasets, plots, targets
from pyroflow.diagnostics import diagnose
from pyroflow.distribution import VERSION
from pyroflow.flows import planar_flow
from pyroflow.guides import AutoPlanarFlow
from pyroflow.inference import fit_density, fit_guide
from pyroflow.inference.callbacks import part_of_a_whole
from pyroflow.io import write_json
from pyroflow.plots.drawing import save_figure
from pyroflow.seeds import seeded


class Settings(NamedTuple):
    """What a run depends on; ``Settings(out, seed, quick, **(QUICK if quick else FULL))``."""

    out: Path
    seed: int
    quick: bool
    fresh: int  # points or draws behind each number
    density: dict[str, int]  # options of the fit
    toy: dict[str, int]
    schools: dict[str, dict[str, int]]  # by form of the model


FULL = {
    "fresh": 100_000,
    "density": {"steps": 500, "polish": 1000},
    "toy": {"steps": 1500},
    "schools": {"non-centred": {"steps": 1500}, "centred": {"steps": 1000}},
}
QUICK = {
    "fresh": 20_000,
    "density": {"steps": 150, "polish": 300},
    "toy": {"steps": 600, "num_particles": 64},
    "schools": {"non-centred": {"steps": 400, "num_particles": 64}},
}

GAUSSIAN_STEPS = 1000  # the most of a Gaussian guide, which gains no more by more

# The numbers of a stage, and its rows of the table: ours beside the exact and the best rival's.
Results = tuple[dict[str, Any], list[dict[str, Any]]]


def run(settings: Settings) -> dict[str, Any]:
    """Run every stage, writing its figures and numbers as soon as it is finished.

    Returns:
        The report, as it stands in ``report.json``: versions, settings and, by stage, numbers,
        table rows and seconds. ``complete`` is False after an interruption, which is raised
        again as ``KeyboardInterrupt`` once the report is on disk.
    """
    report = {
        "versions": {"pyroflow": VERSION} | {n: version(n) for n in ("torch", "pyro-ppl")},
        "seed": settings.seed,
        "quick": settings.quick,
        "threads": torch.get_num_threads(),
        "complete": False,
        "stages": {},
    }
    write_json(settings.out / "report.json", report)
    for name, stage in {"sine": sine, "toy": toy, "eight_schools": eight_schools}.items():
        began = time.perf_counter()
        with part_of_a_whole():
            numbers, rows = stage(settings)
        seconds = round(time.perf_counter() - began, 1)
        report["stages"][name] = numbers | {"rows": rows, "seconds": seconds}
        report["complete"] = name == "eight_schools"
        write_json(settings.out / "report.json", report)
    return report


def table(report: dict[str, Any]) -> Table:
    """The rows of a report."""
    shown = Table("", "ours", "exact", "rival", "", box=None)
    for stage in report["stages"].values():
        for row in stage["rows"]:
            numbers = (f"{row[key]:.4f}" for key in ("ours", "exact", "rival"))
            shown.add_row(row["quantity"], *numbers, row["rival_name"])
    for column in shown.columns:
        column.no_wrap, column.justify = True, "right" if column.header else "left"
    return shown


def _row(quantity: str, ours: float, exact: float, rival: float, name: str) -> dict[str, Any]:
    numbers = {"ours": ours, "exact": exact, "rival": rival}
    return {"quantity": quantity, **numbers, "rival_name": name}


def sine(settings: Settings) -> Results:
    """The sine density by maximum likelihood, against its entropy and a full Gaussian."""
    data = datasets.sine(10_000, seed=settings.seed)
    fresh = datasets.sine(settings.fresh, seed=settings.seed + 1_000_000)
    flow, gaussian = planar_flow(2, num_layers=32), planar_flow(2, num_layers=0)
    fit = fit_density(flow, data, seed=settings.seed, **settings.density)
    fit_density(gaussian, data, steps=100, polish=100, seed=settings.seed, progress=False)
    gaps, spreads = [], []
    for fitted in (flow, gaussian):
        with seeded(settings.seed), torch.no_grad():
            samples = fitted().sample((settings.fresh,))
            # Paired with the exact density, most of the noise of the mean goes away.
            gap = datasets.sine_log_prob(fresh) - fitted().log_prob(fresh)
        gaps.append(gap.mean().item())
        spreads.append((samples[:, 0] - samples[:, 1].sin()).std().item())
    floor = datasets.SINE_ENTROPY
    figure = plots.plot_losses(fit, floor=floor)
    save_figure(plots.plot_density(flow, data), settings.out / "sine_density.png")
    save_figure(figure, settings.out / "sine_loss.png")
    numbers = {
        "num_layers": 32,
        "gap_nats": gaps[0],
        "gap_of_full_gaussian_nats": gaps[1],
        "sd_of_noise_in_samples": spreads[0],
        "entropy_nats": floor,
        "fit": _summary(fit) | settings.density,
    }
    return numbers, [
        _row("sine: NLL above the floor, nats", gaps[0], 0.0, gaps[1], "full Gaussian"),
        _row("sine: sd of x1 - sin x2 in samples", spreads[0], 0.1, spreads[1], "full Gaussian"),
    ]


def toy(settings: Settings) -> Results:
    """The toy posterior, against its evidence, mean field and a full Gaussian."""
    kinds = {"mean field": AutoDiagonalNormal, "full Gaussian": AutoMultivariateNormal}
    guides, numbers = {}, {"num_layers": 32, "log_evidence": targets.TOY_LOG_EVIDENCE}
    for name, guide, found in _fits(targets.toy_model, kinds, settings, settings.toy):
        guides[name] = guide
        kl = targets.TOY_LOG_EVIDENCE - found["elbo"]
        numbers[name] = {"fit": found["fit"], "kl": kl, "kl_se": found["elbo_se"]}
    figure = plots.plot_posteriors(
        targets.toy_log_joint,
        {name: guides[name].get_posterior().log_prob for name in ("mean field", "planar")},
        log_evidence=targets.TOY_LOG_EVIDENCE,
        subtitles={n: f"KL = {numbers[n]['kl']:.3f} nats" for n in ("mean field", "planar")},
    )
    save_figure(figure, settings.out / "toy_posterior.png")
    save_figure(_bending(guides["planar"]), settings.out / "toy_bending.png")
    rival = min(kinds, key=lambda name: numbers[name]["kl"])
    ours, theirs = numbers["planar"]["kl"], numbers[rival]["kl"]
    return numbers, [_row("toy: KL(q‖p), nats", ours, 0.0, theirs, rival)]


def eight_schools(settings: Settings) -> Results:
    """Eight schools, in the full run centred too, against exact draws and Gaussian guides."""
    exact, log_evidence = targets.eight_schools_exact(settings.fresh, seed=settings.seed)
    models = {
        "non-centred": targets.eight_schools_noncentered,
        "centred": targets.eight_schools_centered,
    }
    kinds = {"AutoNormal": AutoNormal, "AutoMultivariateNormal": AutoMultivariateNormal}
    quantities = {
        "ELBO, nats": ("elbo", log_evidence),
        "worst error of a mean, sd": ("worst_mean_error_sd", 0.0),
        "worst error of an sd, relative": ("worst_sd_error", 0.0),
    }
    numbers, rows = {"num_layers": 32, "log_evidence": log_evidence}, []
    for form, options in settings.schools.items():
        draws, found = {}, {}
        for name, guide, fitted in _fits(models[form], kinds, settings, options):
            draws[name] = _draws(models[form], guide, exact, settings)
            found[name] = fitted | _errors(draws[name], exact)
        save_figure(plots.plot_marginals(exact, draws), settings.out / f"eight_schools_{form}.png")
        rival = max(kinds, key=lambda name: found[name]["elbo"])
        for label, (key, known) in quantities.items():
            ours, theirs = found["planar"][key], found[rival][key]
            rows.append(_row(f"eight schools, {form}: {label}", ours, known, theirs, rival))
        numbers[form] = found
    return numbers, rows


def _fits(
    model: Callable, kinds: dict[str, Callable], settings: Settings, options: dict[str, int]
) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Fit our guide, then others, from the same seed; Gaussians are done after 1,000 steps."""
    ours = {"planar": lambda model: AutoPlanarFlow(model, num_layers=32)}
    options = dict(options)
    for name, make in (ours | kinds).items():
        pyro.clear_param_store()
        guide = make(model)
        fit = fit_guide(model, guide, seed=settings.seed, **options)
        report = diagnose(
            model, guide, num_samples=settings.fresh, seed=settings.seed + 1, max_sets=1
        )
        elbo = {"elbo": report.elbo, "elbo_se": report.elbo_se}
        yield name, guide, {"fit": _summary(fit) | options} | elbo
        options["steps"] = min(options["steps"], GAUSSIAN_STEPS)


def _summary(fit: Any) -> dict[str, Any]:
    return {
        "taken": fit.steps,
        "stopped": fit.stopped,
        "seconds": round(fit.seconds, 1),
        "best_loss": fit.best_loss,
    }


def _bending(guide: AutoPlanarFlow, pieces: int = 4) -> Any:
    """A grid of the base space as it goes through the planar stack, in a few pieces."""
    planar = guide.planar
    chunks = zip(*(t.chunk(pieces) for t in (planar.w, planar.u, planar.b)), strict=True)
    steps = [*(planar.at(*chunk) for chunk in chunks), guide.affine]
    chain = TransformedDistribution(guide.get_base_dist(), steps)
    return plots.plot_grid_bending(chain, layers=tuple(range(1, pieces + 1)))


def _draws(
    model: Callable, guide: Callable, exact: dict[str, Tensor], settings: Settings
) -> dict[str, Tensor]:
    options = {"num_samples": settings.fresh, "return_sites": tuple(exact), "parallel": True}
    with seeded(settings.seed):
        draws = Predictive(model, guide=guide, **options)()
    return {site: values.reshape(exact[site].shape) for site, values in draws.items()}


def _errors(draws: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The worst errors of marginal means, in exact sds, and of sds, relative."""
    means, sds = [], []
    for site, reference in exact.items():
        means.append(((draws[site].mean(0) - reference.mean(0)) / reference.std(0)).abs().max())
        sds.append((draws[site].std(0) / reference.std(0) - 1).abs().max())
    return {"worst_mean_error_sd": max(means).item(), "worst_sd_error": max(sds).item()}
