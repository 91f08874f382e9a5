"""Draws wider than the guide's own, by a mixture in its base space: what it never draws itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, StudentT

from pyroflow.diagnostics.marginals import (
    MARGIN,
    SURE,
    Columns,
    Marginals,
    columns_of,
    is_sound,
    marginals,
)
from pyroflow.diagnostics.psis import (
    CONFIDENCE,
    khat_interval,
    khat_threshold,
    pareto_smooth,
    shapes_of,
    tail_length,
)
from pyroflow.guides.coordinates import Coordinates
from pyroflow.guides.flow_guide import FlowGuide
from pyroflow.guides.mixture import FlowMixture
from pyroflow.model.bound import BoundModel
from pyroflow.model.log_joint import LogJoint
from pyroflow.seeds import drawing

OWN, ALONG, AROUND = 0.4, 0.45, 0.15  # parts: the base's own, one direction wider, all wider
FREEDOM, SCALE = 2.0, 1.5  # of the Student-t along a direction
SCALES = (1.25, 1.6, 2.5, 5.0, 10.0, 20.0)  # of the whole base
UNSEEN = 0.05  # nats of evidence that only wider draws find
FALSE_ALARMS = 0.0027  # of all rows together
LEARNT_FROM = 2000  # draws, the directions of the latents


@dataclass(repr=False)
class WideReport:
    """What weighted draws of a mixture wider than the guide say.

    Attributes:
        columns: the unconstrained latents of the draws.
        log_weights: shape (S,), log p − log m for the mixture's density m.
        marginals: of the latents; ``smoothed`` is what counts.
        log_evidence, log_evidence_se: as in the report.
        khat, khat_interval, khat_threshold: likewise.
        unseen: of a structured guide, a row that has more mass than the guide draws, in words.
    """

    columns: Columns
    log_weights: Tensor
    marginals: Marginals
    log_evidence: float
    log_evidence_se: float
    khat: float
    khat_interval: tuple[float, float]
    khat_threshold: float
    unseen: str = ""

    @classmethod
    def of(
        cls, columns: Columns, log_weights: Tensor, own: Marginals, unseen: str = ""
    ) -> WideReport:
        """The report of draws, whose latents are taken as those of the guide's own are."""
        smoothed, log_sum, khat = pareto_smooth(log_weights)
        num, found = len(log_weights), int(log_weights.isfinite().sum())
        ess = 1 / (2 * smoothed).exp().sum().item()
        return cls(
            columns,
            log_weights,
            marginals([columns], [log_weights], own),
            log_sum - math.log(num),
            math.sqrt(max(0.0, 1 / ess - 1 / num)),
            khat,
            khat_interval(khat, found),
            khat_threshold(found),
            unseen,
        )

    @property
    def sound(self) -> bool:
        """Whether these weights give all means and standard deviations."""
        return is_sound(self.marginals, self.khat, self.khat_threshold)

    def __str__(self) -> str:
        worst, name = self.marginals.worst
        return (
            f"log evidence {self.log_evidence:.3f} ± {self.log_evidence_se:.3f}, k-hat "
            f"{self.khat:.2f}, of the latents up to {worst:.2f}, at {name}"
        )


@torch.no_grad()
def wide_draws(bound: BoundModel, log_joint: LogJoint, num: int) -> tuple[Columns, Tensor]:
    r"""Draws of a defensive mixture around a guide, weighted by the model.

    In the base space, where the guide is b(u),

    m(u) = b(u) (0.4 + 0.45 Σ_j w_j t(d_jᵀu)/N(d_jᵀu) + 0.15 mean_s s^{-D} b(u/s)/b(u)):

    with one coordinate, or the direction d_j along which one latent moves, from a Student-t, or
    with all of u wider s times. A product of wide densities has no effective draws in many
    dimensions; one wide direction at a time has. Both densities share the flow's Jacobian, and
    weights are at most 1/0.4 of those of the guide's own draws (Hesterberg, Weighted Average
    Importance Sampling and Defensive Mixture Distributions, 1995, section 3).

    Returns:
        The unconstrained latents of S draws, and log p − log m, shape (S,).
    """
    x, log_m = wider(bound.guide, num)
    log_p = log_joint.values_and_gradients(x)[0]
    values, _ = bound.guide.constrain(x)
    return columns_of(values, bound.runs.records), log_p.double() - log_m


