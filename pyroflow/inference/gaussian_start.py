"""The Gaussian that a guide starts from: the best one along several paths to the modes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyroflow.inference.ascent import Points, ascend
from pyroflow.inference.objectives import bound_scores, edge_factors
from pyroflow.model.log_joint import LogJoint
from pyroflow.seeds import drawing

PATHS = 8
TRIED = 128  # points at which a start is looked for, at each reach
# How far the starts lie from the guide's own, along each latent; tried in turn.
REACHES = (2.0, 1.0, 4.0, 0.5, 8.0, 0.1, 16.0, 0.01)
STEPS = 60  # of a path, at most
ALONG = 12  # points of a path at which a Gaussian is tried
SMALLER = (1 / 4, 1 / 16, 1 / 64)  # sizes of a Gaussian that has draws of weight zero, tried too
DRAWS = 32  # behind the bound of a Gaussian, as antithetic pairs
BEST = 3  # Gaussians that are moved towards the optimum
ROUNDS = (6, 20)  # of those moves, for each and for the best of them
TICKS = STEPS + BEST * ROUNDS[0] + ROUNDS[1]  # of a progress bar
MOVED_BY = 256  # draws behind a move
LEAST_MOVED_BY = 16  # of them inside the support
TESTED_BY = 512  # draws on which they are compared
LARGEST = 1e12  # magnitude of a location that is still one


class Gaussian(NamedTuple):
    """N(loc, scale scaleᵀ), with an estimate of its bound."""

    loc: Tensor
    scale: Tensor
    bound: float


@torch.no_grad()
def best_gaussian(log_joint: LogJoint, start: Tensor, bar: tqdm | None = None) -> Gaussian | None:
    """The Gaussian with the highest bound that several ascents lead to.

    Gaussians of the Hessians along several paths, as in Pathfinder (Zhang et al. 2022); the best
    few are moved to where the expected gradient vanishes and the precision is the expected
    Hessian (Opper and Archambeau 2009), the optimum among Gaussians. A density need not have
    a mode for it: the points on the way there count alike.

    Args:
        log_joint: the log density.
        start: the guide's own, shape (D,).
        bar: shows how far it is, of a total of ``TICKS``.

    Returns:
        The Gaussian; None if there is no sound one, because the log joint is finite at no start,
        or grows without end.
    """
    starts = _starts(log_joint, start)
    if starts is None:
        return None
    noise = _antithetic(DRAWS, start)
    bar = tqdm(total=TICKS, disable=True) if bar is None else bar
    points = ascend(log_joint, starts, STEPS, bar.update)
    loc, scale = (torch.stack(parts) for parts in zip(*_along(points), strict=True))
    found, lost = _scored(log_joint, loc, scale, noise)
    for size in SMALLER if bool(lost.any()) else ():  # an edge tells no Hessian how far off it is
        found += _scored(log_joint, loc[lost], size * scale[lost], noise)[0]
    found = sorted((g for g in found if math.isfinite(g.bound)), key=lambda g: -g.bound)[:BEST]
    if not found:
        return None
    test = _antithetic(TESTED_BY, start)
    found = [_moved_on(log_joint, g, ROUNDS[0], test, bar.update) for g in found]
    best = max(found, key=lambda g: g.bound)
    best = _moved_on(log_joint, best, ROUNDS[1], test, bar.update)
    bar.update(bar.total - bar.n)  # paths and moves may end early
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
    """The guide's own start and points around it; nearer and farther ones where few are finite."""
    found = []
    for reach in REACHES:
        with drawing():
            size = TRIED, len(start)
            offsets = torch.rand(size, dtype=start.dtype, device="cpu").to(start)
        points = start + reach * (2 * offsets - 1)
        points[0] = start
        value, gradient = log_joint.values_and_gradients(points)
        found += points[value.isfinite() & gradient.isfinite().all(-1)]
        if len(found) >= PATHS:
            break
    return torch.stack(found[:PATHS]) if found else None


def _along(points: Points) -> list[tuple[Tensor, Tensor]]:
    """Points and scales spread over each path, its last one among them."""
    chosen = []
    for path in range(points.z.shape[1]):
        moved = points.value[1:, path] != points.value[:-1, path]
        last = int(moved.nonzero().max()) + 1 if bool(moved.any()) else 0
        steps = torch.linspace(last, 0, ALONG, device="cpu").round().long().unique().tolist()
        chosen += [(points.z[t, path], points.scale[t, path]) for t in steps]
    return chosen


