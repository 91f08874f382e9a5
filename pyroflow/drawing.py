"""What the figures of :mod:`pyroflow.plots` are drawn with."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Distribution, Transform

from pyroflow.checks import check_data
from pyroflow.io import write_whole

Pair = tuple[float, float]
Bounds = Pair | tuple[Pair, Pair]
LogProb = Callable[[Tensor], Tensor]
Flow = Distribution | Callable[[], Distribution]

COLOURS = ("#c8385a", "#0f7f8c", "#e39b1e", "#5b4b9a", "#3a7d44")
CORNERS = ((0.1, 0.2, 0.6), (0.8, 0.1, 0.4), (0.0, 0.6, 0.6), (1.0, 0.7, 0.1))


class ShownFigure(Figure):
    """A figure that a notebook shows even where pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def row(figure: Figure | None, n: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with n axes in a row, or n axes on the given figure."""
    figure = figure or ShownFigure(figsize=(width * n, height), layout="compressed")
    axes = list(figure.subplots(1, n, squeeze=False)[0])
    for ax in axes:
        ax.set_prop_cycle(color=COLOURS)
    return figure, axes


def limits_of(bounds: Bounds | None, data: Tensor) -> tuple[Pair, Pair]:
    """((left, right), (bottom, top)), from the data with a margin where no bounds are given."""
    if bounds is None:
        low, high = data.amin(0), data.amax(0)
        margin = 0.05 * (high - low)
        limits = torch.stack([low - margin, high + margin], dim=1).tolist()
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


def on_grid(log_prob: LogProb, limits: tuple[Pair, Pair], like: Tensor | None = None) -> Tensor:
    """Log densities at the centres of 200 by 200 cells; row i is the i-th x2."""
    like = torch.empty(0) if like is None else like
    centres = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    x1, x2 = (low + (high - low) * centres for low, high in limits)
    points = torch.cartesian_prod(x2, x1).flip(-1).to(like)
    return log_prob(points).view(200, 200).double().cpu()


def heatmaps(
    panels: Mapping[str, Tensor], limits: tuple[Pair, Pair], letter: str, figure: Figure | None
) -> Figure:
    """One panel for each density, on one colour scale with one bar."""
    (left, right), (bottom, top) = limits
    width = min(max(3.6 * (right - left) / (top - bottom), 1.5), 6.0) + 0.4
    figure, axes = row(figure, len(panels), width, 4.4)
    norm = Normalize(0, max(map(peak, panels.values())) or 1.0)
    style = {"extent": (left, right, bottom, top), "origin": "lower", "cmap": "magma"}
    for ax, (title, density) in zip(axes, panels.items(), strict=True):
        image = ax.imshow(density.numpy(), norm=norm, **style)
        ax.set(title=title, xlabel=f"${letter}_1$", ylabel=f"${letter}_2$")
        ax.label_outer()
    figure.colorbar(image, ax=axes, label="density", extend="max", pad=0.02)
    return figure


def peak(density: Tensor) -> float:
    """Highest mean of 4 by 4 cells: a single cell of a histogram is mostly noise."""
    finite = density.nan_to_num(0.0, 0.0)[None]
    return float(nn.functional.avg_pool2d(finite, min(4, len(density)), stride=1).max())


def transforms_of(subject: Transform | Flow) -> list[Transform]:
    """The transforms of a transform, a distribution or a flow, from base to data."""
    if not isinstance(subject, (Transform, Distribution)):
        subject = subject()
    given = [subject] if isinstance(subject, Transform) else getattr(subject, "transforms", [])
    return [part for t in given for part in (t.parts if isinstance(t, ComposeTransform) else [t])]


def images_of(steps: list[Transform], bounds: Pair) -> list[Tensor]:
    """Points of shape (lines, places, 2) along a grid, before and after each step."""
    parameters = (p for t in steps if isinstance(t, nn.Module) for p in t.parameters())
    like = next(parameters, torch.empty(0))
    across, along = torch.linspace(*bounds, 25), torch.linspace(*bounds, 145)
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
    colours = weights @ weights.new_tensor(CORNERS)
    segments = torch.stack([image[:, :-1], image[:, 1:]], dim=2).flatten(0, 1)
    return LineCollection(
        segments.numpy(), colors=colours.numpy(), linewidths=1.2, capstyle="round"
    )


def draw_curve(ax: Axes, steps: np.ndarray, values: np.ndarray, label: str | None) -> None:
    """A noisy curve with its running median."""
    parts = min(100, len(values))
    middle = [np.median(part) for part in np.array_split(steps, parts)]
    smooth = [np.median(part) for part in np.array_split(values, parts)]
    (line,) = ax.plot(middle, smooth, label=label)
    ax.plot(steps, values, color=line.get_color(), alpha=0.3, linewidth=0.7, zorder=1)
    ax.set(xlabel="step", ylabel="loss")
    ax.spines[["top", "right"]].set_visible(False)


def fit_height(ax: Axes) -> None:
    """Limit the y axis to what matters of the curves."""
    lines = [np.asarray(line.get_ydata(), dtype=float) for line in ax.lines]
    low = min(line.min() for line in lines)
    high = max(np.quantile(line, 0.99, method="higher") for line in lines)
    margin = 0.05 * (high - low) or 1.0
    ax.set_ylim(low - margin, high + margin)


def scalars_of(sites: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """One array of draws for each scalar of each site."""
    scalars = {}
    for name, draws in sites.items():
        columns = draws.detach().cpu().reshape(len(draws), -1).double().numpy().T
        for index, values in zip(np.ndindex(draws.shape[1:]), columns, strict=True):
            label = f"{name}[{','.join(map(str, index))}]" if len(columns) > 1 else name
            scalars[label] = values
    return scalars


def draw_marginals(
    ax: Axes, name: str, truth: np.ndarray, guides: Mapping[str, np.ndarray]
) -> None:
    """One quantity: the reference filled, each guide as a line."""
    check_data(truth[:, None], name=f"reference[{name!r}]")
    edges = np.linspace(*np.quantile(truth, [0.0025, 0.9975]), 51)
    for number, (label, values) in enumerate({"reference": truth, **guides}.items()):
        height = np.histogram(values, edges)[0] / (len(values) * np.diff(edges))
        style = {"color": COLOURS[(number - 1) % 5]} if number else {"fill": True, "color": "0.8"}
        ax.stairs(height, edges, label=label, linewidth=1.3, **style)
    ax.set(title=name, yticks=[])
    ax.spines[["top", "left", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, small enough to keep beside the code."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getvalue())
