"""Sylvester flows of 40 units in the same model of MNIST, beside a planar flow of 40 layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch.distributions import Transform

from pyroflow.plots.drawing import save_figure
from pyroflow.transforms import ConditionalSylvester
from rezende_mohamed_2015 import mnist
from rezende_mohamed_2015.dlgm_study import run_study, settings
from rezende_mohamed_2015.results import Options, Run, label

UNITS = {"householder": 8, "qr": 8, "triangular": mnist.LATENT}  # M; a fixed Q leaves D − 2M alone
LENGTH = 40  # M · L, the length of the planar flow beside them
FLOW_LR = 2e-3

# van den Berg et al. 2018: 16 layers, 64 latents, M = D for the householder and triangular kinds,
# another orthogonalisation in place of qr, and a far stronger encoder and decoder. A second source
# confirms the bounds of planar and of the kind beside qr; the others are quoted from memory.
THEIRS = {
    "planar": "86.06 / 81.91",
    "householder": "83.40 / 80.29",
    "qr": "83.32 / 80.22",
    "triangular": "83.40 / 80.28",
}


def run(options: Options) -> dict[str, Any] | None:
    """Train and score the three kinds on ``options.data``, with the model and updates of mnist.

    The planar flow beside them is that of mnist.json in the same folder, if it is there with the
    same settings but for the rate: each kind of layer has the one that was chosen for it.

    Returns:
        The report: the runs, and the planar flow's under "planar". None on other ranks than 0.

    Raises:
        ValueError: no ``data``.
        OSError: no MNIST there.
    """
    flows = [{"kind": kind, "M": M, "L": LENGTH // M} for kind, M in UNITS.items()]
    study = mnist.study("sylvester", flows, layers, options)
    schedules = _at_rate(study.facts["schedules"], FLOW_LR)
    schedule = replace(study.schedule, flow_lr=FLOW_LR)
    study = replace(study, schedule=schedule, facts={**study.facts, "schedules": schedules})
    beside = planar(options.out / "mnist.json", settings(study, options.quick))
    report = run_study(study, options)
    if report is not None:
        report |= {"planar": beside}
        save_figure(draw(report), options.out / "sylvester.png")
    return report


def planar(file: Path, ours: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of a planar flow of the same length and, but for its rate, the same settings."""
    if not file.exists():
        return []
    report = json.loads(file.read_text())
    theirs, ours = (
        settings | {"schedules": _at_rate(settings.get("schedules", {}), FLOW_LR)}
        for settings in (report["settings"], ours)
    )
    if theirs != ours:
        return []
    return [run for run in report["runs"] if (run["kind"], run["K"]) == ("planar", LENGTH)]


def _at_rate(schedules: Mapping[str, Any], flow_lr: float) -> dict[str, Any]:
    return {draws: {**schedule, "flow_lr": flow_lr} for draws, schedule in schedules.items()}


def layers(kind: str, M: int, L: int) -> list[Transform]:
    """L amortised Sylvester layers of M units; parameters linear in the hidden units."""
    return [ConditionalSylvester(mnist.LATENT, mnist.HIDDEN, M, L, kind, hidden_dims=())]


def draw(report: dict[str, Any]) -> Figure:
    """−ELBO and −ln p(x), with two standard errors over the images."""
    runs = [*report["planar"], *report["runs"]]
    figure = Figure(figsize=(7, 0.8 + 0.3 * len(runs)), layout="constrained")
    ax = figure.subplots()
    places = range(len(runs))
    for name, title, colour in (("free_energy", "$-$ELBO", "C7"), ("nll", "$-$ln p(x)", "C0")):
        values = [run[name] for run in runs]
        errors = [2 * run[f"{name}_se"] for run in runs]
        ax.errorbar(values, places, xerr=errors, fmt="o", capsize=3, color=colour, label=title)
    ax.set(yticks=places, xlabel="nats", ylim=(len(runs) - 0.5, -0.5))
    ax.set_yticklabels([_label(run) for run in runs], fontsize=8)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return figure


def _label(run: Run) -> str:
    return label({c: run[c] for c in ("kind", "K", "M", "L", "draws", "seed") if c in run})
