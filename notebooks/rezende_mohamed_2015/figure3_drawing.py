"""The pictures of figure 3."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyroflow.drawing import COLOURS
from pyroflow.io import packed, read_data, write_whole
from pyroflow.targets import energy

WINDOW = 4.0
PIXELS = 140
COLUMNS = [f"{kind} K={K}" for kind in ("planar", "NICE orthogonal") for K in (2, 8, 32)]
STYLES = {"planar": "o-", "NICE permutation": "s--", "NICE orthogonal": "^:"}


def keep_density(log_prob: Callable[[Tensor], Tensor], kl: float, file: Path) -> None:
    """Save what a panel shows of a run."""
    write_whole(file, packed((_density(log_prob), kl)))


def shown(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The runs that have a panel, by cell, such as "U1 planar K=2": those of the least KL."""
    best: dict[str, str] = {}
    for key, found in runs.items():
        cell = key.split(" seed=")[0]
        if cell[3:] in COLUMNS and (cell not in best or found["kl"] < runs[best[cell]]["kl"]):
            best[cell] = key
    return best


def densities(files: Mapping[str, Path]) -> Figure:
    """The exact densities, and the fit of each cell's file, an energy a row.

    Colours go up to the value that one pixel in a thousand exceeds, in each panel.
    """
    panels = {cell: read_data(file) for cell, file in files.items()}
    columns = ["exact", *COLUMNS]
    figure = Figure(figsize=(1.75 * len(columns), 7.9), layout="compressed")
    grid = figure.subplots(4, len(columns))
    for number, row in enumerate(grid, start=1):
        content = {"exact": (_exact(number), None)} | {
            column: panels.get(f"U{number} {column}", (None, None)) for column in COLUMNS
        }
        for ax, (column, (density, kl)) in zip(row, content.items(), strict=True):
            _panel(ax, density, kl)
            if number == 1:
                ax.set_title(column.replace(" K=", "\nK = "), fontsize=9)
        row[0].set_ylabel(f"$U_{number}$")
    figure.suptitle("Densities on $(-4, 4)^2$; of each fit, the best seed", fontsize=10)
    return figure


def lengths(
    summary: dict[str, dict[str, Any]], floors: dict[str, float], limits: dict[str, float]
) -> Figure:
    """Figure 3(d): KL, and the bound F = KL − ln Z, against the flow length, an energy a column.

    Lines are medians over the seeds, bands their ranges.
    """
    figure = Figure(figsize=(13, 6.4), layout="compressed")
    upper, lower = figure.subplots(2, len(floors), sharex=True, squeeze=False)
    for ax, below, (name, floor) in zip(upper, lower, floors.items(), strict=True):
        for colour, (kind, style) in zip(COLOURS, STYLES.items(), strict=False):
            options = {"color": colour, "label": kind}
            _curve(ax, summary, f"{name} {kind}", style, 0.0, **options)
            _curve(below, summary, f"{name} {kind}", style, limits[name], **options)
        ax.axhline(floor, color="0.4", linewidth=1, label="least KL of any NICE")
        below.axhline(limits[name], color="k", linewidth=1, linestyle=":", label="$-$ln Z")
        ax.sharey(upper[0])
        ax.set(yscale="log", title=f"$U_{name[1:]}$")
        below.set(xscale="log", xlabel="flow length K", xlim=(1.6, 40))
        below.set_xticks([2, 8, 32], ["2", "8", "32"])
        below.minorticks_off()
    upper[0].set_ylabel("KL(q‖p), nats")
    lower[0].set_ylabel("bound F, nats")
    figure.suptitle("Medians over the seeds, and their ranges", fontsize=10)
    labelled = [*upper[0].lines, lower[0].lines[-1]]
    figure.legend(handles=labelled, loc="outside lower center", ncols=5, frameon=False)
    return figure


def _curve(
    ax: Axes, summary: dict[str, dict], name: str, style: str, shift: float, **options: Any
) -> None:
    found = [(K, summary[f"{name} K={K}"]) for K in (2, 8, 32) if f"{name} K={K}" in summary]
    x = [K for K, _ in found]
    low, middle, high = (
        [cell[part] + shift for _, cell in found] for part in ("low", "median", "high")
    )
    ax.plot(x, middle, style, markersize=4, **options)
    ax.fill_between(x, low, high, color=options["color"], alpha=0.15, linewidth=0)


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
