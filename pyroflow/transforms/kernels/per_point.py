"""The passes of shared.py where every point has its own units, as in amortised inference.

W and Û have shape (N, K, D). The product G = W Ûᵀ would cost K numbers for each of the N·K·D that
the units have, so the layers are applied one after the other; each parameter is read once, and
each gradient written once. One unit a layer. Units without s are planar layers as they are given,
by u: û is made on the way, as it is as large as all that is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflow.transforms.kernels.units import Constraint, Units, constraint, monotone_root

CACHED = 1 << 20  # numbers


class _Found(NamedTuple):
    """What a pass finds of each unit at each point, of shape (K, N)."""

    a: Tensor
    h: Tensor
    s: Tensor


class Pass(NamedTuple):
    """image (N, D); log |det dy/dx| (N); h = tanh(a) and pq = tanh'(a) / 4, shape (K, N)."""

    image: Tensor
    log_det: Tensor
    h: Tensor
    pq: Tensor


def forward(x: Tensor, units: Units) -> Pass:
    """Evaluate y and log |det dy/dx| at x, shape (N, D)."""
    z, found = _start(x, units)
    for rows, made in _chunks(units):
        part, scratch = z[rows], torch.empty_like(z[rows])
        for w, u, b, a, h in _layers(made[:3], _columns(found[:2], rows)):
            torch.add(_dot(w, part, scratch), b, out=a)
            torch.tanh(a, out=h)
            part.addcmul_(u, h.unsqueeze(1))
        found.s[:, rows] = made.s.T
    return _finish(z, *found)


def inverse(y: Tensor, units: Units) -> Pass:
    """Solve for x at y, shape (N, D); the log-determinant is that of the map x ↦ y."""
    z, found = _start(y, units)
    for rows, made in _chunks(units):
        part, scratch = z[rows], torch.empty_like(z[rows])
        for w, u, b, s, a, h in reversed(_layers(made[:4], _columns(found[:2], rows))):
            a.copy_(monotone_root(_dot(w, part, scratch).add_(b), s))
            torch.tanh(a, out=h)
            part.addcmul_(u, h.unsqueeze(1), value=-1)
        found.s[:, rows] = made.s.T
    return _finish(z, *found)


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
    """The gradients in z, W, U, b and s (None where it was not given)."""
    W, U, b, s = units[:4]
    grads = [torch.empty_like(t) if needs[1] else None for t in (W, U, b)]
    grads.append(torch.empty_like(s) if needs[1] and s is not None else None)
    all_at, grad_z, sign = done.image.clone(), grad_image.clone(), -1 if inverse else 1
    for rows, made in _chunks(units):
        at, grad, scratch = all_at[rows], grad_z[rows], torch.empty_like(z[rows])
        h, pq, s_rows = done.h[:, rows], done.pq[:, rows], made.s.T
        share = None if grad_log_det is None else grad_log_det[rows]
        grad_s, bend, factor = _of_determinants(h, pq, s_rows, share, inverse)
        C = torch.empty_like(bend)
        parts = [made.W, made.U, *(t[rows] if needs[1] else made.W for t in grads[:2])]
        layers = _layers(parts, (h, C, bend, factor))
        for w, u, grad_w, grad_u, h_k, c, bend_k, factor_k in layers if inverse else layers[::-1]:
            torch.add(bend_k, _dot(u, grad, scratch), alpha=sign, out=c).mul_(factor_k)
            if needs[1]:
                at.addcmul_(u, h_k.unsqueeze(1), value=-sign)  # where the layer's pass began
                torch.mul(at, c.unsqueeze(1), out=grad_w)
                torch.mul(grad, h_k.unsqueeze(1), out=grad_u)
            grad.addcmul_(w, c.unsqueeze(1))
        if needs[1]:
            if inverse:
                parts[3].neg_()
                grad_s.addcmul_(C, h, value=-1)
            grads[2][rows] = C.T
            if s is None:
                _through_constraint(made, U[rows], *parts[2:], grad_s.T)
            else:
                grads[3][rows] = grad_s.T.unsqueeze(2)
    return grad_z, *grads


