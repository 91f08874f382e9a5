"""Groups of rows with a common normal prior, and the exact posterior of its location and scale.

mu ~ N(0, 5), tau ~ HalfNormal(5), theta_j ~ N(mu, tau) for J groups, and N rows y of them that are
normal around theta, Poisson with rate exp(theta), or Bernoulli with logits theta. Of a group's rows
only their number and sum count, so groups with the same of both are integrated over once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

MU, TAU = 5.0, 5.0  # scales of the two priors
NODES = 48  # of a group's quadrature, around its mode
NEWTON = 60  # steps to the mode
POINTS, WIDTH = 41, 8.0  # of the outer grid in each direction, and standard deviations either way
REFINED = 8  # times that the outer grid is moved to where the mass is
AT_ONCE = 2**22  # numbers of the inner quadrature

# The distribution of a row given its group's theta.
FAMILIES: dict[str, Callable[[Tensor], dist.Distribution]] = {
    "normal": lambda theta: dist.Normal(theta, 1.0),
    "Poisson": lambda theta: dist.Poisson(theta.exp()),
    "Bernoulli": lambda theta: dist.Bernoulli(logits=theta),
}


class Data(NamedTuple):
    """Rows y (N,), the group of each, and J."""

    group: Tensor
    y: Tensor
    groups: int


def data(family: str, groups: int, rows: int, seed: int = 0, spread: float = 1.0) -> Data:
    """N rows in turn of J groups, whose theta have mean 0.5 and a standard deviation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theta = 0.5 + spread * torch.randn(groups)
        group = torch.arange(rows) % groups
        return Data(group, FAMILIES[family](theta[group]).sample(), groups)


def model(family: str, group: Tensor, y: Tensor, groups: int) -> None:
    """The hierarchy as it is written."""
    mu = pyro.sample("mu", dist.Normal(0.0, MU))
    tau = pyro.sample("tau", dist.HalfNormal(TAU))
    with pyro.plate("groups", groups):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", FAMILIES[family](theta[..., group]), obs=y)


class Exact(NamedTuple):
    """The log evidence, and mean and standard deviation of each hyperparameter."""

    log_evidence: float
    mean: dict[str, float]
    sd: dict[str, float]

    def errors(self, draws: dict[str, Tensor]) -> dict[str, float]:
        """Of the means of draws, in standard deviations."""
        return {
            name: abs(draws[name].double().mean().item() - mean) / self.sd[name]
            for name, mean in self.mean.items()
        }


def exact(family: str, found: Data) -> Exact:
    """By quadrature over mu and log tau, and within it over theta for each kind of group.

    The trapezoid rule on a grid in the axes of the last grid's moments: for a smooth density that
    vanishes at the edges its error falls faster than any power of the spacing.
    """
    marginal = _marginal(family, found)
    centre, factor = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    steps = torch.linspace(-WIDTH, WIDTH, POINTS, dtype=torch.float64)
    grid = torch.cartesian_prod(steps, steps)
    for _ in range(REFINED):
        u = centre + grid @ factor.mT
        value = marginal(u) + _log_prior(u)
        weights = value.softmax(0).unsqueeze(-1)
        log_evidence = value.logsumexp(0) + 2 * (steps[1] - steps[0]).log() + factor.logdet()
        centre = (weights * u).sum(0)
        off = u - centre
        # No narrower than some spacings of this grid, between which nothing is seen.
        least = 1e-2 * factor @ factor.mT
        factor = torch.linalg.cholesky((weights * off).mT @ off + least)
    values = {"mu": u[:, :1], "tau": u[:, 1:].exp()}
    mean = {name: (weights * v).sum().item() for name, v in values.items()}
    sd = {n: (weights * (v - mean[n]).square()).sum().sqrt().item() for n, v in values.items()}
    return Exact(log_evidence.item(), mean, sd)


