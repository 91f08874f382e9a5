"""The triangular tanh system that planar stacks and Sylvester layers share.

A stack of K planar layers reads its input through K numbers only. With a_k the
pre-activation of layer k and h = tanh(a), both directions of the stack are one system

    a + N h + (s − 1) ∘ h = r,

with N strictly triangular. Forward, N is lower triangular and s = 1: an explicit
recursion. Inverse, N is upper triangular and each unknown is the root of a monotone
scalar equation. The derivatives of the system are *linear* triangular systems, which torch
differentiates to any order.

Another activation may take the place of tanh. Inside, the layer index comes first: r is
(K, *B); N is (K, K), shared by a flat batch, or (K, K, *P) with P as long as B and
broadcastable to it; s is (K, *P).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pyroflow.transforms.kernels.units import TANH, Activation, Units, constrain


def evaluate(
    z: Tensor, units: Units, inverse: bool, a: Tensor | None, activation: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """The stack in differentiable operations, with parameters of any batch shape."""
    W, U, b, s, size = units
    if s is None:
        U, s = constrain(W, U)
    G = (W @ U.mT).movedim((-2, -1), (0, 1))
    s = s.squeeze(-1).movedim(-1, 0)
    r = _project(z, W, b)
    if inverse:
        a = solve_coupled_tanh(
            r, G, s, upper=True, solution=None if a is None else a.detach(), activation=activation
        )
    else:
        N = -G if size == 1 else -G * _earlier_layers(G, size)
        a = solve_coupled_tanh(r, N, None, upper=False, activation=activation)
    s = s.reshape(s.shape[:1] + (1,) * (a.dim() - s.dim()) + s.shape[1:])
    h = activation.value(a)
    image = _shift(z, U, -h if inverse else h)
    return image, activation.det(a, s).log().sum(0), a


def _earlier_layers(G: Tensor, size: int) -> Tensor:
    """1 where unit k lies in a later layer than unit j, shape (K, K, 1, ...)."""
    layer = torch.arange(len(G), device=G.device) // size
    mask = (layer.unsqueeze(1) > layer).to(G.dtype)
    return mask.reshape(mask.shape + (1,) * (G.dim() - 2))


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


def solve_coupled_tanh(
    r: Tensor,
    N: Tensor,
    s: Tensor | None,
    *,
    upper: bool,
    solution: Tensor | None = None,
    activation: Activation = TANH,
) -> Tensor:
    """Solve a + N tanh(a) + (s − 1) ∘ tanh(a) = r for a, differentiable to any order.

    Args:
        r: right-hand side, shape (K, *B).
        N: coupling, shape (K, K), or (K, K, *P) with P broadcastable to B. Only its strict
            upper (``upper=True``) or strict lower triangle is read.
        s: one plus the diagonal of the coupling, shape (K,) or (K, *P); None for s = 1.
        upper: which triangle couples the unknowns, and with it the order of the recursion.
        solution: a, shape (K, *B), where it is already known: nothing is solved, and the
            result has the gradients of the solution.
        activation: what stands for tanh.

    Returns:
        a, shape (K, *B).

    Example:
        >>> import torch
        >>> from pyroflow.transforms.kernels.reference import solve_coupled_tanh
        >>> N, s = torch.randn(3, 3), torch.ones(3) * 2
        >>> a = solve_coupled_tanh(torch.zeros(3, 5), N, s, upper=True)
        >>> a.shape, bool((a == 0).all())
        (torch.Size([3, 5]), True)
    """
    shape, shared = r.shape, N.dim() == 2
    if shared:
        r = r.reshape(len(r), math.prod(shape[1:]))
        solution = None if solution is None else solution.reshape(r.shape)
    N, s = N if shared else pad(N, r.dim() - 1, 2), pad(s, r.dim() - 1, 1)
    return _CoupledTanh.apply(r, N, s, upper, solution, activation).reshape(shape)


class _CoupledTanh(Function):
    """r ↦ a. The forward pass is the recursion, the backward pass its linearisation."""

    @staticmethod
    def forward(
        r: Tensor,
        N: Tensor,
        s: Tensor | None,
        upper: bool,
        solution: Tensor | None,
        activation: Activation,
    ) -> Tensor:
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
        flipped = N.transpose(0, 1)
        adjoint = _solve_linear(grad, flipped, det, d, not ctx.upper, differentiable=again)
        grad_N = -_outer(adjoint, h, N, ctx.upper) if ctx.needs_input_grad[1] else None
        grad_s = None if s is None else -(adjoint * h).sum_to_size(s.shape)
        return adjoint, grad_N, grad_s, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple,
        r: Tensor,
        N: Tensor,
        s: Tensor | None,
        upper: bool,
        solution: Tensor | None,
        activation: Activation,
    ) -> tuple[Tensor, int]:
        dims = in_dims[:3] + in_dims[4:5]
        r, N, s, solution = _add_batch(info.batch_size, dims, (1, 2, 1, 1), (r, N, s, solution))
        return _CoupledTanh.apply(r, N, s, upper, solution, activation), 1


def _solve_linear(
    v: Tensor, N: Tensor, p: Tensor | None, e: Tensor, upper: bool, *, differentiable: bool
) -> Tensor:
    """The x with p ∘ x + e ∘ (N x) = v, for N strictly triangular; p None means 1."""
    if differentiable:
        coupling = _triangle(N, upper).movedim((0, 1), (-2, -1)) * e.movedim(0, -1).unsqueeze(-1)
        diagonal = (torch.ones_like(e) if p is None else p).movedim(0, -1).diag_embed()
        right = v.movedim(0, -1).unsqueeze(-1)
        found = torch.linalg.solve_triangular(coupling + diagonal, right, upper=upper)
        return found.squeeze(-1).movedim(-1, 0)
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


def _outer(left: Tensor, right: Tensor, N: Tensor, upper: bool) -> Tensor:
    """The gradient of a bilinear form in N: left rightᵀ, summed over what N shares."""
    if N.dim() == 2:
        return _triangle(left @ right.T, upper)
    return _triangle((left.unsqueeze(1) * right).sum_to_size(N.shape), upper)


def pad(t: Tensor | None, batch_dims: int, at: int) -> Tensor | None:
    """Insert singleton batch dimensions after the first ``at``, for right-aligned broadcasting."""
    if t is None:
        return t
    missing = batch_dims - (t.dim() - at)
    return t.reshape(t.shape[:at] + (1,) * missing + t.shape[at:])


def _add_batch(size: int, in_dims: tuple, at: tuple, tensors: tuple) -> list[Tensor | None]:
    """Move each mapped dimension behind the layer indices; the first tensor is expanded."""
    moved = []
    for t, dim, position in zip(tensors, in_dims, at, strict=True):
        if t is not None:
            t = t.unsqueeze(position) if dim is None else t.movedim(dim, position)
        moved.append(t)
    moved[0] = moved[0].expand(len(moved[0]), size, *moved[0].shape[2:])
    batch_dims = moved[0].dim() - 2
    return [pad(t, batch_dims, start + 1) for t, start in zip(moved, at, strict=True)]
