"""Nine of the Stan programs of posteriordb as Pyro models; the ODE is in ``lotka_volterra``.

Latents are indexed from the right, so that all models run under an outer plate of particles.
A parameter without a prior in Stan is a proper distribution with its support and
``.mask(False)``: it has log density 0 and can still be sampled.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions.transforms import OrderedTransform
from torch import Tensor


def flat(y: Tensor, *shape: int) -> dist.TorchDistribution:
    """No prior on the reals."""
    return dist.Normal(y.new_zeros(shape), 1.0).to_event(len(shape)).mask(False)


def flat_positive(y: Tensor, *shape: int) -> dist.TorchDistribution:
    """No prior on the positive numbers."""
    return dist.HalfNormal(y.new_ones(shape)).to_event(len(shape)).mask(False)


def line(x: Tensor, y: Tensor) -> None:
    """A regression line without priors: mesquite and earnings."""
    beta = pyro.sample("beta", flat(y, 2))
    sigma = pyro.sample("sigma", flat_positive(y))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(beta[..., 0] + beta[..., 1] * x, sigma), obs=y)


def kidscore(x: Tensor, y: Tensor) -> None:
    """Regression on a design matrix x of shape (N, 4), flat on its coefficients: kidiq."""
    beta = pyro.sample("beta", flat(y, x.shape[1]))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    pyro.sample("y", dist.Normal(beta @ x.T, sigma.unsqueeze(-1)).to_event(1), obs=y)


def autoregression(lags: Tensor, y: Tensor) -> None:
    """AR(K); row t of lags, shape (T - K, K), holds the K values before y_t."""
    alpha = pyro.sample("alpha", dist.Normal(y.new_zeros(()), 10.0))
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(lags.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    mean = alpha.unsqueeze(-1) + beta @ lags.T
    pyro.sample("y", dist.Normal(mean, sigma.unsqueeze(-1)).to_event(1), obs=y)


def mixture(y: Tensor) -> None:
    """Two Gaussians with ordered means; ``MixtureSameFamily`` says the same in twice the time."""
    unordered = dist.Normal(y.new_zeros(2), 1.0).to_event(1)
    ordered = dist.TransformedDistribution(unordered, OrderedTransform())
    mu = pyro.sample("mu", ordered.mask(False))
    pyro.factor("mu_prior", dist.Normal(y.new_zeros(2), 2.0).log_prob(mu).sum(-1))
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_full((2,), 2.0)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(y.new_tensor(5.0), 5.0))
    log_weights = theta.log(), torch.log1p(-theta)
    terms = [
        dist.Normal(mu[..., i, None], sigma[..., i, None]).log_prob(y)
        + log_weights[i].unsqueeze(-1)
        for i in (0, 1)
    ]
    pyro.factor("y", torch.logaddexp(*terms).sum(-1))


def garch(y: Tensor, sigma1: Tensor) -> None:
    """GARCH(1, 1); the simplex ``share`` is (alpha1, beta1, the rest).

    Stan's prior is flat on alpha1, beta1 > 0 with alpha1 + beta1 < 1, and so is this Dirichlet.
    A uniform prior of beta1 on (0, 1 - alpha1) would not do: Pyro's guides and NUTS take a
    site's support from one run of the model.
    """
    mu = pyro.sample("mu", flat(y))
    alpha0 = pyro.sample("alpha0", flat_positive(y))
    share = pyro.sample("share", dist.Dirichlet(y.new_ones(3)))
    mu, alpha0, alpha1 = mu.unsqueeze(-1), alpha0.unsqueeze(-1), share[..., :1]
    inputs = torch.addcmul(alpha0, alpha1, (y[:-1] - mu).square())
    first = sigma1.square().expand(*inputs.shape[:-1], 1)
    variance = accumulate(torch.cat([first, inputs], -1), share[..., 1:2])
    pyro.sample("y", dist.Normal(mu, variance.sqrt()).to_event(1), obs=y)


def accumulate(c: Tensor, beta: Tensor) -> Tensor:
    """v_t = c_t + beta v_{t-1} with v_0 = 0, in log2(T) rounds; c (..., T), beta (..., 1).

    (1 - beta L)⁻¹ = ∏_k (1 + (beta L)^{2^k}) with L the shift by one; all terms are positive.
    """
    lag = 1
    while lag < c.shape[-1]:
        c = c + F.pad(beta * c[..., :-lag], (lag, 0))
        beta, lag = beta.square(), 2 * lag
    return c


def gp_poisson(x: Tensor, k: Tensor) -> None:
    """Counts k at places x, log-rate a Gaussian process with standardised values ``f_tilde``."""
    rho = pyro.sample("rho", dist.Gamma(x.new_tensor(25.0), 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(x.new_tensor(2.0)))
    f_tilde = pyro.sample("f_tilde", dist.Normal(x.new_zeros(len(x)), 1.0).to_event(1))
    f = gp_values(x, rho, alpha, f_tilde)
    pyro.sample("k", dist.Poisson(f.exp()).to_event(1), obs=k)


def gp_values(x: Tensor, rho: Tensor, alpha: Tensor, f_tilde: Tensor) -> Tensor:
    """f = L f_tilde, shape (..., N), with L Lᵀ the squared exponential covariance and a jitter.

    NaN where alpha and rho are so large that the covariance is not positive definite in float64,
    so that one such draw of many does not end the run.
    """
    squares = -0.5 * (x[:, None] - x).square()
    rho, alpha = rho[..., None, None], alpha[..., None, None]
    covariance = alpha.square() * (squares / rho.square()).exp()
    jitter = 1e-10 * torch.eye(len(x), dtype=x.dtype, device=x.device)
    factor, failed = torch.linalg.cholesky_ex(covariance + jitter)
    f = (factor @ f_tilde.unsqueeze(-1)).squeeze(-1)
    return f.masked_fill(failed.unsqueeze(-1) != 0, torch.nan)
