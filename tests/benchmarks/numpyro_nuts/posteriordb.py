"""The ten posteriors of posteriordb in numpyro's language: see ``benchmarks.posteriordb.ports``."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints

STEPS = (3, 4, 5)  # leapfrog steps a year of the solutions that are extrapolated


def flat(support: constraints.Constraint, *shape: int) -> dist.Distribution:
    """No prior."""
    return dist.ImproperUniform(support, (), shape)


def line(x: Array, y: Array) -> None:
    """A regression line without priors: mesquite and earnings."""
    beta = numpyro.sample("beta", flat(constraints.real, 2))
    sigma = numpyro.sample("sigma", flat(constraints.positive))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(beta[0] + beta[1] * x, sigma), obs=y)


def kidscore(x: Array, y: Array) -> None:
    """Regression on a design matrix, flat on its coefficients."""
    beta = numpyro.sample("beta", flat(constraints.real, x.shape[1]))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def autoregression(lags: Array, y: Array) -> None:
    """AR(K)."""
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(lags.shape[1]), 10.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y)


def mixture(y: Array) -> None:
    """Two Gaussians with ordered means."""
    mu = numpyro.sample("mu", flat(constraints.ordered_vector, 2))
    numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(jnp.full(2, 2.0)).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    terms = dist.Normal(mu, sigma).log_prob(y[:, None])
    numpyro.factor(
        "y", jnp.logaddexp(jnp.log(theta) + terms[:, 0], jnp.log1p(-theta) + terms[:, 1]).sum()
    )


def garch(y: Array, sigma1: Array) -> None:
    """GARCH(1, 1); the simplex ``share`` is (alpha1, beta1, the rest)."""
    mu = numpyro.sample("mu", flat(constraints.real))
    alpha0 = numpyro.sample("alpha0", flat(constraints.positive))
    share = numpyro.sample("share", dist.Dirichlet(jnp.ones(3)))
    inputs = alpha0 + share[0] * (y[:-1] - mu) ** 2
    variance = accumulate(jnp.concatenate([sigma1[None] ** 2, inputs]), share[1])
    numpyro.sample("y", dist.Normal(mu, jnp.sqrt(variance)), obs=y)


def accumulate(c: Array, beta: Array) -> Array:
    """v_t = c_t + beta v_{t-1} with v_0 = 0, in log2(T) rounds, as for torch."""
    lag = 1
    while lag < len(c):
        c = c.at[lag:].add(beta * c[:-lag])
        beta, lag = beta**2, 2 * lag
    return c


def lotka_volterra(y: Array) -> None:
    """Populations y of shape (2, 1 + years), prey first."""
    theta = numpyro.sample("theta", flat(constraints.positive, 4))
    prior = dist.Normal(jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05]))
    numpyro.factor("theta_prior", prior.log_prob(theta).sum())
    z_init = numpyro.sample("z_init", dist.LogNormal(jnp.full(2, math.log(10)), 1.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.LogNormal(jnp.full(2, -1.0), 1.0).to_event(1))
    weights = [math.prod(n * n / (n * n - m * m) for m in STEPS if m != n) for n in STEPS]
    courses = [course(theta, jnp.log(z_init), y.shape[1] - 1, n) for n in STEPS]
    log_z = sum(weight * found for weight, found in zip(weights, courses, strict=True))
    numpyro.sample("y", dist.LogNormal(log_z, sigma[:, None]), obs=y)


def course(theta: Array, start: Array, years: int, steps: int) -> Array:
    """log u and log v at the start of each year, shape (2, 1 + years), by leapfrog steps."""
    alpha, beta, gamma, delta = theta

    def year(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        u, v = state
        for _ in range(steps):
            u = u + (alpha - beta * jnp.exp(v)) / (2 * steps)
            v = v + (delta * jnp.exp(u) - gamma) / steps
            u = u + (alpha - beta * jnp.exp(v)) / (2 * steps)
        return (u, v), jnp.stack([u, v])

    _, found = jax.lax.scan(year, (start[0], start[1]), length=years)
    return jnp.concatenate([start[:, None], found.T], axis=1)


def eight_schools_noncentered(y: Array, sigma: Array) -> None:
    """Eight schools with standardised effects."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        standardised = numpyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * standardised, sigma), obs=y)


def eight_schools_centered(y: Array, sigma: Array) -> None:
    """Eight schools with the effects as they are."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def gp_poisson(x: Array, k: Array) -> None:
    """Counts k at places x, log-rate a Gaussian process with standardised values ``f_tilde``."""
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    f_tilde = numpyro.sample("f_tilde", dist.Normal(jnp.zeros(len(x)), 1.0).to_event(1))
    covariance = alpha**2 * jnp.exp(-0.5 * (x[:, None] - x) ** 2 / rho**2)
    f = jnp.linalg.cholesky(covariance + 1e-10 * jnp.eye(len(x))) @ f_tilde
    numpyro.sample("k", dist.Poisson(jnp.exp(f)), obs=k)


PORTS = {
    "mesquite-logmesquite_logvolume": line,
    "low_dim_gauss_mix-low_dim_gauss_mix": mixture,
    "arK-arK": autoregression,
    "kidiq-kidscore_interaction": kidscore,
    "earnings-earn_height": line,
    "garch-garch11": garch,
    "hudson_lynx_hare-lotka_volterra": lotka_volterra,
    "eight_schools-eight_schools_noncentered": eight_schools_noncentered,
    "eight_schools-eight_schools_centered": eight_schools_centered,
    "gp_pois_regr-gp_pois_regr": gp_poisson,
}
