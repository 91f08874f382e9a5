"""The modes of a posterior that a guide does not draw."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroflow.guides import AutoFlow, AutoStructuredFlow
from pyroflow.inference.arrowhead import Arrow
from pyroflow.inference.census import (
    DRAWS,
    LEAST_SHARE,
    MISSED,
    Mode,
    are_one,
    census,
    connected,
)
from pyroflow.inference.gaussian_start import normal_pairs
from pyroflow.model.comparison import FAILURES
from pyroflow.model.log_joint import LogJoint
from pyroflow.seeds import seeded

NEAR = 3.0  # standard deviations of a mode's χ² distance above its mean
LARGEST = 100.0  # nats, to take the exponential of
MOSTLY = 0.5  # of a mode's draws, or of its mass
OWN = 64  # draws of a guide, whose mean is near its mode
CHECKED = 1000  # draws of the fitted guide, in the light of which modes are missed


class Missed(NamedTuple):
    """A mode that a guide does not draw, with a lower bound of the log evidence missed there."""

    mode: Mode
    log_mass: float
    apart: bool  # whether the log joint dips between it and the others that the guide draws


@torch.no_grad()
def missed_by(
    modes: list[Mode],
    log_joint: LogJoint,
    q: Distribution,
    log_evidence: float,
    drawn: tuple[Tensor, Tensor] | None = None,
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
        drawn: the guide's draws (S, D) with weights (S,) that sum to one, where there are any:
            a mode at which they have most of the mass is not missed.
    """
    found, covered = [], []
    for mode in modes:
        noise = normal_pairs(log_joint.runs.few(DRAWS, 64), mode.loc)
        log_g = base_log_prob(noise) - torch.linalg.slogdet(mode.scale).logabsdet
        mass = log_mass_missed(log_joint, q, log_evidence, mode.loc + noise @ mode.scale.mT, log_g)
        if mass is None:
            covered.append(mode)
            continue
        if drawn is not None:
            share, seen = math.exp(min(mass - log_evidence, LARGEST)), _mass_near(mode, *drawn)
            if seen >= MOSTLY * share:
                continue
            mass = log_evidence + math.log(share - seen)
        if mass < log_evidence + math.log(LEAST_SHARE):
            continue
        found.append(Missed(mode, mass, apart=True))
    return [
        missed._replace(apart=not any(are_one(log_joint, missed.mode, m) for m in covered))
        for missed in found
    ]


def log_mass_missed(
    log_joint: LogJoint, q: Distribution, log_evidence: float, x: Tensor, log_g: Tensor
) -> float | None:
    """The bound of :func:`missed_by` from draws x (S, D) of a Gaussian with log densities (S,).

    None where most of them are not missed.
    """
    log_p = log_joint.values_and_gradients(x)[0].double()
    # Far from its draws a flow may have no inverse that is found in finite numbers.
    log_q = q.log_prob(x).double().nan_to_num(-torch.inf)
    missed = (log_p - log_q - log_evidence > MISSED) & log_p.isfinite()
    part = missed.double().mean().item()
    return (log_p - log_g)[missed].mean().item() + math.log(part) if part >= MOSTLY else None


def base_log_prob(noise: Tensor) -> Tensor:
    """The standard normal log density at noise (S, D), shape (S,)."""
    return -noise.square().sum(-1) / 2 - noise.shape[-1] / 2 * math.log(2 * math.pi)


def _mass_near(mode: Mode, x: Tensor, weights: Tensor) -> float:
    """The weight of the draws inside of nearly all of a mode's Gaussian."""
    size = torch.linalg.solve(mode.scale, (x - mode.loc).mT).square().sum(0)
    dim = x.shape[-1]
    return weights[(size < dim + NEAR * math.sqrt(2 * dim)).to(weights.device)].sum().item()


def shares_missed(missed: list[Missed], log_evidence: float) -> list[float]:
    """The part of the posterior in each of the modes that a guide misses, at least."""
    found = [m.log_mass for m in missed] + [log_evidence]
    masses = torch.tensor(found, dtype=torch.float64, device="cpu")
    return masses.softmax(0)[:-1].tolist()


@torch.no_grad()
def missed_at(
    log_joint: LogJoint, guide: AutoFlow, ends: Sequence[Tensor]
) -> tuple[list[Missed], float]:
    """The modes apart from the guide's own where ascents ended, and their share.

    Where the guide has as much density at all ends as at its draws, that costs one evaluation.
    """
    ends, q = torch.stack(ends), guide.flow()
    ends = ends[ends.isfinite().all(-1)]
    if not len(ends):
        return [], 0.0
    ends = ends if guide.coordinates is None else guide.coordinates.inv(ends)
    with seeded(0), pyro.validation_enabled(False):
        num = log_joint.runs.few(CHECKED, 200)
        x = torch.cat([q.sample((num,)), ends])
        log_weights = (log_joint.values_and_gradients(x)[0] - q.log_prob(x)).double()
        log_weights = log_weights.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
        own, there = log_weights[:num], log_weights[num:]
        evidence = own.logsumexp(0).item() - math.log(num)
        if not bool((there > evidence + MISSED).any()):
            return [], 0.0
        try:
            modes = census(log_joint, ends)
            found = missed_by(modes, log_joint, q, evidence, (x[:num], own.softmax(0)))
        except FAILURES:  # such as a matrix that is singular far from the guide
            return [], 0.0
    # Where none of the modes is drawn, the guide's own is among them.
    found = [each for each in found if each.apart] if len(found) < len(modes) else []
    return found, sum(shares_missed(found, evidence))


@torch.no_grad()
def modes_missed(
    log_joint: LogJoint, guide: AutoStructuredFlow, starts: Tensor, log_evidence: float
) -> list[Missed]:
    """The modes that ascents from P starts (P, D) end in, and the guide does not draw.

    As :func:`~pyroflow.inference.census.missed_by`, by Gaussians with an arrowhead precision. In
    many rows the bound of one falls short by nats, at a mode as good as any: it counts as much
    more as that of the guide's own mode falls short of the evidence. Ends that are nearer to each
    other than a standard deviation are one mode.
    """
    arrow = Arrow(log_joint, guide, copy.deepcopy(guide.affine))
    q, found = guide.flow(), []
    own, bound = arrow.move(*arrow.ascend(q.sample((OWN,)).mean(0)))
    short = max(0.0, log_evidence - bound)

    def mass() -> float | None:
        """What is missed of the present Gaussian."""
        x, log_det = arrow.affine.forward_and_log_det(arrow.noise)
        log_g = base_log_prob(arrow.noise) - log_det
        return log_mass_missed(log_joint, q, log_evidence, x, log_g)

    def known(loc: Tensor) -> bool:
        size = torch.linalg.vector_norm(arrow.affine(arrow.noise).std(0))
        return any(torch.linalg.vector_norm(loc - m.mode.loc) < size for m in found)

    def missed(start: Tensor) -> Missed | None:
        end, blocks = arrow.ascend(start)
        if mass() is None or known(end):
            return None
        loc, bound = arrow.move(end, blocks)
        there = mass()
        if there is None or there + short < log_evidence + math.log(LEAST_SHARE) or known(loc):
            return None
        mode = Mode(loc, loc.new_zeros(0, 0), bound, 1, end)
        return Missed(mode, there + short, apart=not connected(log_joint, loc, own))

    for start in starts:
        with suppress(*FAILURES):
            found += filter(None, [missed(start)])
    return found
