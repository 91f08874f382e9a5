"""The eleven models, centred and with plates; the mathematics of each is in its JSON file."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def neal_funnel(dim: int) -> None:
    """Neal's funnel."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("dims", dim):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def radon(num: int, county: Tensor, log_uranium: Tensor, floor: Tensor, y: Tensor) -> None:
    """Intercepts that vary by county."""
    mu = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    sigma_alpha = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma_y = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    with pyro.plate("counties", num):
        alpha = pyro.sample("alpha", dist.Normal(mu, sigma_alpha))
    with pyro.plate("rows", len(y)):
        mean = alpha[county] + beta[0] * log_uranium + beta[1] * floor
        pyro.sample("log_radon", dist.Normal(mean, sigma_y), obs=y)


def rats(num: int, rat: Tensor, week: Tensor, weight: Tensor) -> None:
    """Intercepts and slopes that vary by rat, and their correlation."""
    mu = pyro.sample(
        "mu", dist.Normal(torch.tensor([250.0, 40.0]), torch.tensor([100.0, 50.0])).to_event(1)
    )
    tau = pyro.sample("tau", dist.HalfNormal(torch.tensor([50.0, 20.0])).to_event(1))
    L = pyro.sample("L", dist.LKJCholesky(2, 2.0))
    sigma_y = pyro.sample("sigma_y", dist.HalfNormal(20.0))
    with pyro.plate("rats", num):
        theta = pyro.sample("theta", dist.MultivariateNormal(mu, scale_tril=tau.diag_embed() @ L))
    with pyro.plate("rows", len(weight)):
        mean = theta[rat, 0] + theta[rat, 1] * week
        pyro.sample("weight", dist.Normal(mean, sigma_y), obs=weight)


def peregrine(sites: int, years: int, site: Tensor, year: Tensor, count: Tensor) -> None:
    """Counts with crossed effects of sites and years."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    sigma_site = pyro.sample("sigma_site", dist.HalfNormal(2.0))
    sigma_year = pyro.sample("sigma_year", dist.HalfNormal(1.0))
    with pyro.plate("sites", sites):
        of_site = pyro.sample("site", dist.Normal(0.0, sigma_site))
    with pyro.plate("years", years):
        of_year = pyro.sample("year", dist.Normal(0.0, sigma_year))
    with pyro.plate("rows", len(count)):
        rate = (mu + of_site[site] + of_year[year]).exp()
        pyro.sample("count", dist.Poisson(rate), obs=count)


def latent_gp(decade: Tensor, count: Tensor) -> None:
    """Counts along a Gaussian process (Matern 3/2) whose amplitude and length are unknown."""
    mu = pyro.sample("mu", dist.Normal(4.0, 2.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(1.5))
    rho = pyro.sample("rho", dist.InverseGamma(4.0, 6.0))
    q = math.sqrt(3) * (decade[:, None] - decade).abs() / rho
    covariance = alpha**2 * (1 + q) * (-q).exp() + 1e-6 * torch.eye(len(decade))
    f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(len(decade)), covariance))
    with pyro.plate("points", len(count)):
        pyro.sample("count", dist.Poisson((mu + f).exp()), obs=count)


def random_walk(y: Tensor, log_price: Tensor, belt_law: Tensor, season: Tensor) -> None:
    """A level that walks, with regressors."""
    level_0 = pyro.sample("level_0", dist.Normal(7.5, 1.0))
    sigma_level = pyro.sample("sigma_level", dist.HalfNormal(0.1))
    sigma_y = pyro.sample("sigma_y", dist.HalfNormal(0.2))
    price = pyro.sample("price", dist.Normal(0.0, 1.0))
    law = pyro.sample("law", dist.Normal(0.0, 1.0))
    of_season = pyro.sample("season", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("steps", len(y) - 1):
        step = pyro.sample("step", dist.Normal(0.0, sigma_level))
    level = level_0 + torch.cat([torch.zeros(1), step.cumsum(-1)])
    with pyro.plate("months", len(y)):
        mean = level + price * log_price + law * belt_law + season @ of_season
        pyro.sample("log_drivers", dist.Normal(mean, sigma_y), obs=y)


def irt(y: Tensor) -> None:
    """Items with a discrimination and a difficulty; y has shape (items, persons)."""
    items, persons = y.shape
    sigma_a = pyro.sample("sigma_a", dist.HalfCauchy(1.0))
    mu_b = pyro.sample("mu_b", dist.Normal(0.0, 3.0))
    sigma_b = pyro.sample("sigma_b", dist.HalfCauchy(2.0))
    with pyro.plate("persons", persons):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("items", items):
        a = pyro.sample("a", dist.LogNormal(0.0, sigma_a))
        b = pyro.sample("b", dist.Normal(mu_b, sigma_b))
    with pyro.plate("rows", items, dim=-2), pyro.plate("columns", persons, dim=-1):
        logits = a[:, None] * (theta - b[:, None])
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def normal_groups(num: int, group: Tensor, y: Tensor) -> None:
    """A thousand groups of a few rows."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("groups", num):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(theta[group], sigma), obs=y)


def label_switching(y: Tensor) -> None:
    """Two normal components whose labels can be exchanged."""
    with pyro.plate("components", 2):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
    share = dist.Categorical(torch.stack([weight, 1 - weight]))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(share, dist.Normal(mu, sigma)), obs=y)


def horseshoe(X: Tensor, y: Tensor) -> None:
    """A regression with a horseshoe prior."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(0.3))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("coefficients", X.shape[1]):
        lam = pyro.sample("lam", dist.HalfCauchy(1.0))
        beta = pyro.sample("beta", dist.Normal(0.0, tau * lam))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(intercept + X @ beta, sigma), obs=y)


def seeds(n: Tensor, germinated: Tensor, seed: Tensor, extract: Tensor) -> None:
    """Seeds that germinate on plates, with an effect of each plate."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(4), 2.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("plates", len(n)):
        effect = pyro.sample("plate_effect", dist.Normal(0.0, sigma))
        logits = beta[0] + beta[1] * seed + beta[2] * extract + beta[3] * seed * extract + effect
        pyro.sample("germinated", dist.Binomial(n, logits=logits), obs=germinated)
