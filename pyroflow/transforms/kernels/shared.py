"""The two passes of a stack of tanh units, written by hand for speed.

A stack of K units y = x + Σ_k û_k tanh(a_k), a_k = w_kᵀz + b_k, sees its input through K numbers.
These functions evaluate, invert and differentiate it with two matrix products in the event size
and a recursion on (K, N) arrays. They record no graph: autograd.py makes an autograd function of
them, and reference.py is the same mathematics in differentiable operations.

Units come in layers of M that do not see each other's shifts: M = 1 for planar layers, and
M = the number of units for Sylvester layers, whose G = W Ûᵀ is upper triangular inside a layer.

The arrays hold p = σ(2a) in place of h = tanh(a) = 2p − 1 where that saves work: a sigmoid
costs a quarter of a tanh, and the factors fold into the products.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflow.transforms.kernels.units import Units, monotone_root

SHALLOW = 32  # one block up to this many units
LARGE = 65_000  # numbers in a (K, N) array from which small blocks stay in the cache
DENSE = 4_096  # numbers in a block below which one batched triangular solve beats a loop
NARROW = 512  # rows up to which an inverse block of 16 units stays in the cache
FEW_STEPS, MANY_STEPS = 10, 16  # Newton steps for many rows, and for the few that are then left
BOLD = 4  # steps before a step is held at the origin
WIDEST = 2048  # an event that fits into the registers of a program
EARLIEST_END = 3  # before that some element is hardly ever close enough: do not look


class Pass(NamedTuple):
    """Image (N, D); log |det dy/dx| (N); h = tanh(a) and pq = σ(2a) σ(−2a) (K, N); G = W Ûᵀ.

    pq is a quarter of tanh'(a), to full relative precision.
    """

    image: Tensor
    log_det: Tensor
    h: Tensor
    pq: Tensor
    G: Tensor


def forward(x: Tensor, units: Units) -> Pass:
    """Evaluate y = x + Ûᵀ tanh(a) and log |det dy/dx| at x, shape (N, D)."""
    W, U, b, _, size = units
    G = torch.mm(W, U.T)
    coupling = earlier(G, size)
    # In p = σ(2a) the system reads 2a = 2 (W x + b − Σ_j G_kj) + 4 Σ_j G_kj p_j.
    bias = torch.sub(b, coupling.sum(1)).unsqueeze(1)
    A = torch.addmm(bias, W, x.T, beta=2, alpha=2)
    P = torch.zeros_like(A)
    for start, stop in _blocks(*A.shape, size):
        here = slice(start, stop)
        if start:
            A[here].addmm_(coupling[here, :start], P[:start], alpha=4)
        if size == 1:
            _recur(A, P, coupling, here)
        else:
            torch.sigmoid(A[here], out=P[here])
    return _finish(x, A, P, units, G, sign=1)


def inverse(y: Tensor, units: Units) -> Pass:
    """Solve y = x + Ûᵀ tanh(a) for x; the log-determinant is that of the map x ↦ y."""
    W, U, b, s, _ = units
    A = torch.addmm(b.unsqueeze(1), W, y.T)
    H = torch.empty_like(A)
    G = torch.mm(W, U.T)
    coupling = G.triu(1)
    size = 16 if len(y) <= NARROW else 8
    for start in reversed(range(0, len(A), size)):
        here, later = slice(start, min(start + size, len(A))), slice(start + size, len(A))
        if later.start < later.stop:
            A[here].addmm_(coupling[here, later], H[later], alpha=-1)
        A[here] = _solve(A[here], coupling[here, here], s[here])
        torch.tanh(A[here], out=H[here])
    A.mul_(2)
    return _finish(y, A, torch.sigmoid(A, out=H), units, G, sign=-1)


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
    _, _, h, pq, G = done
    sign = -1 if inverse else 1
    C = torch.addmm(h, U, grad_image.T, beta=0, alpha=4 * sign)
    factor, grad_s = pq, None
    if inverse or grad_log_det is not None:
        det = torch.mul(h, h).addcmul_(pq, s, value=4)
        factor = torch.div(pq, det) if inverse else pq
        if grad_log_det is not None:
            E = torch.div(grad_log_det, det, out=det)
            if needs[1]:
                grad_s = torch.linalg.vecdot(pq, E).unsqueeze(1).mul_(4)
            C.addcmul_(E.mul_(h), 1 - s, value=8)
    coupling = G.triu(1).T if inverse else earlier(G, size).T
    C = _linear(C, factor, coupling, 4 * sign, 1 if inverse else size, upper=not inverse)
    grad_z = torch.addmm(grad_image, C.T, W) if needs[0] else None
    if not needs[1]:
        return grad_z, None, None, None, None
    grad_G = torch.mm(C, h.T)
    if inverse:
        lost = grad_G.diagonal().unsqueeze(1)
        grad_s = lost.neg() if grad_s is None else grad_s.sub_(lost)
    grad_G = grad_G.triu_(1) if inverse else earlier(grad_G, size)
    grad_W = torch.addmm(torch.mm(C, z), grad_G, U, alpha=sign)
    grad_U = torch.addmm(torch.mm(grad_G.T, W), h, grad_image)
    grad_U = grad_U.neg_() if inverse else grad_U
    return grad_z, grad_W, grad_U, C.sum(1), grad_s


def _finish(z: Tensor, A: Tensor, P: Tensor, units: Units, G: Tensor, sign: int) -> Pass:
    """The image and log-determinant from 2a and p, which both are overwritten."""
    Q = A.neg_().sigmoid_()
    h = torch.sub(P, Q)
    pq = P.mul_(Q)
    det = torch.mul(h, h, out=Q).addcmul_(pq, units.s, value=4)
    image = torch.addmm(z, h.T, units.U, alpha=sign)
    return Pass(image, det.log_().sum(0), h, pq, G)


def earlier(G: Tensor, size: int) -> Tensor:
    """G with zeros where unit k does not see the shift of unit j: j in k's own layer or later."""
    G = G.tril(-1)
    if size > 1:
        for start in range(0, len(G), size):
            G[start : start + size, start : start + size] = 0
    return G