@torch.no_grad()
def wider(guide: FlowGuide, num: int) -> tuple[Tensor, Tensor]:
    """Draws x (S, D) of the mixture m around a guide's flow, and log m; see :func:`wide_draws`.

    Of a mixture of flows, one of such mixtures around each.
    """
    q = guide.flow()
    parts, log_weights = [q], torch.zeros(1, dtype=torch.float64, device="cpu")
    if isinstance(q, FlowMixture):
        parts, log_weights = q.parts, q.log_weights.double().cpu()
    directions = [_directions(part, guide.coordinates) for part in parts]
    with drawing():
        chosen = torch.multinomial(log_weights.exp(), num, replacement=True)
        counts = chosen.bincount(minlength=len(parts)).tolist()
        drawn = zip(parts, directions, counts, strict=True)
        x = torch.cat([_pushed(part, _draw(part.base_dist, d, n)) for part, d, n in drawn])
    log_m = [_log_wide(part, d, x) for part, d in zip(parts, directions, strict=True)]
    return x, (torch.stack(log_m, -1) + log_weights.to(x.device)).logsumexp(-1)


def _pushed(q: Distribution, u: Tensor) -> Tensor:
    for t in q.transforms:
        u = t(u)
    return u


def _log_wide(q: Distribution, directions: Directions, x: Tensor) -> Tensor:
    """Log m of one flow at any x (S, D); zero density where the flow has no inverse."""
    u = x
    for t in reversed(q.transforms):
        u = t.inv(u)
    log_m = q.log_prob(x) + _log_ratio(q.base_dist, directions, u)
    return log_m.double().nan_to_num(-torch.inf, torch.inf, -torch.inf)


def _is_normal(base: Distribution) -> bool:
    while isinstance(base, Independent):
        base = base.base_dist
    return isinstance(base, Normal)


class Directions(NamedTuple):
    """Unit vectors (K, D) in the base space, and how often each is widened, shape (K,)."""

    vectors: Tensor
    weights: Tensor


def _directions(q: Distribution, moved: Coordinates | None) -> Directions:
    """The coordinates, and the directions along which each latent moves.

    Half of the draws widen a latent that priors of others depend on, if there are such: there
    a hierarchy has its necks and long tails.
    """
    base, transforms = q.base_dist, list(q.transforms)
    if transforms and isinstance(transforms[-1], Coordinates):
        moved = transforms.pop()
    dim = base.event_shape[-1]
    with drawing():
        u = base.sample((max(LEARNT_FROM, 4 * dim),))
    axes = torch.eye(dim, dtype=u.dtype, device=u.device)
    if not _is_normal(base):  # whose directions are not alike
        return Directions(axes, torch.full_like(axes[0], 1 / dim))
    x = u
    for t in transforms:
        x = t(x)
    finite = x.isfinite().all(-1)
    u, x = u[finite], x[finite]
    moves = (x - x.mean(0)).mT @ u
    norms = torch.linalg.vector_norm(moves, dim=-1, keepdim=True)
    good = norms.isfinite() & (norms > 0)
    vectors = torch.cat([axes, torch.where(good, moves / norms, axes)])
    weights = torch.full_like(vectors[:, 0], 1 / len(vectors))
    if moved is not None:
        parents = _parents(moved, moved(x.mean(0)))
        weights = weights / 2
        weights[dim:] += parents / (2 * parents.sum())
    return Directions(vectors, weights)


def _parents(coordinates: Coordinates, z: Tensor) -> Tensor:
    """Which of the latents z (D,) a prior's location or scale depends on, as 0 and 1."""

    def priors(z: Tensor) -> Tensor:
        return torch.cat([t.flatten() for t in coordinates.priors(z)])

    slopes = torch.autograd.functional.jacobian(priors, z.detach())
    return (slopes != 0).any(0).to(z)


