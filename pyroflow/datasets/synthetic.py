"""Points in the plane with known densities: the sine strip, two moons, a ring."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pyroflow.checks import check_positive

_NOISE = 0.1
_HALF_WIDTH = 3.0
_LOWER_MOON = (1.0, 0.5)  # its centre; the upper moon's is the origin
_NODES = 16  # over the noise: enough for full precision within 4 of a moon's centre

SINE_ENTROPY: float = math.log(2 * _HALF_WIDTH) + 0.5 * math.log(2 * math.pi * math.e * _NOISE**2)
"""Differential entropy of :func:`sine`, 0.908113 nats: no model's mean loss can be lower."""


def sine(n: int = 10_000, seed: int = 0) -> Tensor:
    r"""Draws points around a sine curve: x2 ~ U(-3, 3), x1 = sin(x2) + N(0, 0.1²).

    Args:
        n: Number of points.
        seed: Equal seeds give equal points; torch's global random state is not used.

    Returns:
        Points of shape :math:`(n, 2)`, float32, x1 in column 0.

    Example:
        >>> from pyroflow.datasets import sine
        >>> sine(500, seed=1).shape
        torch.Size([500, 2])
    """
    uniform, normal = _samplers("sine", n, seed)
    x2, noise = _HALF_WIDTH * (2 * uniform(n) - 1), normal(n)
    return torch.stack([x2.sin() + _NOISE * noise, x2], dim=-1)


def sine_log_prob(y: Tensor) -> Tensor:
    r"""Exact log density of :func:`sine`, log p(y) = -log 6 + log N(y1 | sin y2, 0.1²).

    Points of shape :math:`(*, 2)` have log densities of shape :math:`(*,)`, minus infinity where
    :math:`|y_2| > 3`.

    Example:
        >>> from pyroflow.datasets import sine, sine_log_prob
        >>> sine_log_prob(sine(500)).shape
        torch.Size([500])
    """
    _check_points("sine_log_prob", y)
    y1, y2 = y.unbind(-1)
    residual = (y1 - y2.sin()) / _NOISE
    constant = math.log(2 * _HALF_WIDTH * _NOISE) + 0.5 * math.log(2 * math.pi)
    log_prob = -0.5 * residual.square() - constant
    return log_prob.masked_fill(y2.abs() > _HALF_WIDTH, -math.inf)


def two_moons(n: int = 10_000, seed: int = 0, *, noise: float = _NOISE) -> Tensor:
    r"""Draws points around two half circles that reach into each other, as scikit-learn has them.

    x = (cos t, sin t) or (1 - cos t, 1/2 - sin t), either with probability 1/2, t ~ U(0, π), plus
    N(0, noise² I).

    Args:
        n: Number of points.
        seed: Equal seeds give equal points; torch's global random state is not used.
        noise: Standard deviation of the noise along each axis.

    Returns:
        Points of shape :math:`(n, 2)`, float32.

    Example:
        >>> from pyroflow.datasets import two_moons
        >>> two_moons(500, seed=1).shape
        torch.Size([500, 2])
    """
    uniform, normal = _samplers("two_moons", n, seed)
    check_positive("noise", noise)
    upper = _on_circle(math.pi * uniform(n))
    x = torch.where(uniform(n, 1) < 0.5, upper.new_tensor(_LOWER_MOON) - upper, upper)
    return x + noise * normal(n, 2)


def two_moons_log_prob(y: Tensor, *, noise: float = _NOISE) -> Tensor:
    r"""Log density of :func:`two_moons`, exact to rounding.

    A moon's density ∫ N(y | (cos t, sin t), noise² I) dt/π is an incomplete Bessel function. It is
    evaluated by Gauss-Legendre quadrature, which converges exponentially, in time and memory that
    grow as 1 / noise: beyond a distance of 4 it loses digits. Points of shape :math:`(*, 2)` have
    log densities of shape :math:`(*,)`.

    Example:
        >>> from pyroflow.datasets import two_moons, two_moons_log_prob
        >>> two_moons_log_prob(two_moons(500)).shape
        torch.Size([500])
    """
    _check_points("two_moons_log_prob", y)
    check_positive("noise", noise)
    upper = _upper_moon_log_prob(y, noise)
    lower = _upper_moon_log_prob(y.new_tensor(_LOWER_MOON) - y, noise)
    return torch.logaddexp(upper, lower) - math.log(2)


def ring(n: int = 10_000, seed: int = 0, *, noise: float = _NOISE) -> Tensor:
    r"""Draws points around the unit circle: x = (cos t, sin t) + N(0, noise² I), t ~ U(0, 2π).

    Arguments and result are those of :func:`two_moons`.

    Example:
        >>> from pyroflow.datasets import ring
        >>> ring(500, seed=1).shape
        torch.Size([500, 2])
    """
    uniform, normal = _samplers("ring", n, seed)
    check_positive("noise", noise)
    return _on_circle(2 * math.pi * uniform(n)) + noise * normal(n, 2)


def ring_log_prob(y: Tensor, *, noise: float = _NOISE) -> Tensor:
    r"""Exact log density of :func:`ring`, a Rice distribution of the radius r = ‖y‖.

    p(y) = exp(-(r² + 1) / (2 noise²)) I₀(r / noise²) / (2π noise²), I₀ a modified Bessel function.
    Points of shape :math:`(*, 2)` have log densities of shape :math:`(*,)`.

    Example:
        >>> from pyroflow.datasets import ring, ring_log_prob
        >>> ring_log_prob(ring(500)).shape
        torch.Size([500])
    """
    _check_points("ring_log_prob", y)
    check_positive("noise", noise)
    r = torch.linalg.vector_norm(y, dim=-1)
    scaled_bessel = torch.special.i0e(r / noise**2)
    residual = (r - 1) / noise
    return scaled_bessel.log() - 0.5 * residual.square() - math.log(2 * math.pi * noise**2)


def _upper_moon_log_prob(y: Tensor, noise: float) -> Tensor:
    nodes, weights = np.polynomial.legendre.leggauss(max(16, math.ceil(_NODES / noise)))
    points = _on_circle(torch.from_numpy(math.pi / 2 * (nodes + 1))).to(y)
    log_weights = torch.from_numpy(weights / 2).log().to(y)
    exponents = log_weights + (y @ points.T - 1) / noise**2
    squares = 0.5 * (y.square().sum(-1) - 1) / noise**2
    return exponents.logsumexp(-1) - squares - math.log(2 * math.pi * noise**2)


def _on_circle(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def _samplers(name: str, n: int, seed: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """``torch.rand`` and ``torch.randn`` on a generator of their own, whatever torch's defaults."""
    if n < 1:
        raise ValueError(f"{name}: n expects a positive number of points, got {n}.")
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    return partial(torch.rand, **options), partial(torch.randn, **options)


def _check_points(name: str, y: Tensor) -> None:
    if y.shape[-1:] != (2,):
        raise ValueError(f"{name}: y expects last dimension 2, got shape {tuple(y.shape)}.")
