"""Bananas, funnels, rings, spirals and waves."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Normal

from ..judging import Draws
from .grids import Grid
from .target import Sampler, Target


def free(name: str, model: Callable, draw: Callable[[int], Draws], *heavy: str) -> Target:
    """A model without data, drawn in the order in which it is written."""
    return Target(name, "curved", lambda: (model, ()), lambda: Sampler(draw), heavy=heavy)


def banana(name: str, pairs: int, bend: float, width: float) -> Target:
    """Pairs of numbers, the second about ``bend`` times the square of the first."""

    def model() -> None:
        with pyro.plate("pairs", pairs):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(bend * x**2, width))

    def draw(num: int) -> Draws:
        x = torch.randn(num, pairs)
        return {"x": x, "y": bend * x**2 + width * torch.randn(num, pairs)}

    return free(name, model, draw)


def along_curve(name: str, curve: Callable[[Tensor], Tensor], width: float) -> Target:
    """A number, and another on a curve above it."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.5))
        pyro.sample("y", dist.Normal(curve(x), width))

    def draw(num: int) -> Draws:
        x = 1.5 * torch.randn(num)
        return {"x": x, "y": curve(x) + width * torch.randn(num)}

    return free(name, model, draw)


def chain(dim: int) -> Target:
    """Each number about the square of the one before: a banana of bananas."""

    def model() -> None:
        x = pyro.sample("x0", dist.Normal(1.0, 0.7))
        for i in range(1, dim):
            x = pyro.sample(f"x{i}", dist.Normal(0.5 * x**2, 0.5))

    def draw(num: int) -> Draws:
        draws = {"x0": 1 + 0.7 * torch.randn(num)}
        for i in range(1, dim):
            draws[f"x{i}"] = 0.5 * draws[f"x{i - 1}"] ** 2 + 0.5 * torch.randn(num)
        return draws

    return free(f"banana-chain_{dim}", model, draw, *(f"x{i}" for i in range(2, dim)))


def funnel(dim: int, sd: float) -> Target:
    """Neal's funnel with ``dim`` numbers in all; sd of the log of the scale times two."""

    def model() -> None:
        v = pyro.sample("v", dist.Normal(0.0, sd))
        with pyro.plate("numbers", dim - 1):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    def draw(num: int) -> Draws:
        v = sd * torch.randn(num)
        return {"v": v, "x": (v / 2).exp()[:, None] * torch.randn(num, dim - 1)}

    return free(f"funnel-{sd:g}_{dim}", model, draw, "x")


def two_scales() -> Target:
    """A funnel below a funnel."""

    def model() -> None:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        v = pyro.sample("v", dist.Normal(u, 1.0))
        with pyro.plate("numbers", 5):
            pyro.sample("x", dist.Normal(u, v.exp()))

    def draw(num: int) -> Draws:
        u = torch.randn(num)
        v = u + torch.randn(num)
        x = u[:, None] + v.exp()[:, None] * torch.randn(num, 5)
        return {"u": u, "v": v, "x": x}

    return free("funnel-nested_7", model, draw, "x")


def ring(name: str, dim: int, radius: float, width: float) -> Target:
    """A shell, given by its density alone: |x| about ``radius``."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(dim), 5.0).to_event(1).mask(False))
        # the tiny number keeps the slope finite at the centre
        r = (x.square().sum(-1) + 1e-12).sqrt()
        pyro.factor("shell", -0.5 * ((r - radius) / width) ** 2)

    def solve() -> Sampler:
        # radius by quadrature over its log, direction at random
        def log_density(u: Tensor) -> Tensor:
            return dim * u - 0.5 * ((u.exp() - radius) / width) ** 2

        top = math.log(radius + 9 * width)
        grid = Grid(log_density, (top - 14, top, 8001))
        sphere = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)

        def draw(num: int) -> Draws:
            direction = torch.randn(num, dim)
            r = grid.sample(num).exp()
            return {"x": r * direction / direction.norm(dim=1, keepdim=True)}

        return Sampler(draw, grid.log_evidence + sphere)

    return Target(name, "curved", lambda: (model, ()), solve)


def spiral() -> Target:
    """A point on a spiral, and the time at which it is there."""

    def place(t: Tensor) -> Tensor:
        angle = 2 * t
        return torch.stack([angle.cos(), angle.sin()], -1) * (2 + t).unsqueeze(-1)

    def model() -> None:
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        pyro.sample("place", dist.Normal(place(t), 0.2).to_event(1))

    def draw(num: int) -> Draws:
        t = torch.randn(num)
        return {"t": t, "place": place(t) + 0.2 * torch.randn(num, 2)}

    return free("spiral_3", model, draw)


def heteroscedastic() -> Target:
    """A scale that grows with another number without end."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = 0.1 + x.square().sum(-1)
        pyro.sample("y", dist.Normal(x[..., 0], scale))

    def draw(num: int) -> Draws:
        x = torch.randn(num, 2)
        scale = 0.1 + x.square().sum(-1)
        return {"x": x, "y": x[:, 0] + scale * torch.randn(num)}

    return free("pinched_3", model, draw, "y")


def sum_observed() -> Target:
    """Two numbers whose squares sum to one: a ring that a likelihood makes."""

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x.square().sum(-1), 0.15), obs=y)

    def solve() -> Sampler:
        def log_density(u: Tensor) -> Tensor:
            prior = 2 * u - 0.5 * (2 * u).exp()  # of the log of the radius
            return prior + Normal((2 * u).exp(), 0.15).log_prob(torch.tensor(1.0))

        grid = Grid(log_density, (-12.0, 0.7, 4001))

        def draw(num: int) -> Draws:
            r, turn = grid.sample(num)[:, 0].exp(), 2 * math.pi * torch.rand(num)
            return {"x": torch.stack([r * turn.cos(), r * turn.sin()], -1)}

        return Sampler(draw, grid.log_evidence)

    return Target("ring-observed_2", "curved", lambda: (model, (torch.tensor(1.0),)), solve)


TARGETS: list[Target] = [
    banana("banana-mild_2", 1, 0.5, 0.5),
    banana("banana-sharp_2", 1, 1.0, 0.1),
    banana("banana-strong_2", 1, 3.0, 1.0),
    banana("banana-five_10", 5, 1.0, 0.5),
    chain(4),
    along_curve("cubic_2", lambda x: x**3 / 3, 0.4),
    along_curve("wave_2", lambda x: 2 * (2 * x).sin(), 0.2),
    funnel(2, 3.0),
    funnel(10, 3.0),
    funnel(10, 1.0),
    funnel(51, 2.0),
    funnel(101, 3.0),
    two_scales(),
    ring("ring_2", 2, 3.0, 0.3),
    ring("shell_5", 5, 4.0, 0.4),
    sum_observed(),
    spiral(),
    heteroscedastic(),
]
