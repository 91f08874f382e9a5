"""Figures of flows, posteriors and fits: each function returns its figure, pyplot is not used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Distribution, Transform

from pyroflow.checks import check_data
from pyroflow.frames import column_names
from pyroflow.plots import drawing
from pyroflow.plots.drawing import Bounds, Flow, LogProb, Pair

__all__ = ["plot_density", "plot_grid_bending", "plot_losses", "plot_marginals", "plot_posteriors"]


def plot_density(
    flow: Flow,
    data: Any,
    *,
    num_samples: int = 10_000,
    bins: int = 120,
    bounds: Bounds | None = None,
    figure: Figure | None = None,
) -> Figure:
    r"""Shows data, samples of a flow and the flow's density side by side, on one colour scale.

    Args:
        flow: A distribution with event shape (2,), or a function that returns one, as a Flow does.
            Outside its support the density is 0.
        data: Points of shape :math:`(n, 2)`, or a frame, whose names the axes then have.
        num_samples: Number of samples to draw, with torch's global random state.
        bins: Cells along each axis of the histograms; points out of bounds count in the densities.
        bounds: (low, high) for both axes, or one such pair for each; around the data by default.
        figure: Where to draw; a new figure by default.

    Returns:
        The figure, with three panels and a colour bar.

    Raises:
        ValueError: If the data are not finite with shape (n, 2), or the flow is not over the plane.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyroflow.plots import plot_density
        >>> normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> figure = plot_density(normal, torch.randn(500, 2))
    """
    columns = getattr(flow, "columns", None) or column_names(data)
    data = check_data(data, width=2, columns=columns)
    model = flow if isinstance(flow, Distribution) else flow()
    if model.event_shape != (2,):
        raise ValueError(
            f"plot_density expects a flow with event shape (2,), got {tuple(model.event_shape)};"
            " fit one to two columns of the data."
        )
    limits = drawing.axis_limits(bounds, data)

    def log_prob(x: Tensor) -> Tensor:
        inside = model.support.check(x)
        found = torch.full_like(x[:, 0], -torch.inf)
        found[inside] = model.log_prob(x[inside])
        return found

    with torch.no_grad():
        samples = model.sample((num_samples,))
        panels = {
            f"Data\n{len(data):,} points": drawing.histogram(data, limits, bins),
            f"Samples\n{num_samples:,} points": drawing.histogram(samples, limits, bins),
            "Model density": drawing.on_grid(log_prob, limits, samples).exp(),
        }
    labels = [name.replace("$", r"\$") for name in columns] if columns else ["$x_1$", "$x_2$"]
    return drawing.heatmaps(panels, limits, labels, figure)


def plot_posteriors(
    log_joint: LogProb,
    panels: Mapping[str, LogProb | Tensor],
    *,
    bounds: Bounds = (-6.0, 6.0),
    log_evidence: float | None = None,
    subtitles: Mapping[str, str] | None = None,
    figure: Figure | None = None,
) -> Figure:
    r"""Shows an exact posterior in the plane and approximations to it, on one colour scale.

    Args:
        log_joint: Unnormalised log density, :math:`(N, 2) \to (N,)`.
        panels: For each title a normalised log density, or draws of shape :math:`(n, 2)`.
        bounds: (low, high) for both axes, or one such pair for each.
        log_evidence: Log normaliser of ``log_joint``; by default that of the part in the bounds.
        subtitles: A second line for some of the titles, e.g. a KL divergence.
        figure: Where to draw; a new figure by default.

    Returns:
        The figure: the exact posterior first, then the panels in their order.

    Raises:
        ValueError: If draws do not have shape (n, 2), or a subtitle belongs to no panel.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyroflow import plots, targets
        >>> normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> figure = plots.plot_posteriors(targets.toy_log_joint, {"Normal": normal.log_prob})
    """
    subtitles = subtitles or {}
    if not set(subtitles) <= set(panels):
        raise ValueError(
            f"plot_posteriors: subtitles expects titles out of {list(panels)}, got"
            f" {list(subtitles)}; use the keys of panels."
        )
    limits = drawing.axis_limits(bounds)
    with torch.no_grad():
        joint = drawing.on_grid(log_joint, limits)
        if log_evidence is None:
            log_evidence = joint.logsumexp((0, 1)) + np.log(drawing.cell_area(limits, len(joint)))
        shown = {"Exact posterior": (joint - log_evidence).exp()}
        for title, panel in panels.items():
            lines = [title, subtitles[title]] if title in subtitles else [title]
            shown["\n".join(lines)] = (
                drawing.histogram(check_data(panel, width=2, name=title), limits, 100)
                if isinstance(panel, Tensor)
                else drawing.on_grid(panel, limits).exp()
            )
    return drawing.heatmaps(shown, limits, ["$z_1$", "$z_2$"], figure)


def plot_grid_bending(
    transform: Transform | Flow,
    *,
    layers: Sequence[int] | None = None,
    bounds: Pair = (-3.0, 3.0),
    figure: Figure | None = None,
) -> Figure:
    r"""Shows how a map bends the plane: a grid at the base and its image, coloured by base place.

    Args:
        transform: A transform of the plane, a distribution that is made with transforms, or a
            function that returns one, as a Flow does.
        layers: After how many transforms to draw; only after all of them by default.
        bounds: (low, high) of the grid along both axes.
        figure: Where to draw; a new figure by default.

    Returns:
        The figure: the base grid, then one panel for each of ``layers``.

    Raises:
        ValueError: If there are no transforms, or fewer than ``layers`` asks for.

    Example:
        >>> import torch
        >>> from pyroflow.plots import plot_grid_bending
        >>> figure = plot_grid_bending(torch.distributions.AffineTransform(0.0, 0.5))
    """
    steps = drawing.transforms_of(transform)
    layers = [len(steps)] if layers is None else layers
    if not steps or not all(0 < layer <= len(steps) for layer in layers):
        raise ValueError(
            f"plot_grid_bending expects layers between 1 and the number of transforms, got layers"
            f" {list(layers)} and {len(steps)} transform(s); a stack of layers counts as one."
        )
    images = drawing.grid_images(steps, bounds)
    titles = {k: f"After {k} of {len(steps)} transforms" for k in layers}
    titles = {0: "Base space", **titles, len(steps): "Image"}
    figure, axes = drawing.panels(figure, len(titles), 4.2, 4.4, columns=len(titles))
    for ax, (layer, title) in zip(axes, titles.items(), strict=True):
        ax.add_collection(drawing.coloured_lines(images[0], images[layer]))
        ax.set(title=title, xlabel="$x_1$", ylabel="$x_2$", aspect="equal", adjustable="datalim")
        ax.autoscale_view()
    return figure


def plot_losses(
    losses: Sequence[float] | Tensor,
    *,
    floor: float | None = None,
    label: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    r"""Shows the loss at each step, faint, and the median of each hundredth of the steps.

    The axis ends below the highest hundredth of the losses, mostly those of the first steps.
    Losses that are NaN or infinite are left out.

    Args:
        losses: Losses of shape :math:`(n,)`.
        floor: The loss that no model can beat, e.g. an entropy, as a dashed line.
        label: Name of the curve in the legend.
        ax: Where to draw, also beside earlier curves; a new figure by default.

    Returns:
        The figure of the axes.

    Raises:
        ValueError: If ``losses`` is not one-dimensional, or none of them is finite.

    Example:
        >>> from pyroflow.plots import plot_losses
        >>> figure = plot_losses([3.0, 2.0, 1.5], floor=1.0)
    """
    values = torch.as_tensor(losses, dtype=torch.float64, device="cpu").detach().numpy()
    finite = np.isfinite(values)
    if values.ndim != 1 or not finite.any():
        raise ValueError(
            f"plot_losses expects finite losses of shape (n,), got shape {values.shape} with"
            f" {finite.sum()} finite; pass the losses of one fit."
        )
    ax = drawing.panels(None, 1, 6.4, 4.0)[1][0] if ax is None else ax
    steps, values = finite.nonzero()[0] + 1, values[finite]
    parts = min(100, len(values))
    middle, smooth = ([np.median(a) for a in np.array_split(b, parts)] for b in (steps, values))
    (curve,) = ax.plot(middle, smooth, label=label)
    ax.plot(steps, values, color=curve.get_color(), alpha=0.3, linewidth=0.7, zorder=1)
    if floor is not None:
        ax.axhline(floor, color="0.25", linestyle="--", linewidth=1, label=f"floor {floor:.4g}")
    heights = [np.asarray(line.get_ydata(), dtype=float) for line in ax.lines]
    low = min(line.min() for line in heights)
    high = max(np.quantile(line, 0.99, method="higher") for line in heights)
    margin = 0.05 * (high - low) or 1.0
    ax.set(xlabel="step", ylabel="loss", ylim=(low - margin, high + margin))
    ax.spines[["top", "right"]].set_visible(False)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(frameon=False)
    return ax.figure


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
        edges = np.linspace(*np.quantile(values, [0.0025, 0.9975]), 51)
        ax.stairs(*_density(values, edges), label="reference", fill=True, color="0.8")
        for guide, found in guides.items():
            ax.stairs(*_density(found[name], edges), label=guide, linewidth=1.3)
        ax.set(title=name, yticks=[])
        ax.spines[["top", "left", "right"]].set_visible(False)
    for ax in axes[len(truth) :]:
        ax.axis("off")
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center", frameon=False)
    return figure


def _density(values: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Heights over the edges; values beyond them count in the total."""
    return np.histogram(values, edges)[0] / (len(values) * np.diff(edges)), edges
