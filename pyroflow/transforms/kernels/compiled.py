"""The kernels as operators that ``torch.compile`` takes whole, without tracing their loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyroflow.transforms.kernels import per_point, shared
from pyroflow.transforms.kernels.units import Units


@torch.library.custom_op("pyroflow::stack", mutates_args=())
def stack(
    z: Tensor, W: Tensor, U: Tensor, b: Tensor, s: Tensor, size: int, inverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image (N, D), log-determinant (N), h and pq (K, N) of a pass at z, shape (N, D).

    The parameters are those of :class:`~pyroflow.transforms.kernels.units.Units`, shared by all
    points or one set a point.
    """
    kernels = shared if W.dim() == 2 else per_point
    done = (kernels.inverse if inverse else kernels.forward)(z, Units(W, U, b, s, size))
    return done.image.contiguous(), done.log_det, done.h, done.pq


@stack.register_fake
def _(
    z: Tensor, W: Tensor, U: Tensor, b: Tensor, s: Tensor, size: int, inverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, K = z.shape[0], W.shape[-2]
    return z.new_empty(z.shape), z.new_empty(N), z.new_empty(K, N), z.new_empty(K, N)


@torch.library.custom_op("pyroflow::stack_gradients", mutates_args=())
def stack_gradients(
    z: Tensor,
    W: Tensor,
    U: Tensor,
    b: Tensor,
    s: Tensor,
    image: Tensor,
    h: Tensor,
    pq: Tensor,
    grad_image: Tensor,
    grad_log_det: Tensor,
    size: int,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients in z and in the parameters."""
    kernels = shared if W.dim() == 2 else per_point
    own = (W @ U.T,) if kernels is shared else ()
    done = kernels.Pass(image, grad_log_det, h, pq, *own)
    units = Units(W, U, b, s, size)
    grads = kernels.gradients(
        z, units, done, grad_image, grad_log_det, inverse=inverse, needs=(True, True)
    )
    return tuple(t.contiguous() for t in grads)


@stack_gradients.register_fake
def _(
    z: Tensor,
    W: Tensor,
    U: Tensor,
    b: Tensor,
    s: Tensor,
    image: Tensor,
    h: Tensor,
    pq: Tensor,
    grad_image: Tensor,
    grad_log_det: Tensor,
    size: int,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (z, W, U, b, s))


def _remember(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.size, ctx.inverse = inputs
    image, _, h, pq = output
    ctx.save_for_backward(*tensors, image, h, pq)
    ctx.set_materialize_grads(True)


def _differentiate(ctx: Any, grad_image: Tensor, grad_log_det: Tensor, *_: Tensor) -> tuple:
    grads = stack_gradients(
        *ctx.saved_tensors, grad_image, grad_log_det.contiguous(), ctx.size, ctx.inverse
    )
    return (*grads, None, None)


stack.register_autograd(_differentiate, setup_context=_remember)
