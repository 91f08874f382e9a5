"""Stacks of units as differentiable functions: the fast kernels, and the general path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from pyroflow.transforms import chain_kernels, compiled, stack_kernels
from pyroflow.transforms.activations import TANH, Activation, Tanh
from pyroflow.transforms.constraint import Rows, constrain, constrain_rows, row_gradients
from pyroflow.transforms.coupled_tanh import solve_coupled_tanh
from pyroflow.transforms.stack_kernels import Units

Pass = stack_kernels.Pass | chain_kernels.Pass


class Intermediates(NamedTuple):
    """What a pass leaves for later calls at the same point.

    log_det has shape (*B). ``a`` (K, *B) comes from the general path, ``done`` from the kernels.
    """

    log_det: Tensor
    a: Tensor | None = None
    done: Pass | None = None


def evaluate_stack(
    z: Tensor,
    units: Units,
    *,
    inverse: bool,
    cached: tuple[Tensor, Intermediates] | None = None,
    activation: Activation = TANH,
) -> tuple[Tensor, Intermediates]:
    """Evaluate y = x + Ûᵀ h(a) at z = x, or solve it for x at z = y; differentiable to any order.

    Args:
        z: shape (*B, D).
        units: W, Û (*P, K, D), b (*P, K), s (*P, K, 1), with P broadcastable to B; or u in
            place of Û, and s None.
        inverse: whether z is y.
        cached: the image and its intermediates, where they were found before: nothing is solved.
        activation: what bends a unit; the kernels know tanh.

    Returns:
        The image, shape (*B, D), and its intermediates.
    """
    kernels = _kernels_for(z, units) if isinstance(activation, Tanh) and _plain(z) else None
    if kernels is None:
        return _general(z, units, inverse, cached and cached[1].a, activation)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # neither records a Function
        return _traced(z, units, inverse)
    if kernels is chain_kernels:
        units = _flattened(units)
    rows = constrain_rows(units.W.detach(), units.U.detach()) if units.s is None else None
    if units.s is None and rows is None:
        u_hat, s = constrain(units.W, units.U)
        units = units._replace(U=u_hat, s=s)
    flat = z if z.dim() == 2 else z.reshape(-1, z.shape[-1])
    found = cached and cached[1].done
    if found is not None:
        found = found._replace(image=cached[0].detach().reshape(flat.shape))
    call = _Call(kernels, units.size, inverse, rows, found)
    if torch.is_grad_enabled():
        image, log_det = _Stack.apply(flat, *units[:4], call)
    else:
        image, log_det, *_ = call.run(flat, *units[:4])
    done, call.done = call.done, None  # the graph keeps what it needs by itself
    if flat is not z:
        image, log_det = image.reshape(z.shape), log_det.reshape(z.shape[:-1])
    return image, Intermediates(log_det, done=done)


def _traced(z: Tensor, units: Units, inverse: bool) -> tuple[Tensor, Intermediates]:
    """The kernels as one operator for ``torch.compile``."""
    W, U, b, s, size = units
    if s is None:
        U, s = constrain(W, U)
    if W.dim() > 2:
        W, U, b, s, _ = _flattened(Units(W, U, b, s))
    flat = z.reshape(-1, z.shape[-1])
    image, log_det, _, _ = compiled.stack(flat, W, U, b, s, size, inverse)
    return image.reshape(z.shape), Intermediates(log_det.reshape(z.shape[:-1]))


def differentiable_gradients(
    function: Callable, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of a function as functions of its inputs, for derivatives of any order.

    It is evaluated anew at aliases of the inputs, so that no path that leads from one input to
    another is followed.
    """
    with torch.enable_grad():
        aliases = [t.view_as(t) for t in inputs]
        outputs = function(*aliases)
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    wanted = [t for t in aliases if t.requires_grad]
    found = torch.autograd.grad(
        [out for out, _ in pairs],
        wanted,
        [grad for _, grad in pairs],
        create_graph=True,
        allow_unused=True,
    )
    results = iter(found)
    return [next(results) if t.requires_grad else None for t in aliases]


def transformed() -> bool:
    """Whether a transform of torch.func is at work, which the kernels do not know."""
    return torch._C._are_functorch_transforms_active()


