"""Stacks of units as differentiable bijections: the fast kernels, and the general path."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyroflow.transforms.bijection import Bijection, Pair, Parameters
from pyroflow.transforms.kernels import compiled, per_point, reference, shared
from pyroflow.transforms.kernels.shared import kernels_for_device
from pyroflow.transforms.kernels.units import TANH, Activation, Tanh, Units, constrain, softplus

Pass = shared.Pass | per_point.Pass


class Intermediates(NamedTuple):
    """What a pass leaves for later calls at the same point.

    log_det has shape (*B). ``a`` (K, *B) comes from the general path, ``done`` from the kernels.
    """

    log_det: Tensor
    a: Tensor | None = None
    done: Pass | None = None


class Stack(Bijection):
    """A bijection made of layers of units: planar layers, and those that are written as such."""

    activation: Activation = TANH

    def _units(self, parameters: Parameters) -> Units:
        """The units, (w, u, b) as they are in planar layers."""
        return Units(*parameters, None)

    def _forward(self, x: Tensor, parameters: Parameters) -> tuple[Tensor, Intermediates]:
        return evaluate_stack(x, self._units(parameters), False, None, self.activation)

    def _invert(
        self, y: Tensor, parameters: Parameters, cached: Pair | None
    ) -> tuple[Tensor, Intermediates]:
        return evaluate_stack(y, self._units(parameters), True, cached, self.activation)

    def _log_det(self, intermediates: Intermediates) -> Tensor:
        """Σ_k ln(t² + s (1 − t²)), t = tanh a: the papers' determinants as sums of positives."""
        return intermediates.log_det.clone()


def evaluate_stack(
    z: Tensor,
    units: Units,
    inverse: bool,
    cached: Pair | None = None,
    activation: Activation = TANH,
) -> tuple[Tensor, Intermediates]:
    """Evaluate y = x + Ûᵀ h(a) at z = x, or solve it for x at z = y; differentiable to any order.

    z has shape (*B, D), W and Û (*P, K, D), b (*P, K) and s (*P, K, 1), with P broadcastable to B.
    Where the pair is ``cached`` nothing is solved. The kernels know tanh alone.
    """
    kernels = _kernels_for(z, units) if isinstance(activation, Tanh) and _plain(z) else None
    if kernels is None:
        a = cached and cached.intermediates.a
        image, log_det, a = reference.evaluate(z, units, inverse, a, activation)
        return image, Intermediates(log_det, a=a)
    if kernels is per_point:
        units = Units(*[t if t is None else t.flatten(0, units.W.dim() - 3) for t in units[:4]])
    flat = z if z.dim() == 2 else z.reshape(-1, z.shape[-1])
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # neither records a Function
    rows, able = None, False
    if not tracing:
        kernels = kernels_for_device(kernels, flat)
        able = kernels is not shared  # the others make û themselves
        if units.s is None and not able:
            rows = _constrain_rows(units.W.detach(), units.U.detach())
    if units.s is None and rows is None and not able:
        u_hat, s = constrain(units.W, units.U)
        units = units._replace(U=u_hat, s=s)
    if tracing:
        (image, log_det, *_), done = compiled.stack(flat, *units, inverse), None
    else:
        call, done = _Call(kernels, units.size, inverse, rows), cached and cached.intermediates.done
        if done is None:
            with torch.no_grad():
                done = (kernels.inverse if inverse else kernels.forward)(flat, call.units(*units))
        else:
            done = done._replace(image=cached.x.detach().reshape(flat.shape))
        image, log_det = done[:2]
        if torch.is_grad_enabled():
            image, log_det = _Pass.apply(flat, *units[:4], done, call)
    if flat is not z:
        image, log_det = image.reshape(z.shape), log_det.reshape(z.shape[:-1])
    return image, Intermediates(log_det, done=done)


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


