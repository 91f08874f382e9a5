"""The eleven hierarchies in numpyro's language: see ``benchmarks.hierarchies.ports``."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array


def neal_funnel(dim: int) -> None:
    """Neal's funnel."""
    v = numpyro.sample("v", dist.Normal(0.0, 3.0))
    with numpyro.plate("dims", dim):
        numpyro.sample("x", dist.Normal(0.0, jnp.exp(v / 2)))


def radon(num: int, county: Array, log_uranium: Array, floor: Array, y: Array) -> None:
    """Intercepts that vary by county."""
    mu = numpyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    sigma_alpha = numpyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma_y = numpyro.sample("sigma_y", dist.HalfNormal(1.0))
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(2), 10.0).to_event(1))
    with numpyro.plate("counties", num):
        alpha = numpyro.sample("alpha", dist.Normal(mu, sigma_alpha))
    with numpyro.plate("rows", len(y)):
        mean = alpha[county] + beta[0] * log_uranium + beta[1] * floor
        numpyro.sample("log_radon", dist.Normal(mean, sigma_y), obs=y)


def rats(num: int, rat: Array, week: Array, weight: Array) -> None:
    """Intercepts and slopes that vary by rat, and their correlation."""
    mu = numpyro.sample(
        "mu", dist.Normal(jnp.array([250.0, 40.0]), jnp.array([100.0, 50.0])).to_event(1)
    )
    tau = numpyro.sample("tau", dist.HalfNormal(jnp.array([50.0, 20.0])).to_event(1))
    L = numpyro.sample("L", dist.LKJCholesky(2, 2.0))
    sigma_y = numpyro.sample("sigma_y", dist.HalfNormal(20.0))
    with numpyro.plate("rats", num):
        theta = numpyro.sample("theta", dist.MultivariateNormal(mu, scale_tril=tau[:, None] * L))
    with numpyro.plate("rows", len(weight)):
        mean = theta[rat, 0] + theta[rat, 1] * week
        numpyro.sample("weight", dist.Normal(mean, sigma_y), obs=weight)


def peregrine(sites: int, years: int, site: Array, year: Array, count: Array) -> None:
    """Counts with crossed effects of sites and years."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    sigma_site = numpyro.sample("sigma_site", dist.HalfNormal(2.0))
    sigma_year = numpyro.sample("sigma_year", dist.HalfNormal(1.0))
    with numpyro.plate("sites", sites):
        of_site = numpyro.sample("site", dist.Normal(0.0, sigma_site))
    with numpyro.plate("years", years):
        of_year = numpyro.sample("year", dist.Normal(0.0, sigma_year))
    with numpyro.plate("rows", len(count)):
        rate = jnp.exp(mu + of_site[site] + of_year[year])
        numpyro.sample("count", dist.Poisson(rate), obs=count)


def latent_gp(decade: Array, count: Array) -> None:
    """Counts along a Gaussian process (Matern 3/2) whose amplitude and length are unknown."""
    mu = numpyro.sample("mu", dist.Normal(4.0, 2.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(1.5))
    rho = numpyro.sample("rho", dist.InverseGamma(4.0, 6.0))
    q = math.sqrt(3) * jnp.abs(decade[:, None] - decade) / rho
    covariance = alpha**2 * (1 + q) * jnp.exp(-q) + 1e-6 * jnp.eye(len(decade))
    f = numpyro.sample("f", dist.MultivariateNormal(jnp.zeros(len(decade)), covariance))
    with numpyro.plate("points", len(count)):
        numpyro.sample("count", dist.Poisson(jnp.exp(mu + f)), obs=count)


def random_walk(y: Array, log_price: Array, belt_law: Array, season: Array) -> None:
    """A level that walks, with regressors."""
    level_0 = numpyro.sample("level_0", dist.Normal(7.5, 1.0))
    sigma_level = numpyro.sample("sigma_level", dist.HalfNormal(0.1))
    sigma_y = numpyro.sample("sigma_y", dist.HalfNormal(0.2))
    price = numpyro.sample("price", dist.Normal(0.0, 1.0))
    law = numpyro.sample("law", dist.Normal(0.0, 1.0))
    of_season = numpyro.sample("season", dist.Normal(jnp.zeros(4), 1.0).to_event(1))
    with numpyro.plate("steps", len(y) - 1):
        step = numpyro.sample("step", dist.Normal(0.0, sigma_level))
    level = level_0 + jnp.concatenate([jnp.zeros(1), jnp.cumsum(step)])
    with numpyro.plate("months", len(y)):
        mean = level + price * log_price + law * belt_law + season @ of_season
        numpyro.sample("log_drivers", dist.Normal(mean, sigma_y), obs=y)


def irt(y: Array) -> None:
    """Items with a discrimination and a difficulty; y has shape (items, persons)."""
    items, persons = y.shape
    sigma_a = numpyro.sample("sigma_a", dist.HalfCauchy(1.0))
    mu_b = numpyro.sample("mu_b", dist.Normal(0.0, 3.0))
    sigma_b = numpyro.sample("sigma_b", dist.HalfCauchy(2.0))
    with numpyro.plate("persons", persons):
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
    with numpyro.plate("items", items):
        a = numpyro.sample("a", dist.LogNormal(0.0, sigma_a))
        b = numpyro.sample("b", dist.Normal(mu_b, sigma_b))
    with numpyro.plate("rows", items, dim=-2), numpyro.plate("columns", persons, dim=-1):
        logits = a[:, None] * (theta - b[:, None])
        numpyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def normal_groups(num: int, group: Array, y: Array) -> None:
    """A thousand groups of a few rows."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    with numpyro.plate("groups", num):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(theta[group], sigma), obs=y)


def label_switching(y: Array) -> None:
    """Two normal components whose labels can be exchanged."""
    with numpyro.plate("components", 2):
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        sigma = numpyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    weight = numpyro.sample("weight", dist.Beta(2.0, 2.0))
    share = dist.Categorical(jnp.stack([weight, 1 - weight]))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.MixtureSameFamily(share, dist.Normal(mu, sigma)), obs=y)


def horseshoe(X: Array, y: Array) -> None:
    """A regression with a horseshoe prior."""
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(0.3))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    with numpyro.plate("coefficients", X.shape[1]):
        lam = numpyro.sample("lam", dist.HalfCauchy(1.0))
        beta = numpyro.sample("beta", dist.Normal(0.0, tau * lam))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(intercept + X @ beta, sigma), obs=y)


def seeds(n: Array, germinated: Array, seed: Array, extract: Array) -> None:
    """Seeds that germinate on plates, with an effect of each plate."""
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(4), 2.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    with numpyro.plate("plates", len(n)):
        effect = numpyro.sample("plate_effect", dist.Normal(0.0, sigma))
        logits = beta[0] + beta[1] * seed + beta[2] * extract + beta[3] * seed * extract + effect
        numpyro.sample("germinated", dist.Binomial(n, logits=logits), obs=germinated)


PORTS = {
    "neal-funnel_10": neal_funnel,
    "radon_mn-intercept": radon,
    "rats-slopes_lkj": rats,
    "peregrine-sites_years_poisson": peregrine,
    "peregrine-latent_gp_poisson": latent_gp,
    "uk_drivers-random_walk": random_walk,
    "irt-2pl": irt,
    "synthetic-normal_1000": normal_groups,
    "synthetic-label_switching": label_switching,
    "synthetic-horseshoe": horseshoe,
    "seeds-binomial": seeds,
}
