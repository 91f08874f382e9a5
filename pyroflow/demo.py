"""The demo: a density, a toy posterior and eight schools, each against what is known of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.distributions import TransformedDistribution
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyroflow import datasets, plots, targets
from pyroflow.flows import Flow, planar_flow
from pyroflow.guides import AutoPlanarFlow
from pyroflow.inference import fit_density, fit_guide
from pyroflow.io import write_json
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw
from pyroflow.plots.drawing import save_figure
from pyroflow.seeds import seeded


@dataclass(frozen=True)
class Settings:
    """What a run depends on: where it writes, its seed, and whether it is the short version."""

    out: Path
    seed: int = 0
    quick: bool = False

    @property
    def fresh(self) -> int:
        """Points or draws behind each number."""
        return 20_000 if self.quick else 100_000

    @property
    def density(self) -> dict[str, int]:
        """Options of the density fit."""
        return {"steps": 150, "polish": 300} if self.quick else {"steps": 500, "polish": 1000}

    @property
    def toy(self) -> dict[str, int]:
        """Options of the fits to the toy posterior."""
        return {"steps": 600, "num_particles": 64} if self.quick else {"steps": 2000}

    @property
    def schools(self) -> dict[str, dict[str, int]]:
        """Options of the fits to each form of eight schools."""
        if self.quick:
            return {"non-centred": {"steps": 400, "num_particles": 64}}
        return {"non-centred": {"steps": 2000}, "centred": {"steps": 1000}}


@dataclass(frozen=True)
class Row:
    """One line of the table: our number beside the exact one and the best rival's."""

    quantity: str
    ours: float
    exact: float
    rival: float
    rival_name: str


