"""Ascent of many paths at once to the modes of a log density."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyroflow.model.log_joint import LogJoint

LENGTHS = (4.0, 2.0, 1.0, 0.5, 0.25, 1 / 16, 1 / 64, 1 / 1024)  # of a step, all tried at once
FLAT = 1e-4  # nats; a step that gains less counts as none
FLAT_STEPS = 2  # of those in a row that end a path
FLATTEST = 1e-6  # of a curvature, in the units of the scale before


class Points(NamedTuple):
    """Where the paths stood, in order.

    Attributes:
        z: shape (T, P, D).
        value: the log density, shape (T, P).
        scale: F with F Fᵀ = |∇² log p|⁻¹, shape (T, P, D, D).
    """

    z: Tensor
    value: Tensor
    scale: Tensor


@torch.no_grad()
def ascend(
    log_joint: LogJoint, starts: Tensor, steps: int, tick: Callable[[], Any] = int
) -> Points:
    """Newton's method from P starts, all of whose evaluations are batches.

    The Hessian's eigenvalues are taken by their absolute values (Dauphin et al. 2014), so every
    step ascends; of several lengths the best is taken. Hessians are differences of gradients in
    the units of the last scale, so latents of any magnitude are alike.

    Args:
        log_joint: the log density.
        starts: shape (P, D), at which it and its gradient are finite.
        steps: the most to take; paths end earlier where they gain nothing.
        tick: called after each.
    """
    z, dim = starts, starts.shape[-1]
    scale = torch.eye(dim, dtype=z.dtype, device=z.device).expand(len(z), dim, dim)
    lengths = z.new_tensor(LENGTHS)
    value = log_joint.values_and_gradients(z)[0]
    flat = torch.zeros(len(z), dtype=torch.long, device=z.device)
    found = []
    for step in range(steps):
        # The first Hessian is taken again, in units that fit.
        for _ in range(2 if step == 0 else 1):
            gradient, scale = rescale(log_joint, z, scale)
        found.append(Points(z, value, scale))
        tick()
        if bool((flat >= FLAT_STEPS).all()):
            break
        direction = (scale @ scale.mT @ gradient.unsqueeze(-1)).squeeze(-1)
        trials = z + lengths[:, None, None] * direction
        values, gradients = log_joint.values_and_gradients(trials.reshape(-1, dim))
        finite = values.isfinite() & gradients.isfinite().all(-1)
        values = values.where(finite, -torch.inf).reshape(len(lengths), -1)
        best, index = values.max(0)
        gain = best - value
        flat = torch.where(gain > FLAT, 0, flat + 1)
        better = gain > 0
        z = torch.where(
            better.unsqueeze(-1), trials[index, torch.arange(len(z), device=z.device)], z
        )
        value = torch.where(better, best, value)
    return Points(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def rescale(log_joint: LogJoint, z: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient at z (P, D), and F with F Fᵀ = |∇² log p|⁻¹ there, from the F before.

    Where the Hessian is not finite, F stays.
    """
    num, dim = z.shape
    step = torch.finfo(z.dtype).eps ** (1 / 4)
    moves = step * torch.cat([scale.mT, -scale.mT], 1)
    points = torch.cat([z.unsqueeze(1), z.unsqueeze(1) + moves], 1)
    _, gradients = log_joint.values_and_gradients(points.reshape(-1, dim))
    gradients = gradients.reshape(num, 2 * dim + 1, dim)
    forward, backward = gradients[:, 1:].chunk(2, 1)
    curvature = (backward - forward) @ scale / (2 * step)
    curvature = (curvature + curvature.mT) / 2
    largest = torch.finfo(z.dtype).max ** 0.5  # beyond it the eigenvalues do not converge
    finite = (curvature.abs() < largest).flatten(1).all(1)[:, None, None]
    flat = torch.eye(dim, dtype=z.dtype, device=z.device)
    values, vectors = torch.linalg.eigh(curvature.where(finite, flat))
    values = values.abs().clamp(min=FLATTEST)
    return gradients[:, 0], scale @ (vectors / values.sqrt().unsqueeze(-2)) @ vectors.mT