def _of_determinants(
    h: Tensor, pq: Tensor, s: Tensor, grad_log_det: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the log-determinants in s and in a; and what a pre-activation's goes by."""
    det = torch.mul(h, h).addcmul_(pq, s, value=4)
    slope = pq * 4
    grad_s, bend = torch.zeros_like(h), torch.zeros_like(h)
    if grad_log_det is not None:
        share = torch.div(grad_log_det, det)
        torch.mul(slope, share, out=grad_s)
        torch.mul(share.mul_(h), 1 - s, out=bend).mul_(2)
    return grad_s, bend, slope.div_(det) if inverse else slope


class _Made(NamedTuple):
    """Units of some rows, with û (n, K, D) and s (n, K); and how they came from u."""

    W: Tensor
    U: Tensor
    b: Tensor
    s: Tensor
    scratch: Tensor | None = None
    v: Tensor | None = None
    found: Constraint | None = None


def _chunks(units: Units) -> Iterator[tuple[slice, _Made]]:
    """Rows in parts whose parameters stay in the cache from layer to layer."""
    N, K, D = units.W.shape
    size = max(1, CACHED // max(1, K * D))
    buffers = None if units.s is not None else units.W.new_empty(2, min(size, N), K, D)
    for start in range(0, N, size):
        rows = slice(start, min(N, start + size))
        W, U, b, s = (t if t is None else t[rows] for t in units[:4])
        if s is not None:
            yield rows, _Made(W, U, b, s.squeeze(2))
            continue
        made, scratch = buffers[:, : rows.stop - start]
        v, norm2 = torch.mul(W, U, out=scratch).sum(2), torch.mul(W, W, out=scratch).sum(2)
        found = constraint(v, norm2)
        torch.mul(W, found.coefficient.unsqueeze(2), out=made).add_(U)
        yield rows, _Made(W, made, b, found.s, scratch, v, found)


def _through_constraint(
    made: _Made, u: Tensor, grad_w: Tensor, grad_u: Tensor, grad_s: Tensor
) -> None:
    """Turn the gradients in w and û, given that in s, into those in w and u."""
    w, v, scratch = made.W, made.v, made.scratch
    coefficient, _, denominator, share = made.found
    along = torch.mul(grad_u, w, out=scratch).sum(2).div_(denominator)
    grad_v = grad_s * (share * v.sigmoid() + (1 - share)) - along * (-v).sigmoid()
    grad_norm2 = torch.where(share < 1, grad_s, -along).mul_(coefficient)
    for grad, factor, of in (
        (grad_w, coefficient, grad_u),
        (grad_w, grad_v, u),
        (grad_w, grad_norm2.mul_(2), w),
        (grad_u, grad_v, w),
    ):
        grad.add_(torch.mul(of, factor.unsqueeze(2), out=scratch))


def _start(z: Tensor, units: Units) -> tuple[Tensor, _Found]:
    A = z.new_empty(units.W.shape[1], len(z))
    return z.clone(), _Found(A, torch.empty_like(A), torch.empty_like(A))


def _dot(left: Tensor, right: Tensor, scratch: Tensor) -> Tensor:
    """The inner products of rows, shape (N,)."""
    return torch.mul(left, right, out=scratch).sum(1)


def _columns(found: Sequence[Tensor], rows: slice) -> list[Tensor]:
    return [t[:, rows] for t in found]


def _layers(given: Sequence[Tensor], found: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """What belongs to each layer, of tensors (n, K, ...) as given and (K, n) as found."""
    parts = [t.unbind(1) for t in given] + [t.unbind(0) for t in found]
    return list(zip(*parts, strict=True))


def _finish(z: Tensor, A: Tensor, h: Tensor, s: Tensor) -> Pass:
    q = A.abs_().mul_(-2).sigmoid_()
    pq = torch.addcmul(q, q, q, value=-1)
    det = torch.mul(h, h, out=q).addcmul_(pq, s, value=4)
    return Pass(z, det.log_().sum(0), h, pq)
