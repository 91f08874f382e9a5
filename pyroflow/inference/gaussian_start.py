"""The Gaussian that a guide starts from: the best one along several paths to the modes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyroflow.guides import AutoFlow
from pyroflow.inference.objectives import bound_scores, edge_factors
from pyroflow.model.log_joint import LogJoint
from pyroflow.seeds import drawing, seeded

PATHS = 8
COORDINATES = 800  # latents times paths, above which there are fewer of them
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
MOVED_BY, LEAST_MOVED_BY = 256, 16  # draws behind a move, and of them inside the support
TESTED_BY = 512  # draws on which they are compared
LARGEST = 1e12  # location of a sound Gaussian
MOMENT_DRAWS = 4096  # behind the moments of layers that are not the identity

# of the ascent
LENGTHS = (4.0, 2.0, 1.0, 0.5, 0.25, 1 / 16, 1 / 64, 1 / 1024)  # of a step, all tried at once
FLAT, FLAT_STEPS = 1e-4, 2  # nats; a path ends with so many steps in a row that gain less
FLATTEST = 1e-6  # of a curvature, in the units of the scale before


class Gaussian(NamedTuple):
    """N(loc, scale scaleᵀ), with an estimate of its bound; lower-triangular once it was moved."""

    loc: Tensor
    scale: Tensor
    bound: float


@torch.no_grad()
def best_gaussian(
    log_joint: LogJoint, start: Tensor, bar: tqdm | None = None
) -> tuple[Gaussian | None, list[Tensor]]:
    """The Gaussian with the highest bound that several ascents from the guide's start (D,) find.

    Gaussians of the Hessians along the paths, as in Pathfinder (Zhang et al. 2022), are compared,
    so that a density need not have a mode; the best few are moved to where the expected gradient
    vanishes and the precision is the expected Hessian, the optimum among Gaussians (Opper and
    Archambeau 2009). The bar is of a total of ``TICKS``. None is for no sound one: the log joint is
    finite at no start, or grows without end. The second value is where the best of each path lies.
    """
    starts = _starts(log_joint, start)
    if starts is None:
        return None, []
    few = log_joint.runs.few
    noise, bar = normal_pairs(few(DRAWS, 16), start), bar or tqdm(total=TICKS, disable=True)
    points = ascend(log_joint, starts, STEPS, bar.update)
    *both, paths = zip(*_along(points, few(ALONG, 4)), strict=True)
    loc, scale = map(torch.stack, both)
    found, lost = _scored(log_joint, loc, scale, noise)
    by_path = dict(sorted(zip(paths, found, strict=True), key=lambda each: each[1].bound))
    ends = [g.loc for g in by_path.values() if math.isfinite(g.bound)]
    for size in SMALLER if bool(lost.any()) else ():  # an edge tells no Hessian how far off it is
        found += _scored(log_joint, loc[lost], size * scale[lost], noise)[0]
    found = sorted((g for g in found if math.isfinite(g.bound)), key=lambda g: -g.bound)[:BEST]
    if not found:
        return None, ends
    test = normal_pairs(few(TESTED_BY, 64), start)
    move = partial(moved_on, log_joint, test=test, tick=bar.update)
    best = max([move(g, few(ROUNDS[0], 3)) for g in found], key=lambda g: g.bound)
    best = move(best, few(ROUNDS[1], 6))
    bar.update(bar.total - bar.n)  # paths and moves may end early
    return best if math.isfinite(best.bound) and best.loc.abs().max() < LARGEST else None, ends


def paths_in(dim: int) -> int:
    """Of a kind of start, for D latents: each step of a path takes D gradients."""
    return max(2, min(PATHS, COORDINATES // dim))


def lower_factor(factor: Tensor) -> Tensor:
    """The lower triangle with positive diagonal that has the same product with its transpose."""
    upper = torch.linalg.qr(factor.mT).R
    return (upper * torch.where(upper.diagonal() < 0, -1.0, 1.0).to(upper).unsqueeze(-1)).mT


def normal_pairs(num: int, like: Tensor) -> Tensor:
    """Standard normal draws (num, D), as antithetic pairs."""
    with drawing():
        half = torch.randn(num // 2, len(like), dtype=like.dtype, device="cpu").to(like)
    return torch.cat([half, -half])


def _starts(log_joint: LogJoint, start: Tensor) -> Tensor | None:
    """The guide's own start and points around it; nearer and farther ones where few are finite."""
    found, few = [], log_joint.runs.few
    num, tried = few(paths_in(len(start)), 2), few(TRIED, 16)
    for reach in REACHES:
        with drawing():
            offsets = torch.rand(tried, len(start), dtype=start.dtype, device="cpu").to(start)
        points = start + reach * (2 * offsets - 1)
        points[0] = start
        value, gradient = log_joint.values_and_gradients(points)
        found += points[value.isfinite() & gradient.isfinite().all(-1)]
        if len(found) >= num:
            break
    return torch.stack(found[:num]) if found else None


