"""Several modes: mixtures with known weights, labels, signs, phases, products, a wide part."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Normal

from ..judging import Draws
from .grids import Grid, Gridded, half_normal
from .target import Sampler, Target


def along(dim: int, *places: float) -> list[list[float]]:
    """Centres at these distances along the diagonal."""
    return [[place / dim**0.5] * dim for place in places]


def mixture(
    name: str,
    weights: list[float],
    centres: list[list[float]],
    scales: list[float],
    kind: str = "modes",
) -> Target:
    """Spherical Gaussians as a distribution of Pyro."""
    dim = len(centres[0])

    def parts() -> tuple[Tensor, Tensor, Tensor]:
        return torch.tensor(weights), torch.tensor(centres), torch.tensor(scales)

    def model(weights: Tensor, centres: Tensor, scales: Tensor) -> None:
        spread = scales[:, None].expand(-1, dim)
        pyro.sample("x", dist.MixtureOfDiagNormals(centres, spread, weights.log()))

    def draw(num: int) -> Draws:
        weights, centres, scales = parts()
        edges = weights.cumsum(0)
        k = torch.searchsorted(edges, torch.rand(num) * edges[-1]).clamp(max=len(edges) - 1)
        return {"x": centres[k] + scales[k, None] * torch.randn(num, dim)}

    return Target(name, kind, lambda: (model, parts()), lambda: Sampler(draw))


def circle(num: int, radius: float) -> list[list[float]]:
    """Centres on a circle."""
    turns = (2 * math.pi * i / num for i in range(num))
    return [[radius * math.cos(turn), radius * math.sin(turn)] for turn in turns]


def factored() -> Target:
    """Two modes of unlike shapes, given by a density alone."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 10.0).to_event(1).mask(False))
        wide = dist.Normal(torch.tensor([-4.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 0.2]))
        narrow = dist.Normal(torch.tensor([4.0, 0.0, 0.0]), torch.tensor([0.3, 0.2, 2.0]))
        terms = (
            math.log(0.35) + wide.log_prob(x).sum(-1),
            math.log(0.65) + narrow.log_prob(x).sum(-1),
        )
        pyro.factor("density", torch.logaddexp(*terms))

    def draw(num: int) -> Draws:
        first = torch.rand(num, 1) < 0.35
        wide = torch.tensor([-4.0, 0, 0]) + torch.tensor([1.0, 2.0, 0.2]) * torch.randn(num, 3)
        narrow = torch.tensor([4.0, 0, 0]) + torch.tensor([0.3, 0.2, 2.0]) * torch.randn(num, 3)
        return {"x": wide.where(first, narrow)}

    return Target("modes-unlike_3", "modes", lambda: (model, ()), lambda: Sampler(draw))


def two_rates() -> Target:
    """A positive number with two modes on the log scale."""

    def model() -> None:
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0).mask(False))
        slow, fast = dist.LogNormal(-3.0, 0.5), dist.LogNormal(2.0, 0.4)
        terms = math.log(0.3) + slow.log_prob(rate), math.log(0.7) + fast.log_prob(rate)
        pyro.factor("density", torch.logaddexp(*terms))

    def draw(num: int) -> Draws:
        slow = torch.rand(num) < 0.3
        noise = torch.randn(num)
        return {"rate": (-3 + 0.5 * noise).where(slow, 2 + 0.4 * noise).exp()}

    return Target("modes-rates_1", "modes", lambda: (model, ()), lambda: Sampler(draw))


def signs(dim: int) -> Target:
    """Only squares are observed, so each sign is free."""
    y = [2.0, 1.0, 3.0][:dim]

    def model(y: Tensor) -> None:
        with pyro.plate("numbers", dim):
            x = pyro.sample("x", dist.Normal(0.0, 2.0))
            pyro.sample("y", dist.Normal(x**2, 0.5), obs=y)

    def solve() -> Sampler:
        grids = [
            Grid(
                lambda x, y=y: (
                    Normal(0.0, 2.0).log_prob(x) + Normal(x**2, 0.5).log_prob(torch.tensor(y))
                ),
                (-4, 4, 2001),
            )
            for y in y
        ]
        evidence = sum(grid.log_evidence for grid in grids)
        return Sampler(lambda n: {"x": torch.cat([g.sample(n) for g in grids], 1)}, evidence)

    return Target(f"signs_{dim}", "modes", lambda: (model, (torch.tensor(y),)), solve)


def labels(name: str, means: tuple[float, float], rows: int) -> Target:
    """A mixture of two equal components with known scales."""
    spread = torch.special.ndtri((torch.arange(rows, dtype=torch.float64) + 0.5) / rows)
    data = torch.cat([means[0] + spread, means[1] + spread])

    def model(y: Tensor) -> None:
        with pyro.plate("components", 2):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        share = dist.Categorical(torch.tensor([0.5, 0.5]))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.MixtureSameFamily(share, dist.Normal(mu, 1.0)), obs=y)

    def log_density(a: Tensor, b: Tensor) -> Tensor:
        total = Normal(0.0, 5.0).log_prob(a) + Normal(0.0, 5.0).log_prob(b)
        for y in data:
            total = total + torch.logaddexp(Normal(a, 1.0).log_prob(y), Normal(b, 1.0).log_prob(y))
        return total - len(data) * math.log(2)

    def solve() -> Gridded:
        axis = (min(means) - 3.0, max(means) + 3.0, 281)
        return Gridded(Grid(log_density, axis, axis), lambda x: {"mu": x})

    return Target(name, "modes", lambda: (model, (data.to(torch.get_default_dtype()),)), solve)


