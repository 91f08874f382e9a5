"""The eight small posteriors in numpyro's language: see ``benchmarks.known``."""

from __future__ import annotations

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array

from .hierarchies import neal_funnel
from .posteriordb import eight_schools_centered


def funnel() -> None:
    """Neal's funnel with ten numbers in all."""
    neal_funnel(9)


def mixture(weights: Array, centres: Array, scales: Array) -> None:
    """Spherical Gaussians."""
    parts = dist.Normal(centres, scales[:, None]).to_event(1)
    numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), parts))


def normal_groups(y: Array, s: Array) -> None:
    """Means of groups with known standard errors."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfNormal(2.0))
    with numpyro.plate("groups", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, s), obs=y)


def poisson_groups(exposure: Array, count: Array) -> None:
    """Counts with exposures."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = numpyro.sample("tau", dist.HalfNormal(2.0))
    with numpyro.plate("groups", len(count)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("count", dist.Poisson(exposure * jnp.exp(theta)), obs=count)


PORTS = {
    "eight_schools-centred_10": eight_schools_centered,
    "funnel-3_10": funnel,
    "modes-60_40_5": mixture,
    "modes-90_10_5": mixture,
    "wide-1_percent_5": mixture,
    "groups-uneven_42": normal_groups,
    "poisson-60_62": poisson_groups,
    "groups-thousand_1002": normal_groups,
}
