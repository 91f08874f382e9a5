"""Figure 3: the four energies of Table 1, fitted by planar flows and by NICE."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.distributions import Distribution
from tqdm.auto import tqdm

from pyroflow.experiments import figure3_drawing
from pyroflow.experiments.nice import nice_layers, volume_preserving_floor
from pyroflow.experiments.results import Options, Results, checkpoint_folder, save_figure
from pyroflow.flows import Flow, StandardNormal
from pyroflow.inference import fit_energy
from pyroflow.seeds import seeded
from pyroflow.targets import energy
from pyroflow.targets.energies import Energy
from pyroflow.transforms import Affine, Planar

ENERGIES = (1, 2, 3, 4)
LENGTHS = (2, 8, 32)
KINDS = ("planar", "NICE permutation", "NICE orthogonal")
SEEDS = 5
RATES = {"planar": 0.03, "NICE permutation": 0.01, "NICE orthogonal": 0.01}  # better for each
HIDDEN = 32  # units of each NICE coupling
ANNEALED = 0.6  # the share of the steps over which β rises, as in equation 20
JUDGE = 10**6  # seed of the draws that a fit is judged on
EDGE = 4.5  # of the square whose share of the mass is reported

# KL of a plain recipe by energy, at K = 2, 8, 32: the same flows, Adam 5e-3, 4000 updates, β
# rising over the first fifth; the best of one or two seeds. The paper prints no numbers.
REFERENCE = {
    1: (0.247, 0.032, 0.009),
    2: (0.82, 0.245, 0.007),
    3: (0.59, 0.284, 0.048),
    4: (0.84, 0.41, 0.022),
}


def run(options: Options) -> dict[str, Any]:
    """Fit every energy with every flow, length and seed; write the numbers and two figures.

    All energies, lengths and seeds have the same options. The energies have pyroflow's walls
    outside (−4, 4)²: without, three of the four are improper.

    Returns:
        The report: the runs, and a summary by energy, flow and length.
    """
    budget = _budget(options.quick)
    settings = {"hidden": HIDDEN, "annealed": ANNEALED, "lr": RATES, "quick": options.quick}
    results = Results(options.out / "figure3.json", settings | budget)
    chosen = [key for key in options.chosen(_keys(options)) if key not in results.runs]
    folder = checkpoint_folder(options, "figure3")
    for key in _with_progress(chosen, options):
        results.add(key, _fitted(key, folder, **budget))
        _checkpoint(folder, key).unlink(missing_ok=True)
    floors = {f"U{number}": volume_preserving_floor(energy(number)) for number in ENERGIES}
    summary = summarise(results.runs)
    limits = {f"U{number}": -energy(number).log_normalizer for number in ENERGIES}
    results.write(nice_floors=floors, bound_limits=limits, summary=summary)
    save_figure(figure3_drawing.lengths(summary, floors, limits), options.out / "figure3_kl.png")
    picture, best = options.out / "figure3_densities.png", figure3_drawing.shown(results.runs)
    if not picture.exists() or results.summary.get("pictured") != best:
        files = _densities(best, folder, options, budget)
        save_figure(figure3_drawing.densities(files), picture)
        results.write(pictured=best)
    return {"runs": results.runs, **results.summary}


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


def summarise(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Median and range of KL over seeds, and the best of the first three, by cell."""
    cells: dict[str, dict[int, dict[str, Any]]] = {}
    for key, found in runs.items():
        cell, seed = key.split(" seed=")
        cells.setdefault(cell, {})[int(seed)] = found
    return {cell: _summary(by_seed) for cell, by_seed in sorted(cells.items())}


