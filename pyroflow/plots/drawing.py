"""What the figures of :mod:`pyroflow.plots` are drawn with."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Distribution, Transform
from torch.nn.functional import avg_pool2d

from pyroflow.io import write_whole

Pair = tuple[float, float]
Bounds = Pair | tuple[Pair, Pair]
LogProb = Callable[[Tensor], Tensor]
Flow = Distribution | Callable[[], Distribution]

COLOURS = ("#c8385a", "#0f7f8c", "#e39b1e", "#5b4b9a", "#3a7d44")
DATA, FLOW = COLOURS[1], COLOURS[0]  # wherever data are beside a flow
# Of densities: 0 is the white of the page, and each step is darker.
DENSITY = LinearSegmentedColormap.from_list(
    "density", ["#ffffff", "#b9dfdf", COLOURS[1], "#1b3a5c", "#0d1b33"]
)
CORNERS = ((0.1, 0.2, 0.6), (0.8, 0.1, 0.4), (0.0, 0.6, 0.6), (1.0, 0.7, 0.1))
FILL = 0.5  # the alpha of areas
PART = 10_000  # simulations at once
CELLS = 40  # along each axis, behind contours


class ShownFigure(Figure):
    """A figure that a notebook shows even where pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        return _image(self, "png")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the file's ending, small enough to keep beside the code."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, _image(figure, path.suffix[1:], dpi=110))


