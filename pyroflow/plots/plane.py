"""Pictures of the plane: densities on a colour scale, and how a map bends a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Transform

from pyroflow.checks import check_data
from pyroflow.plots import drawing
from pyroflow.plots.compared import compare
from pyroflow.plots.drawing import Bounds, Flow, LogProb, Pair


def plot_density(
    flow: Flow,
    data: Any,
    *,
    num_samples: int = 10_000,
    bins: int | None = None,
    bounds: Bounds | None = None,
    figure: Figure | None = None,
) -> Figure:
    r"""Shows data, samples of a flow and the flow's density side by side, on one colour scale.

    Args:
        flow: A distribution with event shape (2,), or a function that returns one, as a Flow does.
            Outside its support the density is 0.
        data: Points of shape :math:`(n, 2)`, or a frame, whose names the axes then have.
        num_samples: Number of samples to draw, with torch's global random state.
        bins: Cells along each axis of the histograms, by default as many as give most of the data
            some neighbours, at most 120; points out of bounds count in the densities.
        bounds: (low, high) for both axes, or one such pair for each; by default around the central
            99.5 % of each column.
        figure: Where to draw; a new figure by default.

    Returns:
        The figure, with three panels and a colour bar. A unit of length is the same on both axes,
        unless their ranges differ by more than three times.

    Raises:
        ValueError: If the data are not finite with shape (n, 2), or the flow is not over the plane.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyroflow.plots import plot_density
        >>> normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> figure = plot_density(normal, torch.randn(500, 2))
    """
    both = compare(flow, data, width=2)
    model, data = both.model, both.data
    limits = drawing.axis_limits(bounds, data)
    bins = int(np.clip(1.2 * len(data) ** 0.5, 20, 120)) if bins is None else bins

    def log_prob(x: Tensor) -> Tensor:
        inside = model.support.check(x)
        found = torch.full_like(x[:, 0], -torch.inf)
        found[inside] = model.log_prob(x[inside])
        return found

    with torch.no_grad():
        samples = both.draw(num_samples)
        panels = {
            f"Data\n{len(data):,} points": drawing.histogram(data, limits, bins),
            f"Samples\n{num_samples:,} points": drawing.histogram(samples, limits, bins),
            "Model density": drawing.on_grid(log_prob, limits, samples).exp(),
        }
    return drawing.heatmaps(panels, limits, both.labels(), figure)


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
