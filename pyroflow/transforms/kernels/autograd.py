"""Stacks of units as differentiable functions: the fast kernels, and the general path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from pyroflow.transforms.kernels import compiled, per_point, reference, shared
from pyroflow.transforms.kernels.units import (
    TANH,
    Activation,
    Rows,
    Tanh,
    Units,
    constrain,
    constrain_rows,
    row_gradients,
)

Pass = shared.Pass | per_point.Pass


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
        a = cached and cached[1].a
        image, log_det, a = reference.evaluate(z, units, inverse, a, activation)
        return image, Intermediates(log_det, a=a)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # neither records a Function
        return _traced(z, units, inverse)
    if kernels is per_point:
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
        return shared
    own = W.shape[:-2]
    extra = z.dim() - W.dim() + 1  # batch dimensions of z alone, such as one of samples
    fits = own and extra >= 0 and z.shape[:-1] == (1,) * extra + own
    fits = fits and U.shape[:-2] == b.shape[:-1] == own
    return per_point if fits and units.size == 1 else None


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
        self, kernels: ModuleType, size: int, inverse: bool, rows: Rows | None, cached: Pass | None
    ) -> None:
        self.kernels, self.size, self.inverse, self.rows = kernels, size, inverse, rows
        self.done = cached

    def units(self, W: Tensor, U: Tensor, b: Tensor, s: Tensor | None) -> Units:
        """The units with û in its place."""
        rows = self.rows
        return Units(
            W, U if rows is None else rows.u_hat, b, s if rows is None else rows.s, self.size
        )

    def run(self, z: Tensor, W: Tensor, U: Tensor, b: Tensor, s: Tensor | None) -> Pass:
        """What the kernels find, or an earlier pass has found."""
        if self.done is None:
            kernel = self.kernels.inverse if self.inverse else self.kernels.forward
            self.done = kernel(z, self.units(W, U, b, s))
        return self.done

    def general(self, z: Tensor, W: Tensor, U: Tensor, b: Tensor, s: Tensor | None = None) -> tuple:
        """The results in differentiable operations."""
        return reference.evaluate(z, Units(W, U, b, s, self.size), self.inverse, None, TANH)[:2]


class _Stack(Function):
    """The kernels as an autograd function; second derivatives take the general path."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, W: Tensor, U: Tensor, b: Tensor, s: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor]:
        done = call.run(z, W, U, b, s)
        image = done.image.detach()
        read = image if call.kernels is per_point else None  # then nobody may edit it
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
