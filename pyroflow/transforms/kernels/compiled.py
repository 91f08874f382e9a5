"""The kernels as operators that ``torch.compile`` takes whole, without tracing their loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflow.transforms.kernels import per_point, shared
from pyroflow.transforms.kernels.shared import kernels_for_device
from pyroflow.transforms.kernels.units import Units


@torch.library.custom_op("pyroflow::stack", mutates_args=())
def stack(
    z: Tensor, W: Tensor, U: Tensor, b: Tensor, s: Tensor, size: int, inverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image (N, D), log-determinant (N), h and pq (K, N) of a pass at z, shape (N, D).

    The units are :class:`~.units.Units` that all points share, or one set a point.
    """
    kernels = kernels_for_device(shared if W.dim() == 2 else per_point, z)
    done = (kernels.inverse if inverse else kernels.forward)(z, Units(W, U, b, s, size))
    return done.image.contiguous(), done.log_det, done.h, done.pq


@torch.library.custom_op("pyroflow::stack_gradients", mutates_args=())
def stack_gradients(
    inputs: Sequence[Tensor], found: Sequence[Tensor], size: int, inverse: bool
) -> list[Tensor]:
    """The gradients in z, W, Û, b and s, given a pass with its gradients as log-determinant."""
    z, W, U, b, s = inputs
    grad_image, image, grad_log_det, h, pq = found
    kernels = kernels_for_device(shared if W.dim() == 2 else per_point, z)
    own = (W @ U.T,) if W.dim() == 2 else ()
    done = kernels.Pass(image, grad_log_det, h, pq, *own)
    units, options = Units(W, U, b, s, size), {"inverse": inverse, "needs": (True, True)}
    grads = kernels.gradients(z, units, done, grad_image, grad_log_det, **options)
    return [t.contiguous() for t in grads]


def _shapes(z: Tensor, W: Tensor, *_: Any) -> tuple[Tensor, ...]:
    N, K = z.shape[0], W.shape[-2]
    return z.new_empty(z.shape), z.new_empty(N), z.new_empty(K, N), z.new_empty(K, N)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.size, ctx.inverse = inputs
    image, _, h, pq = output
    ctx.save_for_backward(*tensors, image, h, pq)


def _differentiate(ctx: Any, grad_image: Tensor, grad_log_det: Tensor, *_: Tensor) -> tuple:
    *inputs, image, h, pq = ctx.saved_tensors
    found = [grad_image, image, grad_log_det.contiguous(), h, pq]
    return *stack_gradients(inputs, found, ctx.size, ctx.inverse), None, None


stack.register_fake(_shapes)
stack_gradients.register_fake(lambda inputs, *_: [t.new_empty(t.shape) for t in inputs])
stack.register_autograd(_differentiate, setup_context=_save)