def _blocks(K: int, N: int, size: int) -> list[tuple[int, int]]:
    if size == 1:
        size = 8 if K * N > LARGE else 16 if K > SHALLOW or N > NARROW else max(K, 1)
    return [(start, min(start + size, K)) for start in range(0, K, size)]


def _recur(A: Tensor, P: Tensor, coupling: Tensor, here: slice) -> None:
    """p_k = σ(2a_k + 4 Σ_j coupling_kj p_j) within a block; P holds zeros at the start."""
    if here.stop - here.start < len(A):
        A, P, coupling = A[here], P[here], coupling[here, here]
    transposed = P.T
    for a, p, row in zip(A.unbind(0), P.unbind(0), coupling.unbind(0), strict=True):
        torch.sigmoid(a.addmv_(transposed, row, alpha=4), out=p)


def _linear(
    v: Tensor, factor: Tensor, coupling: Tensor, alpha: int, size: int, *, upper: bool
) -> Tensor:
    """Solve x = factor ∘ (v + alpha coupling x), strictly triangular, in place of v."""
    K, N = v.shape
    blocks = _blocks(K, N, size)
    for start, stop in reversed(blocks) if upper else blocks:
        here, done = slice(start, stop), slice(stop, K) if upper else slice(0, start)
        x, f = v[here], factor[here]
        if done.start < done.stop:
            x.addmm_(coupling[here, done], v[done], alpha=alpha)
        if size > 1:
            x.mul_(f)
        elif x.numel() <= DENSE:
            _solve_at_once(x, f, coupling[here, here], alpha, upper)
        else:
            _solve_by_rows(x, f, coupling[here, here], alpha, upper)
    return v


def _solve_at_once(x: Tensor, f: Tensor, coupling: Tensor, alpha: int, upper: bool) -> None:
    """One batched triangular solve, a matrix a row."""
    system = torch.mul(coupling, f.T.unsqueeze(1)).mul_(-alpha)
    right = x.T.unsqueeze(2)
    found = torch.linalg.solve_triangular(system, right, upper=upper, unitriangular=True)
    torch.mul(found.squeeze(2).T, f, out=x)


def _solve_by_rows(x: Tensor, f: Tensor, coupling: Tensor, alpha: int, upper: bool) -> None:
    """The unknowns not yet solved have zeros in ``coupling``."""
    transposed = x.T
    rows = list(zip(x.unbind(0), f.unbind(0), coupling.unbind(0), strict=True))
    for x_k, f_k, row in reversed(rows) if upper else rows:
        x_k.addmv_(transposed, row, alpha=alpha).mul_(f_k)


