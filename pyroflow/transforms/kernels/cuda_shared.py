"""The passes of shared.py on a GPU: the products by cuBLAS, all between them by Triton's kernels.

A program holds some columns of the (K, N) arrays in its registers and goes through a block of
units. Units without s are planar layers as they are given, by u.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyroflow.transforms.kernels.cuda_per_point import (
    bend,
    constrain,
    constrain_gradients,
    root,
    tiles,
)
from pyroflow.transforms.kernels.shared import Pass, earlier
from pyroflow.transforms.kernels.units import Units

BLOCK = 32  # units whose numbers stay in registers


def forward(x: Tensor, units: Units) -> Pass:
    """Evaluate y = x + Ûᵀ tanh(a) and log |det dy/dx| at x, shape (N, D)."""
    return _pass(x, units, sign=1)


def inverse(y: Tensor, units: Units) -> Pass:
    """Solve y = x + Ûᵀ tanh(a) for x; the log-determinant is that of the map x ↦ y."""
    return _pass(y, units, sign=-1)


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
    W, U, _, s, size = _constrained(units)
    _, _, h, pq, G = done
    sign = -1 if inverse else 1
    K, N = h.shape
    coupling = G.triu(1) if inverse else earlier(G, size)
    C = torch.mm(U, grad_image.T)
    share = None
    if grad_log_det is not None:
        share = C.new_empty(K, triton.cdiv(N, _columns(C)))
        grad_log_det = grad_log_det.contiguous()
    for here, over in _blocks(K, -sign):
        if over.start < over.stop:
            C[here].addmm_(coupling[over, here].T, C[over])
        part = None if share is None else share[here]
        arrays = coupling[here, here], s[here], h[here], pq[here], C[here], part
        _launch(_solve, arrays, grad_log_det, -sign)
    grad_z = torch.addmm(grad_image, C.T, W) if needs[0] else None
    if not needs[1]:
        return grad_z, None, None, None, None
    grad_G = torch.mm(C, h.T)
    grad_s = torch.zeros_like(s) if share is None else share.sum(1, keepdim=True)
    if inverse:
        grad_s -= grad_G.diagonal().unsqueeze(1)
    grad_G = grad_G.triu_(1) if inverse else earlier(grad_G, size)
    grad_W = torch.addmm(torch.mm(C, z), grad_G, U, alpha=sign)
    grad_U = torch.addmm(torch.mm(grad_G.T, W), h, grad_image, beta=sign, alpha=sign)
    if units.s is None:
        _by_rows(_constrain_gradients, W, units.U.contiguous(), grad_W, grad_U, grad_s)
        grad_s = None
    return grad_z, grad_W, grad_U, C.sum(1), grad_s


def _pass(z: Tensor, units: Units, sign: int) -> Pass:
    W, U, b, s, size = _constrained(units)
    G = torch.mm(W, U.T)
    coupling = earlier(G, size) if sign > 0 else G.triu(1)
    A = torch.addmm(b.unsqueeze(1), W, z.T)
    pq, log_det = torch.empty_like(A), A.new_zeros(len(z))
    for here, over in _blocks(len(A), sign):
        if over.start < over.stop:
            A[here].addmm_(coupling[here, over], A[over], alpha=sign)
        _launch(_evaluate, (coupling[here, here], s[here], A[here], pq[here]), log_det, sign)
    return Pass(torch.addmm(z, A.T, U, alpha=sign), log_det, A, pq, G)


def _constrained(units: Units) -> Units:
    """The units with û and s in their places."""
    W, U, s = units.W.contiguous(), units.U.contiguous(), units.s
    if s is None:
        u, U, s = U, torch.empty_like(U), U.new_empty(len(U), 1)
        _by_rows(_constrain, W, u, U, s)
    return Units(W, U, units.b, s.contiguous(), units.size)


def _by_rows(kernel: triton.JITFunction, W: Tensor, *tensors: Tensor) -> None:
    grid, options = tiles(*W.shape)
    with torch.cuda.device_of(W):
        kernel[grid](W, *tensors, *W.shape, **options)


def _blocks(K: int, sign: int) -> list[tuple[slice, slice]]:
    """Each block of units in turn, from the first or (sign < 0) the last, and those before it."""
    starts = list(range(0, K, BLOCK))[::sign]
    blocks = [slice(start, min(start + BLOCK, K)) for start in starts]
    return [(b, slice(0, b.start) if sign > 0 else slice(b.stop, K)) for b in blocks]


def _columns(like: Tensor) -> int:
    """How many of the (K, N) arrays a program holds: all units of a column are then in a thread."""
    return 128 if like.dtype == torch.float32 else 64


def _launch(
    kernel: triton.JITFunction, arrays: Sequence[Tensor | None], log_det: Tensor | None, sign: int
) -> None:
    """Go through the units of a block, (K, N) arrays, from the first or (sign < 0) the last."""
    coupling, like = arrays[0], arrays[2]
    (K, N), columns = like.shape, _columns(like)
    sizes = K, sign, triton.next_power_of_2(K), columns
    with torch.cuda.device_of(like):
        kernel[(triton.cdiv(N, columns),)](
            *arrays, log_det, N, *coupling.stride(), *sizes, num_warps=1
        )


@triton.jit
def _evaluate(
    G, S, A, PQ, LOG_DET, N, g_row, g_column,
    K: tl.constexpr, SIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Put h in place of a, find pq, and add to the log-determinant."""
    unit = tl.arange(0, ROWS)
    at, N = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS), tl.cast(N, tl.int64)
    here, known, row = at < N, unit < K, unit[:, None]
    places = A + row * N + at[None, :]
    left = tl.load(places, known[:, None] & here[None, :], other=0.0)
    log_det = tl.load(LOG_DET + at, here, other=0.0)
    for i in range(K):
        k = i if SIGN > 0 else K - 1 - i
        g = SIGN * tl.load(G + unit * g_row + k * g_column, known, other=0.0)
        s = tl.load(S + k)
        a = tl.sum(tl.where(row == k, left, 0.0), 0)
        if SIGN < 0:
            a = root(a, s)
        h, pq = bend(a)
        left += g[:, None] * h[None, :]
        log_det += tl.log(h * h + 4 * pq * s)
        tl.store(A + k * N + at, h, here)
        tl.store(PQ + k * N + at, pq, here)
    tl.store(LOG_DET + at, log_det, here)


