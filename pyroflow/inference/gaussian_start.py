"""The Gaussian that a guide starts from: the best one along several paths to the modes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyroflow.guides import AutoFlow
from pyroflow.inference.ascent import Points, ascend, evaluated
from pyroflow.inference.objectives import edge_factors, mean_scores
from pyroflow.model.log_joint import LogJoint
from pyroflow.progress import Bar, progress_bar
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


class Gaussian(NamedTuple):
    """N(loc, scale scaleᵀ), with an estimate of its bound; lower-triangular once it was moved."""

    loc: Tensor
    scale: Tensor
    bound: float


@torch.no_grad()
def best_gaussian(
    log_joint: LogJoint, start: Tensor, bar: Bar | None = None
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
    noise, bar = normal_pairs(few(DRAWS, 16), start), bar or progress_bar("", TICKS, False)
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
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(upper)
    return (upper * signs.unsqueeze(-1)).mT


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


def bounds(
    log_joint: LogJoint, loc: Tensor, scale: Tensor, noise: Tensor, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Bounds on fixed draws of N(loc, scale scaleᵀ), (C, D) and (C, D, D), and if draws are lost.

    A bound is −∞ where it is not finite; ``own`` is as in :func:`evaluated`.
    """
    draws = loc.unsqueeze(1) + noise @ scale.mT
    log_q = -noise.square().sum(-1) / 2 - noise.shape[-1] / 2 * math.log(2 * math.pi)
    log_weights = evaluated(log_joint, draws, own)[0] - log_q
    bound = torch.linalg.slogdet(scale).logabsdet - mean_scores(log_weights.mT)
    lost = ~log_weights.isfinite().all(1)
    return bound.where(bound.isfinite(), -torch.inf), lost


def _scored(
    log_joint: LogJoint, loc: Tensor, scale: Tensor, noise: Tensor
) -> tuple[list[Gaussian], Tensor]:
    """The Gaussians N(loc, scale scaleᵀ) with their bounds, and whether draws of each were lost."""
    bound, lost = bounds(log_joint, loc, scale, noise)
    found = zip(loc, scale, bound.tolist(), strict=True)
    return [Gaussian(*parts) for parts in found], lost


def moved_on(
    log_joint: LogJoint,
    start: Gaussian,
    rounds: int,
    test: Tensor,
    tick: Callable[[], Any] = int,
) -> Gaussian:
    """Move a Gaussian to its optimum by natural gradients, unless that lowers its bound."""
    given = start.loc.unsqueeze(0), start.scale.unsqueeze(0)
    (loc,), (scale,), (bound,) = moved_together(log_joint, *given, rounds, test, tick)
    return Gaussian(loc, scale, bound.item())


def moved_together(
    log_joint: LogJoint,
    loc: Tensor,
    scale: Tensor,
    rounds: int,
    test: Tensor,
    tick: Callable[[], Any] = int,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of G Gaussians, (G, D) and (G, D, D): locations, triangles and bounds.

    ``own`` is as in :func:`evaluated`, of each Gaussian.
    """
    start, (num, dim) = (loc, scale), loc.shape
    going = torch.ones(num, dtype=torch.bool, device=loc.device)
    for t in range(rounds):
        tick()
        noise = normal_pairs(max(log_joint.runs.few(MOVED_BY, 64), 4 * dim), loc.flatten())
        noise = noise.unflatten(1, loc.shape).movedim(0, 1)
        value, gradient = evaluated(log_joint, loc.unsqueeze(1) + noise @ scale.mT, own)
        inside = value.isfinite() & gradient.isfinite().all(-1)
        going = going & (inside.sum(1) >= max(LEAST_MOVED_BY, 2 * dim))
        if not bool(going.any()):
            break
        pull = gradient @ scale
        shift, slope = pull.mean(1), _slope(noise, pull)
        log_weights = (value + noise.square().sum(-1) / 2).where(inside, -torch.inf)
        for i in (going & ~inside.all(1)).nonzero().flatten().tolist():
            shift[i], slope[i] = _cut(noise[i], log_weights[i], pull[i])
        shift, slope = (
            t.where(going.reshape(-1, *[1] * (t.dim() - 1)), 0.0) for t in (shift, slope)
        )
        rate = 1 / (2 + t / 4)  # falling as 1/t averages the noise of the draws
        moved = _moved(loc, scale, shift, slope, rate)
        loc = moved[0].where(going[:, None], loc)
        scale = moved[1].where(going[:, None, None], scale)
    before, after = (bounds(log_joint, *place, test, own)[0] for place in (start, (loc, scale)))
    better = after > before
    loc = loc.where(better[:, None], start[0])
    scale = scale.where(better[:, None, None], start[1])
    return loc, lower_factor(scale), torch.maximum(before, after)


def _moved(
    loc: Tensor, scale: Tensor, gradient: Tensor, slope: Tensor, rate: float
) -> tuple[Tensor, Tensor]:
    """One natural-gradient step of at most one standard deviation, in whitened coordinates."""
    identity = torch.eye(loc.shape[-1], dtype=loc.dtype, device=loc.device)
    precision = (1 - rate) * identity + rate * (slope + slope.mT) / 2
    values, vectors = torch.linalg.eigh(precision)
    values = values.clamp(0.25, 4.0).unsqueeze(-2)
    shift = rate * (vectors / values) @ vectors.mT @ gradient.unsqueeze(-1)
    shift = shift / torch.linalg.vector_norm(shift, dim=-2, keepdim=True).clamp(min=1.0)
    return loc + (scale @ shift).squeeze(-1), scale @ (vectors / values.sqrt()) @ vectors.mT


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
