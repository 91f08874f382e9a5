"""Figure 3: the four energies of Table 1, fitted by planar flows and by NICE."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.distributions import Distribution
from tqdm.auto import tqdm

from pyroflow.flows import Flow, StandardNormal
from pyroflow.inference import fit_energy
from pyroflow.inference.callbacks import part_of_a_whole
from pyroflow.plots.drawing import save_figure
from pyroflow.seeds import seeded
from pyroflow.targets import Energy, energy
from pyroflow.transforms import Affine, Planar
from rezende_mohamed_2015 import figure3_drawing
from rezende_mohamed_2015.nice import nice_layers, volume_preserving_floor
from rezende_mohamed_2015.results import Options, Results, Run, checkpoint_folder, label

ENERGIES = {f"U{number}": number for number in (1, 2, 3, 4)}
LENGTHS = (2, 8, 32)
KINDS = ("planar", "NICE permutation", "NICE orthogonal")
CELL = ["energy", "kind", "K"]  # the columns that seeds share
SEEDS = 5
RATES = {"planar": 0.03, "NICE permutation": 0.01, "NICE orthogonal": 0.01}  # better for each
HIDDEN = 32  # units of each NICE coupling
ANNEALED = 0.6  # the share of the steps over which β rises, as in equation 20
JUDGE = 10**6  # seed of the draws that a fit is judged on
EDGE = 4.5  # of the square whose share of the mass is reported

# KL of a plain recipe by energy, at K = 2, 8, 32: the same flows, Adam 5e-3, 4000 updates, β
# rising over the first fifth; the best of one or two seeds. The paper prints no numbers.
REFERENCE = {
    "U1": (0.247, 0.032, 0.009),
    "U2": (0.82, 0.245, 0.007),
    "U3": (0.59, 0.284, 0.048),
    "U4": (0.84, 0.41, 0.022),
}


def run(options: Options) -> dict[str, Any]:
    """Fit every energy with every flow, length and seed; write the numbers and two figures.

    All energies, lengths and seeds have the same options. The energies have pyroflow's walls
    outside (−4, 4)²: without, three of the four are improper.

    Returns:
        The report: the runs, and by energy the floor of NICE and the least bound.
    """
    budget = _budget(options.quick)
    settings = {"hidden": HIDDEN, "annealed": ANNEALED, "lr": RATES, "quick": options.quick}
    results = Results(options.out / "figure3.json", settings | budget)
    planned, folder = _planned(options), checkpoint_folder(options, "figure3")
    _fit_all(results.missing(options.selected(planned)), folder, options, budget, results.add)
    floors = {name: volume_preserving_floor(energy(i)) for name, i in ENERGIES.items()}
    limits = {name: -energy(i).log_normalizer for name, i in ENERGIES.items()}
    results.write(nice_floors=floors, bound_limits=limits)
    cells = summarise(results.runs)
    save_figure(figure3_drawing.lengths(cells, floors, limits), options.out / "figure3_kl.png")
    picture, best = options.out / "figure3_densities.png", figure3_drawing.shown(results.runs)
    if not picture.exists() or results.summary.get("pictured") != best:
        missing = [run for run in best if not _density_file(folder, run).exists()]
        _fit_all(missing, folder, options, budget)  # as in a fresh clone
        panels = [(run, _density_file(folder, run)) for run in best]
        save_figure(figure3_drawing.densities(panels), picture)
        results.write(pictured=best)
    return {"runs": results.ordered(planned), **results.summary}


def summarise(runs: Sequence[Run]) -> pd.DataFrame:
    """By energy, kind and K: KL over the seeds, with the best of the first three, and seconds."""
    frame = pd.DataFrame(runs)
    frame["first"] = frame.kl.where(frame.seed < 3)
    return frame.groupby(CELL, as_index=False).agg(
        seeds=("seed", "size"),
        median=("kl", "median"),
        low=("kl", "min"),
        high=("kl", "max"),
        best_of_three=("first", "min"),
        least_mass_inside=("mass_inside", "min"),
        fastest=("seconds", "min"),
        slowest=("seconds", "max"),
    )


def make_flow(kind: str, K: int) -> Flow:
    """N(0, I) in the plane, K layers and an affine layer.

    For planar layers this is the family of a Gaussian q_0 with a full covariance, where the
    paper has a diagonal one: what maps q_0 to N(0, I) passes through a planar layer, which
    stays planar.
    """
    if kind == "planar":
        layers = [Planar(2, K)]
    else:
        layers = nice_layers(2, K, kind.removeprefix("NICE "), HIDDEN)
    return Flow(StandardNormal(2), [*layers, Affine(2)])


def annealing(steps: int) -> Callable[[int], float]:
    """Equation 20 with its 10,000 steps scaled to a share of the fit."""
    return lambda step: min(1.0, 0.01 + step / (ANNEALED * steps))


def _planned(options: Options) -> list[Run]:
    """The runs in their order: planar flows first."""
    return [
        {"energy": name, "kind": kind, "K": K, "seed": seed}
        for kind in KINDS
        for seed in range(options.seeds or (1 if options.quick else SEEDS))
        for K in LENGTHS
        for name in ENERGIES
    ]


def _budget(quick: bool) -> dict[str, int]:
    if quick:
        return {"steps": 40, "num_particles": 64, "fresh": 10_000}
    return {"steps": 3000, "num_particles": 256, "fresh": 100_000}


def _fitted(run: Run, folder: Path, *, fresh: int, **options: int) -> dict[str, Any]:
    """One fit, and its numbers from fresh draws; a picture of its density is left in the folder."""
    target, kind, seed = energy(ENERGIES[run["energy"]]), run["kind"], run["seed"]
    with seeded(seed):
        flow = make_flow(kind, run["K"])
    with part_of_a_whole():
        fit = fit_energy(
            flow,
            target,
            annealing=annealing(options["steps"]),
            lr=RATES[kind],
            seed=seed,
            progress=False,
            checkpoint=_checkpoint(folder, run),
            **options,
        )
    q = copy.deepcopy(flow).double()()
    judged = _judged(q, target, fresh)
    figure3_drawing.keep_density(q.log_prob, judged["kl"], _density_file(folder, run))
    return judged | {
        "parameters": sum(p.numel() for p in flow.parameters()),
        "updates": fit.steps,
        "seconds": round(fit.seconds, 1),
        "stopped": fit.stopped,
    }


def _fit_all(
    runs: Sequence[Run],
    folder: Path,
    options: Options,
    budget: dict[str, int],
    keep: Callable[[Run, dict[str, Any]], None] = lambda run, found: None,
) -> None:
    for run in (bar := tqdm(runs, desc="figure3", disable=not (runs and options.progress))):
        bar.set_postfix_str(label(run))
        keep(run, _fitted(run, folder, **budget))
        _checkpoint(folder, run).unlink(missing_ok=True)


@torch.no_grad()
def _judged(q: Distribution, target: Energy, fresh: int) -> dict[str, float]:
    """The bound F = E_q[log q + U] and KL(q ‖ p) = F + ln Z, in nats, and the mass inside."""
    with seeded(JUDGE):
        z = q.sample((fresh,))
    losses = q.log_prob(z) + target(z)
    bound = losses.mean().item()
    return {
        "bound": bound,
        "kl": bound + target.log_normalizer,
        "kl_se": (losses.std() / fresh**0.5).item(),
        "mass_inside": (z.abs() <= EDGE).all(-1).double().mean().item(),
    }


def _checkpoint(folder: Path, run: Run) -> Path:
    return folder / f"{label(run)}.pt"


def _density_file(folder: Path, run: Run) -> Path:
    return folder / f"{label(run)} density.pt"