def _scored(
    log_joint: LogJoint, loc: Tensor, scale: Tensor, noise: Tensor
) -> tuple[list[Gaussian], Tensor]:
    """The Gaussians N(loc, scale scaleᵀ), shapes (C, D) and (C, D, D), with bounds on fixed draws.

    Those without a finite bound have −∞. The second value is whether draws of each were lost.
    """
    draws = loc.unsqueeze(1) + noise @ scale.mT
    value, _ = log_joint.values_and_gradients(draws.flatten(0, 1))
    log_q = -noise.square().sum(-1) / 2 - noise.shape[-1] / 2 * math.log(2 * math.pi)
    log_weights = value.reshape(draws.shape[:2]) - log_q
    bound = torch.linalg.slogdet(scale).logabsdet
    bound = bound - torch.stack([bound_scores(row).mean() for row in log_weights])
    bound = bound.where(bound.isfinite(), -torch.inf).tolist()
    found = [Gaussian(*parts) for parts in zip(loc, scale, bound, strict=True)]
    return found, ~log_weights.isfinite().all(1)


def _moved_on(
    log_joint: LogJoint, start: Gaussian, rounds: int, test: Tensor, tick: Callable[[], Any]
) -> Gaussian:
    """Move a Gaussian to its optimum by natural gradients, unless that lowers its bound.

    Rates fall as 1/t, which averages the noise of the draws.
    """
    loc, scale = start.loc, start.scale
    for t in range(rounds):
        tick()
        noise = _antithetic(max(MOVED_BY, 4 * len(loc)), loc)
        value, gradient = log_joint.values_and_gradients(loc + noise @ scale.mT)
        inside = value.isfinite() & gradient.isfinite().all(-1)
        if int(inside.sum()) < max(LEAST_MOVED_BY, 2 * len(loc)):
            break
        rate = 1 / (2 + t / 4)
        if bool(inside.all()):
            shift, slope = gradient.mean(0) @ scale, _slope(noise, gradient @ scale)
        else:
            log_weights = (value + noise.square().sum(-1) / 2).where(inside, -torch.inf)
            shift, slope = _cut(noise, log_weights, gradient @ scale)
        loc, scale = _moved(loc, scale, shift, slope, rate)
    both = (torch.stack(parts) for parts in zip(start[:2], (loc, scale), strict=True))
    return max(_scored(log_joint, *both, test)[0], key=lambda g: g.bound)


def _moved(
    loc: Tensor, scale: Tensor, gradient: Tensor, slope: Tensor, rate: float
) -> tuple[Tensor, Tensor]:
    """One natural-gradient step of at most one standard deviation, in whitened coordinates."""
    identity = torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
    precision = (1 - rate) * identity + rate * (slope + slope.mT) / 2
    values, vectors = torch.linalg.eigh(precision)
    values = values.clamp(0.25, 4.0)
    shift = rate * (vectors / values) @ vectors.mT @ gradient
    shift = shift / max(1.0, float(torch.linalg.vector_norm(shift)))
    return loc + scale @ shift, scale @ (vectors / values.sqrt()) @ vectors.mT


def _slope(noise: Tensor, gradient: Tensor) -> Tensor:
    """The negative expected Hessian, as the slope of a regression of gradients on draws.

    That is exact with few draws where the density is Gaussian.
    """
    return -torch.cholesky_solve(noise.mT @ gradient, torch.linalg.cholesky(noise.mT @ noise))


def _cut(noise: Tensor, log_weights: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The expected gradient and negative Hessian of a bound that is cut to a support.

    See :func:`~pyroflow.inference.objectives.cut_loss`.
    """
    inside = log_weights.isfinite()
    factor = edge_factors(log_weights, 1, noise, path=True).unsqueeze(1)
    gradient = (gradient + noise)[inside]
    hessian = gradient.mT @ noise[inside] / len(gradient) + noise.mT @ (factor * noise)
    mean = gradient.mean(0) + (factor * noise).sum(0)
    return mean, torch.eye(noise.shape[-1], dtype=noise.dtype, device=noise.device) - hessian