def product(name: str, y: float, noise: float) -> Target:
    """Only the product of two numbers is observed."""

    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a * b, noise), obs=y)

    def solve() -> Gridded:
        prior = Normal(0.0, 1.0)

        def log_density(a: Tensor, b: Tensor) -> Tensor:
            data = Normal(a * b, noise).log_prob(torch.tensor(y))
            return prior.log_prob(a) + prior.log_prob(b) + data

        grid = Grid(log_density, (-4.6, 4.6, 801), (-4.6, 4.6, 801))
        return Gridded(grid, lambda x: {"a": x[:, 0], "b": x[:, 1]})

    return Target(name, "modes", lambda: (model, (torch.tensor(y),)), solve)


TIMES = (0.1, 0.5, 0.9, 1.7, 2.2, 2.9, 3.3, 4.1)


def phase() -> Target:
    """A wave of unknown amplitude and phase, which wraps."""

    def values() -> tuple[Tensor, Tensor]:
        t = torch.tensor(TIMES)
        return t, 1.5 * (t + 1).sin() + 0.2 * (9 * t).cos()

    def model(t: Tensor, y: Tensor) -> None:
        amplitude = pyro.sample("amplitude", dist.HalfNormal(3.0))
        phase = pyro.sample("phase", dist.Normal(0.0, 4.0))
        with pyro.plate("rows", len(t)):
            pyro.sample("y", dist.Normal(amplitude * (t + phase).sin(), 0.5), obs=y)

    def log_density(u: Tensor, phase: Tensor) -> Tensor:
        total = half_normal(3.0)(u) + Normal(0.0, 4.0).log_prob(phase)
        for t, y in zip(*values(), strict=True):
            total = total + Normal(u.exp() * (t + phase).sin(), 0.5).log_prob(y)
        return total

    def solve() -> Gridded:
        grid = Grid(log_density, (-3.0, 2.5, 401), (-22.0, 22.0, 1201))
        return Gridded(grid, lambda x: {"amplitude": x[:, 0].exp(), "phase": x[:, 1]})

    return Target("phase-wraps_2", "modes", lambda: (model, values()), solve)


def frequency() -> Target:
    """A frequency that evenly spaced points know up to 2π."""

    def values() -> tuple[Tensor, Tensor]:
        t = torch.tensor([0.0, 1.0, 2.0, 3.0])
        return t, (2 * t).sin()

    def model(t: Tensor, y: Tensor) -> None:
        omega = pyro.sample("omega", dist.Normal(3.0, 3.0))
        with pyro.plate("rows", len(t)):
            pyro.sample("y", dist.Normal((omega * t).sin(), 0.5), obs=y)

    def log_density(omega: Tensor) -> Tensor:
        total = Normal(3.0, 3.0).log_prob(omega)
        for t, y in zip(*values(), strict=True):
            total = total + Normal((omega * t).sin(), 0.5).log_prob(y)
        return total

    def solve() -> Gridded:
        return Gridded(Grid(log_density, (-13.0, 19.0, 6401)), lambda x: {"omega": x[:, 0]})

    return Target("frequency_1", "modes", lambda: (model, values()), solve)


HALVES = [0.5, 0.5]
TARGETS: list[Target] = [
    mixture("modes-60_40_5", [0.6, 0.4], along(5, 0, 9), [1.0, 1.0]),
    mixture("modes-90_10_5", [0.9, 0.1], along(5, 0, 9), [1.0, 1.0]),
    mixture("modes-50_50_2", HALVES, along(2, -5, 5), [1.0, 1.0]),
    mixture("modes-70_30_20", [0.7, 0.3], along(20, -6, 6), [1.0, 1.0]),
    mixture("modes-three_10", [0.5, 0.3, 0.2], along(10, -10, 0, 10), [1.0, 0.5, 1.5]),
    mixture("modes-ten_2", [0.1] * 10, circle(10, 12.0), [0.7] * 10),
    mixture("modes-ten_uneven_2", [i / 55 for i in range(1, 11)], circle(10, 12.0), [0.7] * 10),
    mixture("modes-very_far_3", [0.4, 0.6], along(3, -60, 60), [1.0, 1.0]),
    mixture("modes-near_3", HALVES, along(3, -1.2, 1.2), [1.0, 1.0]),
    mixture("modes-touching_2", [0.7, 0.3], along(2, -2, 2), [1.0, 1.0]),
    mixture("modes-spike_2", [0.3, 0.7], along(2, 0, 0), [0.1, 1.0]),
    mixture("wide-1_percent_5", [0.99, 0.01], along(5, 0, 0), [1.0, 10.0], kind="tails"),
    mixture("wide-5_percent_2", [0.95, 0.05], along(2, 0, 0), [1.0, 5.0], kind="tails"),
    factored(),
    two_rates(),
    signs(1),
    signs(3),
    labels("labels-far_2", (-2.5, 2.5), 15),
    labels("labels-near_2", (-1.0, 1.0), 15),
    product("product-one_2", 1.0, 0.1),
    product("product-zero_2", 0.0, 0.3),
    phase(),
    frequency(),
]