def _solve(r: Tensor, coupling: Tensor, s: Tensor) -> Tensor:
    """The root a of a + coupling tanh(a) + (s − 1) ∘ tanh(a) = r, strictly upper triangular."""
    steps = FEW_STEPS if r.shape[1] > NARROW else MANY_STEPS
    a, left = _solve_together(r, coupling, s, steps)
    if left is not None and steps == FEW_STEPS:
        again, still = _solve_together(r[:, left], coupling, s, MANY_STEPS)
        a[:, left] = again
        left = None if still is None else left[still]
    if left is not None:
        a[:, left] = _solve_in_turn(r[:, left], coupling, s)
    return a


def _solve_together(
    r: Tensor, coupling: Tensor, s: Tensor, steps: int
) -> tuple[Tensor, Tensor | None]:
    """Newton's method for all units at once: the roots, and the columns it did not end for.

    The triangular Jacobian is inverted by two terms of its Neumann series. What is iterated is
    2a, with p = σ(2a) and p (1 − p) a quarter of the slope. A solution is improved once more
    after it is found good.
    """
    one, c = r.new_ones(()), s - 1
    full = coupling + torch.diag_embed(c.squeeze(1))
    reach = full.abs().sum(1, keepdim=True).add_(1)
    size = r.abs()
    tolerance = torch.add(reach, size).mul_(32 * torch.finfo(r.dtype).eps)
    A = _sweep(r, coupling, s, c) if r.shape[1] > NARROW else _guess(r, reach, c)
    less = torch.add(r, full.sum(1, keepdim=True)).mul_(-2)
    full, coupling, c = full.mul_(4), coupling * 4, c * 4
    for step in range(steps):
        P = A.sigmoid()
        slope = torch.addcmul(P, P, P, value=-1)
        residual = torch.addmm(less, full, P).add_(A)
        good = residual.abs() <= tolerance if step >= EARLIEST_END else None
        det = torch.addcmul(one, slope, c)
        residual.addmm_(coupling, slope.mul_(residual).div_(det), alpha=-1)
        before, A = A, torch.addcdiv(A, residual, det, value=-1)
        if good is not None and bool(good.all()):
            return A.mul_(0.5), None
        if step >= BOLD:  # a step across the bend at the origin may lead into a cycle
            A.masked_fill_(before.mul_(A) < 0, 0)
    return A.mul_(0.5), (~good).any(0).nonzero().squeeze(1)


def _guess(r: Tensor, reach: Tensor, c: Tensor) -> Tensor:
    """About 2a: past the bend of its unit a root lies at r ± c, near the origin at r/s."""
    return torch.where(r.abs() > reach, r - c * r.sign(), r / reach).mul_(2)


def _sweep(r: Tensor, coupling: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """About 2a, unit by unit, where rows are long: t − c tanh(t/s) is right near and far."""
    a, h = torch.empty_like(r), torch.zeros_like(r)
    for k in reversed(range(len(r))):
        t = torch.addmv(r[k], h.T, coupling[k], alpha=-1)
        torch.addcmul(t, (t / s[k]).tanh_(), c[k], value=-1, out=a[k])
        torch.tanh(a[k], out=h[k])
    return a.mul_(2)


def _solve_in_turn(r: Tensor, coupling: Tensor, s: Tensor) -> Tensor:
    """The same equations, unit by unit from the last: monotone, so that none can fail."""
    a, h = r.clone(), torch.zeros_like(r)
    for k in reversed(range(len(r))):
        a[k] = monotone_root(r[k] - torch.mv(h.T, coupling[k]), s[k])
        torch.tanh(a[k], out=h[k])
    return a


def kernels_for_device(kernels: ModuleType, z: Tensor) -> ModuleType:
    """``kernels``, which is ``shared`` or ``per_point``, or its counterpart in Triton for a GPU.

    Those in Triton take planar units without s too. While operations are recorded as a graph, as
    by ``make_fx``, it is ``kernels``: Triton's launches would not be seen.
    """
    served = z.is_cuda and z.dtype in (torch.float32, torch.float64) and 0 < z.shape[-1] <= WIDEST
    if not (served and len(z) and torch._C._len_torch_dispatch_stack() == 0 and _has_triton()):
        return kernels
    name = kernels.__name__.rpartition(".")[2]
    return import_module(f"{__package__}.cuda_{name}")


@cache
def _has_triton() -> bool:
    """Whether Triton is there and finds what it needs, a compiler of C for one."""
    try:
        target = import_module("triton").runtime.driver.active.get_current_target()
        return target.backend == "cuda" and target.arch >= 70
    except Exception:  # whatever it is, torch's own operations are at hand
        return False
