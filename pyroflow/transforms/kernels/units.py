"""What a unit is: its bend h(a), the paper's û, and the root that an inverse needs."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyroflow.checks import check_fraction

MAX_STEPS = 64  # where s is huge and r near it, a step gains only half a unit in the tail of tanh
EARLIEST_END = 2  # before that some element is never at rounding level: do not look
CUBIC = 0.238  # tanh(a) <= a - 0.238 a**3 on [0, 1], as 1 - tanh(1) > 0.238

Nonlinearity = Literal["tanh", "leaky_relu"]

# ln(1 + eᵛ). Torch's switches to v already at 20, where float64 still sees a difference.
softplus = partial(F.softplus, threshold=40)


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
    """The paper's û (appendix A.1), shape (*, D), and s = 1 + wᵀû > 0, (*, 1), row by row.

    û = u + [m(wᵀu) − wᵀu] w/‖w‖² with m(v) = −1 + ln(1 + eᵛ), so that s = ln(1 + e^(wᵀu)).
    At ‖w‖ = 0 the formula is 0/0. Below ‖w‖² = sqrt(tiny), the square root of the smallest
    normal number, the denominator stays there and s follows; a wᵀu < −1/2 is exempt, as it
    needs the true norm to stay invertible (and with it a ‖u‖ beyond 1e9).
    """
    found = constraint((w * u).sum(-1, keepdim=True), w.square().sum(-1, keepdim=True))
    return u + found.coefficient * w, found.s


class Constraint(NamedTuple):
    """û = u + coefficient · w, and s; the denominator, and the share of its floor that ‖w‖² has."""

    coefficient: Tensor
    s: Tensor
    denominator: Tensor
    share: Tensor


def constraint(v: Tensor, norm2: Tensor) -> Constraint:
    """What :func:`constrain` makes of v = wᵀu and ‖w‖², element by element."""
    tiny = torch.finfo(v.dtype).tiny
    floor = torch.full_like(v, math.sqrt(tiny)).masked_fill(v < -0.5, tiny)
    share, denominator = (norm2 / floor).clamp(max=1), torch.maximum(norm2, floor)
    s = share * softplus(v) + (1 - share) * (1 + v)
    return Constraint((softplus(-v) - 1) / denominator, s.clamp(min=tiny), denominator, share)


class Tanh:
    """h = tanh, as in the paper."""

    def value(self, a: Tensor) -> Tensor:
        """h(a)."""
        return a.tanh()

    def slope(self, a: Tensor) -> Tensor:
        """h'(a) = 1 − tanh²(a), to full relative precision and without overflow."""
        return 4 * torch.sigmoid(2 * a) * torch.sigmoid(-2 * a)

    def det(self, a: Tensor, s: Tensor) -> Tensor:
        """1 + (s − 1) h'(a) as a sum of positives, t² + s (1 − t²)."""
        return a.tanh().square() + s * self.slope(a)

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


def monotone_root(r: Tensor, s: Tensor, *, return_steps: bool = False) -> Tensor:
    """Solve a + (s − 1) tanh(a) = r for a, element by element; gradients are not recorded.

    The left side is odd and strictly increasing for every s > 0. For r ≥ 0 it is concave where
    s ≥ 1 and convex where s < 1, so Newton's method from the bounds of :func:`_outer_bound`
    moves monotonically to the root: no bracket, no bisection and no case that fails. It ends
    once every residual is at rounding level. Taking s and not c = s − 1 keeps the digits of layers
    that almost fold (s → 0). With ``return_steps`` the number of Newton steps comes along.
    """
    with torch.no_grad():
        size, s = r.abs(), s.clamp(min=torch.finfo(r.dtype).tiny)
        a = _outer_bound(size, s)
        steps = _newton(a, size, s)
        a = torch.copysign(a, r)
    return (a, steps) if return_steps else a


def _outer_bound(r: Tensor, s: Tensor) -> Tensor:
    """The start from which Newton's method is monotone, for r ≥ 0."""
    shifted, scaled = r - (s - 1), r / s
    cube_root = (r / CUBIC).pow(1 / 3)
    convex = torch.minimum(shifted, scaled)
    convex = torch.where(cube_root <= 1, torch.minimum(convex, cube_root), convex)
    return torch.where(s >= 1, torch.maximum(shifted, scaled), convex)


def _newton(a: Tensor, r: Tensor, s: Tensor) -> int:
    """Improve a in place until every residual is within 2 ulp of its terms' size."""
    tolerance = 2 * torch.finfo(a.dtype).eps
    for step in range(MAX_STEPS):
        t = a.tanh()
        residual = torch.addcmul(a - t, s, t).sub_(r)
        if step >= EARLIEST_END and bool((residual.abs() <= tolerance * (a + r)).all()):
            return step
        e = a.mul(-2).exp_()
        det = t.square_().add_(4 * s * e.div_((1 + e).square_()))  # 1 − t² would round to 0
        a.addcdiv_(residual, det, value=-1).clamp_(min=0)
    return MAX_STEPS
