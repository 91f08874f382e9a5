"""Gaussians: correlated, of very different scales, of many dimensions, and from regressions."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .target import Sampler, Target, double


def factor(covariance: Tensor) -> Tensor:
    """A square root of a covariance that may be nearly singular."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def rotated(sds: Tensor, seed: int = 0) -> Tensor:
    """A covariance with these sds along random directions."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(sds), len(sds), generator=generator)).Q
    return q @ sds.square().diag() @ q.T


def autoregressive(dim: int, rho: float) -> Tensor:
    """Correlations rho to the power of the distance."""
    place = torch.arange(dim)
    return rho ** (place[:, None] - place).abs().to(torch.get_default_dtype())


def equal(dim: int, rho: float) -> Tensor:
    """The same correlation everywhere."""
    return torch.full((dim, dim), rho) + (1 - rho) * torch.eye(dim)


def gaussian(name: str, covariance: Callable[[], Tensor], shift: float = 0.0) -> Target:
    """One site with that covariance."""

    def model(mean: Tensor, covariance: Tensor) -> None:
        pyro.sample("x", dist.MultivariateNormal(mean, covariance))

    def build() -> tuple[Callable, tuple]:
        with double():
            found = covariance()
        found = found.to(torch.get_default_dtype())
        return model, (torch.full((len(found),), shift), found)

    def solve() -> Sampler:
        root = factor(covariance())
        return Sampler(lambda n: {"x": shift + torch.randn(n, len(root)) @ root.T})

    return Target(name, "gaussian", build, solve)


def scaled() -> Target:
    """Ten numbers, each on a scale of its own, from a thousandth to a thousand."""

    def model(scales: Tensor) -> None:
        with pyro.plate("numbers", len(scales)):
            pyro.sample("x", dist.Normal(scales, scales))

    def solve() -> Sampler:
        scales = torch.logspace(-3, 3, 10)
        return Sampler(lambda n: {"x": scales * (1 + torch.randn(n, 10))})

    build = lambda: (model, (torch.logspace(-3, 3, 10),))  # noqa: E731
    return Target("gaussian-scales_10", "gaussian", build, solve)


def design(rows: int, dim: int, alike: float, seed: int) -> Tensor:
    """Regressors, of which a part ``alike`` is common to all."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    common = torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    return alike**0.5 * common + (1 - alike) ** 0.5 * own


def regression(name: str, rows: int, dim: int, alike: float, noise: float) -> Target:
    """Coefficients ~ N(0, 10²), a known noise, and intercept among them."""
    X = design(rows, dim, alike, seed=dim)
    y = X @ torch.linspace(-1, 2, dim, dtype=torch.float64) + noise * design(rows, 1, 0.0, 7)[:, 0]

    def model(X: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(dim), 10.0).to_event(1))
        with pyro.plate("rows", rows):
            pyro.sample("y", dist.Normal(X @ beta, noise), obs=y)

    def build() -> tuple[Callable, tuple]:
        dtype = torch.get_default_dtype()
        return model, (X.to(dtype), y.to(dtype))

    def solve() -> Sampler:
        precision = X.T @ X / noise**2 + torch.eye(dim) / 100
        covariance = torch.linalg.inv(precision)
        mean, root = covariance @ (X.T @ y) / noise**2, factor(covariance)
        marginal = 100 * X @ X.T + noise**2 * torch.eye(rows)
        evidence = dist.MultivariateNormal(torch.zeros(rows), marginal).log_prob(y).item()
        return Sampler(lambda n: {"beta": mean + torch.randn(n, dim) @ root.T}, evidence)

    return Target(name, "gaussian", build, solve)


def process() -> Target:
    """A Gaussian process with known hyperparameters, observed with noise at twelve of thirty."""
    x = torch.linspace(0, 3, 30, dtype=torch.float64)
    K = (-0.5 * (x[:, None] - x).square() / 0.4**2).exp() + 1e-4 * torch.eye(30).double()
    seen = torch.arange(0, 24, 2)
    y = (3 * x[seen]).sin() + 0.2 * (17 * x[seen]).cos()

    def model(K: Tensor, y: Tensor) -> None:
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(30), K))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(f[seen], 0.2), obs=y)

    def build() -> tuple[Callable, tuple]:
        dtype = torch.get_default_dtype()
        return model, (K.to(dtype), y.to(dtype))

    def solve() -> Sampler:
        marginal = K[seen][:, seen] + 0.04 * torch.eye(12)
        gain = torch.linalg.solve(marginal, K[seen]).T
        mean, root = gain @ y, factor(K - gain @ K[seen])
        evidence = dist.MultivariateNormal(torch.zeros(12), marginal).log_prob(y).item()
        return Sampler(lambda n: {"f": mean + torch.randn(n, 30) @ root.T}, evidence)

    return Target("gp-known_30", "gaussian", build, solve)


TARGETS = [
    gaussian("gaussian-correlated_2", lambda: equal(2, 0.95)),
    gaussian("gaussian-far_5", lambda: equal(5, 0.5), shift=300.0),
    gaussian("gaussian-ill_10", lambda: rotated(torch.logspace(-1.5, 1.5, 10))),
    gaussian("gaussian-ar1_50", lambda: autoregressive(50, 0.9)),
    gaussian("gaussian-equal_30", lambda: equal(30, 0.99)),
    gaussian("gaussian-rotated_100", lambda: rotated(torch.logspace(-1, 1, 100), seed=1)),
    scaled(),
    regression("regression-5", 40, 5, 0.0, 0.5),
    regression("regression-collinear_20", 60, 20, 0.98, 1.0),
    process(),
]
