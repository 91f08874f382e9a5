"""Pyro models with a known posterior: a wave in the plane, and eight schools."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

TOY_LOG_EVIDENCE: float = -1.690889541
"""Log evidence of :func:`toy_model`, by quadrature."""


def toy_model() -> None:
    r"""A two-dimensional Pyro model with a banded, wavy posterior and known evidence.

    The site ``z`` is drawn from N(0, 2² I) and the site ``obs``, observed to be 0, from
    N(z2 - sin(π z1 / 2), 0.4²): the wave of the paper's U2, made proper by a Gaussian prior. Its
    log joint density is :func:`toy_log_joint`, its log evidence :data:`TOY_LOG_EVIDENCE`.

    Example:
        >>> from pyro import poutine
        >>> from pyroflow.targets import toy_model
        >>> poutine.trace(toy_model).get_trace().nodes["z"]["value"].shape
        torch.Size([2])
    """
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    wave = torch.sin(math.pi * z[..., 0] / 2)
    pyro.sample("obs", dist.Normal(z[..., 1] - wave, 0.4), obs=torch.tensor(0.0))


def toy_log_joint(z: Tensor) -> Tensor:
    r"""Log joint density of :func:`toy_model` at its site ``z`` and its observation.

    Points of shape :math:`(*, 2)` have log densities of shape :math:`(*,)`.

    Example:
        >>> from pyroflow.targets import toy_log_joint
        >>> toy_log_joint(torch.zeros(5, 2)).shape
        torch.Size([5])
    """
    if z.shape[-1:] != (2,):
        raise ValueError(f"toy_log_joint: z expects last dimension 2, got shape {tuple(z.shape)}.")
    constant = 1.5 * math.log(2 * math.pi) + math.log(2.0 * 2.0 * 0.4)
    wave = torch.sin(math.pi * z[..., 0] / 2)
    return -((z[..., 1] - wave) / 0.4).square() / 2 - (z / 2).square().sum(-1) / 2 - constant


Schools = Sequence[float] | Tensor | None

EIGHT_SCHOOLS_Y: tuple[float, ...] = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
"""Estimated effects of coaching in the eight schools (Rubin, 1981)."""

EIGHT_SCHOOLS_SIGMA: tuple[float, ...] = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
"""Standard errors of :data:`EIGHT_SCHOOLS_Y`."""

_MU_SD, _TAU_SCALE, _CELLS = 5.0, 5.0, 20_000


def eight_schools_centered(y: Schools = None, sigma: Schools = None) -> None:
    r"""Eight schools with the effects as they are: a funnel between ``tau`` and ``theta``.

    mu ~ N(0, 5²), tau ~ HalfCauchy(5), theta_j ~ N(mu, tau²), y_j ~ N(theta_j, sigma_j²), the
    effects and the data in the plate ``schools``.

    Args:
        y: Estimated effects of shape :math:`(J,)`; the eight schools by default.
        sigma: Their standard errors, of the same shape.

    Raises:
        ValueError: If ``y`` and ``sigma`` have different shapes.

    References:
        Estimation in Parallel Randomized Experiments (Rubin, 1981), in the form of posteriordb,
        https://github.com/stan-dev/posteriordb

    Example:
        >>> from pyro import poutine
        >>> from pyroflow.targets import eight_schools_centered
        >>> poutine.trace(eight_schools_centered).get_trace().nodes["theta"]["value"].shape
        torch.Size([8])
    """
    y, sigma = _schools(y, sigma)
    mu, tau = _population(y)
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(y: Schools = None, sigma: Schools = None) -> None:
    r"""Eight schools with standardised effects ``theta_trans``: theta = mu + tau · theta_trans.

    Else it is :func:`eight_schools_centered`, arguments and source too. theta_trans_j ~ N(0, 1),
    and ``theta`` is a deterministic site.

    Example:
        >>> from pyro import poutine
        >>> from pyroflow.targets import eight_schools_noncentered
        >>> poutine.trace(eight_schools_noncentered).get_trace().nodes["theta"]["value"].shape
        torch.Size([8])
    """
    y, sigma = _schools(y, sigma)
    mu, tau = _population(y)
    with pyro.plate("schools", len(y)):
        standardised = pyro.sample("theta_trans", dist.Normal(torch.zeros_like(y), 1.0))
        theta = pyro.deterministic("theta", mu + tau * standardised, event_dim=0)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_exact(
    num: int, seed: int = 0, y: Schools = None, sigma: Schools = None
) -> tuple[dict[str, Tensor], float]:
    r"""Independent draws from the exact posterior of eight schools, and its log evidence.

    Given tau everything is Gaussian. With tau = 5 tan(πv/2), v uniform under the prior, the
    evidence is an integral over v in (0, 1), taken by the midpoint rule on 20,000 cells.

    Args:
        num: Number of draws S.
        seed: Of the draws; torch's global random state is not used.
        y: As in :func:`eight_schools_centered`.
        sigma: As in :func:`eight_schools_centered`.

    Returns:
        Draws of ``mu`` and ``tau``, shape :math:`(S,)`, and ``theta``, shape :math:`(S, J)`, in
        float64; the log evidence in nats, the same for both forms of the model.

    Example:
        >>> from pyroflow.targets import eight_schools_exact
        >>> draws, log_evidence = eight_schools_exact(100)
        >>> draws["theta"].shape, round(log_evidence, 2)
        (torch.Size([100, 8]), -31.31)
    """
    y, sigma = (t.double().cpu() for t in _schools(y, sigma))
    options = {"dtype": torch.float64, "device": "cpu"}
    generator = torch.Generator().manual_seed(seed)
    middle = (torch.arange(_CELLS, **options) + 0.5) / _CELLS
    log_like = _log_likelihood(_TAU_SCALE * torch.tan(math.pi / 2 * middle), y, sigma)
    cell = torch.multinomial(log_like.softmax(0), num, replacement=True, generator=generator)
    jitter = torch.rand(num, generator=generator, **options)
    tau = _TAU_SCALE * torch.tan(math.pi / 2 * (cell + jitter) / _CELLS)
    noise = torch.randn(num, 1 + len(y), generator=generator, **options)
    weight = 1 / (sigma**2 + tau[:, None] ** 2)
    precision = weight.sum(1) + _MU_SD**-2
    mu = (weight @ y) / precision + noise[:, 0] / precision.sqrt()
    precision = sigma**-2 + tau[:, None] ** -2
    mean = (y / sigma**2 + mu[:, None] / tau[:, None] ** 2) / precision
    theta = mean + noise[:, 1:] / precision.sqrt()
    log_evidence = (log_like.logsumexp(0) - math.log(_CELLS)).item()
    return {"mu": mu, "tau": tau, "theta": theta}, log_evidence


def _schools(y: Schools, sigma: Schools) -> tuple[Tensor, Tensor]:
    y = _floats(EIGHT_SCHOOLS_Y if y is None else y)
    sigma = _floats(EIGHT_SCHOOLS_SIGMA if sigma is None else sigma)
    if y.ndim != 1 or y.shape != sigma.shape:
        raise ValueError(
            f"eight schools expects y and sigma of one shape (J,), got {tuple(y.shape)} and"
            f" {tuple(sigma.shape)}; give one standard error for each effect."
        )
    return y, sigma


def _floats(values: Sequence[float] | Tensor) -> Tensor:
    kept = isinstance(values, Tensor) and values.is_floating_point()
    return values if kept else torch.as_tensor(values, dtype=torch.get_default_dtype())


def _population(y: Tensor) -> tuple[Tensor, Tensor]:
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    return mu, pyro.sample("tau", dist.HalfCauchy(y.new_full((), 5.0)))


def _log_likelihood(tau: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
    """Log p(y | tau), theta and mu integrated out: N(0, diag(sigma² + tau²) + 25 11ᵀ)."""
    diagonal = torch.diag_embed(sigma**2 + tau[:, None] ** 2)
    return dist.MultivariateNormal(torch.zeros_like(y), diagonal + _MU_SD**2).log_prob(y)
