"""The Gaussian that a guide starts from: the best one along several paths to the modes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflow.inference.ascent import Points, ascend
from pyroflow.inference.log_joint import LogJoint
from pyroflow.seeds import drawing

PATHS = 8
SPREAD = 2.0  # starts lie within this of the guide's own, along each latent
STEPS = 60  # of a path, at most
ALONG = 12  # points of a path at which a Gaussian is tried
DRAWS = 32  # behind the bound of a Gaussian, as antithetic pairs
BEST = 3  # Gaussians that are moved towards the optimum
ROUNDS = (6, 20)  # of those moves, for each and for the best of them
MOVED_BY = 256  # draws behind a move
TESTED_BY = 512  # draws on which they are compared
LARGEST = 1e12  # magnitude of a location that is still one


class Gaussian(NamedTuple):
    """N(loc, scale scaleᵀ), with an estimate of its bound."""

    loc: Tensor
    scale: Tensor
    bound: float


@torch.no_grad()
def best_gaussian(log_joint: LogJoint, start: Tensor) -> Gaussian | None:
    """The Gaussian with the highest bound that several ascents lead to.

    Gaussians of the Hessians along several paths, as in Pathfinder (Zhang et al. 2022); the best
    few are moved to where the expected gradient vanishes and the precision is the expected
    Hessian (Opper and Archambeau 2009), the optimum among Gaussians. A density need not have
    a mode for it: the points on the way there count alike.

    Returns:
        The Gaussian; None if there is no sound one, because the log joint is finite at no start,
        or grows without end.
    """
    starts = _starts(log_joint, start)
    if starts is None:
        return None
    noise = _antithetic(DRAWS, start)
    points = ascend(log_joint, starts, STEPS)
    found = [_scored(log_joint, z, scale, noise) for z, scale in _along(points)]
    found = sorted((g for g in found if math.isfinite(g.bound)), key=lambda g: -g.bound)[:BEST]
    if not found:
        return None
    test = _antithetic(TESTED_BY, start)
    found = [_moved_on(log_joint, g, ROUNDS[0], test) for g in found]
    best = _moved_on(log_joint, max(found, key=lambda g: g.bound), ROUNDS[1], test)
    if not (math.isfinite(best.bound) and bool(best.loc.abs().max() < LARGEST)):
        return None
    return best._replace(scale=_lower(best.scale))


def _lower(factor: Tensor) -> Tensor:
    """The lower triangle with positive diagonal that has the same product with its transpose."""
    upper = torch.linalg.qr(factor.mT).R
    return (upper * torch.where(upper.diagonal() < 0, -1.0, 1.0).to(upper).unsqueeze(-1)).mT


def _antithetic(num: int, like: Tensor) -> Tensor:
    with drawing():
        half = torch.randn(num // 2, len(like), dtype=like.dtype, device="cpu").to(like)
    return torch.cat([half, -half])


def _starts(log_joint: LogJoint, start: Tensor) -> Tensor | None:
    """The guide's own start and points around it, nearer where the density is not finite."""
    with drawing():
        uniform = torch.rand(PATHS, len(start), dtype=start.dtype, device="cpu").to(start)
    offsets = SPREAD * (2 * uniform - 1)
    offsets[0] = 0.0
    for _ in range(10):
        value, gradient = log_joint.values_and_gradients(start + offsets)
        finite = value.isfinite() & gradient.isfinite().all(-1)
        if bool(finite.all()):
            break
        offsets = torch.where(finite.unsqueeze(-1), offsets, offsets / 2)
    return (start + offsets)[finite] if bool(finite.any()) else None


def _along(points: Points) -> list[tuple[Tensor, Tensor]]:
    """Points and scales spread over each path, its last one among them."""
    chosen = []
    for path in range(points.z.shape[1]):
        moved = points.value[1:, path] != points.value[:-1, path]
        last = int(moved.nonzero().max()) + 1 if bool(moved.any()) else 0
        steps = torch.linspace(last, 0, ALONG, device="cpu").round().long().unique().tolist()
        chosen += [(points.z[t, path], points.scale[t, path]) for t in steps]
    return chosen


def _scored(log_joint: LogJoint, loc: Tensor, scale: Tensor, noise: Tensor) -> Gaussian:
    """The Gaussian with its bound on fixed draws; −∞ where half of them have no finite weight.

    A draw without one counts as the worst of the others: a guide cannot keep clear of the edge
    of a support that the model does not declare.
    """
    value, _ = log_joint.values_and_gradients(loc + noise @ scale.mT)
    log_q = -noise.square().sum(-1) / 2 - len(loc) / 2 * math.log(2 * math.pi)
    log_weights = value - log_q
    finite = log_weights.isfinite()
    if int(finite.sum()) <= len(noise) // 2:
        return Gaussian(loc, scale, -math.inf)
    worst = log_weights[finite].min()
    mean = torch.where(finite, log_weights, worst).mean().item()
    bound = mean + torch.linalg.slogdet(scale).logabsdet.item()
    return Gaussian(loc, scale, bound if math.isfinite(bound) else -math.inf)


def _moved_on(log_joint: LogJoint, start: Gaussian, rounds: int, test: Tensor) -> Gaussian:
    """Move a Gaussian to its optimum by natural gradients, unless that lowers its bound.

    Rates fall as 1/t, which averages the noise of the draws.
    """
    loc, scale = start.loc, start.scale
    for t in range(rounds):
        noise = _antithetic(max(MOVED_BY, 4 * len(loc)), loc)
        _, gradient = log_joint.values_and_gradients(loc + noise @ scale.mT)
        finite = gradient.isfinite().all(-1)
        if int(finite.sum()) < len(noise) // 2:
            break
        loc, scale = _moved(loc, scale, noise[finite], (gradient @ scale)[finite], 1 / (2 + t / 4))
    first, last = (_scored(log_joint, *g, test) for g in (start[:2], (loc, scale)))
    return max(first, last, key=lambda g: g.bound)


def _moved(
    loc: Tensor, scale: Tensor, noise: Tensor, gradient: Tensor, rate: float
) -> tuple[Tensor, Tensor]:
    """One natural-gradient step of at most one standard deviation, in whitened coordinates.

    The expected Hessian is the slope of a regression of gradients on draws: exact with few draws
    where the density is Gaussian.
    """
    slope = -torch.cholesky_solve(noise.mT @ gradient, torch.linalg.cholesky(noise.mT @ noise))
    identity = torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
    precision = (1 - rate) * identity + rate * (slope + slope.mT) / 2
    values, vectors = torch.linalg.eigh(precision)
    values = values.clamp(0.25, 4.0)
    shift = rate * (vectors / values) @ vectors.mT @ gradient.mean(0)
    shift = shift / max(1.0, float(torch.linalg.vector_norm(shift)))
    return loc + scale @ shift, scale @ (vectors / values.sqrt()) @ vectors.mT
