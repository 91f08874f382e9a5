"""Models whose priors are where their data are."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyroflow.targets.models import EIGHT_SCHOOLS_SIGMA, EIGHT_SCHOOLS_Y


def regression(x: Tensor, y: Tensor) -> None:
    """The logistic regression of ``scale``, with its prior where the data are."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def groups(y: Tensor, s: Tensor) -> None:
    """The groups of ``known``, with their priors where the data are."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(y.new_full((), 2.0)))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, s), obs=y)


def schools_data(**at: Any) -> tuple[Tensor, Tensor]:
    """Effects and their standard errors."""
    return torch.tensor(EIGHT_SCHOOLS_Y, **at), torch.tensor(EIGHT_SCHOOLS_SIGMA, **at)
