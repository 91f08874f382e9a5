"""The general path: units of any activation, batch shape and order of derivatives.

A stack of K planar layers reads its input through K numbers only. With a_k the
pre-activation of layer k and h = tanh(a), both directions of the stack are one system

    a + N h + (s − 1) ∘ h = r,

with N strictly triangular. Forward, N is lower triangular and s = 1: an explicit recursion.
Inverse, N is upper triangular and each unknown is the root of a monotone scalar equation. The
derivatives of the system are *linear* triangular systems, which torch differentiates to any order.

Inside, the layer index comes first: r is (K, *B); N is (K, K), shared by a flat batch, or
(K, K, *P) with P as long as B and broadcastable to it; s is (K, *P), or None for 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pyroflow.transforms.kernels.units import Activation, Units, constrain


def evaluate(
    z: Tensor, units: Units, inverse: bool, a: Tensor | None, activation: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """Image, log-determinant and a at z, with parameters of any batch shape.

    Where a, shape (K, *B), is already known, nothing is solved, and the results have the
    gradients of the solution.
    """
    W, U, b, s, size = units
    if s is None:
        U, s = constrain(W, U)
    N = (W @ U.mT).movedim((-2, -1), (0, 1))
    s = s.squeeze(-1).movedim(-1, 0)
    if not inverse:
        N = -N
        if size > 1:  # a unit sees the shifts of earlier layers
            layer = torch.arange(len(N), device=N.device) // size
            N = N * pad((layer.unsqueeze(1) > layer).to(N.dtype), N.dim() - 2, 2)
    r = _project(z, W, b)
    shape, solution = r.shape, a if a is None else a.detach()
    if N.dim() == 2:
        r = r.reshape(len(r), math.prod(shape[1:]))
        solution = None if a is None else solution.reshape(r.shape)
    N, bend = N if N.dim() == 2 else pad(N, r.dim() - 1, 2), pad(s, r.dim() - 1, 1)
    a = _System.apply(r, N, bend if inverse else None, inverse, solution, activation).reshape(shape)
    h = activation.value(a)
    image = _shift(z, U, -h if inverse else h)
    return image, activation.det(a, pad(s, a.dim() - 1, 1)).log().sum(0), a


def pad(t: Tensor, batch_dims: int, at: int) -> Tensor:
    """Insert singleton batch dimensions after the first ``at``, for right-aligned broadcasting."""
    missing = batch_dims - (t.dim() - at)
    return t.reshape(t.shape[:at] + (1,) * missing + t.shape[at:])


def _project(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """W x + b with the layers first, shape (K, *B)."""
    if w.dim() == b.dim() + 1 == 2:
        flat = torch.addmm(b.unsqueeze(-1), w, x.reshape(-1, x.shape[-1]).T)
        return flat.reshape(len(w), *x.shape[:-1])
    return ((w @ x.unsqueeze(-1)).squeeze(-1) + b).movedim(-1, 0)


def _shift(x: Tensor, u_hat: Tensor, h: Tensor) -> Tensor:
    """Return x + Ûᵀ h for h of shape (K, *B)."""
    if u_hat.dim() == 2 and h.shape[1:] == x.shape[:-1]:
        flat = x.reshape(-1, x.shape[-1])
        return torch.addmm(flat, h.reshape(len(h), len(flat)).T, u_hat).reshape(x.shape)
    return x + (h.movedim(0, -1).unsqueeze(-2) @ u_hat).squeeze(-2)


class _System(Function):
    """(r, N, s, upper, solution, activation) ↦ a: the recursion, and backwards its linearisation.

    Only the strict triangle of N that ``upper`` names is read; ``solution`` is a, where known.
    """

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        r, N, s, upper, solution, activation = inputs
        if solution is not None:
            return solution.clone()
        a, h = r.clone(), torch.zeros_like(r)
        for k, a_k, h_k, coupling in _rows(upper, a, h, _triangle(N, upper)):
            a_k.sub_(_combine(coupling, h))
            if s is not None:
                a_k.copy_(activation.root(a_k, s[k]))
            h_k.copy_(activation.value(a_k))
        return a

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, N, s, ctx.upper, _, ctx.activation = inputs
        ctx.save_for_backward(output, N, s)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        a, N, s = ctx.saved_tensors
        h, d = ctx.activation.value(a), ctx.activation.slope(a)
        det = None if s is None else ctx.activation.det(a, s)
        # Autograd differentiates the solution of a linear system to any order, a loop does not.
        again = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        solve = _solve_linear if again else _solve_by_rows
        adjoint = solve(grad, N.transpose(0, 1), det, d, not ctx.upper)
        grad_N = None
        if ctx.needs_input_grad[1]:  # summed over what N shares
            shared = N.dim() == 2
            outer = adjoint @ h.T if shared else (adjoint.unsqueeze(1) * h).sum_to_size(N.shape)
            grad_N = -_triangle(outer, ctx.upper)
        grad_s = None if s is None else -(adjoint * h).sum_to_size(s.shape)
        return adjoint, grad_N, grad_s, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple[Tensor, int]:
        """Move each mapped dimension behind the layer indices, where broadcasting finds it."""
        moved = list(inputs)
        for i, at in ((0, 1), (1, 2), (2, 1), (4, 1)):
            if moved[i] is not None:
                unmapped = in_dims[i] is None
                t = moved[i].unsqueeze(at) if unmapped else moved[i].movedim(in_dims[i], at)
                if i == 0:
                    t = t.expand(len(t), info.batch_size, *t.shape[2:])
                moved[i] = pad(t, moved[0].dim() - 2, at + 1) if i else t
        return _System.apply(*moved), 1


def _solve_linear(v: Tensor, N: Tensor, p: Tensor | None, e: Tensor, upper: bool) -> Tensor:
    """The x with p ∘ x + e ∘ (N x) = v, for N strictly triangular; p None means 1."""
    coupling = _triangle(N, upper).movedim((0, 1), (-2, -1)) * e.movedim(0, -1).unsqueeze(-1)
    diagonal = (torch.ones_like(e) if p is None else p).movedim(0, -1).diag_embed()
    right = v.movedim(0, -1).unsqueeze(-1)
    found = torch.linalg.solve_triangular(coupling + diagonal, right, upper=upper)
    return found.squeeze(-1).movedim(-1, 0)


def _solve_by_rows(v: Tensor, N: Tensor, p: Tensor | None, e: Tensor, upper: bool) -> Tensor:
    """The same, in place of a matrix a point."""
    x, solved = v.clone(), torch.zeros_like(v)
    for k, x_k, solved_k, coupling in _rows(upper, x, solved, _triangle(N, upper)):
        x_k.sub_(_combine(coupling, solved).mul_(e[k]))
        if p is not None:
            x_k.div_(p[k])
        solved_k.copy_(x_k)
    return x


def _rows(upper: bool, *tensors: Tensor) -> Iterator[tuple]:
    """The index and the rows of each unknown, in solving order."""
    rows = list(zip(range(len(tensors[0])), *(t.unbind(0) for t in tensors), strict=True))
    return iter(rows[::-1] if upper else rows)


def _combine(coupling: Tensor, h: Tensor) -> Tensor:
    """Σ_j coupling_j h_j. The unknowns not yet solved have zeros in ``coupling``."""
    return torch.mv(h.T, coupling) if coupling.dim() == 1 else (coupling * h).sum(0)


def _triangle(N: Tensor, upper: bool) -> Tensor:
    moved = N.movedim((0, 1), (-2, -1))
    return (moved.triu(1) if upper else moved.tril(-1)).movedim((-2, -1), (0, 1))
