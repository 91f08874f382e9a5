"""The passes of shared.py where every point has its own units, as in amortised inference.

W and Û have shape (N, K, D). The product G = W Ûᵀ would cost K numbers for each of the N·K·D that
the units have, so the layers are applied one after the other; each parameter is read once, and
each gradient written once. One unit a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflow.transforms.kernels.units import Units, monotone_root

CACHED = 1 << 20  # numbers


class Pass(NamedTuple):
    """image (N, D); log |det dy/dx| (N); h = tanh(a) and pq = tanh'(a) / 4, shape (K, N)."""

    image: Tensor
    log_det: Tensor
    h: Tensor
    pq: Tensor


def forward(x: Tensor, units: Units) -> Pass:
    """Evaluate y and log |det dy/dx| at x, shape (N, D)."""
    z, A, H = _start(x, units)
    for rows in _chunks(units.W):
        part, scratch = z[rows], torch.empty_like(z[rows])
        for w, u, b, a, h in _layers(rows, units[:3], (A, H)):
            torch.add(_dot(w, part, scratch), b, out=a)
            torch.tanh(a, out=h)
            part.addcmul_(u, h.unsqueeze(1))
    return _finish(z, A, H, units)


def inverse(y: Tensor, units: Units) -> Pass:
    """Solve for x at y, shape (N, D); the log-determinant is that of the map x ↦ y."""
    z, A, H = _start(y, units)
    s = units.s.squeeze(2)
    for rows in _chunks(units.W):
        part, scratch = z[rows], torch.empty_like(z[rows])
        for w, u, b, s_k, a, h in reversed(_layers(rows, (*units[:3], s), (A, H))):
            a.copy_(monotone_root(_dot(w, part, scratch).add_(b), s_k))
            torch.tanh(a, out=h)
            part.addcmul_(u, h.unsqueeze(1), value=-1)
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
    all_at, grad_z, C = done.image.clone(), grad_image.clone(), torch.empty_like(h)
    for rows in _chunks(W):
        at, grad, scratch = all_at[rows], grad_z[rows], torch.empty_like(z[rows])
        layers = _layers(rows, (W, U, *grads), (h, C, bend, factor))
        for w, u, grad_w, grad_u, h_k, c, bend_k, factor_k in layers if inverse else layers[::-1]:
            torch.add(bend_k, _dot(u, grad, scratch), alpha=sign, out=c).mul_(factor_k)
            if needs[1]:
                at.addcmul_(u, h_k.unsqueeze(1), value=-sign)  # where the layer's pass began
                torch.mul(at, c.unsqueeze(1), out=grad_w)
                torch.mul(grad, h_k.unsqueeze(1), out=grad_u)
            grad.addcmul_(w, c.unsqueeze(1))
    if not needs[1]:
        return grad_z, None, None, None, None
    if inverse:
        grads[1].neg_()
        grad_s.addcmul_(C, h, value=-1)
    return grad_z, *grads, C.T.contiguous(), grad_s.T.unsqueeze(2)


def _start(z: Tensor, units: Units) -> tuple[Tensor, Tensor, Tensor]:
    A = z.new_empty(units.W.shape[1], len(z))
    return z.clone(), A, torch.empty_like(A)


def _dot(left: Tensor, right: Tensor, scratch: Tensor) -> Tensor:
    """The inner products of rows, shape (N,)."""
    return torch.mul(left, right, out=scratch).sum(1)


def _chunks(W: Tensor) -> Iterator[slice]:
    """Rows in parts whose parameters stay in the cache from layer to layer."""
    N, K, D = W.shape
    size = max(1, CACHED // max(1, K * D))
    return (slice(start, start + size) for start in range(0, N, size))


def _layers(
    rows: slice, given: Sequence[Tensor], found: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    """What belongs to each layer, of tensors (N, K, ...) as given and (K, N) as found."""
    parts = [t[rows].unbind(1) for t in given] + [t[:, rows].unbind(0) for t in found]
    return list(zip(*parts, strict=True))


def _finish(z: Tensor, A: Tensor, h: Tensor, units: Units) -> Pass:
    q = A.abs_().mul_(-2).sigmoid_()
    pq = torch.addcmul(q, q, q, value=-1)
    det = torch.mul(h, h, out=q).addcmul_(pq, units.s.squeeze(2).T, value=4)
    return Pass(z, det.log_().sum(0), h, pq)
