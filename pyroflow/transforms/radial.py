"""Radial layers (Rezende & Mohamed 2015, equation 14), K of them as one transform."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn

from pyroflow.checks import check_count
from pyroflow.transforms.bijection import Bijection, Pair, Parameters, batch_shape
from pyroflow.transforms.kernels.reference import pad
from pyroflow.transforms.kernels.units import softplus

INIT_WIDTH = 1.0  # α at the start: the reach of a layer, in standard deviations of the base


class _Intermediates(NamedTuple):
    r: Tensor
    alpha: Tensor
    s: Tensor
    D: int


class Radial(Bijection, TransformModule):
    """K radial layers y = x + β̂ (x − x0) / (α + r), r = ‖x − x0‖, starting as the identity.

    Base to data: ``t(x) = y``. A layer expands (β̂ > 0) or contracts (β̂ < 0) space around its
    centre x0. α = softplus(raw_alpha) and β̂ = −α + softplus(beta), so every parameter value is
    a bijection. The layers act in order, layer 1 first. The inverse is in closed form: a
    quadratic equation in r for each layer.

    References:
        Rezende and Mohamed, Variational Inference with Normalizing Flows, 2015,
        https://arxiv.org/abs/1505.05770, equation 14 and appendix A.2.

    Args:
        input_dim: D; inputs have shape (*B, D).
        num_layers: K; 0 is the identity.

    Attributes:
        x0: shape (K, D).
        raw_alpha, beta: shape (K,).

    Raises:
        ValueError: If a size is too small; at a call, if an input's last dimension is not D or
            its dtype not that of the parameters.

    Example:
        >>> import torch
        >>> from pyroflow import Radial
        >>> t, x = Radial(2, num_layers=8), torch.randn(5, 2)
        >>> t.log_abs_det_jacobian(x, t(x)).shape, torch.allclose(t.inv(t(x).clone()), x, atol=1e-5)
        (torch.Size([5]), True)
    """

    event_dims = {"x0": 2, "raw_alpha": 1, "beta": 1}

    def __init__(self, input_dim: int, num_layers: int = 1) -> None:
        check_count("input_dim", input_dim, 1)
        check_count("num_layers", num_layers, 0)
        Bijection.__init__(self)
        self.x0 = nn.Parameter(torch.empty(num_layers, input_dim))
        self.raw_alpha = nn.Parameter(torch.empty(num_layers))
        self.beta = nn.Parameter(torch.empty(num_layers))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw centres from a standard normal, and set beta so that each β̂ is 0."""
        self.x0.normal_()
        self.raw_alpha.fill_(math.log(math.expm1(INIT_WIDTH)))
        self.beta.copy_(self.raw_alpha)

    def _forward(self, x: Tensor, parameters: Parameters) -> tuple[Tensor, _Intermediates]:
        x, x0, alpha, s = self._columns(x, parameters)
        distances = []
        for x0_k, alpha_k, beta_hat in zip(x0, alpha, s - alpha, strict=True):
            d = x - x0_k
            r = _length(d)
            x = torch.addcmul(x, d, beta_hat / (alpha_k + r))
            distances.append(r)
        return _rows(x), _Intermediates(_stack(distances, x), alpha, s, len(x))

    def _invert(
        self, y: Tensor, parameters: Parameters, cached: Pair | None
    ) -> tuple[Tensor, _Intermediates]:
        y, x0, alpha, s = self._columns(y, parameters)  # closed form: what is cached saves nothing
        distances = []
        for x0_k, alpha_k, s_k in reversed(list(zip(x0, alpha, s, strict=True))):
            d = y - x0_k
            r = _preimage(_length(d), alpha_k, s_k)
            y = torch.addcmul(y, d, (alpha_k - s_k) / (r + s_k))
            distances.append(r)
        return _rows(y), _Intermediates(_stack(distances[::-1], y), alpha, s, len(y))

    def _log_det(self, intermediates: _Intermediates) -> Tensor:
        """Σ_k (D−1) ln f + ln(1 + β̂ h + β̂ h' r), equation 14 with h = 1/(α + r), f = 1 + β̂ h.

        As sums of positives: f = (r + s)/(r + α), and the other factor is (r + α f)/(r + α).
        """
        r, alpha, s, D = intermediates
        f = (r + s) / (r + alpha)
        g = (r + alpha * f) / (r + alpha)
        return ((D - 1) * f.log() + g.log()).sum(0)

    def _columns(self, x: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
        """A copy of x (D, *B), x0 (K, D, *P), α and s (K, *P), with P as long as the full batch B.

        Short sums are fast over the first axis.
        """
        x0, raw_alpha, beta = parameters
        batch = torch.broadcast_shapes(x.shape[:-1], batch_shape(parameters, self.event_dims))
        columns = x.expand(*batch, x.shape[-1]).movedim(-1, 0)
        alpha, s = (pad(t.movedim(-1, 0), len(batch), 1) for t in constrain(raw_alpha, beta))
        x0 = pad(x0.movedim((-2, -1), (0, 1)), len(batch), 2)
        return columns.clone(memory_format=torch.contiguous_format), x0, alpha, s


def constrain(raw_alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """α = ln(1 + e^raw_alpha) > 0 and s = α + β̂ = ln(1 + e^β) > 0 (appendix A.2).

    They stay so large that a distance too short to be squared does not count beside them.
    """
    least = _nearest(beta.dtype) / torch.finfo(beta.dtype).eps
    return softplus(raw_alpha).clamp(min=least), softplus(beta).clamp(min=least)


def _nearest(dtype: torch.dtype) -> float:
    """The shortest distance with a square: 1e-19 in float32, 1e-154 in float64."""
    return math.sqrt(torch.finfo(dtype).tiny)  # a power of two, and so is its square


def _length(d: Tensor) -> Tensor:
    """‖d‖ over the first axis, or the nearest distance; its derivatives are 0 at a centre."""
    return d.square().sum(0).clamp(min=_nearest(d.dtype) ** 2).sqrt()


def _preimage(length: Tensor, alpha: Tensor, s: Tensor) -> Tensor:
    """The r ≥ 0 with r (r + s) / (r + α) = length, the positive root of r² + q r − α length.

    Of the two ways to write it, each sign of q = s − length takes the one that adds.
    """
    length = length - _nearest(length.dtype)  # so that r is 0 at the centre
    q, product = s - length, alpha * length
    root = (q * q + 4 * product).sqrt()
    outside = q < 0
    larger = torch.where(outside, root - q, root + q) / 2
    return torch.where(outside, larger, product / larger)


def _rows(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous()


def _stack(distances: list[Tensor], like: Tensor) -> Tensor:
    """The distances of all layers, shape (K, *B), for like of shape (D, *B)."""
    return torch.stack(distances) if distances else like.new_empty(0, *like.shape[1:])
