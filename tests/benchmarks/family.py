"""Planar, Sylvester and radial layers at equal numbers of parameters and equal seconds.

python tests/benchmarks/family.py fits each family to the sine data, two moons and a ring with
three seeds, prints the held-out negative log likelihoods as a table, and writes
notebooks/results/family.json and family.png. The pace of a family's last fit sets how many
steps the next one gets, so that all take about ten seconds on the machine at hand, or less where
the held-out loss no longer falls. One thread, six minutes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import pyroflow as pf
from pyroflow import datasets
from pyroflow.plots import drawing
from pyroflow.plots.drawing import Bounds, LogProb

OUT = Path(__file__).resolve().parents[2] / "notebooks" / "results"
SEEDS = (0, 1, 2)
POINTS, FRESH = 10_000, 100_000
BUDGET = 10.0  # seconds of a fit

# 160 trained numbers each, beside the affine layer that all have.
FAMILIES: dict[str, Callable[[], pf.Flow]] = {
    "planar": lambda: pf.planar_flow(2, num_layers=32),
    "Sylvester": lambda: pf.sylvester_flow(2, 2, num_layers=20, orthogonal="triangular"),
    "radial": lambda: pf.radial_flow(2, num_layers=40),
}
SETS: dict[str, tuple[Callable[..., Tensor], LogProb, Bounds]] = {
    "sine": (datasets.sine, datasets.sine_log_prob, (-3.4, 3.4)),
    "two moons": (datasets.two_moons, datasets.two_moons_log_prob, ((-1.4, 2.4), (-1.65, 2.15))),
    "ring": (datasets.ring, datasets.ring_log_prob, (-1.6, 1.6)),
}


def count(flow: pf.Flow) -> int:
    """Trained numbers of the layers; of R and R̃ only the upper triangles count."""
    layers = dict(flow.parts[0].named_parameters())
    triangles = [layers.pop(name) for name in ("R", "R_tilde") if name in layers]
    free = sum(t.shape[0] * t.shape[1] * (t.shape[1] + 1) // 2 for t in triangles)
    return free + sum(t.numel() for t in layers.values())


def options(pace: float) -> dict[str, int]:
    """Of a fit that takes BUDGET at this pace, with the defaults' share of polish."""
    third = max(1, round(BUDGET / pace / 3))
    return {"steps": third, "polish": 2 * third}


def short_pace(make: Callable[[], pf.Flow]) -> float:
    """Seconds a step in the second of two short fits: the first one loads code."""
    data = datasets.ring(POINTS)
    fits = [
        pf.fit_density(make(), data, steps=n, polish=2 * n, seed=0, progress=False) for n in (5, 50)
    ]
    return fits[-1].seconds / fits[-1].steps


def log_prob_of(log_prob: LogProb, points: Tensor) -> Tensor:
    """In parts, which keeps the memory small."""
    with torch.no_grad():
        return torch.cat([log_prob(part) for part in points.split(10_000)])


def compare(pace: dict[str, float], name: str) -> tuple[dict[str, Any], dict[str, pf.Flow]]:
    """The floor and the scores of each family for one data set, and the flows of the first seed.

    A fit that takes all its steps sets the pace of its family's next one.
    """
    draw, log_prob, _ = SETS[name]
    fresh = draw(FRESH, seed=10**6)
    log_p = log_prob_of(log_prob, fresh)
    found, flows = {"floor": round(-log_p.mean().item(), 4)}, {}
    for family, make in FAMILIES.items():
        found[family] = {}
        for seed in SEEDS:
            flow, data = make(), draw(POINTS, seed=100 + seed)
            fit = pf.fit_density(flow, data, seed=seed, progress=False, **options(pace[family]))
            if fit.stopped.startswith("all"):
                pace[family] = fit.seconds / fit.steps
            log_q = log_prob_of(lambda y, flow=flow: flow().log_prob(y), fresh)
            found[family][f"seed {seed}"] = {
                "nll": round(-log_q.mean().item(), 4),
                "gap": round((log_p - log_q).mean().item(), 4),
                "seconds": round(fit.seconds, 1),
                "steps": fit.steps,
                "stopped": fit.stopped,
            }
            flows.setdefault(family, flow)
    return found, flows


def draw_row(figure: Any, name: str, found: dict[str, Any], flows: dict[str, pf.Flow]) -> None:
    """The exact density of a data set and its fits on one colour scale."""
    _, log_prob, bounds = SETS[name]
    limits = drawing.axis_limits(bounds)
    with torch.no_grad():
        exact = f"{name}: exact, NLL {found['floor']:.3f}"
        panels = {exact: drawing.on_grid(log_prob, limits).exp()}
        for family, flow in flows.items():
            title = f"{family}: NLL {found[family]['seed 0']['nll']:.3f}"
            panels[title] = drawing.on_grid(flow().log_prob, limits).exp()
    drawing.heatmaps(panels, limits, ["$x_1$", "$x_2$"], figure)


def frame(report: dict[str, Any]) -> pd.DataFrame:
    """The median NLL, the median and the range of the gap, and the median seconds, as text."""
    rows = []
    for name, found in report["data"].items():
        row = {"data (floor)": f"{name} ({found['floor']:.4f})"}
        for family in FAMILIES:
            nll, gap, seconds = (
                sorted(seed[key] for seed in found[family].values())
                for key in ("nll", "gap", "seconds")
            )
            spread = f"{median(gap):.4f} ({gap[0]:.4f} to {gap[-1]:.4f})"
            row[family] = f"{median(nll):.4f}; {spread}; {median(seconds):.0f} s"
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    """Run every case, and write after each data set."""
    torch.set_num_threads(1)
    pace = {family: short_pace(make) for family, make in FAMILIES.items()}
    report: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "seconds allowed": BUDGET,
        "parameters": {family: count(make()) for family, make in FAMILIES.items()},
        "data": {},
    }
    figure = drawing.ShownFigure(figsize=(12.4, 10.4), layout="constrained")
    parts = dict(zip(SETS, figure.subfigures(len(SETS), 1), strict=True))
    for name, part in parts.items():
        report["data"][name], flows = compare(pace, name)
        draw_row(part, name, report["data"][name], flows)
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / "family.json").write_text(json.dumps(report, indent=2) + "\n")
    figure.savefig(OUT / "family.png", dpi=85)
    print(frame(report).to_string(index=False))


if __name__ == "__main__":
    main()
