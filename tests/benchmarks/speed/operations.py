"""What is timed at one shape, and the ratios that the table shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

import pyroflow as pf
from pyroflow.flows import AlongPath

from .contenders import FLOOR, FLOWJAX, NORMFLOWS, OURS, PYRO, Contender, Ours
from .problem import Problem
from .timing import Local, Timed, ratio

Key = tuple[str, str]  # operation, contender
BATCHED_NUMBERS = 20_000_000  # w and u by row, and their gradients: four times this in memory

RATIOS: dict[str, tuple[Key, Key]] = {
    f"{rival} / ours, {operation}": ((operation, rival), (operation, OURS))
    for operation in ("train", "forward")
    for rival in (PYRO, NORMFLOWS, FLOWJAX)
}
RATIOS |= {
    f"ours / floor, {operation}": ((operation, OURS), (operation, FLOOR))
    for operation in ("train", "forward")
}
RATIOS |= {
    "inverse / forward": (("inverse", OURS), ("forward", OURS)),
    "train inverse / train": (("train inverse", OURS), ("train", OURS)),
    "sample and score / sample": (("sample and score", OURS), ("sample", OURS)),
    "path gradient / plain": (("path gradient", OURS), ("plain gradient", OURS)),
    "batched parameters / shared": (("batched train", OURS), ("train", OURS)),
}


def operations(problem: Problem, stacks: dict[str, Contender]) -> dict[Key, Timed]:
    """Everything that runs in this process, by operation and contender."""
    x, y, ours = problem.x, problem.y, stacks[OURS]
    assert isinstance(ours, Ours)
    timed: dict[Key, Timed] = {}
    for name, stack in stacks.items():
        timed["train", name] = Local(lambda stack=stack: stack.train(x))
        timed["forward", name] = Local(lambda stack=stack: stack.forward(x))
    timed["train inverse", OURS] = Local(lambda: ours.train_inverse(y))
    timed["inverse", OURS] = Local(lambda: ours.inverse(y))
    for name, function in _distributions(problem, ours.transform).items():
        timed[name, OURS] = Local(function)
    N, D, K = problem.shape
    if N * D * K <= BATCHED_NUMBERS:
        timed["batched train", OURS] = Local(Batched(problem).call)
    return timed


class Batched(Contender):
    """Ours, with parameters of their own for every row, as a hypernetwork makes them."""

    def __init__(self, problem: Problem) -> None:
        self.x = problem.x
        self.planar = pf.Planar(problem.shape.D, problem.shape.K)
        self.parameters = [
            p.expand(problem.shape.N, *p.shape).contiguous().requires_grad_()
            for p in problem.parameters
        ]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        transform = self.planar.at(*self.parameters)
        y = transform(x)
        return y, transform.log_abs_det_jacobian(x, y)

    def call(self) -> object:
        return self.train(self.x)


def _distributions(problem: Problem, t: pf.Planar) -> dict[str, Callable[[], object]]:
    """Sampling with and without its score; gradients of an ELBO, plain and along the path."""
    D, rows = problem.shape.D, torch.Size([problem.shape.N])
    like = problem.x
    base = dist.Normal(like.new_zeros(D), like.new_ones(D)).to_event(1)
    plain, along = dist.TransformedDistribution(base, [t]), AlongPath(base, [t])

    def sample() -> Tensor:
        with torch.no_grad():
            return plain.sample(rows)

    def sample_and_score() -> Tensor:
        with torch.no_grad():
            return plain.log_prob(plain.sample(rows))

    def gradient(q: dist.TransformedDistribution) -> object:
        z = q.rsample(rows)
        loss = (q.log_prob(z) + z.square().sum(-1) / 2).mean()
        return torch.autograd.grad(loss, (t.w, t.u, t.b))

    return {
        "sample": sample,
        "sample and score": sample_and_score,
        "plain gradient": lambda: gradient(plain),
        "path gradient": lambda: gradient(along),
    }


def ratios(taken: dict[Key, list[float]]) -> dict[str, dict[str, float] | None]:
    """Every ratio; None where one side did not run."""
    found: dict[str, Any] = dict.fromkeys(RATIOS)
    for name, (above, below) in RATIOS.items():
        if above in taken and below in taken:
            found[name] = ratio(taken[above], taken[below])
    return found
