"""Lynx and hare: the Lotka-Volterra equations with measured populations."""

from __future__ import annotations

import math
from functools import cache

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

STEPS = (3, 4, 5)  # leapfrog steps a year of the solutions that are extrapolated


def lotka_volterra(y: Tensor) -> None:
    """Populations y of shape (2, 1 + years), prey first, measured at the start of each year."""
    near = dist.LogNormal(y.new_tensor([1.0, 0.05, 1.0, 0.05]).log(), 0.5).to_event(1)
    theta = pyro.sample("theta", near.mask(False))
    # normal(1, 0.5) and normal(0.05, 0.05), not renormalised on the positive numbers
    prior = dist.Normal(y.new_tensor([1.0, 0.05, 1.0, 0.05]), y.new_tensor([0.5, 0.05, 0.5, 0.05]))
    pyro.factor("theta_prior", prior.log_prob(theta).sum(-1))
    z_init = pyro.sample("z_init", dist.LogNormal(y.new_full((2,), math.log(10)), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(y.new_full((2,), -1.0), 1.0).to_event(1))
    log_z = log_populations(theta, z_init, y.shape[-1] - 1)
    pyro.sample("y", dist.LogNormal(log_z, sigma.unsqueeze(-1)).to_event(2), obs=y)


def log_populations(theta: Tensor, z_init: Tensor, years: int) -> Tensor:
    """log u and log v at the start of each year, shape (..., 2, 1 + years).

    u' = (alpha - beta v) u and v' = (delta u - gamma) v have a separable Hamiltonian in
    (log u, log v), so the leapfrog steps are exact flows of its two halves. Their errors are a
    series in even powers of the step, and Richardson extrapolation over the ``STEPS``, which run
    side by side in the last dimension, leaves those of order 6. What grows linearly in time is
    moved into the sizes of the steps and put back at the end, so that a step is a sum, an
    exponential and a sum.
    """
    alpha, beta, gamma, delta = theta[..., None, None].unbind(-3)
    log_steps_u, times_v, log_steps_v, times_u, weights, start = (
        t.to(theta) for t in _scheme(years)
    )
    sizes_u = iter((beta.log() + log_steps_u - gamma * times_v).unbind(-2))
    sizes_v = iter((delta.log() + log_steps_v + alpha * times_u).unbind(-2))
    log_u, log_v = z_init.log().unsqueeze(-1).expand(*z_init.shape, len(STEPS)).unbind(-2)
    course_u, course_v = [log_u], [log_v]
    for _ in range(years):
        log_u = log_u - (log_v + next(sizes_u)).exp()
        for _ in range(max(STEPS)):
            log_v = log_v + (log_u + next(sizes_v)).exp()
            log_u = log_u - (log_v + next(sizes_u)).exp()
        course_u.append(log_u)
        course_v.append(log_v)
    course = (torch.stack(course_u + course_v, -2) @ weights).unflatten(-1, (2, 1 + years))
    growth = torch.stack([theta[..., 0], -theta[..., 2]], -1)
    return course + growth.unsqueeze(-1) * start


@cache
def _scheme(years: int) -> tuple[Tensor, ...]:
    """Log sizes of all steps of log u, and the times at which they find log v; then the reverse.

    Each of shape (steps, len(STEPS)): every year log u makes a half step, full ones and a half
    step, and log v full ones. The solutions with fewer steps end the year in some of size 0.
    Then the weights of the extrapolation and the times at which years start.
    """
    rows = [[1 / n if i < n else 0 for n in STEPS] for i in range(max(STEPS))]
    full = torch.tensor(rows, dtype=torch.double)
    none = torch.zeros_like(full[:1])
    half = (torch.cat([none, full]) + torch.cat([full, none])) / 2
    times_v, times_u = torch.cat([none, full.cumsum(0)]), half.cumsum(0)[:-1]
    weights = [math.prod(n * n / (n * n - m * m) for m in STEPS if m != n) for n in STEPS]
    start = torch.arange(1 + years, dtype=torch.double)
    of_year = start[:-1, None, None]
    return (
        half.log().repeat(years, 1),
        (times_v + of_year).flatten(0, 1),
        full.log().repeat(years, 1),
        (times_u + of_year).flatten(0, 1),
        torch.tensor(weights, dtype=torch.double),
        start,
    )