def _along(points: Points, num: int) -> list[tuple[Tensor, Tensor, int]]:
    """Points and scales spread over each path, its last one among them, and which path it is."""
    chosen = []
    for path in range(points.z.shape[1]):
        moved = points.value[1:, path] != points.value[:-1, path]
        last = int(moved.nonzero().max()) + 1 if bool(moved.any()) else 0
        steps = torch.linspace(last, 0, num, device="cpu").round().long().unique().tolist()
        chosen += [(points.z[t, path], points.scale[t, path], path) for t in steps]
    return chosen


def _scored(
    log_joint: LogJoint, loc: Tensor, scale: Tensor, noise: Tensor
) -> tuple[list[Gaussian], Tensor]:
    """The Gaussians N(loc, scale scaleᵀ), shapes (C, D) and (C, D, D), with bounds on fixed draws.

    The bound is −∞ where it is not finite. The second value is whether draws of each were lost.
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


def moved_on(
    log_joint: LogJoint,
    start: Gaussian,
    rounds: int,
    test: Tensor,
    tick: Callable[[], Any] = int,
) -> Gaussian:
    """Move a Gaussian to its optimum by natural gradients, unless that lowers its bound."""
    loc, scale = start.loc, start.scale
    for t in range(rounds):
        tick()
        noise = normal_pairs(max(log_joint.runs.few(MOVED_BY, 64), 4 * len(loc)), loc)
        value, gradient = log_joint.values_and_gradients(loc + noise @ scale.mT)
        inside = value.isfinite() & gradient.isfinite().all(-1)
        if int(inside.sum()) < max(LEAST_MOVED_BY, 2 * len(loc)):
            break
        rate = 1 / (2 + t / 4)  # falling as 1/t averages the noise of the draws
        if bool(inside.all()):
            shift, slope = gradient.mean(0) @ scale, _slope(noise, gradient @ scale)
        else:
            log_weights = (value + noise.square().sum(-1) / 2).where(inside, -torch.inf)
            shift, slope = _cut(noise, log_weights, gradient @ scale)
        loc, scale = _moved(loc, scale, shift, slope, rate)
    both = (torch.stack(parts) for parts in zip(start[:2], (loc, scale), strict=True))
    best = max(_scored(log_joint, *both, test)[0], key=lambda g: g.bound)
    return best._replace(scale=lower_factor(best.scale))


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
    """The negative expected Hessian: the slope of gradients on draws, exact for a Gaussian."""
    return -torch.cholesky_solve(noise.mT @ gradient, torch.linalg.cholesky(noise.mT @ noise))


def _cut(noise: Tensor, log_weights: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The expected gradient and negative Hessian of a bound that is cut, see ``cut_loss``."""
    inside = log_weights.isfinite()
    factor = edge_factors(log_weights, 1, noise, path=True).unsqueeze(1)
    gradient = (gradient + noise)[inside]
    hessian = gradient.mT @ noise[inside] / len(gradient) + noise.mT @ (factor * noise)
    mean = gradient.mean(0) + (factor * noise).sum(0)
    return mean, torch.eye(noise.shape[-1], dtype=noise.dtype, device=noise.device) - hessian


@torch.no_grad()
def initialize(guide: AutoFlow, gaussian: Gaussian) -> None:
    """Set the affine layer so that the guide has the Gaussian's mean and covariance.

    Layers that are not the identity at the start are made up for by their moments; a Student-t
    base keeps its wider tails around the Gaussian.
    """
    loc, scale, affine = gaussian.loc, gaussian.scale, guide.affine
    if affine.diagonal:  # the optimum without correlations has the precision's diagonal
        scale = (torch.cholesky_inverse(scale).diagonal()).rsqrt()
    with seeded(0):
        base = guide.get_base_dist().sample((MOMENT_DRAWS,))
    x = base
    for t in guide.flow.transforms()[:-1]:
        x = t(x)
    if layers_inside(guide) and not torch.allclose(x, base, atol=1e-5):
        factor = torch.linalg.cholesky(torch.cov(x.T).reshape(len(loc), len(loc)))
        if affine.diagonal:
            scale = scale / x.std(0)
            loc = loc - scale * x.mean(0)
        else:
            scale = torch.linalg.solve_triangular(factor, scale, upper=False, left=False)
            loc = loc - scale @ x.mean(0)
    affine.start_from(loc, scale)