def _log_prior(u: Tensor) -> Tensor:
    """Of mu and log tau (S, 2)."""
    mu, log_tau = u.unbind(-1)
    scale = torch.tensor(TAU, dtype=torch.float64)
    tau = dist.HalfNormal(scale).log_prob(log_tau.exp()) + log_tau
    return dist.Normal(torch.zeros_like(scale), MU).log_prob(mu) + tau


def _marginal(family: str, found: Data) -> Callable[[Tensor], Tensor]:
    """Log p(y | mu, tau), theta integrated out, as a function of mu and log tau (S, 2)."""
    y = found.y.double()
    counts = torch.zeros(found.groups, dtype=torch.float64)
    counts.index_add_(0, found.group, torch.ones_like(y))
    sums = torch.zeros_like(counts).index_add_(0, found.group, y)
    if family == "normal":
        return _normal(y, counts, sums)
    kinds, times = torch.stack([counts, sums], 1).unique(dim=0, return_counts=True)
    constant = -torch.lgamma(y + 1).sum() if family == "Poisson" else y.new_zeros(())
    curve = torch.exp if family == "Poisson" else torch.nn.functional.softplus

    def marginal(u: Tensor) -> Tensor:
        size = max(1, AT_ONCE // (NODES * len(kinds)))
        parts = [_inner(curve, part, *kinds.unbind(-1)) @ times.double() for part in u.split(size)]
        return constant + torch.cat(parts)

    return marginal


def _normal(y: Tensor, counts: Tensor, sums: Tensor) -> Callable[[Tensor], Tensor]:
    """A group's mean is N(mu, tau² + 1/n), and what is left of its rows does not depend on them."""
    sizes, kind = counts.unique(return_inverse=True)
    means = sums / counts
    first, second = (
        torch.zeros_like(sizes).index_add_(0, kind, t) for t in (means, means.square())
    )
    times = torch.zeros_like(sizes).index_add_(0, kind, torch.ones_like(counts))
    within = y.square().sum() - (counts * means.square()).sum()
    constant = -within / 2 - (len(y) * math.log(2 * math.pi) + counts.log().sum()) / 2
    constant = constant + len(counts) * math.log(2 * math.pi) / 2

    def marginal(u: Tensor) -> Tensor:
        mu, variance = u[:, :1], (2 * u[:, 1:]).exp() + 1 / sizes
        squares = second - 2 * mu * first + mu.square() * times
        each = squares / variance + times * (2 * math.pi * variance).log()
        return constant - each.sum(-1) / 2

    return marginal


def _inner(curve: Callable[[Tensor], Tensor], u: Tensor, counts: Tensor, sums: Tensor) -> Tensor:
    """Log ∫ exp(s θ − n curve(θ)) N(θ; mu, tau) dθ of each kind of group (K,), shape (S, K).

    By Gauss and Hermite's rule around the mode, where the integrand is log-concave.
    """
    mu, log_tau = u[:, :1], u[:, 1:]
    precision = (-2 * log_tau).exp()
    theta = mu.expand(-1, len(counts))
    for _ in range(NEWTON):
        slope = sums - counts * _slope(curve, theta) - precision * (theta - mu)
        theta = theta + (slope / (counts * _bend(curve, theta) + precision)).clamp(-1, 1)
    scale = (counts * _bend(curve, theta) + precision).rsqrt().unsqueeze(-1)
    nodes, weights = (torch.tensor(t) for t in np.polynomial.hermite_e.hermegauss(NODES))
    at = theta.unsqueeze(-1) + scale * nodes
    log_p = sums.unsqueeze(-1) * at - counts.unsqueeze(-1) * curve(at)
    prior = dist.Normal(mu.unsqueeze(-1), log_tau.exp().unsqueeze(-1))
    value = log_p + prior.log_prob(at) + nodes.square() / 2 + weights.log()
    return (value + scale.log()).logsumexp(-1)


def _slope(curve: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    return theta.exp() if curve is torch.exp else theta.sigmoid()


def _bend(curve: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    slope = _slope(curve, theta)
    return slope if curve is torch.exp else slope * (1 - slope)