def _kernels_for(z: Tensor, units: Units) -> ModuleType | None:
    """Those for parameters that all points share, or for one set a point; else None."""
    W, U, b = units[:3]
    if W.dim() == U.dim() == 2 and b.dim() == 1:
        return stack_kernels
    own = W.shape[:-2]
    extra = z.dim() - W.dim() + 1  # batch dimensions of z alone, such as one of samples
    fits = own and extra >= 0 and z.shape[:-1] == (1,) * extra + own
    fits = fits and U.shape[:-2] == b.shape[:-1] == own
    return chain_kernels if fits and units.size == 1 else None


def _flattened(units: Units) -> Units:
    """The units with their batch dimensions made one."""
    last = units.W.dim() - 3
    parts = [None if t is None else t.flatten(0, last) for t in units[:4]]
    return Units(*parts, units.size)


def _plain(z: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return True
    return z.dtype in (torch.float32, torch.float64) and not transformed()


def _batched_by_autograd(grad: Tensor | None) -> bool:
    """Whether ``is_grads_batched`` is at work, which has a mechanism of its own."""
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


class _Call:
    """What a pass is to do, and what it found beside its results."""

    def __init__(
        self, kernels: ModuleType, size: int, inverse: bool, rows: Rows | None, known: Pass | None
    ) -> None:
        self.kernels, self.size, self.inverse, self.rows = kernels, size, inverse, rows
        self.done = known

    def units(self, W: Tensor, U: Tensor, b: Tensor, s: Tensor | None) -> Units:
        """The units with û in its place."""
        rows = self.rows
        return Units(
            W, U if rows is None else rows.u_hat, b, s if rows is None else rows.s, self.size
        )

    def run(self, z: Tensor, W: Tensor, U: Tensor, b: Tensor, s: Tensor | None) -> Pass:
        """What the kernels find, or an earlier pass has found."""
        if self.done is None:
            kernel = self.kernels.pull if self.inverse else self.kernels.push
            self.done = kernel(z, self.units(W, U, b, s))
        return self.done

    def general(self, z: Tensor, W: Tensor, U: Tensor, b: Tensor, s: Tensor | None = None) -> tuple:
        """The results in differentiable operations."""
        image, found = _general(z, Units(W, U, b, s, self.size), self.inverse, None, TANH)
        return image, found.log_det


class _Stack(Function):
    """The kernels as an autograd function; second derivatives take the general path."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, W: Tensor, U: Tensor, b: Tensor, s: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor]:
        done = call.run(z, W, U, b, s)
        image = done.image.detach()
        read = image if call.kernels is chain_kernels else None  # then nobody may edit it
        ctx.save_for_backward(z, W, U, b, s, read, *done[2:])
        ctx.call = call
        ctx.set_materialize_grads(False)
        return image, done.log_det.detach()

    @staticmethod
    def backward(
        ctx: Any, grad_image: Tensor | None, grad_log_det: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        z, *parameters, image = ctx.saved_tensors[:6]
        call = ctx.call
        batched = any(_batched_by_autograd(t) for t in (grad_image, grad_log_det))
        if torch.is_grad_enabled() or transformed() or batched:
            inputs = [t for t in (z, *parameters) if t is not None]
            found = differentiable_gradients(call.general, inputs, (grad_image, grad_log_det))
            return (*found, *[None] * (6 - len(found)))
        units = call.units(*parameters)
        W, U, _, _ = parameters
        grad_z, grad_W, grad_U, grad_b, grad_s = call.kernels.gradients(
            z,
            units,
            call.kernels.Pass(image, grad_log_det, *ctx.saved_tensors[6:]),
            torch.zeros_like(z) if grad_image is None else grad_image,
            grad_log_det,
            inverse=call.inverse,
            needs=(ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:5])),
        )
        if call.rows is not None and grad_W is not None:
            grad_W, grad_U = row_gradients(W, U, call.rows, grad_W, grad_U, grad_s)
            grad_s = None
        return grad_z, grad_W, grad_U, grad_b, grad_s, None


def _general(
    z: Tensor, units: Units, inverse: bool, a: Tensor | None, activation: Activation
) -> tuple[Tensor, Intermediates]:
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
    return image, Intermediates(activation.det(a, s).log().sum(0), a=a)


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
