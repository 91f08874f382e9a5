"""What a unit is: its bend h(a), the paper's û, and the parameters that the kernels take."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyroflow.checks import check_choice, check_fraction
from pyroflow.transforms.kernels.root import monotone_root

# ln(1 + eᵛ). Torch's switches to v already at 20, where float64 still sees a difference.
softplus = partial(F.softplus, threshold=40)

Nonlinearity = Literal["tanh", "leaky_relu"]


class Units(NamedTuple):
    """K units in layers of ``size``: W, Û (K, D), b (K) and s = 1 + diag(W Ûᵀ), (K, 1).

    Outside of the kernels s may be None: U then holds the u of planar layers.
    """

    W: Tensor
    U: Tensor
    b: Tensor
    s: Tensor | None
    size: int = 1


def constrain(w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's û (appendix A.1) and s = 1 + wᵀû > 0, row by row.

    û = u + [m(wᵀu) − wᵀu] w/‖w‖² with m(v) = −1 + ln(1 + eᵛ), so that s = ln(1 + e^(wᵀu)).
    At ‖w‖ = 0 the formula is 0/0. Below ‖w‖² = sqrt(tiny), the square root of the smallest
    normal number, the denominator stays there and s follows; a wᵀu < −1/2 is exempt, as it
    needs the true norm to stay invertible (and with it a ‖u‖ beyond 1e9).

    Args:
        w: shape (*, D).
        u: shape (*, D).

    Returns:
        û, shape (*, D), and s, shape (*, 1).
    """
    v, tiny = (w * u).sum(-1, keepdim=True), torch.finfo(w.dtype).tiny
    norm2 = w.square().sum(-1, keepdim=True)
    floor = torch.full_like(v, math.sqrt(tiny)).masked_fill(v < -0.5, tiny)
    share = (norm2 / floor).clamp(max=1)
    u_hat = u + (softplus(-v) - 1) / torch.maximum(norm2, floor) * w
    s = share * softplus(v) + (1 - share) * (1 + v)
    return u_hat, s.clamp(min=tiny)


def sech2(a: Tensor) -> Tensor:
    """sech²(a) = 1 − tanh²(a), to full relative precision and without overflow."""
    return 4 * torch.sigmoid(2 * a) * torch.sigmoid(-2 * a)


class Tanh:
    """h = tanh, as in the paper."""

    def value(self, a: Tensor) -> Tensor:
        """h(a)."""
        return a.tanh()

    def slope(self, a: Tensor) -> Tensor:
        """h'(a)."""
        return sech2(a)

    def det(self, a: Tensor, s: Tensor) -> Tensor:
        """1 + (s − 1) h'(a) as a sum of positives, t² + s (1 − t²)."""
        return a.tanh().square() + s * sech2(a)

    def root(self, r: Tensor, s: Tensor) -> Tensor:
        """The a with a + (s − 1) h(a) = r; gradients are not recorded."""
        return monotone_root(r, s)


class LeakyReLU:
    """h(a) = max(a, slope·a) for a slope in (0, 1).

    The condition for a bijection is that of tanh, s > 0, as 1 + (s − 1) h' lies between 1 and s.
    """

    def __init__(self, negative_slope: float) -> None:
        self.negative_slope = check_fraction("negative_slope", negative_slope)

    def value(self, a: Tensor) -> Tensor:
        """h(a)."""
        return F.leaky_relu(a, self.negative_slope)

    def slope(self, a: Tensor) -> Tensor:
        """h'(a), 1 at the origin."""
        return torch.where(a >= 0, torch.ones_like(a), self.negative_slope)

    def det(self, a: Tensor, s: Tensor) -> Tensor:
        """1 + (s − 1) h'(a) as a sum of positives."""
        return torch.where(a >= 0, s, (1 - self.negative_slope) + self.negative_slope * s)

    def root(self, r: Tensor, s: Tensor) -> Tensor:
        """The a with a + (s − 1) h(a) = r: r over the determinant on its side."""
        return r / self.det(r, s)


Activation = Tanh | LeakyReLU
TANH = Tanh()


def activation_named(nonlinearity: Nonlinearity, negative_slope: float) -> Activation:
    """The activation of that name; only the leaky one has a slope.

    Raises:
        ValueError: an unknown name, or a slope outside (0, 1).
    """
    check_choice("nonlinearity", nonlinearity, ("tanh", "leaky_relu"))
    return TANH if nonlinearity == "tanh" else LeakyReLU(negative_slope)
