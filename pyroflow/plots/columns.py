"""Pictures by column: pairs and marginals of data beside draws, and checks of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from pyroflow.checks import check_count, check_data, check_fraction
from pyroflow.plots import drawing
from pyroflow.plots.compared import compare
from pyroflow.plots.drawing import Flow


def plot_pairs(
    flow: Flow,
    data: Any,
    *,
    context: Any = None,
    columns: Sequence[int | str] | None = None,
    num_samples: int = 10_000,
    num_points: int = 2_000,
    figure: Figure | None = None,
) -> Figure:
    r"""Shows data beside samples of a flow, for each column and each pair of columns.

    On the diagonal are the marginals of both; below it the data, with lines that hold 50 % and 90 %
    of the samples; above it the samples, across and up exchanged. Axes span the central 99.5 % of
    each column of the data.

    Args:
        flow: A distribution with event shape (D,), or a function that returns one, as a Flow does.
        data: Points of shape :math:`(N, D)`, or a frame, whose names the axes then have.
        context: Of a conditional Flow, one row for each of the data; each gets equally many
            samples.
        columns: Those to show, by name or position, at most 12; by default the first 12.
        num_samples: Number of samples to draw, with torch's global random state.
        num_points: At most so many of the data, and of the samples, are drawn as points.
        figure: Where to draw; a new figure by default.

    Returns:
        The figure, with a panel for each pair of columns, and one for each column.

    Raises:
        ValueError: If the data are not finite with shape (N, D), a context is missing, or there is
            no such column.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyroflow.plots import plot_pairs
        >>> normal = dist.Normal(torch.zeros(3), torch.tensor([1.0, 10.0, 100.0])).to_event(1)
        >>> figure = plot_pairs(normal, normal.sample((500,)))
    """
    check_count("num_samples", num_samples, 1)
    check_count("num_points", num_points, 1)
    both = compare(flow, data, context)
    shown, names = both.shown(columns), both.labels()
    with torch.no_grad():
        tables = {"data": both.data, "flow": both.draw(num_samples)}
    tables = {label: t[:, shown].double().cpu() for label, t in tables.items()}
    num = min(num_points, *map(len, tables.values()))
    points = {label: t[torch.randperm(len(t), device="cpu")[:num]] for label, t in tables.items()}
    limits = [drawing.span(values, 0.05) for values in tables["data"].numpy().T]
    width = len(shown)
    size = float(np.clip(13 / width, 1.15, 2.4)) if width > 1 else 4.0
    figure, axes = drawing.panels(figure, width**2, size, size, columns=width)
    for (i, j), ax in zip(np.ndindex(width, width), axes, strict=True):
        if i == j:
            columns_of = {label: t[:, i].numpy() for label, t in tables.items()}
            drawing.marginals(ax, columns_of, limits[i], (drawing.DATA, drawing.FLOW))
        else:
            label, colour = ("data", drawing.DATA) if i > j else ("flow", drawing.FLOW)
            x, y = points[label][:, [j, i]].T.numpy()
            style = {"s": 6, "alpha": 0.4, "linewidths": 0, "rasterized": True}
            ax.scatter(x, y, color=colour, label=label, **style)
            if i > j:
                at = (limits[j], limits[i])
                drawing.contours(ax, tables["flow"][:, [j, i]], at, (0.5, 0.9), drawing.FLOW)
            ax.set(xlim=limits[j], ylim=limits[i])
        _label_pair(ax, i, j, [names[k] for k in shown])
    rows, samples = (len(t) for t in tables.values())
    drawn, lines = (f", {num:,} as points", "; lines hold 50 % and 90 %") if width > 1 else ("", "")
    handles = [
        Patch(color=drawing.DATA, alpha=drawing.FILL, label=f"data: {rows:,} rows{drawn}"),
        Line2D([], [], color=drawing.FLOW, label=f"flow: {samples:,} samples{drawn}{lines}"),
    ]
    _legend(figure, handles, both.subset(shown))
    return figure


def plot_pit(
    flow: Flow,
    data: Any,
    *,
    context: Any = None,
    columns: Sequence[int | str] | None = None,
    num_samples: int = 100_000,
    level: float = 0.05,
    figure: Figure | None = None,
) -> Figure:
    r"""Shows whether data could be draws of a flow, by probability integral transforms.

    Each line is the share of rows whose transform lies below a place, minus that place. If the
    flow is right, transforms are uniform, and all lines stay in their grey bands, but for a
    probability of ``level``. A line that leaves its band is red, and its panel says so: above 0,
    the data lie lower than the flow's draws; first below and then above, they spread less than
    these; first above and then below, they spread more.

    By column, the transform is the rank of a value among draws. For a flow with a normal base it is
    also :math:`\Phi(z_j)` for each coordinate of the base value :math:`z` that the flow maps to a
    row, and that of :math:`|z|^2` by its chi-squared distribution.

    Args:
        flow: A distribution with event shape (D,), or a function that returns one, as a Flow does.
        data: Points of shape :math:`(N, D)`, or a frame, whose names the panels then have. Rows
            that the flow was fitted to look better than others.
        context: Of a conditional Flow, one row for each of the data.
        columns: Those to show, by name or position, at most 12; by default the first 12.
        num_samples: Draws among which rows are ranked, with torch's global random state; of a
            conditional flow 200 for each row instead.
        level: The false alarm rate of all lines together, which is shared out evenly.
        figure: Where to draw; a new figure by default.

    Returns:
        The figure, with two panels for the base and one for each column.

    Raises:
        ValueError: If the data are not finite with shape (N, D) and inside the flow's support, a
            context is missing, there is no such column, or the level is not between 0 and 1.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyroflow.plots import plot_pit
        >>> normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> figure = plot_pit(normal, 2 * normal.sample((500,)))
    """
    check_fraction("level", level)
    check_count("num_samples", num_samples, 1)
    both = compare(flow, data, context, inside=True)
    shown, names = both.shown(columns), both.labels()
    with torch.no_grad():
        z = both.base()
        pits, independent = both.column_pits(num_samples)
    panels = {names[j]: (pits[:, [j]], independent) for j in shown}
    if z is not None:
        radius = torch.special.gammainc(z.new_tensor(z.shape[1] / 2), z.square().sum(1) / 2)
        base = {"base, each $z_j$": torch.special.ndtr(z), "base, $|z|^2$": radius[:, None]}
        panels = {title: (found, float(len(z))) for title, found in base.items()} | panels
    lines = sum(found.shape[1] for found, _ in panels.values())
    figure, axes = drawing.panels(figure, len(panels), 2.7, 2.9, sharey=True)
    for ax, (title, (found, num)) in zip(axes, panels.items(), strict=False):
        outside = drawing.ecdf_lines(ax, found.numpy().T, num, 1 - level / lines)
        ax.set_title(f"{title}\nleaves its band" if outside else title, fontsize="medium")
    for ax in axes[len(panels) :]:
        ax.axis("off")
    figure.supxlabel("probability integral transform", fontsize="medium")
    figure.supylabel("share of rows below \u2212 expected", fontsize="medium")
    chance = f"with a chance of {100 * (1 - level):.4g} %"
    handles = [
        Patch(color="0.88", label=f"where all lines stay, {chance}, if the flow is right"),
        Line2D([], [], color=drawing.DATA, label="in its band"),
        Line2D([], [], color=drawing.FLOW, label="leaves its band"),
    ]
    _legend(figure, handles, both.subset(shown))
    return figure


def plot_marginals(
    reference: Mapping[str, Tensor],
    draws: Mapping[str, Mapping[str, Tensor]],
    *,
    figure: Figure | None = None,
) -> Figure:
    r"""Shows the marginals of reference draws, filled, and of guides, as lines.

    Axes span the central 99.5 % of the reference; draws beyond them count in the densities.

    Args:
        reference: Draws of each site with shape :math:`(n, *)`; every entry gets a panel.
        draws: For each guide its draws of the same sites, any number of them.
        figure: Where to draw; a new figure by default.

    Returns:
        The figure, with the legend in a panel of its own.

    Raises:
        ValueError: If a guide lacks a quantity of the reference, or reference draws are not finite.

    Example:
        >>> import torch
        >>> from pyroflow.plots import plot_marginals
        >>> sites = {"mu": torch.randn(500), "theta": torch.randn(500, 2)}
        >>> figure = plot_marginals(sites, {"guide": sites})
    """
    truth = drawing.scalars_of(reference)
    guides = {guide: drawing.scalars_of(sites) for guide, sites in draws.items()}
    for guide, found in guides.items():
        if not set(truth) <= set(found):
            raise ValueError(
                f"plot_marginals: draws[{guide!r}] expects {list(truth)}, got {list(found)};"
                " draw these sites as well, or leave them out of reference."
            )
    figure, axes = drawing.panels(figure, len(truth) + 1, 2.8, 2.3)
    for ax, (name, values) in zip(axes, truth.items(), strict=False):
        check_data(values[:, None], name=f"reference[{name!r}]")
        draws_of = {"reference": values} | {guide: found[name] for guide, found in guides.items()}
        drawing.marginals(ax, draws_of, drawing.span(values), ("0.6", *drawing.COLOURS))
        ax.set(title=name)
    for ax in axes[len(truth) :]:
        ax.axis("off")
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center", frameon=False)
    return figure


def _label_pair(ax: Axes, i: int, j: int, names: Sequence[str]) -> None:
    """Names and ticks at the rim alone; those of the first row stand on its right."""
    last = len(names) - 1
    ax.locator_params(nbins=3)
    ax.tick_params(labelsize="small", labelbottom=i == last, bottom=i == last)
    if i == last:
        ax.set_xlabel(names[j])
        ax.tick_params(axis="x", rotation=30 if last > 3 else 0)
    if i == j:
        return
    right = i == 0 and j == last
    ax.tick_params(axis="y", left=j == 0, labelleft=j == 0, right=right, labelright=right)
    if j == 0 or right:
        ax.yaxis.set_label_position("right" if right else "left")
        ax.set_ylabel(names[i])


def _legend(figure: Figure, handles: Sequence[Artist], title: str) -> None:
    """A key above the panels, below a title, no wider than they are."""
    wide = int(9 * figure.bbox.width / figure.dpi)
    for handle in handles:
        handle.set_label(fill(handle.get_label(), wide - 5))
    style = {"loc": "outside upper center", "frameon": False, "fontsize": "medium"}
    figure.legend(handles=handles, title=fill(title, wide), **style)