@triton.jit
def _solve(
    G, S, H, PQ, C, SHARE, GRAD, N, g_row, g_column,
    K: tl.constexpr, SIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradients in the pre-activations, and each unit's share of that in its s.

    SIGN is that of the order, which is the opposite of the pass's.
    """
    part, parts, unit = tl.program_id(0), tl.num_programs(0), tl.arange(0, ROWS)
    at, N = part.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS), tl.cast(N, tl.int64)
    here, known, row = at < N, unit < K, unit[:, None]
    places = C + row * N + at[None, :]
    left = tl.load(places, known[:, None] & here[None, :], other=0.0)
    if GRAD is not None:
        grad_log_det = tl.load(GRAD + at, here, other=0.0)
    for i in range(K):
        k = i if SIGN > 0 else K - 1 - i
        g = tl.load(G + k * g_row + unit * g_column, known, other=0.0)
        s = tl.load(S + k)
        h = tl.load(H + k * N + at, here, other=1.0)
        slope = 4 * tl.load(PQ + k * N + at, here, other=0.0)
        det = h * h + slope * s
        c = -SIGN * tl.sum(tl.where(row == k, left, 0.0), 0)
        if GRAD is not None:
            e = grad_log_det / det
            tl.store(SHARE + k * parts + part, tl.sum(slope * e))
            c += 2 * e * h * (1 - s)
        c *= slope / det if SIGN > 0 else slope
        left += g[:, None] * c[None, :]
        tl.store(C + k * N + at, c, here)


@triton.jit
def _constrain(W, U, U_HAT, S, K, D, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, WIDTH)[None, :]
    at, inside = row[:, None] * D + lane, (row < K)[:, None] & (lane < D)
    w, u = tl.load(W + at, inside, other=0.0), tl.load(U + at, inside, other=0.0)
    u_hat, s, _, _, _, _, _ = constrain(w, u)
    tl.store(U_HAT + at, u_hat, inside)
    tl.store(S + row, s, row < K)


@triton.jit
def _constrain_gradients(
    W, U, GRAD_W, GRAD_U, GRAD_S, K, D, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """In place of the gradients in w and û."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, WIDTH)[None, :]
    at, inside = row[:, None] * D + lane, (row < K)[:, None] & (lane < D)
    w, u = tl.load(W + at, inside, other=0.0), tl.load(U + at, inside, other=0.0)
    _, _, coefficient, norm2, share, up, down = constrain(w, u)
    grad_w = tl.load(GRAD_W + at, inside, other=0.0)
    grad_u = tl.load(GRAD_U + at, inside, other=0.0)
    grad_s = tl.load(GRAD_S + row, row < K, other=0.0)
    grad_w, grad_u = constrain_gradients(
        w, u, coefficient, norm2, share, up, down, grad_w, grad_u, grad_s
    )
    tl.store(GRAD_W + at, grad_w, inside)
    tl.store(GRAD_U + at, grad_u, inside)
