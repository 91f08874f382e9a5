"""The scalar equation behind every planar inverse: a + (s − 1) tanh(a) = r."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_STEPS = 64  # where s is huge and r near it, a step gains only half a unit in the tail of tanh
EARLIEST_END = 2  # before that some element is never at rounding level: do not look
_CUBIC = 0.238  # tanh(a) <= a - 0.238 a**3 on [0, 1], as 1 - tanh(1) > 0.238


def monotone_root(r: Tensor, s: Tensor, *, return_steps: bool = False) -> Tensor:
    """Solve a + (s − 1) tanh(a) = r for a, element by element.

    The left side is odd and strictly increasing for every s > 0. For r ≥ 0 it is
    concave where s ≥ 1 and convex where s < 1, so Newton's method from the bounds of
    :func:`_outer_bound` moves monotonically to the root: no bracket, no bisection and
    no case that fails. It ends once every residual is at rounding level.

    Gradients are not recorded; :func:`~pyroflow.transforms.kernels.reference.solve_coupled_tanh`
    supplies them by the implicit function theorem.

    Args:
        r: right-hand sides, of any shape.
        s: slopes at the origin, 1 + wᵀû > 0, broadcastable to the shape of r. Taking s and
            not c = s − 1 keeps the digits of layers that almost fold (s → 0).
        return_steps: also return the number of Newton steps taken.

    Returns:
        The root, with the broadcast shape of r and s.

    Example:
        >>> import torch
        >>> from pyroflow.transforms.kernels.root import monotone_root
        >>> a = monotone_root(torch.tensor([-2.0, 0.0, 5.0]), torch.tensor(3.0))
        >>> bool(torch.allclose(a + 2 * a.tanh(), torch.tensor([-2.0, 0.0, 5.0])))
        True
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
    cube_root = (r / _CUBIC).pow(1 / 3)
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