def _plain(z: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return True
    return z.dtype in (torch.float32, torch.float64) and not _transformed()


def _transformed() -> bool:
    """Whether a transform of torch.func is at work, which the kernels do not know."""
    return torch._C._are_functorch_transforms_active()


class _Rows(NamedTuple):
    """û and s of planar units, and what their gradients need; recorded in no graph."""

    u_hat: Tensor
    s: Tensor
    norm2: Tensor
    v: Tensor
    coefficient: Tensor


def _constrain_rows(w: Tensor, u: Tensor) -> _Rows | None:
    """:func:`~.units.constrain` in few operations; None where a norm is below its floor.

    Whether one is cannot be seen on another device without waiting for it, nor by a graph that is
    being recorded: None there as well.
    """
    if w.device.type != "cpu" or not w.numel() or get_proxy_mode() is not None:
        return None
    norm2, v = (w * w).sum(-1, keepdim=True), (w * u).sum(-1, keepdim=True)
    if not norm2.min().item() > math.sqrt(torch.finfo(w.dtype).tiny):
        return None
    s = softplus(v).clamp_(min=torch.finfo(w.dtype).tiny)
    coefficient = torch.sub(s, v).sub_(1).div_(norm2)
    return _Rows(torch.addcmul(u, coefficient, w), s, norm2, v, coefficient)


def _row_gradients(
    w: Tensor, u: Tensor, rows: _Rows, grad_w: Tensor, grad_u_hat: Tensor, grad_s: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients in w and u, given those of w (overwritten), û and s."""
    share = (grad_u_hat * w).sum(-1, keepdim=True).div_(rows.norm2)
    grad_v = share if grad_s is None else grad_s.add_(share)
    grad_v = torch.mul(grad_v, rows.v.sigmoid()).sub_(share)
    grad_w.addcmul_(grad_u_hat, rows.coefficient).addcmul_(grad_v, u)
    grad_w.addcmul_(share.mul_(rows.coefficient), w, value=-2)
    return grad_w, torch.addcmul(grad_u_hat, grad_v, w)


class _Call(NamedTuple):
    """How a pass is run; ``rows`` where the units are planar ones, given by u."""

    kernels: ModuleType
    size: int
    inverse: bool
    rows: _Rows | None

    def units(self, W: Tensor, U: Tensor, b: Tensor, s: Tensor | None, *_: int) -> Units:
        """The units as the kernels take them, with û and s in their places."""
        U, s = (U, s) if self.rows is None else self.rows[:2]
        return Units(W, U, b, s, self.size)


class _Pass(Function):
    """A pass of the kernels as an autograd function; second derivatives take the general path."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, done, ctx.call = inputs
        image = done.image.detach()
        own = ctx.call.kernels.Pass is per_point.Pass
        read = image if own else None  # then nobody may edit it
        ctx.save_for_backward(*tensors, read, *done[2:])
        ctx.set_materialize_grads(False)
        return image, done.log_det.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        z, W, U, b, s, image, *rest = ctx.saved_tensors
        (grad_image, grad_log_det), call = grads, ctx.call
        # is_grads_batched has a mechanism of its own, beside that of torch.func
        batched = any(
            t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in grads
        )
        if torch.is_grad_enabled() or _transformed() or batched:
            return *_differentiable_gradients(call, (z, W, U, b, s), grads), None, None
        grad_z, grad_W, grad_U, grad_b, grad_s = call.kernels.gradients(
            z,
            call.units(W, U, b, s),
            call.kernels.Pass(image, grad_log_det, *rest),
            torch.zeros_like(z) if grad_image is None else grad_image,
            grad_log_det,
            inverse=call.inverse,
            needs=(ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:5])),
        )
        if call.rows is not None and grad_W is not None:
            grad_W, grad_U = _row_gradients(W, U, call.rows, grad_W, grad_U, grad_s)
            grad_s = None
        return grad_z, grad_W, grad_U, grad_b, grad_s, None, None


def _differentiable_gradients(
    call: _Call, inputs: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The gradients by the general path, as functions of the inputs.

    At aliases of the inputs, so that no path that leads from one to another is followed.
    """
    with torch.enable_grad():
        z, *parameters = aliases = [t if t is None else t.view_as(t) for t in inputs]
        units = Units(*parameters, call.size)
        image, log_det, _ = reference.evaluate(z, units, call.inverse, None, TANH)
    outputs = [(out, g) for out, g in zip((image, log_det), grads, strict=True) if g is not None]
    needed = [t is not None and t.requires_grad for t in aliases]
    wanted = [t for t, need in zip(aliases, needed, strict=True) if need]
    values, given = zip(*outputs, strict=True)
    options = {"create_graph": True, "allow_unused": True}
    found = iter(torch.autograd.grad(values, wanted, given, **options))
    return [next(found) if need else None for need in needed]
