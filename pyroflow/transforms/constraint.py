"""The paper's û, which makes a layer a bijection whatever the trained u."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LINEAR = 40  # torch's softplus switches to v already at 20, where float64 still sees a difference


def softplus(v: Tensor) -> Tensor:
    """ln(1 + eᵛ), exact in float64 too."""
    return F.softplus(v, threshold=LINEAR)


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


class Rows(NamedTuple):
    """û and s of :func:`constrain`, and what its gradients need; recorded in no graph."""

    u_hat: Tensor
    s: Tensor
    norm2: Tensor
    v: Tensor
    coefficient: Tensor


def constrain_rows(w: Tensor, u: Tensor) -> Rows | None:
    """:func:`constrain` in few operations; None where a norm is below its floor.

    Whether one is cannot be seen on another device without waiting for it: None there as well.
    """
    if w.device.type != "cpu" or not w.numel():
        return None
    norm2, v = (w * w).sum(-1, keepdim=True), (w * u).sum(-1, keepdim=True)
    if not norm2.min().item() > math.sqrt(torch.finfo(w.dtype).tiny):
        return None
    s = F.softplus(v, threshold=LINEAR).clamp_(min=torch.finfo(w.dtype).tiny)
    coefficient = torch.sub(s, v).sub_(1).div_(norm2)
    return Rows(torch.addcmul(u, coefficient, w), s, norm2, v, coefficient)


def row_gradients(
    w: Tensor, u: Tensor, rows: Rows, grad_w: Tensor, grad_u_hat: Tensor, grad_s: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients in w and u, given those of w (overwritten), û and s."""
    share = (grad_u_hat * w).sum(-1, keepdim=True).div_(rows.norm2)
    grad_v = share if grad_s is None else grad_s.add_(share)
    grad_v = torch.mul(grad_v, rows.v.sigmoid()).sub_(share)
    grad_w.addcmul_(grad_u_hat, rows.coefficient).addcmul_(grad_v, u)
    grad_w.addcmul_(share.mul_(rows.coefficient), w, value=-2)
    return grad_w, torch.addcmul(grad_u_hat, grad_v, w)
