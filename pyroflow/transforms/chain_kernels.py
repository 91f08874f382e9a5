"""The passes of :mod:`~pyroflow.transforms.stack_kernels` where every point has its own units.

As in amortised inference: W and Û have shape (N, K, D). The product G = W Ûᵀ would then cost K
numbers for each of the N·K·D that the units have, so the layers are applied one after the other;
each parameter is read once, and each gradient written once. One unit a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflow.transforms.monotone_root import monotone_root
from pyroflow.transforms.stack_kernels import Units


class Pass(NamedTuple):
    """image (N, D); log |det dy/dx| (N); h = tanh(a) and pq = tanh'(a) / 4, shape (K, N)."""

    image: Tensor
    log_det: Tensor
    h: Tensor
    pq: Tensor


def push(x: Tensor, units: Units) -> Pass:
    """Evaluate y and log |det dy/dx| at x, shape (N, D)."""
    z, A, H = _start(x, units)
    scratch = torch.empty_like(z)
    layers = zip(units.W.unbind(1), units.U.unbind(1), units.b.unbind(1), A, H, strict=True)
    for w, u, b, a, h in layers:
        torch.add(_dot(w, z, scratch), b, out=a)
        torch.tanh(a, out=h)
        z.addcmul_(u, h.unsqueeze(1))
    return _finish(z, A, H, units)


def pull(y: Tensor, units: Units) -> Pass:
    """Solve for x at y, shape (N, D); the log-determinant is that of the map x ↦ y."""
    z, A, H = _start(y, units)
    scratch = torch.empty_like(z)
    s = units.s.squeeze(2).unbind(1)
    layers = zip(units.W.unbind(1), units.U.unbind(1), units.b.unbind(1), s, A, H, strict=True)
    for w, u, b, s_k, a, h in reversed(list(layers)):
        a.copy_(monotone_root(_dot(w, z, scratch).add_(b), s_k))
        torch.tanh(a, out=h)
        z.addcmul_(u, h.unsqueeze(1), value=-1)
    return _finish(z, A, H, units)


def gradients(
    z: Tensor,
    units: Units,
    done: Pass,
    grad_image: Tensor,
    grad_log_det: Tensor | None,
    *,
    inverse: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, ...]:
    """The gradients in z, W, Û, b and s, given those of image and log-determinant."""
    W, U, _, s = units[:4]
    s = s.squeeze(2).T
    h, pq = done.h, done.pq
    det = torch.mul(h, h).addcmul_(pq, s, value=4)
    slope = pq * 4
    grad_s, bend = torch.zeros_like(h), torch.zeros_like(h)
    if grad_log_det is not None:
        share = torch.div(grad_log_det, det)
        torch.mul(slope, share, out=grad_s)
        torch.mul(share.mul_(h), 1 - s, out=bend).mul_(2)
    factor = slope.div_(det) if inverse else slope
    grads = torch.empty_like(W), torch.empty_like(U)
    sign = -1 if inverse else 1
    at, grad, scratch = done.image.clone(), grad_image.clone(), torch.empty_like(z)
    C = torch.empty_like(h)
    for k in _order(len(h), inverse):
        w, u, h_k, c = W[:, k], U[:, k], h[k].unsqueeze(1), C[k]
        torch.add(bend[k], _dot(u, grad, scratch), alpha=sign, out=c).mul_(factor[k])
        if needs[1]:
            at.addcmul_(u, h_k, value=-sign)  # where the layer's pass began
            torch.mul(at, c.unsqueeze(1), out=grads[0][:, k])
            torch.mul(grad, h_k, out=grads[1][:, k])
        grad.addcmul_(w, c.unsqueeze(1))
    if not needs[1]:
        return grad, None, None, None, None
    if inverse:
        grads[1].neg_()
        grad_s.addcmul_(C, h, value=-1)
    return grad, *grads, C.T.contiguous(), grad_s.T.unsqueeze(2)


def _start(z: Tensor, units: Units) -> tuple[Tensor, Tensor, Tensor]:
    A = z.new_empty(units.W.shape[1], len(z))
    return z.clone(), A, torch.empty_like(A)


def _dot(left: Tensor, right: Tensor, scratch: Tensor) -> Tensor:
    """The inner products of rows, shape (N,)."""
    return torch.mul(left, right, out=scratch).sum(1)


def _order(K: int, inverse: bool) -> Iterator[int]:
    """Backwards through the pass: the inverse ended with the first layer."""
    return iter(range(K)) if inverse else reversed(range(K))


def _finish(z: Tensor, A: Tensor, h: Tensor, units: Units) -> Pass:
    q = A.abs_().mul_(-2).sigmoid_()
    pq = torch.addcmul(q, q, q, value=-1)
    det = torch.mul(h, h, out=q).addcmul_(pq, units.s.squeeze(2).T, value=4)
    return Pass(z, det.log_().sum(0), h, pq)
