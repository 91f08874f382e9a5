"""The course of a fit as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Distribution

from pyroflow.inference.fit import Fit
from pyroflow.plots import drawing


def plot_losses(
    losses: Sequence[float] | Tensor | Fit,
    *,
    floor: float | None = None,
    label: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    r"""Shows the loss at each step, faint, and the median of each hundredth of the steps.

    Of a fit it also shows the scores by step: of a density those of its held-out rows, and of a
    full Gaussian as a line. If a density's depth was found on held-out rows, a second panel has the
    score of each depth. The axis ends below the highest hundredth of the losses, mostly those of
    the first steps. Losses that are NaN or infinite are left out.

    Args:
        losses: Losses of shape :math:`(n,)`, or a fit.
        floor: The loss that no model can beat, e.g. an entropy, as a dashed line.
        label: Name of the curve in the legend; of a fit, before what each of its curves is.
        ax: Where to draw the curves, also beside earlier ones; a new figure by default.

    Returns:
        The figure of the axes.

    Raises:
        TypeError: If it is a flow or a guide, in place of its fit.
        ValueError: If ``losses`` is not one-dimensional, or none of them is finite.

    Example:
        >>> from pyroflow.plots import plot_losses
        >>> figure = plot_losses([3.0, 2.0, 1.5], floor=1.0)
    """
    fit = losses if isinstance(losses, Fit) else None
    values = losses if fit is None else fit.losses
    if isinstance(values, nn.Module | Distribution):
        raise TypeError(f"losses must be a Fit or numbers, got {type(values).__name__}")
    values = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().numpy()
    finite = np.isfinite(values)
    if values.ndim != 1 or not finite.any():
        raise ValueError(
            f"plot_losses expects finite losses of shape (n,), got shape {values.shape} with"
            f" {finite.sum()} finite; pass the losses of one fit."
        )
    depths = fit.depths if fit is not None and ax is None else []
    if ax is None:
        ax, *others = drawing.panels(None, 2 if depths else 1, 6.4, 4.0)[1]
    before = [ax.get_ylim()] if ax.has_data() else []
    words = _words(fit, label)
    heights = _curve(ax, finite.nonzero()[0] + 1, values[finite], words["losses"])
    if fit is not None:
        heights += _scores(ax, fit, words, late=0.01 * len(finite)) + _gaussian(ax, fit, words)
    if floor is not None:
        ax.axhline(floor, color="0.25", linestyle="--", linewidth=1, label=f"floor {floor:.4g}")
        heights.append(floor)
    margin = 0.05 * (max(heights) - min(heights)) or 1.0
    lows, highs = zip((min(heights) - margin, max(heights) + margin), *before, strict=True)
    ax.set(xlabel="step", ylabel=words["axis"], ylim=(min(lows), max(highs)))
    if depths:
        _depths(others[0], fit, words)
    for drawn in [ax, *others] if depths else [ax]:
        drawn.spines[["top", "right"]].set_visible(False)
        if drawn.get_legend_handles_labels()[1]:
            drawn.legend(frameon=False)
    return ax.figure


def _curve(ax: Axes, steps: np.ndarray, values: np.ndarray, label: str | None) -> list[float]:
    """Draw losses; the lowest one, and the highest but for a hundredth of them."""
    parts = min(100, len(values))
    middle, smooth = ([np.median(a) for a in np.array_split(b, parts)] for b in (steps, values))
    (curve,) = ax.plot(middle, smooth, label=label)
    ax.plot(steps, values, color=curve.get_color(), alpha=0.3, linewidth=0.7, zorder=1)
    return [values.min(), np.quantile(values, 0.99, method="higher")]


def _words(fit: Fit | None, label: str | None) -> dict[str, str | None]:
    """What the axis and the curves are called."""
    if fit is None:
        return {"axis": "loss", "losses": label}
    density = fit.training_loss is not None
    before = "" if label is None else f"{label}: "
    return {
        "axis": "\u2212log q, nats per row" if density else "loss, nats",
        "losses": before + ("training rows" if density else "training loss"),
        "scores": before + ("held-out rows" if density else "fixed draws or points"),
        "best": f"{before}best, {fit.best_loss:.4g}",
        "gaussian": f"{before}full Gaussian, held-out rows",
    }


def _scores(ax: Axes, fit: Fit, words: dict[str, str | None], late: float) -> list[float]:
    """Draw the scores; the finite ones from step ``late`` on."""
    scores = [(step, score) for step, score in fit.scores if math.isfinite(score)]
    if not scores:
        return []
    (curve,) = ax.plot(*zip(*scores, strict=True), marker=".", label=words["scores"])
    best = min(scores, key=itemgetter(1))
    _mark(ax, best, words["best"], curve.get_color())
    return [score for step, score in scores if step >= late]


def _gaussian(ax: Axes, fit: Fit, words: dict[str, str | None]) -> list[float]:
    """Draw the Gaussian's score, if there is one, and return it."""
    loss = fit.gaussian_loss
    if loss is None:
        return []
    ax.axhline(loss, color="0.25", linestyle=":", linewidth=1.2, label=words["gaussian"])
    return [loss]


def _depths(ax: Axes, fit: Fit, words: dict[str, str | None]) -> None:
    """Draw the score of each depth, at equal distances."""
    depths, scores = zip(*fit.depths, strict=True)
    ax.plot(range(len(depths)), scores, marker=".", color=drawing.DATA, label=words["scores"])
    at = depths.index(fit.num_layers)
    few = ", as deeper ones hardly gain" if min(scores) < scores[at] else ""
    _mark(ax, (at, scores[at]), f"chosen, {fit.num_layers} layers{few}", drawing.DATA)
    _gaussian(ax, fit, words)
    ax.set(xlabel="layers", ylabel=words["axis"])
    ax.set_xticks(range(len(depths)), map(str, depths))


def _mark(ax: Axes, place: tuple[float, float], label: str | None, colour: str) -> None:
    ax.plot(*([x] for x in place), marker="o", linestyle="", color=colour, label=label)
