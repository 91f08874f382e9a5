"""Ascents to the modes of a log joint by Newton's method, many side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyroflow.model.log_joint import LogJoint

LENGTHS = (4.0, 2.0, 1.0, 0.5, 0.25, 1 / 16, 1 / 64, 1 / 1024)  # of a step, all tried at once
FLAT, FLAT_STEPS = 1e-4, 2  # nats; a path ends with so many steps in a row that gain less
FLATTEST = 1e-6  # of a curvature, in the units of the scale before


class Points(NamedTuple):
    """Where the paths stood, in order."""

    z: Tensor  # shape (T, P, D)
    value: Tensor  # the log density, shape (T, P)
    scale: Tensor  # F with F Fᵀ = |∇² log p|⁻¹, shape (T, P, D, D)


def evaluated(
    log_joint: LogJoint, points: Tensor, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The log joint and its gradient at points (G, n, D), shapes (G, n) and (G, n, D).

    ``own`` (G,) says of which data set the log joint is, where it is one of several.
    """
    given = () if own is None else (own.repeat_interleave(points.shape[1]),)
    value, gradient = log_joint.values_and_gradients(points.flatten(0, 1), *given)
    return value.unflatten(0, points.shape[:2]), gradient.unflatten(0, points.shape[:2])


@torch.no_grad()
def ascend(
    log_joint: LogJoint,
    starts: Tensor,
    steps: int,
    tick: Callable[[], Any] = int,
    own: Tensor | None = None,
) -> Points:
    """At most so many steps of Newton's method from P starts (P, D), evaluated as batches.

    ``own`` is as in :func:`evaluated`, of each start.

    The Hessian's eigenvalues are taken by their absolute values (Dauphin et al. 2014), so every
    step ascends; of several lengths the best is taken. Hessians are differences of gradients in
    the units of the last scale, so latents of any magnitude are alike. Paths end without gains.
    """
    z, dim = starts, starts.shape[-1]
    scale = torch.eye(dim, dtype=z.dtype, device=z.device).expand(len(z), dim, dim)
    lengths = z.new_tensor(LENGTHS).unsqueeze(-1)
    value = evaluated(log_joint, z.unsqueeze(1), own)[0].squeeze(1)
    least = FLAT + log_joint.runs.dear * torch.finfo(z.dtype).eps * value.abs()  # of long sums
    flat, found = torch.zeros(len(z), dtype=torch.long, device=z.device), []
    for step in range(steps):
        going = (flat < FLAT_STEPS).nonzero().squeeze(-1)
        if not len(going):
            break
        part, rescaled = z[going], scale[going]
        whose = None if own is None else own[going]
        for _ in range(2 if step == 0 else 1):  # the first one again, in units that fit
            gradient, rescaled = rescale(log_joint, part, rescaled, whose)
        scale = scale.index_copy(0, going, rescaled)
        found.append(Points(z, value, scale))
        tick()
        direction = rescaled @ rescaled.mT @ gradient.unsqueeze(-1)
        trials = part.unsqueeze(1) + lengths * direction.mT
        values, gradients = evaluated(log_joint, trials, whose)
        finite = values.isfinite() & gradients.isfinite().all(-1)
        best, index = values.where(finite, -torch.inf).max(1)
        gain = best - value[going]
        flat[going] = torch.where(gain > least[going], 0, flat[going] + 1)
        better = (gain > 0).nonzero().squeeze(-1)
        z = z.index_copy(0, going[better], trials[better, index[better]])
        value = value.index_copy(0, going[better], best[better])
    return Points(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def rescale(
    log_joint: LogJoint, z: Tensor, scale: Tensor, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradient at z (P, D), and F with F Fᵀ = |∇² log p|⁻¹; where not finite, F before."""
    step = torch.finfo(z.dtype).eps ** (1 / 4)  # of so little, one side will do
    points = torch.cat([z.unsqueeze(1), z.unsqueeze(1) + step * scale.mT], 1)
    gradients = evaluated(log_joint, points, own)[1]
    curvature = (gradients[:, :1] - gradients[:, 1:]) @ scale / step
    curvature = (curvature + curvature.mT) / 2
    largest = torch.finfo(z.dtype).max ** 0.5  # beyond it the eigenvalues do not converge
    finite = (curvature.abs() < largest).flatten(1).all(1)[:, None, None]
    flat = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    values, vectors = torch.linalg.eigh(curvature.where(finite, flat))
    values = values.abs().clamp(min=FLATTEST)
    return gradients[:, 0], scale @ (vectors / values.sqrt().unsqueeze(-2)) @ vectors.mT
