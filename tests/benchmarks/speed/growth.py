"""How the cost grows with N, D and K."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from .contenders import FLOOR, OURS, Floor, Ours
from .problem import Problem, Shape
from .timing import Local, interleave, spread

CURVES: dict[str, tuple[Shape, ...]] = {
    "N, at D = 40, K = 32": tuple(Shape(4**i, 40, 32) for i in range(9)),
    "D, at N = 256, K = 16": tuple(Shape(256, D, 16) for D in (2, 8, 32, 128, 512, 2048, 4096)),
    "K, at N = 256, D = 2": tuple(Shape(256, 2, 2**i) for i in range(10)),
    "K, at N = 256, D = 40": tuple(Shape(256, 40, 2**i) for i in range(10)),
}
QUICK_CURVES = {"N, at D = 2, K = 4": (Shape(1, 2, 4), Shape(16, 2, 4), Shape(256, 2, 4))}
# Cost of a call, per layer, per number of the batch, per number of the activations, and of the
# products with W and Û and with G.
TERMS = ("1", "K", "N D", "N K", "N D K", "N K K")


def terms(shape: Shape) -> list[float]:
    """The values of TERMS at a shape."""
    N, D, K = shape
    return [1, K, N * D, N * K, N * D * K, N * K * K]


def fit(shapes: list[Shape], nanoseconds: list[float]) -> dict[str, Any]:
    """Non-negative costs of the terms that minimise the relative errors of the times."""
    rows = np.array([terms(shape) for shape in shapes]) / np.array(nanoseconds)[:, None]
    costs, _ = nnls(rows, np.ones(len(rows)))
    factors = rows @ costs
    return {
        "nanoseconds": {name: float(cost) for name, cost in zip(TERMS, costs, strict=True)},
        "model / measured": [float(factors.min()), float(factors.max())],
    }


def curve(axis: str, shapes: tuple[Shape, ...], rounds: int, seconds: float) -> dict[str, Any]:
    """Times along one axis, with the exponent between the two largest sizes."""
    sizes = [getattr(shape, axis) for shape in shapes]
    found: dict[str, Any] = {"sizes": sizes, "milliseconds": {}}
    for shape in shapes:
        problem = Problem.draw(shape)
        ours, floor = Ours(problem), Floor(problem)
        timed = {
            f"{OURS}, train": Local(lambda ours=ours, x=problem.x: ours.train(x)),
            f"{OURS}, forward": Local(lambda ours=ours, x=problem.x: ours.forward(x)),
            f"{OURS}, inverse": Local(lambda ours=ours, y=problem.y: ours.inverse(y)),
            f"{FLOOR}, train": Local(lambda floor=floor, x=problem.x: floor.train(x)),
        }
        for name, taken in interleave(timed, rounds, seconds).items():
            found["milliseconds"].setdefault(name, []).append(spread(taken, 1e3)["median"])
    step = math.log(sizes[-1] / sizes[-2])
    found["exponent at the end"] = {
        name: math.log(times[-1] / times[-2]) / step
        for name, times in found["milliseconds"].items()
    }
    return found


def growth(rounds: int, seconds: float, quick: bool = False) -> dict[str, Any]:
    """Every curve, and for each operation the model that fits all of them."""
    chosen = QUICK_CURVES if quick else CURVES
    curves = {name: curve(name[0], shapes, rounds, seconds) for name, shapes in chosen.items()}
    shapes = [shape for them in chosen.values() for shape in them]
    found: dict[str, Any] = {"curves": curves, "model": {}}
    for name in (f"{OURS}, {operation}" for operation in ("train", "forward", "inverse")):
        times = [ms * 1e6 for c in curves.values() for ms in c["milliseconds"][name]]
        found["model"][name] = fit(shapes, times)
    return found


def plot(curves: dict[str, Any], out: Path) -> None:
    """The curves on logarithmic axes, one panel each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(curves), 3.2), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for panel, (name, found) in zip(panels, curves.items(), strict=True):
        for contender, times in found["milliseconds"].items():
            style = "--" if contender.startswith(FLOOR) else "-"
            panel.loglog(found["sizes"], times, style, marker=".", label=contender)
        panel.set_xlabel(name)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds")
    panels[0].legend(fontsize=8)
    figure.savefig(out, dpi=120)
