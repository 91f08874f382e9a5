"""The two passes of a stack of tanh units, written by hand for speed.

A stack of K units y = x + Σ_k û_k tanh(a_k), a_k = w_kᵀz + b_k, sees its input through K
numbers. These functions evaluate it, invert it and differentiate both, with two matrix products
in the event size and a recursion on (K, N) arrays. They record no graph:
:mod:`~pyroflow.transforms.stack` makes an autograd function of them, and
:func:`~pyroflow.transforms.coupled_tanh.solve_coupled_tanh` is the same mathematics in
differentiable operations.

Units come in layers of M that do not see each other's shifts: M = 1 for planar layers, and
M = the number of units for Sylvester layers, whose G = W Ûᵀ is upper triangular inside a layer.

The arrays hold p = σ(2a) in place of h = tanh(a) = 2p − 1 where that saves work: a sigmoid
costs a quarter of a tanh, and the factors fold into the products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflow.transforms.monotone_root import monotone_root

SHALLOW = 32  # one block up to this many units
LARGE = 65_000  # numbers in a (K, N) array from which small blocks stay in the cache
DENSE = 4_096  # numbers below which one batched triangular solve beats a loop over the units
NARROW = 512  # rows up to which an inverse block of 16 units stays in the cache
NEWTON_STEPS = 12
EARLIEST_END = 2  # before that some element is never close enough: do not look


class Units(NamedTuple):
    """K units in layers of ``size``: W, Û (K, D), b (K) and s = 1 + diag(W Ûᵀ), (K, 1).

    Outside of the kernels s may be None: U then holds the u of planar layers.
    """

    W: Tensor
    U: Tensor
    b: Tensor
    s: Tensor | None
    size: int = 1


class Pass(NamedTuple):
    """What either direction returns: the image (N, D), log |det dy/dx| (N), tanh and pq (K, N).

    pq = σ(2a) σ(−2a) is a quarter of tanh'(a), to full relative precision.
    """

    image: Tensor
    log_det: Tensor
    h: Tensor
    pq: Tensor


def push(x: Tensor, units: Units) -> Pass:
    """Evaluate y = x + Ûᵀ tanh(a) and log |det dy/dx| at x, shape (N, D)."""
    W, U, b, _, size = units
    coupling = _coupling(W, U, size, alpha=4.0)
    bias = torch.sub(b, coupling.sum(1), alpha=0.25)
    A = torch.addmm(bias.unsqueeze(1), W, x.T, beta=2, alpha=2)  # 2a, less what p adds
    P = torch.zeros_like(A)
    for start, stop in _blocks(*A.shape, size):
        if start:
            A[start:stop].addmm_(coupling[start:stop, :start], P[:start])
        if size == 1:
            here = slice(start, stop)
            _recur(A[here], P[here], coupling[here, here])
        else:
            torch.sigmoid(A[start:stop], out=P[start:stop])
    return _finish(x, A, P, units, sign=1)


def pull(y: Tensor, units: Units) -> Pass:
    """Solve y = x + Ûᵀ tanh(a) for x; the log-determinant is that of the map x ↦ y."""
    W, U, b, s, _ = units
    A = torch.addmm(b.unsqueeze(1), W, y.T)
    H = torch.empty_like(A)
    coupling = torch.mm(W, U.T).triu_(1)
    size = 16 if len(y) <= NARROW else 8
    for start in reversed(range(0, len(A), size)):
        stop = min(start + size, len(A))
        if stop < len(A):
            A[start:stop].addmm_(coupling[start:stop, stop:], H[stop:], alpha=-1)
        a, inner = A[start:stop], coupling[start:stop, start:stop]
        solution = _solve_together(a, inner, s[start:stop])
        a.copy_(_solve_in_turn(a, inner, s[start:stop]) if solution is None else solution)
        torch.tanh(a, out=H[start:stop])
    A.mul_(2)
    return _finish(y, A, torch.sigmoid(A, out=H), units, sign=-1)


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
    """The gradients in z, W, Û, b and s, given those of image and log-determinant.

    ``needs`` says whether that of z, and whether those of the parameters, are wanted.
    """
    W, U, _, s, size = units
    h, pq = done.h, done.pq
    C = torch.mm(U, grad_image.T)
    if inverse:
        C.neg_()
    det = torch.mul(h, h).addcmul_(pq, s, value=4)
    factor = torch.div(pq, det) if inverse else pq
    grad_s = torch.zeros_like(s)
    if grad_log_det is not None:
        E = torch.div(grad_log_det, det, out=det)
        grad_s = torch.linalg.vecdot(pq, E).mul_(4).unsqueeze(1)
        C.addcmul_(E.mul_(h), 1 - s, value=2)
    coupling = _coupling(W, U, 1 if inverse else size, alpha=-4.0 if inverse else 4.0, down=inverse)
    C = _linear(C, factor, coupling.T, size=1 if inverse else size, upper=not inverse).mul_(4)
    grad_z = torch.addmm(grad_image, C.T, W) if needs[0] else None
    if not needs[1]:
        return grad_z, None, None, None, None
    sign = -1.0 if inverse else 1.0
    G = torch.mm(C, h.T)
    if inverse:
        grad_s.sub_(G.diagonal().unsqueeze(1))
    G = _keep(G, size, down=inverse)
    grad_W = torch.addmm(torch.mm(C, z), G, U, alpha=sign)
    grad_U = torch.addmm(torch.mm(h, grad_image), G.T, W).mul_(sign)
    return grad_z, grad_W, grad_U, C.sum(1), grad_s


def _finish(z: Tensor, A: Tensor, P: Tensor, units: Units, sign: int) -> Pass:
    """The image and log-determinant from 2a and p, which both are overwritten."""
    Q = A.neg_().sigmoid_()
    h = torch.sub(P, Q)
    pq = P.mul_(Q)
    det = torch.mul(h, h, out=Q).addcmul_(pq, units.s, value=4)
    return Pass(torch.addmm(z, h.T, units.U, alpha=sign), det.log_().sum(0), h, pq)


def _coupling(W: Tensor, U: Tensor, size: int, *, alpha: float, down: bool = False) -> Tensor:
    """A multiple of G = W Ûᵀ, with zeros where a unit does not see another's shift."""
    G = torch.addmm(W.new_empty(()), W, U.T, beta=0, alpha=alpha)
    return _keep(G, size, down=down)


