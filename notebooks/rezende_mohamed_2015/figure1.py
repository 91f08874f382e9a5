"""Figure 1: what planar and radial layers do to a Gaussian and to a uniform density."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import avg_pool2d
from tqdm.auto import tqdm

from pyroflow.plots.drawing import DENSITY, save_figure
from pyroflow.seeds import seeded
from pyroflow.transforms import Bijection, Conditioned, Planar, Radial
from pyroflow.transforms.affine import inverse_softplus
from rezende_mohamed_2015.results import Options, Results

SEED = 3  # of the layers
LENGTHS = (1, 2, 10)
HALF_WIDTH = math.sqrt(3.0)  # of the uniform's square: unit variance
REACH = 5.0  # standard deviations of the Gaussian that are looked at; 1e-6 of it lies outside
WINDOW = 4.5  # the panels show (−WINDOW, WINDOW)²
PIXELS = 240


def run(options: Options) -> dict[str, Any]:
    """Draw the twelve panels and integrate their densities; write both.

    The layers of a panel are the first K of ten, whose parameters are drawn from ``SEED`` with
    slopes and widths far from the identity. Nothing is fitted.

    Returns:
        The report: by panel the integral of its density, and the box and cells behind it.
    """
    cells = 600 if options.quick else 1600
    settings = {"quick": options.quick, "cells": cells, "layers_seed": SEED}
    results = Results(options.out / "figure1.json", settings)
    planned = [
        {"base": base, "kind": kind, "K": K} for base in BASES for kind in LAYERS for K in LENGTHS
    ]
    left = results.missing(options.selected(planned))
    for run in tqdm(left, desc="figure1", disable=not options.progress):
        began = time.perf_counter()
        panel = integrate(BASES[run["base"]], LAYERS[run["kind"]](run["K"]), cells)
        results.add(run, panel | {"seconds": round(time.perf_counter() - began, 2)})
    save_figure(draw(1 if options.quick else 3), options.out / "figure1.png")
    errors = [abs(panel["integral"] - 1) for panel in results.runs]
    results.write(worst_error=max(errors), complete=not results.missing(planned))
    return {"runs": results.ordered(planned), **results.summary}


def planar_layers(num_layers: int) -> Conditioned:
    """The first of ten planar layers: wᵀû decides how a layer stretches across its hyperplane.

    The first two are at right angles and expand; the others contract or expand at random.
    """
    with seeded(SEED):
        angle = math.pi * torch.rand(10, dtype=torch.float64)
        angle[1] = angle[0] + math.pi / 2
        slope = torch.empty(10, dtype=torch.float64).uniform_(-1.0, 2.0)
        slope[:2] = 4.0
        steepness = torch.empty(10, 1, dtype=torch.float64).uniform_(1.0, 2.5)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        w = steepness * direction
        b = torch.randn(10, dtype=torch.float64)
        b[:2] = 0.0
        along = direction.flip(-1) * torch.tensor([-1.0, 1.0]).double()
        u = slope.unsqueeze(-1) * w / steepness.square()
        u[2:] += 0.7 * torch.randn(8, 1, dtype=torch.float64) * along[2:]
    K = num_layers
    return Planar(2, K).at(w[:K], u[:K], b[:K])


def radial_layers(num_layers: int) -> Conditioned:
    """The first of ten radial layers: β̂ > 0 expands around a centre, β̂ < 0 contracts."""
    with seeded(SEED):
        centre = 1.2 * torch.randn(10, 2, dtype=torch.float64)
        alpha = torch.empty(10, dtype=torch.float64).uniform_(0.4, 1.0)
        ratio = torch.empty(10, dtype=torch.float64).uniform_(-1.2, 1.2).exp()
        ratio[:2] = torch.tensor([5.0, 0.25], dtype=torch.float64)
        s = ratio * alpha  # α + β̂
    K = num_layers
    return Radial(2, K).at(centre[:K], inverse_softplus(alpha)[:K], inverse_softplus(s)[:K])


def gaussian(x: Tensor) -> Tensor:
    """Log of N(x | 0, I), for x of shape (*, 2)."""
    return -0.5 * x.square().sum(-1) - math.log(2 * math.pi)


def uniform(x: Tensor) -> Tensor:
    """Log density of the uniform on the square of unit variance, for x of shape (*, 2)."""
    inside = (x.abs() <= HALF_WIDTH).all(-1)
    return torch.where(inside, -2 * math.log(2 * HALF_WIDTH), -math.inf)


BASES = {"gaussian": gaussian, "uniform": uniform}
LAYERS = {"planar": planar_layers, "radial": radial_layers}


@torch.no_grad()
def density(base: Callable[[Tensor], Tensor], t: Bijection, y: Tensor) -> Tensor:
    """q_K(y) = q_0(x) / |det dy/dx| at x = t⁻¹(y), for y of shape (N, 2)."""
    parts = []
    for part in y.split(200_000):
        x = t.inv(part)
        parts.append((base(x) - t.log_abs_det_jacobian(x, part)).exp())
    return torch.cat(parts)


def integrate(base: Callable[[Tensor], Tensor], t: Bijection, cells: int) -> dict[str, Any]:
    """∫ q_K by the midpoint rule over a box that holds all the mass but 1e-6 of it.

    The box is that of the image of the base's square. A uniform density jumps at the edge of its
    image; a cell there counts whole or not at all, as its midpoint says, and these errors of
    either sign cancel up to about h^1.5, h being the width of a cell.
    """
    low, high = _box(base, t)
    side = (high - low) / cells
    total = density(base, t, _midpoints(low, high, cells)).sum() * side.prod()
    return {"integral": total.item(), "low": low.tolist(), "high": high.tolist()}


def draw(finer: int) -> Figure:
    """The panels: Gaussian above, uniform below; q_0, planar K = 1, 2, 10, radial K = 1, 2, 10.

    Each pixel is the mean over finer × finer points. Colours go with density^0.6, in each panel
    up to the value that one pixel in a thousand exceeds.
    """
    columns = [("planar", 0), *((kind, K) for kind in LAYERS for K in LENGTHS)]
    figure = Figure(figsize=(2.0 * len(columns), 4.6), layout="compressed")
    grid = figure.subplots(2, len(columns), squeeze=False)
    for row, (name, base) in zip(grid, BASES.items(), strict=True):
        for ax, (kind, K) in zip(row, columns, strict=True):
            values = _pixels(base, LAYERS[kind](K), finer)
            norm = PowerNorm(0.6, vmin=0.0, vmax=values.quantile(0.999).item())
            ax.imshow(values.numpy(), origin="lower", cmap=DENSITY, norm=norm)
            ax.set(xticks=[], yticks=[])
            if name == "gaussian":
                ax.set_title(f"{kind}, K = {K}" if K else "$q_0$")
        row[0].set_ylabel(f"unit {name}" if name == "gaussian" else name)
    return figure


def _pixels(base: Callable[[Tensor], Tensor], t: Bijection, finer: int) -> Tensor:
    """Means over the cells of a picture, row i being the i-th x2."""
    corner = torch.full((2,), WINDOW, dtype=torch.float64)
    points = _midpoints(-corner, corner, finer * PIXELS)
    fine = density(base, t, points).view(1, finer * PIXELS, finer * PIXELS)
    return avg_pool2d(fine, finer)[0].T


def _midpoints(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """The centres of cells × cells cells, shape (cells², 2)."""
    places = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    return torch.cartesian_prod(*(low + (high - low) * places.unsqueeze(-1)).T)


@torch.no_grad()
def _box(base: Callable[[Tensor], Tensor], t: Bijection) -> tuple[Tensor, Tensor]:
    """Lower and upper corner of the image of the base's square, with a little margin.

    A continuous bijection takes the square's edge to the edge of its image.
    """
    half = REACH if base is gaussian else HALF_WIDTH
    along = torch.linspace(-half, half, 1001, dtype=torch.float64)
    side = torch.stack([along, torch.full_like(along, half)], -1)
    image = t(torch.cat([side, -side, side.flip(-1), -side.flip(-1)]))
    low, high = image.amin(0), image.amax(0)
    margin = 0.01 * (high - low)
    return low - margin, high + margin