def table(report: dict[str, Any]) -> str:
    """KL by energy and length: medians and ranges over seeds, and the best of three."""
    head = f"{'KL, nats':<12}{'reference':>10}{'best of 3':>11}"
    lines = [head + "".join(f"{kind:>26}" for kind in KINDS) + f"{'NICE floor':>12}"]
    for number in ENERGIES:
        for K, reference in zip(LENGTHS, REFERENCE[number], strict=True):
            cells = [report["summary"].get(f"U{number} {kind} K={K}") for kind in KINDS]
            line = f"U{number}, K = {K:<5}{reference:>10.3f}{_best(cells[0]):>11}"
            line += "".join(f"{_span(cell):>26}" for cell in cells)
            lines.append(line + f"{report['nice_floors'][f'U{number}']:>12.3f}")
    lines.append("planar and NICE: median (lowest to highest); reference: planar, a plain recipe")
    return "\n".join(lines)


def _keys(options: Options) -> list[str]:
    """The runs in their order: planar flows first."""
    return [
        f"U{number} {kind} K={K} seed={seed}"
        for kind in KINDS
        for seed in range(options.seeds or (1 if options.quick else SEEDS))
        for K in LENGTHS
        for number in ENERGIES
    ]


def _budget(quick: bool) -> dict[str, int]:
    if quick:
        return {"steps": 40, "num_particles": 64, "fresh": 10_000}
    return {"steps": 3000, "num_particles": 256, "fresh": 100_000}


def _fitted(key: str, folder: Path, *, fresh: int, **options: int) -> dict[str, Any]:
    """One fit, and its numbers from fresh draws; a picture of its density is left in the folder."""
    number, kind, K, seed = _parts(key)
    with seeded(seed):
        flow = make_flow(kind, K)
    fit = fit_energy(
        flow,
        energy(number),
        annealing=annealing(options["steps"]),
        lr=RATES[kind],
        seed=seed,
        progress=False,
        checkpoint=_checkpoint(folder, key),
        **options,
    )
    q = copy.deepcopy(flow).double()()
    judged = _judged(q, energy(number), fresh)
    figure3_drawing.keep_density(q.log_prob, judged["kl"], _density_file(folder, key))
    return judged | {
        "parameters": sum(p.numel() for p in flow.parameters()),
        "updates": fit.steps,
        "seconds": round(fit.seconds, 1),
        "stopped": fit.stopped,
    }


def _with_progress(keys: list[str], options: Options) -> Iterator[str]:
    for key in (bar := tqdm(keys, desc="figure3", disable=not (keys and options.progress))):
        bar.set_postfix_str(key)
        yield key


def _densities(
    keys: dict[str, str], folder: Path, options: Options, budget: dict[str, int]
) -> dict[str, Path]:
    """By cell, the file of the panel; what is missing, as in a fresh clone, is fitted again."""
    files = {cell: _density_file(folder, key) for cell, key in keys.items()}
    missing = [keys[cell] for cell, file in files.items() if not file.exists()]
    for key in _with_progress(missing, options):
        _fitted(key, folder, **budget)
        _checkpoint(folder, key).unlink(missing_ok=True)
    return files


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


def _summary(by_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    kl = {seed: found["kl"] for seed, found in by_seed.items()}
    first = [kl[seed] for seed in range(3) if seed in kl]
    return {
        "seeds": len(kl),
        "median": median(kl.values()),
        "low": min(kl.values()),
        "high": max(kl.values()),
        "best_of_three": min(first) if first else None,
        "least_mass_inside": min(found["mass_inside"] for found in by_seed.values()),
    }


def _span(cell: dict[str, Any] | None) -> str:
    return f"{cell['median']:.3f} ({cell['low']:.3f} to {cell['high']:.3f})" if cell else "-"


def _best(cell: dict[str, Any] | None) -> str:
    return f"{cell['best_of_three']:.4f}" if cell and cell["best_of_three"] is not None else "-"


def _parts(key: str) -> tuple[int, str, int, int]:
    """Energy, kind, K and seed of a run."""
    name, *kind, length, seed = key.split()
    return int(name[1:]), " ".join(kind), int(length[2:]), int(seed[5:])


def _checkpoint(folder: Path, key: str) -> Path:
    return folder / f"{key}.pt"


def _density_file(folder: Path, key: str) -> Path:
    return folder / f"{key} density.pt"
