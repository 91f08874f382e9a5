"""Times of a planar stack beside the bare products that it is made of, and what it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import pyroflow as pf
from pyroflow.transforms.kernels import autograd, per_point, shared
from pyroflow.transforms.kernels.shared import kernels_for_device

from ..speed.accuracy import check_agreement
from ..speed.contenders import Contender, Floor, Ours
from ..speed.memory import forward_and_backward, peak_bytes
from ..speed.problem import Problem, Shape, reference
from .parts import Cases, Record

SHAPES = Shape(10**6, 40, 32), Shape(10**5, 784, 64), Shape(100, 40, 80)
OWN = Shape(200, 40, 80), Shape(10_000, 40, 32)
SMALL = (Shape(1000, 4, 3),)
COMPARED = 200  # rows whose values are compared with the CPU's


def speed(device: str, quick: bool) -> Cases:
    """Times of a planar stack beside the bare products that it is made of, and what it holds."""
    seconds = 0.01 if quick else 0.3
    for shape in SMALL if quick else SHAPES:
        name = f"N = {shape.N:,}, D = {shape.D}, K = {shape.K}"
        yield name, partial(of_speed, shape, device, seconds)
    for shape in SMALL if quick else OWN:
        name = f"N = {shape.N:,}, D = {shape.D}, K = {shape.K}, units of each point's own"
        yield name, partial(of_own, shape, device, seconds)


def of_speed(shape: Shape, device: str, seconds: float) -> Record:
    """Milliseconds, ratios of medians, errors, and memory."""
    with torch.device(device):
        problem = Problem.draw(shape)
        ours, floor = Ours(problem), Floor(problem)
    check_agreement("ours", *ours.forward(problem.x), reference(*problem.parameters, problem.x))
    by_triton = kernels_for_device(shared, problem.x) is not shared
    found = timed(ours, floor, problem, seconds, by_triton)
    found |= errors(Ours, problem.parameters, problem)
    return found | {"held / (N K)": held(ours, problem, device)}


def of_own(shape: Shape, device: str, seconds: float) -> Record:
    """The same for parameters (N, K, D), gradients of all included."""
    with torch.device(device):
        problem = own_units(Problem.draw(shape))
        ours, floor = Own(problem), OwnFloor(problem)
    with torch.no_grad():
        problem = Problem(shape, *problem.parameters, problem.x, ours(problem.y)[0])
    by_triton = kernels_for_device(per_point, problem.x) is not per_point
    found = timed(ours, floor, problem, seconds, by_triton)
    return found | errors(Own, [p[:COMPARED] for p in problem.parameters], problem)


def own_units(problem: Problem) -> Problem:
    """The same units for each point, moved a little, in tensors of its own."""
    N, D, _ = problem.shape
    moved = [t + 0.1 / D**0.5 * torch.randn_like(t.expand(N, *t.shape)) for t in problem.parameters]
    return Problem(problem.shape, *moved, problem.x, problem.y)


class Own(Ours):
    """pyroflow's stack with parameters of each point's own."""

    def __init__(self, problem: Problem) -> None:
        _, D, K = problem.shape
        self.parameters = [p.requires_grad_() for p in problem.parameters]
        self.transform = pf.Planar(D, K).to(problem.x.dtype).at(*self.parameters)


class OwnFloor(Contender):
    """The bare products with each parameter, as if layers did not couple, and no more."""

    def __init__(self, problem: Problem) -> None:
        self.w, self.u = problem.w.detach(), problem.u.detach()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.bmm(self.w, x.unsqueeze(2)).tanh()
        return x + torch.bmm(h.mT, self.u).squeeze(1), h

    def train(self, x: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            y, h = self(x)
            c = torch.bmm(self.u, y.unsqueeze(2))
            torch.bmm(c.mT, self.w)
            return torch.mul(c, x.unsqueeze(1)), torch.mul(h, y.unsqueeze(1))


def timed(ours: Ours, floor: Contender, problem: Problem, seconds: float, other: bool) -> Record:
    """Medians in milliseconds and their ratios; where there are ``other`` kernels, torch's too."""
    passes = {"forward": ours.forward, "inverse": ours.inverse, "train": ours.train}
    calls: dict[str, Callable] = {
        name: partial(call, problem.y if name == "inverse" else problem.x)
        for name, call in passes.items()
    }
    took = {name: milliseconds(call, seconds) for name, call in calls.items()}
    if other:
        with patch.object(autograd, "kernels_for_device", lambda kernels, _: kernels):
            took |= {f"torch, {n}": milliseconds(call, seconds) for n, call in calls.items()}
    for name, call in (("forward", floor.forward), ("train", floor.train)):
        took[f"floor, {name}"] = milliseconds(partial(call, problem.x), seconds)
    found = {f"{name}, ms": t for name, t in took.items()}
    for prefix in ("", "torch, ") if other else ("",):
        for name in ("forward", "train"):
            found[f"{prefix}{name} / floor"] = took[prefix + name] / took[f"floor, {name}"]
        found[f"{prefix}inverse / forward"] = took[f"{prefix}inverse"] / took[f"{prefix}forward"]
    return found


def milliseconds(call: Callable[[], object], seconds: float) -> float:
    """The median over repeats."""
    timer = Timer("call()", globals={"call": call})
    return 1e3 * timer.blocked_autorange(min_run_time=seconds).median


def errors(kind: type[Ours], parameters: Sequence[Tensor], problem: Problem) -> Record:
    """How far values and gradients of some rows are from the CPU's in float64, by the largest."""
    found = []
    for device, dtype in ((problem.x.device, problem.x.dtype), ("cpu", torch.float64)):
        x, y = (t[:COMPARED].to(device, dtype) for t in (problem.x, problem.y))
        given = [p.detach().to(device, dtype).clone() for p in parameters]
        shape = Shape(len(x), *problem.shape[1:])
        with torch.device(device):
            stack = kind(Problem(shape, *given, x, y))
        found.append([*stack.forward(x), *stack.inverse(y), *stack.train(x)])
    names = ("y", "log det", "x", "inverse log det", "gradient of w", "of u", "of b")
    pairs = zip(names, *found, strict=True)
    return {
        f"error, {name}": ((t.double().cpu() - exact).abs().max() / exact.abs().max()).item()
        for name, t, exact in pairs
    }


def held(ours: Ours, problem: Problem, device: str) -> float:
    """Numbers at the peak of a pass both ways, beside y, its gradient and log |det|, over N K."""
    N, D, K = problem.shape
    run = forward_and_backward(ours, problem)
    run()
    return (peak_bytes(run, device) / problem.x.element_size() - N * (D + 1)) / (N * K)