def _draw(base: Distribution, directions: Directions, num: int) -> Tensor:
    u = base.sample((num,))
    like = {"dtype": u.dtype, "device": u.device}
    kind = torch.rand(num, **like)
    along, around = kind < ALONG, (kind >= ALONG) & (kind < ALONG + AROUND)
    index = torch.multinomial(directions.weights, max(num, 1), replacement=True)[:num]
    chosen = directions.vectors[index]
    wide = SCALE * _student(u).sample((num,))
    moved = u + (wide - (u * chosen).sum(-1)).unsqueeze(-1) * chosen
    scales = torch.tensor(SCALES, **like)
    scales = scales[torch.randint(len(SCALES), (num,), device=u.device)]
    u = torch.where(around.unsqueeze(-1), scales.unsqueeze(-1) * u, u)
    return torch.where(along.unsqueeze(-1), moved, u)


def _student(like: Tensor) -> StudentT:
    return StudentT(torch.tensor(FREEDOM, dtype=like.dtype, device=like.device))


def _log_ratio(base: Distribution, directions: Directions, u: Tensor) -> Tensor:
    """Log m − log b at u (S, D), shape (S,)."""
    own = base.log_prob(u)
    t = u @ directions.vectors.mT
    narrow = base.base_dist.log_prob(t) if not _is_normal(base) else _normal_log(t)
    wide = _student(u).log_prob(t / SCALE) - math.log(SCALE)
    along = (wide - narrow + directions.weights.log()).logsumexp(-1)
    dim = u.shape[-1]
    around = torch.stack([base.log_prob(u / s) - dim * math.log(s) - own for s in SCALES])
    around = around.logsumexp(0) - math.log(len(SCALES))
    parts = [own.new_full(own.shape, math.log(OWN)), math.log(ALONG) + along]
    return torch.stack([*parts, math.log(AROUND) + around]).logsumexp(0)


def wide_rows(base: Distribution, num: int, rows: int) -> tuple[Tensor, Tensor]:
    """Base numbers (S, J d) of J rows wider than their base, and log m − log b of each, (S, J)."""
    mean = base.mean
    axes = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    u = _draw(base, ways := Directions(axes, torch.full_like(axes[0], 1 / len(axes))), num * rows)
    return u.reshape(num, -1), _log_ratio(base, ways, u).double().reshape(num, rows)


def unseen_rows(names: list[str], each: Tensor, log_weights: Tensor) -> str:
    """Which row has more mass in wider draws than the guide's own find, in words, if one has.

    Args:
        names: of the R rows.
        each: log weights of wider draws of the rows, shape (S, R).
        log_weights: of the globals, where rows are the guide's own, shape (S,).
    """
    weights = log_weights.softmax(0).unsqueeze(1)
    ratio = (each - log_weights.unsqueeze(1)).exp().nan_to_num(0.0)
    mean = (weights * ratio).sum(0)
    error = (weights * (ratio - mean)).square().sum(0).sqrt() / mean
    khat, num = shapes_of(each), len(each)
    low = khat - CONFIDENCE * (1 + khat).clamp(min=0) / math.sqrt(tail_length(num))
    level = mean.new_tensor(1 - FALSE_ALARMS / (2 * len(mean)))
    bar = torch.special.ndtri(level).clamp(min=SURE).item()
    # A heavy tail mostly lacks its largest weights, and its error is not allowed for.
    over = mean.log() - (bar * error).where(low <= khat_threshold(num) + MARGIN, 0.0)
    worst, index = over.max(0)
    if not worst > UNSEEN:
        return ""
    more = mean[index].item() - 1
    return f"wider draws of {names[int(index)]} find {more:.0%} more mass than its own"


def _normal_log(t: Tensor) -> Tensor:
    return -t.square() / 2 - math.log(2 * math.pi) / 2