def layers_inside(guide: Callable) -> set[Tensor]:
    """What is trained of the layers inside an affine one, which has to be set before."""
    if not isinstance(guide, AutoFlow) or guide.affine is None:
        return set()
    inside = [t for t in guide.flow.parts if t is not guide.affine]
    return {p for t in inside for p in t.parameters() if p.requires_grad}


class Points(NamedTuple):
    """Where the paths stood, in order."""

    z: Tensor  # shape (T, P, D)
    value: Tensor  # the log density, shape (T, P)
    scale: Tensor  # F with F Fᵀ = |∇² log p|⁻¹, shape (T, P, D, D)


@torch.no_grad()
def ascend(
    log_joint: LogJoint, starts: Tensor, steps: int, tick: Callable[[], Any] = int
) -> Points:
    """At most so many steps of Newton's method from P starts (P, D), evaluated as batches.

    The Hessian's eigenvalues are taken by their absolute values (Dauphin et al. 2014), so every
    step ascends; of several lengths the best is taken. Hessians are differences of gradients in
    the units of the last scale, so latents of any magnitude are alike. Paths end without gains.
    """
    z, dim = starts, starts.shape[-1]
    scale = torch.eye(dim, dtype=z.dtype, device=z.device).expand(len(z), dim, dim)
    lengths = z.new_tensor(LENGTHS)
    value = log_joint.values_and_gradients(z)[0]
    least = FLAT + log_joint.runs.dear * torch.finfo(z.dtype).eps * value.abs()  # of long sums
    flat, found = torch.zeros(len(z), dtype=torch.long, device=z.device), []
    for step in range(steps):
        going = (flat < FLAT_STEPS).nonzero().squeeze(-1)
        if not len(going):
            break
        part, rescaled = z[going], scale[going]
        for _ in range(2 if step == 0 else 1):  # the first one again, in units that fit
            gradient, rescaled = rescale(log_joint, part, rescaled)
        scale = scale.index_copy(0, going, rescaled)
        found.append(Points(z, value, scale))
        tick()
        direction = (rescaled @ rescaled.mT @ gradient.unsqueeze(-1)).squeeze(-1)
        trials = part + lengths[:, None, None] * direction
        values, gradients = log_joint.values_and_gradients(trials.reshape(-1, dim))
        finite = values.isfinite() & gradients.isfinite().all(-1)
        best, index = values.where(finite, -torch.inf).reshape(len(lengths), -1).max(0)
        gain = best - value[going]
        flat[going] = torch.where(gain > least[going], 0, flat[going] + 1)
        better = (gain > 0).nonzero().squeeze(-1)
        z = z.index_copy(0, going[better], trials[index[better], better])
        value = value.index_copy(0, going[better], best[better])
    return Points(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def rescale(log_joint: LogJoint, z: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient at z (P, D), and F with F Fᵀ = |∇² log p|⁻¹; where not finite, F before."""
    num, dim = z.shape
    step = torch.finfo(z.dtype).eps ** (1 / 4)  # of so little, one side will do
    points = torch.cat([z.unsqueeze(1), z.unsqueeze(1) + step * scale.mT], 1)
    _, gradients = log_joint.values_and_gradients(points.reshape(-1, dim))
    gradients = gradients.reshape(num, dim + 1, dim)
    curvature = (gradients[:, :1] - gradients[:, 1:]) @ scale / step
    curvature = (curvature + curvature.mT) / 2
    largest = torch.finfo(z.dtype).max ** 0.5  # beyond it the eigenvalues do not converge
    finite = (curvature.abs() < largest).flatten(1).all(1)[:, None, None]
    flat = torch.eye(dim, dtype=z.dtype, device=z.device)
    values, vectors = torch.linalg.eigh(curvature.where(finite, flat))
    values = values.abs().clamp(min=FLATTEST)
    return gradients[:, 0], scale @ (vectors / values.sqrt().unsqueeze(-2)) @ vectors.mT