def run(settings: Settings) -> dict[str, Any]:
    """Run every stage, writing its figures and numbers as soon as it is finished.

    Returns:
        The report, as it stands in ``report.json``: versions, settings and, by stage, numbers,
        table rows and seconds. ``complete`` is False after an interruption, which is raised
        again as ``KeyboardInterrupt`` once the report is on disk.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    report = _header(settings)
    write_json(settings.out / "report.json", report)
    for name, stage in {"sine": sine, "toy": toy, "eight_schools": eight_schools}.items():
        began = time.perf_counter()
        numbers, rows = stage(settings)
        seconds = round(time.perf_counter() - began, 1)
        rows = [asdict(row) for row in rows]
        report["stages"][name] = numbers | {"rows": rows, "seconds": seconds}
        report["complete"] = name == "eight_schools"
        write_json(settings.out / "report.json", report)
    return report


def sine(settings: Settings) -> tuple[dict[str, Any], list[Row]]:
    """The sine density by maximum likelihood, against its entropy and a full Gaussian."""
    data = datasets.sine(10_000, seed=settings.seed)
    flow, gaussian = planar_flow(2, num_layers=32), planar_flow(2, num_layers=0)
    fit = fit_density(flow, data, seed=settings.seed, **settings.density)
    fit_density(gaussian, data, steps=100, polish=100, seed=settings.seed, progress=False)
    fresh = datasets.sine(settings.fresh, seed=settings.seed + 1_000_000)
    with seeded(settings.seed), torch.no_grad():
        samples = flow().sample((settings.fresh,))
    gap, rival = _gap(flow, fresh), _gap(gaussian, fresh)
    spread = (samples[:, 0] - samples[:, 1].sin()).std().item()
    save_figure(plots.plot_density(flow, data), settings.out / "sine_density.png")
    save_figure(
        plots.plot_losses(fit.losses, floor=datasets.SINE_ENTROPY, label="entropy of the data"),
        settings.out / "sine_loss.png",
    )
    numbers = {
        "num_layers": 32,
        "gap_nats": gap,
        "gap_of_full_gaussian_nats": rival,
        "sd_of_noise_in_samples": spread,
        "entropy_nats": datasets.SINE_ENTROPY,
        "fit": _course(fit) | settings.density,
    }
    return numbers, [
        Row("sine: NLL above the floor, nats", gap, 0.0, rival, "full Gaussian"),
        Row(
            "sine: sd of x1 - sin x2 in samples",
            spread,
            0.1,
            _noise(gaussian, settings),
            "full Gaussian",
        ),
    ]


def toy(settings: Settings) -> tuple[dict[str, Any], list[Row]]:
    """The toy posterior, against its evidence, mean field and a full Gaussian."""
    makers = {
        "planar": lambda: AutoPlanarFlow(targets.toy_model, num_layers=32),
        "mean field": lambda: AutoDiagonalNormal(targets.toy_model),
        "full Gaussian": lambda: AutoMultivariateNormal(targets.toy_model),
    }
    guides, numbers = {}, {"num_layers": 32, "log_evidence": targets.TOY_LOG_EVIDENCE}
    for name, guide, course in _fits(targets.toy_model, makers, settings, settings.toy):
        elbo, se = _elbo(targets.toy_model, guide, settings)
        guides[name] = guide
        numbers[name] = course | {"kl": targets.TOY_LOG_EVIDENCE - elbo, "kl_se": se}
    figure = plots.plot_posteriors(
        targets.toy_log_joint,
        {name: guides[name].get_posterior().log_prob for name in ("mean field", "planar")},
        log_evidence=targets.TOY_LOG_EVIDENCE,
        subtitles={n: f"KL = {numbers[n]['kl']:.3f} nats" for n in ("mean field", "planar")},
    )
    save_figure(figure, settings.out / "toy_posterior.png")
    save_figure(_bending(guides["planar"]), settings.out / "toy_bending.png")
    rival = min("mean field", "full Gaussian", key=lambda name: numbers[name]["kl"])
    row = Row("toy: KL(q‖p), nats", numbers["planar"]["kl"], 0.0, numbers[rival]["kl"], rival)
    return numbers, [row]


def eight_schools(settings: Settings) -> tuple[dict[str, Any], list[Row]]:
    """Eight schools, in the full run centred too, against exact draws and Gaussian guides."""
    exact, log_evidence = targets.eight_schools_exact(settings.fresh, seed=settings.seed)
    models = {
        "non-centred": targets.eight_schools_noncentered,
        "centred": targets.eight_schools_centered,
    }
    numbers, rows = {"num_layers": 32, "log_evidence": log_evidence}, []
    for form, options in settings.schools.items():
        numbers[form], draws = _schools(models[form], exact, settings, options)
        save_figure(plots.plot_marginals(exact, draws), settings.out / f"eight_schools_{form}.png")
        rows += _schools_rows(form, numbers[form], log_evidence)
    return numbers, rows


def _schools(
    model: Callable, exact: dict[str, Tensor], settings: Settings, options: dict[str, int]
) -> tuple[dict, dict]:
    makers = {
        "planar": lambda: AutoPlanarFlow(model, num_layers=32),
        "AutoNormal": lambda: AutoNormal(model),
        "AutoMultivariateNormal": lambda: AutoMultivariateNormal(model),
    }
    numbers, draws = {}, {}
    for name, guide, course in _fits(model, makers, settings, options):
        elbo, se = _elbo(model, guide, settings)
        with seeded(settings.seed):
            predictive = Predictive(
                model,
                guide=guide,
                num_samples=settings.fresh,
                return_sites=tuple(exact),
                parallel=True,
            )
            draws[name] = {site: t.reshape(exact[site].shape) for site, t in predictive().items()}
        numbers[name] = course | {"elbo": elbo, "elbo_se": se} | _errors(draws[name], exact)
    return numbers, draws


def _schools_rows(form: str, numbers: dict[str, Any], log_evidence: float) -> list[Row]:
    rival = max("AutoNormal", "AutoMultivariateNormal", key=lambda name: numbers[name]["elbo"])
    ours, theirs = numbers["planar"], numbers[rival]
    quantities = {
        "ELBO, nats": ("elbo", log_evidence),
        "worst error of a mean, sd": ("worst_mean_error_sd", 0.0),
        "worst error of an sd, relative": ("worst_sd_error", 0.0),
    }
    return [
        Row(f"eight schools, {form}: {label}", ours[key], exact, theirs[key], rival)
        for label, (key, exact) in quantities.items()
    ]


def _fits(
    model: Callable, makers: dict[str, Callable], settings: Settings, options: dict[str, int]
) -> Iterator[tuple[str, Callable, dict[str, Any]]]:
    """Fit one guide after the other, each from the same seed and with the same options."""
    for name, make in makers.items():
        pyro.clear_param_store()
        guide = make()
        fit = fit_guide(model, guide, seed=settings.seed, **options)
        yield name, guide, {"fit": _course(fit) | options}


def _bending(guide: AutoPlanarFlow, pieces: int = 4) -> Any:
    """A grid of the base space as it goes through the planar stack, in a few pieces."""
    planar = guide.planar
    chunks = zip(*(t.chunk(pieces) for t in (planar.w, planar.u, planar.b)), strict=True)
    steps = [*(planar.at(*chunk) for chunk in chunks), guide.affine]
    chain = TransformedDistribution(guide.get_base_dist(), steps)
    return plots.plot_grid_bending(chain, layers=tuple(range(1, pieces + 1)))


def _gap(flow: Flow, fresh: Tensor) -> float:
    """The mean of log p − log q: the pairing takes most of the noise of the NLL away."""
    with torch.no_grad():
        return (datasets.sine_log_prob(fresh) - flow().log_prob(fresh)).mean().item()


def _noise(flow: Flow, settings: Settings) -> float:
    with seeded(settings.seed), torch.no_grad():
        samples = flow().sample((settings.fresh,))
    return (samples[:, 0] - samples[:, 1].sin()).std().item()


def _elbo(model: Callable, guide: Callable, settings: Settings) -> tuple[float, float]:
    """The ELBO and its standard error from fresh draws."""
    with seeded(settings.seed + 1), torch.no_grad():
        draws = draw(BoundModel(model, guide), settings.fresh).log_weights
    return draws.mean().item(), (draws.std() / settings.fresh**0.5).item()


def _errors(draws: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The worst errors of marginal means, in exact sds, and of sds, relative."""
    means, sds = [], []
    for site, reference in exact.items():
        means.append(((draws[site].mean(0) - reference.mean(0)) / reference.std(0)).abs().max())
        sds.append((draws[site].std(0) / reference.std(0) - 1).abs().max())
    return {"worst_mean_error_sd": max(means).item(), "worst_sd_error": max(sds).item()}


def _course(fit: Any) -> dict[str, Any]:
    return {
        "taken": fit.steps,
        "stopped": fit.stopped,
        "seconds": round(fit.seconds, 1),
        "best_loss": fit.best_loss,
    }


def _header(settings: Settings) -> dict[str, Any]:
    return {
        "versions": {name: version(name) for name in ("pyroflow", "torch", "pyro-ppl")},
        "seed": settings.seed,
        "quick": settings.quick,
        "threads": torch.get_num_threads(),
        "complete": False,
        "stages": {},
    }


def table(report: dict[str, Any]) -> str:
    """The rows of a report as a text table."""
    lines = [("", "ours", "exact", "rival", "")]
    for stage in report["stages"].values():
        for row in stage["rows"]:
            numbers = (f"{row[key]:.4f}" for key in ("ours", "exact", "rival"))
            lines.append((row["quantity"], *numbers, row["rival_name"]))
    return "\n".join(f"{a:<58}{b:>10}{c:>10}{d:>10}  {e}".rstrip() for a, b, c, d, e in lines)
