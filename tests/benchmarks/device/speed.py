"""Times of a planar stack beside the bare products that it is made of, and what it holds."""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.benchmark import Timer

from ..speed.accuracy import check_agreement
from ..speed.contenders import Floor, Ours
from ..speed.memory import forward_and_backward, peak_bytes
from ..speed.problem import Problem, Shape, reference
from .parts import Cases, Record

SHAPES, SMALL = (Shape(10**6, 40, 32), Shape(10**5, 784, 64)), (Shape(1000, 4, 3),)


def speed(device: str, quick: bool) -> Cases:
    """Times of a planar stack beside the bare products that it is made of, and what it holds."""
    for shape in SMALL if quick else SHAPES:
        yield (
            f"N = {shape.N:,}, D = {shape.D}, K = {shape.K}",
            partial(of_speed, shape, device, 0.01 if quick else 1.0),
        )


def of_speed(shape: Shape, device: str, seconds: float) -> Record:
    """Milliseconds, ratios of medians, and memory."""
    with torch.device(device):
        problem = Problem.draw(shape)
        ours, floor = Ours(problem), Floor(problem)
    check_agreement("ours", *ours.forward(problem.x), reference(*problem.parameters, problem.x))
    calls = {
        "forward": lambda: ours.forward(problem.x),
        "inverse": lambda: ours.inverse(problem.y),
        "train": lambda: ours.train(problem.x),
        "floor, forward": lambda: floor.forward(problem.x),
        "floor, train": lambda: floor.train(problem.x),
    }
    took = {}
    for name, call in calls.items():
        timer = Timer("call()", globals={"call": call})
        took[name] = timer.blocked_autorange(min_run_time=seconds).median
    found = {f"{name}, ms": 1e3 * t for name, t in took.items()}
    for name in ("forward", "train"):
        found[f"{name} / floor"] = took[name] / took[f"floor, {name}"]
    found["inverse / forward"] = took["inverse"] / took["forward"]
    return found | {"held / (N K)": held(ours, problem, device)}


def held(ours: Ours, problem: Problem, device: str) -> float:
    """Numbers at the peak of a pass both ways, beside y, its gradient and log |det|, over N K."""
    N, D, K = problem.shape
    run = forward_and_backward(ours, problem)
    run()
    return (peak_bytes(run, device) / problem.x.element_size() - N * (D + 1)) / (N * K)
