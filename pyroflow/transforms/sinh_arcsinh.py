"""The sinh-arcsinh layer (Jones & Pewsey 2009): skew and tails of each coordinate by itself."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn

from pyroflow.checks import check_count
from pyroflow.transforms.affine import inverse_softplus
from pyroflow.transforms.bijection import Bijection, Pair, Parameters
from pyroflow.transforms.kernels.units import softplus


class _Intermediates(NamedTuple):
    inner: Tensor  # asinh x, shape (*B, D)
    outer: Tensor  # asinh y
    delta: Tensor


class SinhArcsinh(Bijection, TransformModule):
    """y = sinh(δ asinh(x) + ε), elementwise, starting as the identity; base to data.

    Of a standard normal x it makes y with tails like those of |x|^δ, heavier than normal for
    δ > 1 and lighter for δ < 1, and leans it to the right for ε > 0. δ = softplus(raw) > 0, so
    every parameter value is a bijection, with the inverse x = sinh((asinh(y) − ε)/δ).

    Beyond the range of the dtype, where |δ asinh(x) + ε| is above 88 (float32) or 709 (float64), y
    is infinite, as x is in the inverse; the log-determinant stays finite. δ is at least the
    dtype's rounding unit: a smaller one would round all x to one y.

    References:
        Jones and Pewsey, Sinh-arcsinh distributions, Biometrika 96(4), 2009, 761-780, section 2:
        with their ε' and δ', which map the other way, ε = ε'/δ' and δ = 1/δ'.

    Args:
        input_dim: D; inputs have shape (*B, D).

    Attributes:
        skew: ε, shape (D,).
        raw: δ before the softplus, shape (D,).

    Raises:
        ValueError: If input_dim < 1; at a call, if an input's last dimension is not D or its
            dtype not that of the parameters.

    Example:
        >>> import torch
        >>> from pyroflow import SinhArcsinh
        >>> t, x = SinhArcsinh(2), torch.randn(5, 2)
        >>> t.log_abs_det_jacobian(x, t(x)).shape, torch.allclose(t.inv(t(x).clone()), x, atol=1e-5)
        (torch.Size([5]), True)
    """

    event_dims = {"skew": 1, "raw": 1}
    counts: Tensor | None = None  # of the numbers, in log-determinants, where not all are 1

    def __init__(self, input_dim: int) -> None:
        check_count("input_dim", input_dim, 1)
        Bijection.__init__(self)
        self.skew = nn.Parameter(torch.empty(input_dim))
        self.raw = nn.Parameter(torch.empty(input_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make the map the identity, ε = 0 and δ = 1."""
        self.skew.zero_()
        self.raw.copy_(inverse_softplus(torch.ones_like(self.raw)))

    def _forward(self, x: Tensor, parameters: Parameters) -> tuple[Tensor, _Intermediates]:
        skew, delta = _constrained(parameters)
        inner = x.asinh()
        outer = delta * inner + skew
        return outer.sinh(), _Intermediates(inner, outer, delta)

    def _invert(
        self, y: Tensor, parameters: Parameters, cached: Pair | None
    ) -> tuple[Tensor, _Intermediates]:
        skew, delta = _constrained(parameters)  # closed form: what is cached saves nothing
        outer = y.asinh()
        inner = (outer - skew) / delta
        return inner.sinh(), _Intermediates(inner, outer, delta)

    def log_slopes(self, x: Tensor) -> Tensor:
        """The logarithm of dy/dx of each number, of the shape of x; its sum is the log-det."""
        return _log_slopes(self._forward(x, self._map_parameters())[1])

    def _log_det(self, intermediates: _Intermediates) -> Tensor:
        parts = _log_slopes(intermediates)
        return (parts if self.counts is None else parts * self.counts).sum(-1)


def _log_slopes(intermediates: _Intermediates) -> Tensor:
    """Of each number: log δ + log cosh(δ asinh x + ε) − ½ log(1 + x²).

    √(1 + x²) = cosh(asinh x).
    """
    inner, outer, delta = intermediates
    return delta.log() + _log_cosh(outer) - _log_cosh(inner)


def _constrained(parameters: Parameters) -> tuple[Tensor, Tensor]:
    """ε and δ."""
    skew, raw = parameters
    return skew, softplus(raw).clamp(min=torch.finfo(raw.dtype).eps)


def _log_cosh(a: Tensor) -> Tensor:
    """The logarithm of cosh a; derivatives tanh a and 1 − tanh² a are finite for every a."""
    return softplus(2 * a) - a - math.log(2)
