"""Regressions of few numbers, whose posterior a grid or a conjugate prior gives."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Normal, StudentT
from torch.nn.functional import logsigmoid

from ..judging import Draws
from .gaussians import design, factor
from .grids import Axis, Grid, Gridded, half_normal
from .target import Sampler, Target

Values = Callable[[], tuple[Tensor, ...]]


def logistic(name: str, y: tuple[float, ...], sd: float, axes: tuple[Axis, Axis]) -> Target:
    """Intercept and slope of a binary outcome; the slope is held by the prior if y separates."""

    def values() -> tuple[Tensor, Tensor]:
        return torch.linspace(-2, 2, len(y)), torch.tensor(y)

    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, sd))
        b = pyro.sample("b", dist.Normal(0.0, sd))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=a + b * x), obs=y)

    def log_density(a: Tensor, b: Tensor) -> Tensor:
        total = Normal(0.0, sd).log_prob(a) + Normal(0.0, sd).log_prob(b)
        for x, y in zip(*values(), strict=True):
            total = total + logsigmoid((2 * y - 1) * (a + b * x))
        return total

    return gridded(name, model, values, log_density, axes)


def gridded(
    name: str,
    model: Callable,
    values: Values,
    log_density: Callable,
    axes: tuple[Axis, ...],
    sites: Callable[[Tensor], Draws] = lambda x: {"a": x[:, 0], "b": x[:, 1]},
) -> Target:
    """A model of two numbers, and its density on a grid."""
    solve = lambda: Gridded(Grid(log_density, *axes), sites)  # noqa: E731
    return Target(name, "regression", lambda: (model, values()), solve)


def both_positive(x: Tensor) -> Draws:
    """Sites a and b, whose logs are the coordinates of the grid."""
    return {"a": x[:, 0].exp(), "b": x[:, 1].exp()}


def second_positive(x: Tensor) -> Draws:
    """Sites a and b, of which b is positive."""
    return {"a": x[:, 0], "b": x[:, 1].exp()}


def poisson() -> Target:
    """A log rate along a line."""

    def values() -> tuple[Tensor, Tensor]:
        count = torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0, 1.0, 4.0, 6.0])
        return torch.linspace(-1.5, 1.5, 8), count

    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Poisson((a + b * x).exp()), obs=y)

    def log_density(a: Tensor, b: Tensor) -> Tensor:
        total = Normal(0.0, 3.0).log_prob(a) + Normal(0.0, 3.0).log_prob(b)
        for x, y in zip(*values(), strict=True):
            total = total + y * (a + b * x) - (a + b * x).exp() - torch.lgamma(y + 1)
        return total

    return gridded("poisson-line_2", model, values, log_density, ((-5, 3, 401), (-2, 5.5, 401)))


def robust() -> Target:
    """A line through points, one of which is an outlier, with Student-t errors."""

    def values() -> tuple[Tensor, Tensor]:
        x = torch.linspace(-1, 1, 7)
        return x, 1 + 2 * x + torch.tensor([0.1, -0.1, 0.0, 0.2, -0.1, 6.0, 0.1])

    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 5.0))
        b = pyro.sample("b", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.StudentT(2.0, a + b * x, 0.3), obs=y)

    def log_density(a: Tensor, b: Tensor) -> Tensor:
        total = Normal(0.0, 5.0).log_prob(a) + Normal(0.0, 5.0).log_prob(b)
        for x, y in zip(*values(), strict=True):
            total = total + StudentT(2.0, a + b * x, 0.3).log_prob(y)
        return total

    return gridded("robust-line_2", model, values, log_density, ((-2, 4, 601), (-3, 8, 801)))


def few_numbers() -> Target:
    """Mean and sd of three numbers."""

    def values() -> tuple[Tensor]:
        return (torch.tensor([1.0, 1.4, 3.0]),)

    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        b = pyro.sample("b", dist.HalfNormal(5.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(a, b), obs=y)

    def log_density(a: Tensor, u: Tensor) -> Tensor:
        total = Normal(0.0, 10.0).log_prob(a) + half_normal(5.0)(u)
        for y in values()[0]:
            total = total + Normal(a, u.exp()).log_prob(y)
        return total

    axes = (-25.0, 28.0, 1201), (-3.0, 3.2, 301)
    return gridded("mean_sd-three_2", model, values, log_density, axes, second_positive)


def decay() -> Target:
    """a exp(-b t): a level and a rate, of which little is known."""

    def values() -> tuple[Tensor, Tensor]:
        return torch.tensor([0.0, 0.5, 1.0, 2.0]), torch.tensor([2.2, 1.0, 0.9, 0.1])

    def model(t: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.HalfNormal(5.0))
        b = pyro.sample("b", dist.HalfNormal(3.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(a * (-b * t).exp(), 0.4), obs=y)

    def log_density(u: Tensor, v: Tensor) -> Tensor:
        total = half_normal(5.0)(u) + half_normal(3.0)(v)
        for t, y in zip(*values(), strict=True):
            total = total + Normal(u.exp() * (-v.exp() * t).exp(), 0.4).log_prob(y)
        return total

    axes = (-2.0, 2.5, 401), (-7.0, 2.8, 601)
    return gridded("decay_2", model, values, log_density, axes, both_positive)


def saturation() -> Target:
    """a x / (b + x) far below saturation: only a / b is well known, so the posterior is a ridge."""

    def values() -> tuple[Tensor, Tensor]:
        x = torch.tensor([0.2, 0.5, 1.0, 1.5])
        return x, 6 * x / (5 + x)

    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.LogNormal(1.0, 1.0))
        b = pyro.sample("b", dist.LogNormal(1.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(a * x / (b + x), 0.05), obs=y)

    def log_density(u: Tensor, v: Tensor) -> Tensor:
        total = Normal(1.0, 1.0).log_prob(u) + Normal(1.0, 1.0).log_prob(v)
        for x, y in zip(*values(), strict=True):
            total = total + Normal(u.exp() * x / (v.exp() + x), 0.05).log_prob(y)
        return total

    axes = (-1.0, 5.0, 801), (-2.0, 5.0, 801)
    return gridded("saturation_2", model, values, log_density, axes, both_positive)


def autoregression() -> Target:
    """A persistent series: a coefficient in (-1, 1) near one, and the sd of its steps."""

    def values() -> tuple[Tensor]:
        return (torch.tensor([0.1, 0.4, 0.7, 1.2, 1.3, 1.9, 2.2, 2.4, 3.0, 3.1]),)

    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Uniform(-1.0, 1.0))
        b = pyro.sample("b", dist.HalfNormal(1.0))
        with pyro.plate("rows", len(y) - 1):
            pyro.sample("y", dist.Normal(a * y[:-1], b), obs=y[1:])

    def log_density(z: Tensor, u: Tensor) -> Tensor:
        a = (z / 2).tanh()
        total = ((1 - a**2) / 4).log() + half_normal(1.0)(u)
        (y,) = values()
        for before, now in zip(y[:-1], y[1:], strict=True):
            total = total + Normal(a * before, u.exp()).log_prob(now)
        return total

    def sites(x: Tensor) -> Draws:
        return {"a": (x[:, 0] / 2).tanh(), "b": x[:, 1].exp()}

    axes = (-3.0, 16.0, 801), (-2.5, 1.2, 301)
    return gridded("autoregression_2", model, values, log_density, axes, sites)


def conjugate() -> Target:
    """Coefficients and variance with the conjugate prior."""
    X = design(12, 3, 0.3, seed=5)
    y = X @ torch.tensor([1.0, -2.0, 0.5]).double() + design(12, 1, 0.0, 6)[:, 0]

    def model(X: Tensor, y: Tensor) -> None:
        variance = pyro.sample("variance", dist.InverseGamma(2.0, 1.0))
        beta = pyro.sample(
            "beta", dist.Normal(torch.zeros(3), 3 * variance.sqrt().unsqueeze(-1)).to_event(1)
        )
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(X @ beta, variance.sqrt()), obs=y)

    def build() -> tuple[Callable, tuple]:
        dtype = torch.get_default_dtype()
        return model, (X.to(dtype), y.to(dtype))

    def solve() -> Sampler:
        V = torch.linalg.inv(X.T @ X + torch.eye(3) / 9)
        mean, root = V @ X.T @ y, factor(V)
        shape, rate = 2 + 6, 1 + 0.5 * (y @ y - y @ X @ mean)

        def draw(num: int) -> Draws:
            variance = 1 / dist.Gamma(torch.tensor(shape).double(), rate).sample((num,))
            beta = mean + variance.sqrt()[:, None] * (torch.randn(num, 3) @ root.T)
            return {"variance": variance, "beta": beta}

        evidence = (
            -6 * math.log(2 * math.pi)
            + 0.5 * (V.logdet() - 3 * math.log(9))
            + math.lgamma(shape)
            - math.lgamma(2)
            - shape * rate.log()
        )
        return Sampler(draw, evidence.item())

    return Target("regression-conjugate_4", "regression", build, solve)


TARGETS: list[Target] = [
    logistic("logistic_2", (0.0, 0, 1, 0, 1, 0, 1, 1), 3.0, ((-8, 8, 401), (-5, 12, 501))),
    logistic("logistic-separated_2", (0.0, 0, 0, 1, 1, 1), 5.0, ((-20, 20, 501), (-6, 24, 501))),
    poisson(),
    robust(),
    few_numbers(),
    decay(),
    saturation(),
    autoregression(),
    conjugate(),
]
