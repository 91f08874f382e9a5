"""The passes of per_point.py on a GPU, each one kernel of Triton's; and what units are there.

A program holds the points of a few rows in its registers and walks through their layers, so that
each parameter is read once and each gradient written once. Units without s are planar layers as
they are given, by u: the kernels make û on the way, and nothing is launched beside them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyroflow.transforms.kernels.per_point import Pass
from pyroflow.transforms.kernels.units import MAX_STEPS, Units

STEPS = tl.constexpr(MAX_STEPS)


def forward(x: Tensor, units: Units) -> Pass:
    """Evaluate y and log |det dy/dx| at x, shape (N, D)."""
    return _pass(x, units, inverse=False)


def inverse(y: Tensor, units: Units) -> Pass:
    """Solve for x at y, shape (N, D); the log-determinant is that of the map x ↦ y."""
    return _pass(y, units, inverse=True)


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
    W, U, b, s = (t if t is None else _by_rows(t) for t in units[:4])
    N, K, D = W.shape
    grads = [torch.empty_like(grad_image, memory_format=torch.contiguous_format)]
    if needs[1]:
        grads += [W.new_empty(W.shape), U.new_empty(U.shape), b.new_empty(b.shape)]
    grads += [None] * (4 - len(grads))
    grads.append(s.new_empty(s.shape) if needs[1] and s is not None else None)
    given = done.h, done.pq, done.image, grad_image.contiguous()
    given = *given, grad_log_det if grad_log_det is None else grad_log_det.contiguous()
    strides = W.stride(0), U.stride(0), 0 if s is None else s.stride(0)
    grid, options = tiles(N, D)
    with torch.cuda.device_of(W):
        _backward[grid](W, U, s, *given, *grads, N, D, *strides, K, inverse, **options)
    return tuple(grads)


def tiles(N: int, D: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid of a kernel that goes by rows of D numbers, and its sizes."""
    width = triton.next_power_of_2(D)
    rows = max(1, 64 // width)
    options = {"ROWS": rows, "WIDTH": width, "num_warps": min(max(width // 256, 1), 16)}
    return (triton.cdiv(N, rows),), options


def _pass(z: Tensor, units: Units, inverse: bool) -> Pass:
    W, U, b, s = (t if t is None else _by_rows(t) for t in units[:4])
    N, K, D = W.shape
    found = Pass(z.new_empty(N, D), z.new_empty(N), z.new_empty(K, N), z.new_empty(K, N))
    strides = W.stride(0), U.stride(0), b.stride(0), 0 if s is None else s.stride(0)
    grid, options = tiles(N, D)
    with torch.cuda.device_of(W):
        _evaluate[grid](z.contiguous(), W, U, b, s, *found, N, D, *strides, K, inverse, **options)
    return found


def _by_rows(t: Tensor) -> Tensor:
    """The same with each row contiguous, as those of parts of a network's output are."""
    return t if t[0].is_contiguous() else t.contiguous()


@triton.jit
def bend(a):
    """tanh(a) and tanh'(a) / 4, both to full relative precision; a fraction of Lambert's near 0."""
    size, q = tl.abs(a), a * a
    e = tl.exp(-2 * size)
    near = size < 0.4
    top = tl.where(near, (((q + 378) * q + 17325) * q + 135135) * size, 1 - e)
    bottom = tl.where(near, ((28 * q + 3150) * q + 62370) * q + 135135, 1 + e)
    t = top / bottom
    return tl.where(a < 0, -t, t), e / ((1 + e) * (1 + e))


@triton.jit
def root(r, s):
    """As units.monotone_root. What is found good is improved by small steps alone."""
    most: tl.constexpr = 2.0**-21 if r.dtype == tl.float32 else 2.0**-50
    size = tl.abs(r)
    shifted, scaled = size - (s - 1), size / s
    cube_root = tl.exp2(tl.log2(size / 0.238) / 3)
    convex = tl.minimum(shifted, scaled)
    convex = tl.where(cube_root <= 1, tl.minimum(convex, cube_root), convex)
    a = tl.where(s >= 1, tl.maximum(shifted, scaled), convex)
    step, num_left = 0, 1
    while (step < STEPS) & (num_left > 0):
        t, pq = bend(a)
        residual = (a - t) + s * t - size
        left = tl.abs(residual) > most * (a + size)
        change = residual / (t * t + 4 * pq * s)
        a = tl.where(left | (tl.abs(change) < 0.01 * a), a - change, a)
        a = tl.where(a < 0, 0.0, a)
        step, num_left = step + 1, tl.sum(left.to(tl.int32))
    return tl.where(r < 0, -a, a)


@triton.jit
def constrain(w, u):
    """û, s and what their gradients need, row by row, with the floors of units.constrain."""
    tiny: tl.constexpr = 2.0**-126 if w.dtype == tl.float32 else 2.0**-1022
    root_tiny: tl.constexpr = 2.0**-63 if w.dtype == tl.float32 else 2.0**-511
    v, norm2 = tl.sum(w * u, 1), tl.sum(w * w, 1)
    floor = tl.where(v < -0.5, tiny, root_tiny)
    share, norm2 = tl.minimum(norm2 / floor, 1.0), tl.maximum(norm2, floor)
    e = tl.exp(-tl.abs(v))
    one = 1 + e
    log = tl.where(one == 1, e, tl.log(one) * (e / (one - 1)))  # ln(1 + e) to all digits of e
    coefficient = (tl.maximum(-v, 0.0) + log - 1) / norm2
    s = share * (tl.maximum(v, 0.0) + log) + (1 - share) * (1 + v)
    up = tl.where(v < 0, e, 1.0) / one
    down = tl.where(v < 0, 1.0, e) / one
    return u + coefficient[:, None] * w, tl.maximum(s, tiny), coefficient, norm2, share, up, down


@triton.jit
def constrain_gradients(w, u, coefficient, norm2, share, up, down, grad_w, grad_u, grad_s):
    """The gradients in w and u, given those of w, û and s."""
    q = tl.sum(grad_u * w, 1)
    grad_v = grad_s * (share * up + (1 - share)) - q / norm2 * down
    grad_norm2 = coefficient * tl.where(share < 1, grad_s, -q / norm2)
    grad_w += coefficient[:, None] * grad_u + grad_v[:, None] * u + 2 * grad_norm2[:, None] * w
    return grad_w, grad_u + grad_v[:, None] * w


@triton.jit
def _evaluate(
    Z, W, U, B, S, IMAGE, LOG_DET, H, PQ, N, D, w_row, u_row, b_row, s_row,
    K: tl.constexpr, INVERSE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, WIDTH)[None, :]
    here = row < N
    inside = here[:, None] & (lane < D)
    at = row[:, None] * D + lane
    z = tl.load(Z + at, inside, other=0.0)
    log_det = tl.sum(z * 0, 1)
    for i in range(K):
        k = K - 1 - i if INVERSE else i
        w = tl.load(W + row[:, None] * w_row + k * D + lane, inside, other=0.0)
        u = tl.load(U + row[:, None] * u_row + k * D + lane, inside, other=0.0)
        a = tl.sum(w * z, 1) + tl.load(B + row * b_row + k, here, other=0.0)
        if S is None:
            u, s, _, _, _, _, _ = constrain(w, u)
        else:
            s = tl.load(S + row * s_row + k, here, other=1.0)
        if INVERSE:
            a = root(a, s)
        h, pq = bend(a)
        z = z - h[:, None] * u if INVERSE else z + h[:, None] * u
        log_det += tl.log(h * h + 4 * pq * s)
        tl.store(H + k * N + row, h, here)
        tl.store(PQ + k * N + row, pq, here)
    tl.store(IMAGE + at, z, inside)
    tl.store(LOG_DET + row, log_det, here)


@triton.jit
def _backward(
    W, U, S, H, PQ, IMAGE, GRAD, GRAD_LOG_DET, GRAD_Z, GRAD_W, GRAD_U, GRAD_B, GRAD_S,
    N, D, w_row, u_row, s_row,
    K: tl.constexpr, INVERSE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, WIDTH)[None, :]
    here = row < N
    inside = here[:, None] & (lane < D)
    at = row[:, None] * D + lane
    z, grad = tl.load(IMAGE + at, inside, other=0.0), tl.load(GRAD + at, inside, other=0.0)
    for i in range(K):
        k = i if INVERSE else K - 1 - i
        w = tl.load(W + row[:, None] * w_row + k * D + lane, inside, other=0.0)
        u = tl.load(U + row[:, None] * u_row + k * D + lane, inside, other=0.0)
        if S is None:
            u_hat, s, coefficient, norm2, share, up, down = constrain(w, u)
        else:
            u_hat, s = u, tl.load(S + row * s_row + k, here, other=1.0)
        h = tl.load(H + k * N + row, here, other=1.0)
        pq = tl.load(PQ + k * N + row, here, other=0.0)
        det = h * h + 4 * pq * s
        c = tl.sum(u_hat * grad, 1)
        c = -c if INVERSE else c
        grad_s = h * 0
        if GRAD_LOG_DET is not None:
            e = tl.load(GRAD_LOG_DET + row, here, other=0.0) / det
            grad_s = 4 * pq * e
            c += 2 * e * h * (1 - s)
        c *= 4 * pq / det if INVERSE else 4 * pq
        if GRAD_W is not None:
            grad_u = grad * h[:, None]
            if INVERSE:
                z += h[:, None] * u_hat  # where the layer's pass began
                grad_u, grad_s = -grad_u, grad_s - c * h
            else:
                z -= h[:, None] * u_hat
            grad_w = z * c[:, None]
            if S is None:
                grad_w, grad_u = constrain_gradients(
                    w, u, coefficient, norm2, share, up, down, grad_w, grad_u, grad_s
                )
            else:
                tl.store(GRAD_S + row * K + k, grad_s, here)
            to = (row[:, None] * K + k) * D + lane
            tl.store(GRAD_W + to, grad_w, inside)
            tl.store(GRAD_U + to, grad_u, inside)
            tl.store(GRAD_B + row * K + k, c, here)
        grad += w * c[:, None]
    tl.store(GRAD_Z + at, grad, inside)
