"""A census of the modes of a posterior, and of those that a guide never draws."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroflow.guides import AutoFlow
from pyroflow.inference.gaussian_start import (
    Gaussian,
    _antithetic,
    _moved_on,
    _scored,
    _starts,
    ascend,
)
from pyroflow.model.bound import BoundModel
from pyroflow.model.log_joint import LogJoint
from pyroflow.seeds import between_draws, drawing

WIDEST = 256  # latents, beyond which the Hessians cost too much
PATHS = 8  # of each kind of start
COORDINATES = 800  # latents times paths of all kinds, above which there are fewer of them
STEPS = 40  # of an ascent
OVERDISPERSED = (3.0, 5.0)  # times the base of the guide, starts in turn
MOST = 12  # modes that are kept
ROUNDS = 10  # in which a mode's Gaussian is moved to its optimum
DRAWS = 512  # behind the evidence of a mode
OVERLAP = 10.0  # nats of symmetrised KL, below which two Gaussians are one mode
LINE = 31  # points between two modes
DIP = 0.5  # nats below the lower end, that the log joint must fall to between two modes
MISSED = 3.0  # nats, by which a guide's density is too low where it misses mass
LEAST_SHARE = 1e-3  # of the posterior, for a mode to be named as missed
MOSTLY = 0.5  # of a mode's draws


class Mode(NamedTuple):
    """A mode of the log joint: the best Gaussian N(loc, scale scaleᵀ) there."""

    loc: Tensor  # shape (D,), in the coordinates of the guide's flow
    scale: Tensor  # shape (D, D)
    bound: float  # of the Gaussian, a lower bound of the log evidence there
    paths: int  # ascents that ended there


class Missed(NamedTuple):
    """A mode that a guide does not draw, with a lower bound of the log evidence missed there."""

    mode: Mode
    log_mass: float
    apart: bool  # whether the log joint dips between it and the others that the guide draws


@torch.no_grad()
def census(log_joint: LogJoint, starts: Tensor) -> list[Mode]:
    """The modes that ascents from P starts (P, D) end in, the one with the most evidence first.

    Ascents find modes, and not mass: where a density has a spike, as at the neck of a funnel, its
    evidence is small however high it is. So the Gaussian of each end is moved to its optimum,
    whose bound weighs it. Ends are one mode where their Gaussians overlap, or the log joint does
    not dip on the straight line between them.

    Args:
        log_joint: the log joint, as a function of D coordinates.
        starts: shape (P, D); those where it is not finite are left out.

    Returns:
        At most 12 modes with a finite bound; none, if no ascent ends in one.
    """
    with between_draws():
        value, gradient = log_joint.values_and_gradients(starts)
        starts = starts[value.isfinite() & gradient.isfinite().all(-1)]
        if not len(starts):
            return []
        points = ascend(log_joint, starts, STEPS)
        ends = zip(points.z[-1], points.scale[-1], points.value[-1].tolist(), strict=True)
        found = [Mode(*end, 1) for end in ends if math.isfinite(end[2])]
        found = _merged(log_joint, found)[:MOST]
        if not found:
            return []
        test = _antithetic(DRAWS, starts[0])
        loc, scale = (torch.stack([getattr(m, name) for m in found]) for name in ("loc", "scale"))
        scored = _scored(log_joint, loc, scale, test)[0]
        moved = [_moved_on(log_joint, g, ROUNDS, test, int) for g in scored]
        found = [Mode(*g, mode.paths) for g, mode in zip(moved, found, strict=True)]
        return _merged(log_joint, [mode for mode in found if math.isfinite(mode.bound)])


@torch.no_grad()
def missed_by(
    modes: list[Mode], log_joint: LogJoint, q: Distribution, log_evidence: float
) -> list[Missed]:
    """The modes where the guide's density q is far below the posterior's.

    Mass is missed where log p − log q is above the log evidence that the guide's own draws show
    by more than 3 nats: less than a twentieth of it is drawn. With R such draws among those of the
    mode's Gaussian g, Jensen's inequality bounds it: log ∫_R p ≥ E_g[log p − log g | R] + log g(R).

    Args:
        modes: of the log joint, as :func:`census` finds them.
        log_joint: the log joint.
        q: the guide's distribution over the same coordinates.
        log_evidence: the log evidence by its draws.
    """
    found, covered = [], []
    for mode in modes:
        noise = _antithetic(DRAWS, mode.loc)
        x = mode.loc + noise @ mode.scale.mT
        log_p = log_joint.values_and_gradients(x)[0].double()
        log_g = -noise.square().sum(-1) / 2 - x.shape[-1] / 2 * math.log(2 * math.pi)
        log_g = log_g - torch.linalg.slogdet(mode.scale).logabsdet
        # Far from its draws a flow may have no inverse that is found in finite numbers.
        log_q = q.log_prob(x).double().nan_to_num(-torch.inf)
        missed = (log_p - log_q - log_evidence > MISSED) & log_p.isfinite()
        part = missed.double().mean().item()
        if part < MOSTLY:
            covered.append(mode)
            continue
        mass = (log_p - log_g)[missed].mean().item() + math.log(part)
        if mass < log_evidence + math.log(LEAST_SHARE):
            continue
        found.append(Missed(mode, mass, apart=True))
    return [
        missed._replace(apart=not any(_connected(log_joint, missed.mode, m) for m in covered))
        for missed in found
    ]


def shares_missed(missed: list[Missed], log_evidence: float) -> list[float]:
    """The part of the posterior in each of the modes that a guide misses, at least."""
    masses = torch.tensor([m.log_mass for m in missed] + [log_evidence], dtype=torch.float64)
    return masses.softmax(0)[:-1].tolist()


@torch.no_grad()
def starts_around(bound: BoundModel, guide: AutoFlow, log_joint: LogJoint) -> Tensor:
    """Where to ascend from: draws of the priors, points around the start, wide draws of the guide.

    Returns:
        Shape (P, D): up to 8 of each kind, fewer in many dimensions.
    """
    num = max(2, min(PATHS, COORDINATES // guide.latent_dim))
    q = guide.flow()
    with drawing():
        x = q.base_dist.sample((num,))
        wide = x.new_tensor(OVERDISPERSED).repeat(num)[:num]
        x = wide.unsqueeze(-1) * x
        parts = list(_prior_draws(bound, guide, num))
    for t in q.transforms:
        x = t(x)
    if (around := _starts(log_joint, guide._init_loc())) is not None:
        parts.append(around[:num])
    return torch.cat([x, *parts])


def _prior_draws(bound: BoundModel, guide: AutoFlow, num: int) -> Iterator[Tensor]:
    """Draws of each prior with its parents where they were in a run, without further runs."""
    for _ in range(num):
        try:
            drawn = {name: bound.runs.records[name]["fn"].sample() for name in bound.latents}
            yield guide.unconstrain(drawn).unsqueeze(0)
        except (NotImplementedError, RuntimeError, ValueError):  # improper, or drawn at an edge
            continue


def _merged(log_joint: LogJoint, modes: list[Mode]) -> list[Mode]:
    """The modes in the order of their bounds, without those that one before them takes in."""
    kept: list[Mode] = []
    for mode in sorted(modes, key=lambda m: -m.bound):
        for index, other in enumerate(kept):
            if _divergence(mode, other) < OVERLAP or _connected(log_joint, mode, other):
                kept[index] = other._replace(paths=other.paths + mode.paths)
                break
        else:
            kept.append(mode)
    return kept


def _divergence(one: Mode | Gaussian, other: Mode | Gaussian) -> float:
    """KL(one ‖ other) + KL(other ‖ one)."""
    there = torch.linalg.solve(other.scale, one.scale)
    back = torch.linalg.solve(one.scale, other.scale)
    shift = (one.loc - other.loc).unsqueeze(-1)
    apart = [torch.linalg.solve(g.scale, shift).square().sum() for g in (one, other)]
    total = there.square().sum() + back.square().sum() + sum(apart)
    return total.item() / 2 - len(one.loc)


def _connected(log_joint: LogJoint, one: Mode, other: Mode) -> bool:
    """Whether the log joint does not dip on the straight line between two modes."""
    steps = torch.linspace(0, 1, LINE, dtype=one.loc.dtype, device=one.loc.device)
    value = log_joint.values_and_gradients(torch.lerp(one.loc, other.loc, steps.unsqueeze(-1)))[0]
    value = value.nan_to_num(-torch.inf)
    return bool(value.min() >= torch.minimum(value[0], value[-1]) - DIP)