def _keep(G: Tensor, size: int, *, down: bool) -> Tensor:
    """Zero all but the strict upper triangle (down: from later units) or the earlier layers."""
    if down:
        return G.triu_(1)
    G = G.tril_(-1)
    if size > 1:
        for start in range(0, len(G), size):
            G[start : start + size, start : start + size] = 0
    return G


def _blocks(K: int, N: int, size: int) -> list[tuple[int, int]]:
    if size == 1:
        size = max(K, 1) if K <= SHALLOW else 8 if K * N > LARGE else 16
    return [(start, min(start + size, K)) for start in range(0, K, size)]


def _recur(A: Tensor, P: Tensor, coupling: Tensor) -> None:
    """p_k = σ(2a_k + Σ_{j<k} coupling_kj p_j), row by row; P holds zeros at the start."""
    transposed = P.T
    for a, p, row in _rows(A, P, coupling):
        torch.sigmoid(a.addmv_(transposed, row), out=p)


def _linear(v: Tensor, factor: Tensor, coupling: Tensor, *, size: int, upper: bool) -> Tensor:
    """Solve x = factor ∘ (v + coupling x), strictly triangular; v may be overwritten."""
    K, N = v.shape
    if K * N <= DENSE:
        system = torch.mul(coupling, factor.T.unsqueeze(1)).neg_()
        solution = torch.linalg.solve_triangular(
            system, v.T.unsqueeze(2), upper=upper, unitriangular=True
        )
        return solution.squeeze(2).T * factor
    blocks = _blocks(K, N, size)
    for start, stop in reversed(blocks) if upper else blocks:
        here, done = slice(start, stop), slice(stop, K) if upper else slice(0, start)
        x = v[here]
        if done.start < done.stop:
            x.addmm_(coupling[here, done], v[done])
        if size > 1:
            x.mul_(factor[here])
            continue
        transposed = x.T
        rows = list(_rows(x, factor[here], coupling[here, here]))
        for x_k, factor_k, row in reversed(rows) if upper else rows:
            x_k.addmv_(transposed, row).mul_(factor_k)
    return v


def _rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(t.unbind(0) for t in tensors), strict=True)


def _solve_together(r: Tensor, coupling: Tensor, s: Tensor) -> Tensor | None:
    """Newton's method for a + coupling tanh(a) + (s − 1) ∘ tanh(a) = r, all units at once.

    The triangular Jacobian is inverted by two terms of its Neumann series. Where units couple
    strongly this may wander: then None, and the units are to be solved one by one.
    """
    one, c = r.new_ones(()), s - 1
    full = coupling + torch.diag_embed(c.squeeze(1))
    reach = full.abs().sum(1, keepdim=True).add_(1)
    size = r.abs()
    tolerance = torch.add(reach, size).mul_(32 * torch.finfo(r.dtype).eps)
    # Past the bend of its unit a root lies at r ± c, near the origin at r/s. What is
    # iterated is 2a, with p = σ(2a) and p (1 − p) a quarter of the slope.
    A = torch.where(size > reach, r - c * r.sign(), r / reach).mul_(2)
    less = torch.add(r, full.sum(1, keepdim=True)).mul_(-2)
    full, coupling, c = full.mul_(4), coupling * 4, c * 4
    for step in range(NEWTON_STEPS):
        P = A.sigmoid()
        slope = torch.addcmul(P, P, P, value=-1)
        residual = torch.addmm(less, full, P).add_(A)
        close = step >= EARLIEST_END and bool((residual.abs() <= tolerance).all())
        det = torch.addcmul(one, slope, c)
        residual.addmm_(coupling, slope.mul_(residual).div_(det), alpha=-1)
        A.addcdiv_(residual, det, value=-1)
        if close:
            return A.mul_(0.5)
    return None


def _solve_in_turn(r: Tensor, coupling: Tensor, s: Tensor) -> Tensor:
    """The same equations, unit by unit from the last: monotone, so that none can fail."""
    a, h = r.clone(), torch.zeros_like(r)
    for k in reversed(range(len(r))):
        torch.sub(r[k], torch.mv(h.T, coupling[k]), out=a[k])
        a[k] = monotone_root(a[k], s[k])
        torch.tanh(a[k], out=h[k])
    return a
