"""A census of the modes of a posterior."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroflow.guides.flow_guide import FlowGuide
from pyroflow.guides.mixture import FlowMixture
from pyroflow.inference.ascent import Points, ascend
from pyroflow.inference.gaussian_start import (
    PATHS,
    Gaussian,
    _scored,
    _starts,
    moved_on,
    normal_pairs,
    paths_in,
)
from pyroflow.model.bound import BoundModel
from pyroflow.model.log_joint import LogJoint
from pyroflow.seeds import between_draws, drawing

WIDEST = 256  # latents, beyond which the Hessians cost too much
STEPS = 40  # of an ascent
OVERDISPERSED = (1.0, 2.0, 3.0, 5.0, 8.0)  # times the base of the guide
# Draws of each kind, among which starts are looked for: in few latents they may hit a mode.
PROBED, PROBED_WIDE, FEW = 4000, 1000, 20
ALONG = 12  # points of a path at which a Gaussian is tried
ALONG_DRAWS = 32  # behind the bound of each
MOST = 12  # modes that are kept
ROUNDS = 10  # in which a mode's Gaussian is moved to its optimum
DRAWS = 512  # behind the evidence of a mode
OVERLAP = 10.0  # nats of symmetrised KL, below which two Gaussians are one mode
LINE = 31  # points between two modes
DIP = 0.5  # nats below the lower end, that the log joint must fall to between two modes
LEVEL_BY = 200  # draws of the guide, the level of log p − log q
MISSED = 3.0  # nats, by which a guide's density is too low where it misses mass
LEAST_SHARE = 1e-3  # of the posterior, for a mode to be named as missed


class Mode(NamedTuple):
    """A mode of the log joint: the best Gaussian N(loc, scale scaleᵀ) there."""

    loc: Tensor  # shape (D,), in the coordinates of the guide's flow
    scale: Tensor  # shape (D, D)
    bound: float  # of the Gaussian, a lower bound of the log evidence there
    paths: int  # ascents that led there
    peak: Tensor  # shape (D,), where an ascent from loc ends


@torch.no_grad()
def census(log_joint: LogJoint, starts: Tensor) -> list[Mode]:
    """The modes that ascents from P starts (P, D) end in, the one with the most evidence first.

    Ascents find modes, and not mass: where a density has a spike, as at the neck of a funnel, its
    evidence is small however high it is. So of the Gaussians along a path the best one is taken,
    and moved to its optimum, whose bound weighs the mode. Two are one mode where they overlap, or
    the log joint does not dip on the straight line between them, or between the peaks to which
    ascents lead from them.

    Args:
        log_joint: the log joint, as a function of D coordinates.
        starts: shape (P, D); those where it is not finite are left out.

    Returns:
        At most 12 modes, those with less than a thousandth of the evidence of the first left out;
        none, if no ascent ends in one.

    Example:
        >>> from pyroflow import AutoPlanarFlow
        >>> from pyroflow.targets import toy_model
        >>> guide = AutoPlanarFlow(toy_model).setup()
        >>> bound = BoundModel(toy_model, guide)
        >>> log_joint = LogJoint(bound, guide, 64)
        >>> len(census(log_joint, starts_around(bound, guide, log_joint)))
        1
    """
    with between_draws():
        value, gradient = log_joint.values_and_gradients(starts)
        starts = starts[value.isfinite() & gradient.isfinite().all(-1)]
        if not len(starts):
            return []
        found = merged(log_joint, _best_along(log_joint, ascend(log_joint, starts, STEPS)))[:MOST]
        if not found:
            return []
        few = log_joint.runs.few
        test = normal_pairs(few(DRAWS, 64), starts[0])
        gaussians = [Gaussian(*mode[:3]) for mode in found]
        moved = [moved_on(log_joint, g, few(ROUNDS, 3), test, int) for g in gaussians]
        peaks = ascend(log_joint, torch.stack([g.loc for g in moved]), STEPS).z[-1]
        triples = zip(moved, found, peaks, strict=True)
        found = [Mode(*g, mode.paths, peak) for g, mode, peak in triples]
        least = max(mode.bound for mode in found) + math.log(LEAST_SHARE)
        return merged(log_joint, [mode for mode in found if mode.bound > max(least, -math.inf)])


def _best_along(log_joint: LogJoint, points: Points) -> list[Mode]:
    """The Gaussian with the highest bound on each path, and the end of the path."""
    few, last = log_joint.runs.few, len(points.z) - 1
    steps = torch.linspace(0, last, few(ALONG, 4), device="cpu").round().long().unique()
    z, scale = points.z[steps], points.scale[steps]
    noise = normal_pairs(few(ALONG_DRAWS, 16), z[0, 0])
    tried = _scored(log_joint, z.flatten(0, 1), scale.flatten(0, 1), noise)[0]
    num = z.shape[1]
    paths = [max(tried[path::num], key=lambda g: g.bound) for path in range(num)]
    ends = zip(paths, points.z[-1], strict=True)
    return [Mode(*g, 1, end) for g, end in ends if math.isfinite(g.bound)]


@torch.no_grad()
def starts_around(bound: BoundModel, guide: FlowGuide, log_joint: LogJoint) -> Tensor:
    """Where to ascend from: around the guide's start, priors' draws, wide draws of the guide.

    Of the latter two some are taken as they come, and some where log p − log q is highest, of each
    width alike.

    Returns:
        Shape (P, D): up to 10 of each kind, fewer in many dimensions.
    """
    few = log_joint.runs.few
    num = few(paths_in(guide.latent_dim), 2)
    probed = few(PROBED if guide.latent_dim <= FEW else PROBED_WIDE, 64)
    q = guide.flow()
    with drawing():
        prior = _prior_draws(bound, guide, probed)
        own = q.sample((few(LEVEL_BY, 64),))
    level = (log_joint.values_and_gradients(own)[0] - q.log_prob(own)).nanmedian()
    parts = [] if (around := _starts(log_joint, guide.start())) is None else [around]
    for width in OVERDISPERSED:
        x = _dispersed(q, width, probed)
        parts.append(_missed_most(log_joint, q, x, num // 4, level))
    parts.append(x[: num // 2])
    if prior is not None:
        parts += [prior[:num], _missed_most(log_joint, q, prior, num // 2, level)]
    return torch.cat(parts)


def _dispersed(q: Distribution, width: float, num: int) -> Tensor:
    """Draws (N, D) of a flow, or of the parts of a mixture, from a base so many times as wide."""
    if isinstance(q, FlowMixture):
        each = -(-num // len(q.parts))
        x = torch.cat([_dispersed(part, width, each) for part in q.parts])
        return x[torch.randperm(len(x), device="cpu")[:num].to(x.device)]
    with drawing():
        x = width * q.base_dist.sample((num,))
    for t in q.transforms:
        x = t(x)
    return x


def _missed_most(
    log_joint: LogJoint, q: Distribution, x: Tensor, num: int, level: Tensor
) -> Tensor:
    """Of points x (S, D) those where a guide's density q is too low, shape (up to 2 num, D).

    So many where log p − log q is highest, which may all be at one place; and as many among those
    where it is above its level at the guide's own draws, each as likely as its density p says.
    """
    log_p = log_joint.values_and_gradients(x)[0]
    missed = (log_p - q.log_prob(x)).nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    highest = missed.topk(max(1, num)).indices
    with drawing():
        noise = -torch.empty_like(log_p).exponential_().log()  # Gumbel's, to draw without repeats
    keys = torch.where(missed > level + MISSED, log_p + noise, -torch.inf)
    drawn = keys.topk(max(1, num)).indices
    return x[torch.cat([highest, drawn[keys[drawn].isfinite()]])]


def _prior_draws(bound: BoundModel, guide: FlowGuide, num: int) -> Tensor | None:
    """Draws (N, D) of each prior with its parents where they were in a run, without further runs.

    None where a prior is improper, or every draw is at an edge.
    """
    for size in (num, PATHS, 1):  # one value that is rounded to an edge spoils a draw of all
        try:
            fns = {name: bound.runs.records[name]["fn"] for name in bound.latents}
            return guide.unconstrain({name: fn.sample((size,)) for name, fn in fns.items()})[0]
        except (NotImplementedError, RuntimeError, ValueError):
            continue
    return None


@torch.no_grad()
def merged(log_joint: LogJoint, modes: list[Mode]) -> list[Mode]:
    """The modes in the order of their bounds, without those that one before them takes in."""
    kept: list[Mode] = []
    for mode in sorted(modes, key=lambda m: -m.bound):
        for index, other in enumerate(kept):
            if are_one(log_joint, mode, other):
                kept[index] = other._replace(paths=other.paths + mode.paths)
                break
        else:
            kept.append(mode)
    return kept


def _divergence(one: Mode, other: Mode) -> float:
    """KL(one ‖ other) + KL(other ‖ one)."""
    there = torch.linalg.solve(other.scale, one.scale)
    back = torch.linalg.solve(one.scale, other.scale)
    shift = (one.loc - other.loc).unsqueeze(-1)
    apart = [torch.linalg.solve(g.scale, shift).square().sum() for g in (one, other)]
    total = there.square().sum() + back.square().sum() + sum(apart)
    return total.item() / 2 - len(one.loc)


def are_one(log_joint: LogJoint, one: Mode, other: Mode) -> bool:
    """Whether two Gaussians overlap, or the log joint does not dip between their modes."""
    pairs = (one.loc, other.loc), (one.peak, other.peak)
    return _divergence(one, other) < OVERLAP or any(connected(log_joint, *p) for p in pairs)


def connected(log_joint: LogJoint, one: Tensor, other: Tensor) -> bool:
    """Whether the log joint does not dip on the straight line between two points (D,)."""
    steps = torch.linspace(0, 1, LINE, dtype=one.dtype, device=one.device).unsqueeze(-1)
    value = log_joint.values_and_gradients(torch.lerp(one, other, steps))[0]
    value = value.nan_to_num(-torch.inf)
    return bool(value.min() >= torch.minimum(value[0], value[-1]) - DIP)
