"""The pictures of figure 3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyroflow.io import read_data, write_data
from pyroflow.plots.drawing import COLOURS
from pyroflow.targets import energy
from rezende_mohamed_2015.results import Run

WINDOW = 4.0
PIXELS = 140
COLUMNS = [(kind, K) for kind in ("planar", "NICE orthogonal") for K in (2, 8, 32)]
STYLES = {"planar": "o-", "NICE permutation": "s--", "NICE orthogonal": "^:"}


def keep_density(log_prob: Callable[[Tensor], Tensor], kl: float, file: Path) -> None:
    """Save what a panel shows of a run."""
    write_data(file, (_density(log_prob), kl))


def shown(runs: Sequence[Run]) -> list[Run]:
    """Of the runs that have a panel, the columns of that with the least KL of its seeds."""
    frame = pd.DataFrame(runs).sort_values(["energy", "kind", "K", "kl"])
    best = frame.drop_duplicates(["energy", "kind", "K"])[["energy", "kind", "K", "seed"]]
    return [run for run in best.to_dict("records") if (run["kind"], run["K"]) in COLUMNS]


def densities(files: Sequence[tuple[Run, Path]]) -> Figure:
    """The exact densities, and the fit in the file of each run, an energy a row.

    Colours go up to the value that one pixel in a thousand exceeds, in each panel.
    """
    panels = {(run["energy"], run["kind"], run["K"]): read_data(file) for run, file in files}
    figure = Figure(figsize=(1.75 * (1 + len(COLUMNS)), 7.9), layout="compressed")
    grid = figure.subplots(4, 1 + len(COLUMNS))
    for number, row in enumerate(grid, start=1):
        _panel(row[0], _exact(number), None)
        row[0].set_ylabel(f"$U_{number}$")
        for ax, (kind, K) in zip(row[1:], COLUMNS, strict=True):
            _panel(ax, *panels.get((f"U{number}", kind, K), (None, None)))
            if number == 1:
                ax.set_title(f"{kind}\nK = {K}", fontsize=9)
    grid[0, 0].set_title("exact", fontsize=9)
    figure.suptitle("Densities on $(-4, 4)^2$; of each fit, the best seed", fontsize=10)
    return figure


def lengths(cells: pd.DataFrame, floors: dict[str, float], limits: dict[str, float]) -> Figure:
    """Figure 3(d): KL, and the bound F = KL − ln Z, against the flow length, an energy a column.

    Lines are medians over the seeds, bands their ranges.
    """
    figure = Figure(figsize=(13, 6.4), layout="compressed")
    upper, lower = figure.subplots(2, len(floors), sharex=True, squeeze=False)
    for ax, below, (name, floor) in zip(upper, lower, floors.items(), strict=True):
        for colour, (kind, style) in zip(COLOURS, STYLES.items(), strict=False):
            options = {"color": colour, "label": kind}
            found = cells[(cells.energy == name) & (cells.kind == kind)].sort_values("K")
            _curve(ax, found, style, 0.0, **options)
            _curve(below, found, style, limits[name], **options)
        ax.axhline(floor, color="0.4", linewidth=1, label="least KL of any NICE")
        below.axhline(limits[name], color="k", linewidth=1, linestyle=":", label="$-$ln Z")
        ax.sharey(upper[0])
        ax.set(yscale="log", title=f"$U_{name[1:]}$")
        below.set(xscale="log", xlabel="flow length K", xlim=(1.6, 40))
        below.set_xticks([2, 8, 32], ["2", "8", "32"])
        below.minorticks_off()
    upper[0].set_ylim(max(cells.low.min() / 2, 1e-5), 2 * cells.high.max())
    upper[0].set_ylabel("KL(q‖p), nats")
    lower[0].set_ylabel("bound F, nats")
    figure.suptitle("Medians over the seeds, and their ranges", fontsize=10)
    labelled = [*upper[0].lines, lower[0].lines[-1]]
    figure.legend(handles=labelled, loc="outside lower center", ncols=5, frameon=False)
    return figure


def _curve(ax: Axes, cells: pd.DataFrame, style: str, shift: float, **options: Any) -> None:
    ax.plot(cells.K, cells["median"] + shift, style, markersize=4, **options)
    low, high = cells.low + shift, cells.high + shift
    ax.fill_between(cells.K, low, high, color=options["color"], alpha=0.15, linewidth=0)


def _panel(ax: Axes, density: Tensor | None, kl: float | None) -> None:
    ax.set(xticks=[], yticks=[])
    if density is None:
        ax.set_axis_off()
        return
    top = density.quantile(0.999).item()
    ax.imshow(density.numpy(), origin="lower", cmap="magma", vmin=0.0, vmax=top)
    if kl is not None:
        ax.set_xlabel(f"KL {kl:.3f}", fontsize=8, labelpad=2)


def _exact(number: int) -> Tensor:
    target = energy(number)
    return _density(lambda z: -target(z))


@torch.no_grad()
def _density(log_prob: Callable[[Tensor], Tensor]) -> Tensor:
    """What log_prob is the log of, at the centres of cells, row i being the i-th z2."""
    places = WINDOW * ((torch.arange(PIXELS, dtype=torch.float64) + 0.5) / PIXELS * 2 - 1)
    points = torch.cartesian_prod(places, places).flip(-1)
    return log_prob(points).exp().view(PIXELS, PIXELS).float()