def _image(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def panels(
    figure: Figure | None, count: int, width: float, height: float, columns: int = 4, **options: Any
) -> tuple[Figure, list[Axes]]:
    """At least ``count`` axes in rows, on a new figure where none is given."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = figure or ShownFigure(figsize=(width * columns, height * rows), layout="compressed")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for ax in axes:
        ax.set_prop_cycle(color=COLOURS)
    return figure, axes


def span(values: np.ndarray, margin: float = 0.0) -> Pair:
    """Where the central 99.5 % of values lie, or all if these are equal, and a margin of that."""
    low, high = np.quantile(values, [0.0025, 0.9975])
    low, high = (low, high) if low < high else (values.min(), values.max())
    return float(low - margin * (high - low)), float(high + margin * (high - low))


def axis_limits(bounds: Bounds | None, data: Tensor | None = None) -> tuple[Pair, Pair]:
    """((left, right), (bottom, top)), by the span of the data where no bounds are given."""
    if bounds is None:
        limits = [span(values, 0.05) for values in data.double().cpu().numpy().T]
    else:
        limits = np.broadcast_to(bounds, (2, 2)).tolist()
    if not all(low < high for low, high in limits):
        raise ValueError(f"bounds expects low < high for each axis, got {bounds}.")
    return limits


def cell_area(limits: tuple[Pair, Pair], cells: int) -> float:
    """The area of one of cells × cells cells."""
    return float(np.prod(np.diff(limits))) / cells**2


def histogram(points: Tensor, limits: tuple[Pair, Pair], bins: int) -> Tensor:
    """Density of the points by cell, rows along x2; points outside count in the total."""
    x1, x2 = points.detach().cpu().numpy().T
    counts, _, _ = np.histogram2d(x2, x1, bins=bins, range=limits[::-1])
    return torch.from_numpy(counts / (len(x1) * cell_area(limits, bins)))


def marginals(ax: Axes, draws: Mapping[str, np.ndarray], limits: Pair, colours: Sequence) -> None:
    """Densities over the limits, the first one filled; values beyond them count in the total."""
    first = len(next(iter(draws.values())))
    edges = np.linspace(*limits, int(np.clip(2 * first ** (1 / 3), 10, 50)) + 1)
    for number, ((label, values), colour) in enumerate(zip(draws.items(), colours, strict=False)):
        heights = np.histogram(values, edges)[0] / (len(values) * np.diff(edges))
        style = {"linewidth": 1.3} if number else {"fill": True, "alpha": FILL}
        ax.stairs(heights, edges, label=label, color=colour, **style)
    ax.set(yticks=[], xlim=limits, ylim=(0, None))
    ax.spines[["top", "left", "right"]].set_visible(False)


def contours(
    ax: Axes, points: Tensor, limits: tuple[Pair, Pair], shares: Sequence[float], colour: str
) -> None:
    """Lines around the densest cells, smoothed, that hold shares of the points (n, 2)."""
    density = histogram(points, limits, CELLS)[None]
    for _ in range(2):
        density = avg_pool2d(density, 3, stride=1, padding=1, count_include_pad=False)
    ordered = density.flatten().sort(descending=True).values
    held = ordered.cumsum(0) * cell_area(limits, CELLS)
    levels = {float(ordered[held >= share][0]) for share in shares if share <= float(held[-1])}
    if levels := sorted(levels - {0.0}):
        places = (np.arange(CELLS) + 0.5) / CELLS
        x, y = (low + (high - low) * places for low, high in limits)
        ax.contour(x, y, density[0].numpy(), levels=levels, colors=colour, linewidths=1.0)


@cache
def ecdf_band(num: int, level: float, cells: int) -> np.ndarray:
    """How far at most the ECDF of uniform values lies from k/cells, at all k at once.

    Its distance has the sd sqrt(p (1 - p) / num) at p = k/cells, and the band is a multiple of it
    that holds all of them with probability ``level``, by simulations with a fixed seed.
    """
    places = np.arange(1, cells) / cells
    sd = np.sqrt(places * (1 - places) / num)
    generator, largest = np.random.default_rng(0), []
    for _ in range(max(1, math.ceil(20 / (1 - level) / PART))):  # twenty that are to lie outside
        counts = generator.multinomial(num, np.full(cells, 1 / cells), PART)
        distances = np.abs(counts[:, :-1].cumsum(1) / num - places) / sd
        largest.append(distances.max(1))
    return np.quantile(np.concatenate(largest), level) * sd


def ecdf_lines(ax: Axes, uniforms: Sequence[np.ndarray], num: float, level: float) -> bool:
    """Distances of ECDFs from that of uniform values, in a band; whether one of them leaves it.

    The band is to hold each of them with probability ``level``; their noise is that of ``num``
    independent values.
    """
    cells = int(np.clip(num // 5, 4, 100))
    places, band = np.arange(cells + 1) / cells, np.zeros(cells + 1)
    band[1:-1] = ecdf_band(int(num), level, cells)
    ax.fill_between(places, -band, band, color="0.88", linewidth=0)
    ax.axhline(0.0, color="0.6", linewidth=0.8)
    outside = False
    for values in uniforms:
        distance = np.searchsorted(np.sort(values), places, side="right") / len(values) - places
        distance[[0, -1]] = 0.0
        leaves = bool((np.abs(distance) > band + 1e-12).any())
        colour, order = (FLOW, 3) if leaves else (DATA, 2)
        ax.plot(places, distance, color=colour, zorder=order, linewidth=1.2)
        outside |= leaves
    ax.set(xlim=(0, 1), xticks=[0, 0.5, 1])
    ax.spines[["top", "right"]].set_visible(False)
    return outside


def on_grid(log_prob: LogProb, limits: tuple[Pair, Pair], like: Tensor | None = None) -> Tensor:
    """Log densities at the centres of 200 by 200 cells; row i is the i-th x2."""
    like = torch.empty(0, device="cpu") if like is None else like
    centres = (torch.arange(200, dtype=torch.float64, device="cpu") + 0.5) / 200
    x1, x2 = (low + (high - low) * centres for low, high in limits)
    points = torch.cartesian_prod(x2, x1).flip(-1).to(like)
    return log_prob(points).view(200, 200).double().cpu()


def heatmaps(
    densities: Mapping[str, Tensor],
    limits: tuple[Pair, Pair],
    labels: Sequence[str],
    figure: Figure | None,
) -> Figure:
    """One panel for each density, with one colour scale and bar; the labels are of the axes.

    The first panel, which is the data or the exact density, sets the scale: a density that is too
    narrow is cut off at its end, and does not make the others pale.
    """
    (left, right), (bottom, top) = limits
    ratio = (right - left) / (top - bottom)
    # Of columns with very different units a unit of length would mean nothing.
    aspect, ratio = ("equal", ratio) if 1 / 3 < ratio < 3 else ("auto", 1.0)
    width = min(max(3.6 * ratio, 1.5), 6.0) + 0.4
    figure, axes = panels(figure, len(densities), width, 4.4, columns=len(densities))
    # The highest mean of 4 by 4 cells: a single cell of a histogram is mostly noise.
    finite = [density.nan_to_num(0.0, 0.0)[None] for density in densities.values()]
    peaks = [float(avg_pool2d(f, min(4, f.shape[-1]), stride=1).max()) for f in finite]
    norm = Normalize(0, next((peak for peak in peaks if peak), 1.0))
    style = {"extent": (left, right, bottom, top), "origin": "lower", "cmap": DENSITY}
    for ax, (title, density) in zip(axes, densities.items(), strict=True):
        image = ax.imshow(density.numpy(), norm=norm, aspect=aspect, **style)
        ax.set(title=title, xlabel=labels[0], ylabel=labels[1])
        ax.label_outer()
    figure.colorbar(image, ax=axes, label="density", extend="max", pad=0.02)
    return figure


def transforms_of(subject: Transform | Flow) -> list[Transform]:
    """The transforms of a transform, a distribution or a flow, from base to data."""
    if not isinstance(subject, (Transform, Distribution)):
        subject = subject()
    given = [subject] if isinstance(subject, Transform) else getattr(subject, "transforms", [])
    return [part for t in given for part in (t.parts if isinstance(t, ComposeTransform) else [t])]


def grid_images(steps: list[Transform], bounds: Pair) -> list[Tensor]:
    """Points of shape (lines, places, 2) along a grid, before and after each step."""
    parameters = (p for t in steps if isinstance(t, nn.Module) for p in t.parameters())
    like = next(parameters, torch.empty(0, device="cpu"))
    across, along = (torch.linspace(*bounds, num, device="cpu") for num in (25, 145))
    vertical = torch.cartesian_prod(across, along).view(25, 145, 2)
    images = [torch.cat([vertical, vertical.flip(-1)]).to(like)]
    with torch.no_grad():
        for step in steps:
            images.append(step(images[-1]))
    return [image.double().cpu() for image in images]


def coloured_lines(base: Tensor, image: Tensor) -> LineCollection:
    """Grid lines after a map, coloured by where they lay before it."""
    place = (base[:, 1:] + base[:, :-1]).flatten(0, 1) / 2
    low, high = base.amin((0, 1)), base.amax((0, 1))
    s, t = ((place - low) / (high - low)).unbind(-1)
    weights = torch.stack([(1 - s) * (1 - t), s * (1 - t), (1 - s) * t, s * t], dim=-1)
    colours = (weights @ weights.new_tensor(CORNERS)).numpy()
    segments = torch.stack([image[:, :-1], image[:, 1:]], dim=2).flatten(0, 1).numpy()
    return LineCollection(segments, colors=colours, linewidths=1.2, capstyle="round")


def scalars_of(sites: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """One array of draws for each scalar of each site."""
    scalars = {}
    for name, draws in sites.items():
        columns = draws.detach().cpu().reshape(len(draws), -1).double().numpy().T
        for index, values in zip(np.ndindex(draws.shape[1:]), columns, strict=True):
            label = f"{name}[{','.join(map(str, index))}]" if len(columns) > 1 else name
            scalars[label] = values
    return scalars
