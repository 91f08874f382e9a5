"""Hierarchies with exact evidence and moments by quadrature, and guides for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyroflow as pf

F64 = torch.float64


class Exact(NamedTuple):
    """A model of one global and J rows, with what quadrature says of it."""

    model: Callable
    evidence: float
    mu: tuple[float, float]  # mean and sd
    theta: tuple[Tensor, Tensor]


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def rows_on_grids(
    likelihood: Callable[[Tensor], Tensor], num: int, tau: float, model: Callable, width: float
) -> Exact:
    """Quadrature: of θ_j ~ N(mu, tau) given each mu, and then of mu ~ N(0, 1).

    ``likelihood`` takes θ (K, 1) to the log likelihood of each row (K, J).
    """
    mu, theta = (
        torch.linspace(-width, width, 401, dtype=F64),
        torch.linspace(-6, 6, 1201, dtype=F64),
    )
    step = (theta[1] - theta[0]).log()
    inside = likelihood(theta.unsqueeze(1))  # (K, J)
    found, first, second = [], [], []
    for m in mu:
        log_p = dist.Normal(m, tau).log_prob(theta).unsqueeze(1) + inside
        total = log_p.logsumexp(0)
        weight = (log_p - total).exp()
        found.append(total + step)
        first.append(theta @ weight)
        second.append(theta.square() @ weight)
    log_post = torch.stack(found).sum(1) + dist.Normal(number(0.0), 1.0).log_prob(mu)
    weight = log_post.softmax(0)
    mean = weight @ mu
    sd = (weight @ (mu - mean).square()).sqrt()
    rows = weight @ torch.stack(first)
    spread = (weight @ torch.stack(second) - rows.square()).sqrt()
    evidence = log_post.logsumexp(0).item() + math.log(mu[1] - mu[0])
    return Exact(model, evidence, (mean.item(), sd.item()), (rows, spread))


def normal_rows(num: int) -> Exact:
    draw = torch.Generator().manual_seed(num)
    sd = torch.logspace(-0.5, 0.5, num, dtype=F64)
    y = 0.3 + 0.7 * torch.randn(num, generator=draw, dtype=F64)
    y = y + sd * torch.randn(num, generator=draw, dtype=F64)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(number(0.0), number(1.0)))
        with pyro.plate("groups", num):
            theta = pyro.sample("theta", dist.Normal(mu, number(0.7)))
            pyro.sample("y", dist.Normal(theta, sd), obs=y)

    def likelihood(theta: Tensor) -> Tensor:
        return dist.Normal(theta, sd).log_prob(y)

    width = 1.5 if num > 100 else 3.0
    return rows_on_grids(likelihood, num, 0.7, model, width)


def poisson_rows(num: int, indexed: bool = False) -> Exact:
    """Counts of a few each, whose rows are skewed; attached by an index, or in the rows' plate."""
    draw = torch.Generator().manual_seed(num)
    rate = (0.3 + 0.7 * torch.randn(num, 3, generator=draw, dtype=F64)).exp()
    y = torch.poisson(rate, generator=draw)
    index = torch.arange(3 * num) % num

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(number(0.0), number(1.0)))
        with pyro.plate("groups", num):
            theta = pyro.sample("theta", dist.Normal(mu, number(0.7)))
            if not indexed:
                pyro.sample("y", dist.Poisson(theta.exp().unsqueeze(-1)).to_event(1), obs=y)
        if indexed:
            with pyro.plate("data", 3 * num):
                pyro.sample("y", dist.Poisson(theta[index].exp()), obs=y.mT.flatten())

    def likelihood(theta: Tensor) -> Tensor:
        return dist.Poisson(theta.exp().unsqueeze(-1)).log_prob(y).sum(-1)

    return rows_on_grids(likelihood, num, 0.7, model, 1.5)


def fitted(model: Callable, steps: int = 40, **options: object) -> pf.AutoStructuredFlow:
    guide = pf.AutoStructuredFlow(model, num_layers=2, **options)
    pf.fit_guide(model, guide, steps=steps, seed=0, progress=False)
    return guide
