"""Draws from a guide with what the model and the guide say of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyroflow.checks import check_count
from pyroflow.model.bound import BoundModel, check_sites
from pyroflow.model.records import Sites, Values
from pyroflow.model.supports import bijection, preimage, remember
from pyroflow.seeds import seeded

LOST = 0.01  # of an unconstrained latent, by which rounding may move it
ALLOWED = 0.05  # nats, by which it may change what the rest of the model says of a draw

Scores = dict[str, Tensor]  # log density by site of the model, shape (S,) each


@dataclass
class Draws:
    """S draws of a guide, in float64 where they are log densities.

    Attributes:
        sites: by name, the model's latent sites on their own support, each of shape
            (S, *shape of the site in a run of its own).
        log_p: shape (S,), the model's log joint at the draws, observed sites included.
        log_q: shape (S,), the guide's log density there, of the same values on the same support.
        nonfinite: by name, for how many of the draws the log density of a site of the model or
            the guide is NaN or +inf, or is −inf: draws outside the support count as −inf.
        rounded: by name, for how many of the draws the value was rounded so near an edge of the
            support that the rest of the model cannot be what it says there.
        all_sites: all sites of the model, where they were to be kept.
    """

    sites: Values
    log_p: Tensor
    log_q: Tensor
    nonfinite: dict[str, int] = field(default_factory=dict)
    rounded: dict[str, int] = field(default_factory=dict)
    all_sites: Sites = field(default_factory=dict)

    @property
    def log_weights(self) -> Tensor:
        """Log p(x, z) − log q(z), shape (S,), as they come: they may be −inf or NaN."""
        return self.log_p - self.log_q

    @property
    def point(self) -> str | None:
        """A site with one value in all of several draws, as of a guide that has no density."""
        for name, values in self.sites.items():
            origin = preimage(values)  # empty where there is but one value, as of an empty site
            free = values if origin is None else origin.latent
            if len(free) > 1 and free.numel() and bool((free == free[0]).all()):
                return name
        return None

    def check_weighted(self) -> None:
        """Raise ``ValueError`` unless some of the draws have a weight."""
        if not self.log_weights.isfinite().any():
            worst = max(self.nonfinite, key=self.nonfinite.get)
            raise ValueError(
                f"the log density of site {worst!r} is NaN or infinite for all {len(self)} draws: "
                "mend the model there, or fit the guide first if its draws are far off"
            )

    def __len__(self) -> int:
        return len(self.log_p)

    def at(self, rows: Tensor) -> Draws:
        """Some of the draws, without the counts."""
        sites = {name: values[rows.to(values.device)] for name, values in self.sites.items()}
        all_sites = {name: site.at(rows) for name, site in self.all_sites.items()}
        return Draws(sites, self.log_p[rows], self.log_q[rows], all_sites=all_sites)


@torch.no_grad()
def draw(
    bound: BoundModel, num_samples: int, seed: int | None = None, *, keep_all: bool = False
) -> Draws:
    """Draw from the guide and score the draws under model and guide.

    One draw outside a support costs its own weight and not the run. Where a plate subsamples the
    data, ``log_p`` is an estimate.

    Args:
        bound: model and guide.
        num_samples: S.
        seed: makes the draws reproducible, without touching the global generator.
        keep_all: whether all sites of the model are kept, with the log densities of the data.

    Raises:
        ValueError: If the model has no latent sites, a site changes its shape, is not in every
            run or is one of the guide only, or num_samples is below 1.

    Example:
        >>> from pyroflow import AutoPlanarFlow
        >>> from pyroflow.targets import eight_schools_centered as model
        >>> draws = draw(BoundModel(model, AutoPlanarFlow(model, num_layers=0)), 20, seed=0)
        >>> draws.sites["theta"].shape, draws.sites["tau"].shape, draws.log_weights.shape
        (torch.Size([20, 8]), torch.Size([20]), torch.Size([20]))
    """
    check_count("num_samples", num_samples, 1)
    check_sites(bound)
    with seeded(seed):
        guided = bound.guide_draws(num_samples)
        latents = {name: guided[name].values for name in bound.latents}
        sites = bound.runs.evaluate(latents, num_samples) if keep_all else {}
        scored = _scores(sites) if keep_all else _scores_at(bound, latents, num_samples)
        scores = [scored, _scores(guided)]
        rounded = _rounded(
            latents,
            scores[0],
            lambda moved: _scores_at(bound, latents | moved, num_samples),
        )
    log_p, log_q = (torch.stack(list(by_site.values())).sum(0) for by_site in scores)
    nonfinite = Counter()
    for name, values in [pair for by_site in scores for pair in by_site.items()]:
        nonfinite |= Counter({name: int((~values.isfinite()).sum())})
    return Draws(latents, log_p, log_q, dict(nonfinite), rounded, sites)


def join(parts: list[Draws]) -> Draws:
    """The draws of several runs as one."""
    return Draws(
        {name: torch.cat([part.sites[name] for part in parts]) for name in parts[0].sites},
        torch.cat([part.log_p for part in parts]),
        torch.cat([part.log_q for part in parts]),
        dict(sum((Counter(part.nonfinite) for part in parts), Counter())),
        dict(sum((Counter(part.rounded) for part in parts), Counter())),
    )


def _scores(sites: Sites) -> Scores:
    return {name: s.by_draw(torch.float64) for name, s in sites.items() if s.log_prob is not None}


def _scores_at(bound: BoundModel, latents: Values, size: int) -> Scores:
    """Those of S draws; what the sites have is let go as soon as it is summed."""
    found: dict[str, Tensor] = {}
    start = 0
    for sites in bound.runs.parts(latents, size):
        for name, score in _scores(sites).items():
            # What is kept of each part would lie between the large tensors of the next ones.
            found.setdefault(name, score.new_empty(size))[start : start + len(score)] = score
        start += len(score)
    return found


def _rounded(
    latents: Values, scores: Scores, rescore: Callable[[Values], Scores]
) -> dict[str, int]:
    """Count, by site, the draws so near an edge that the model cannot see them well enough.

    A prior is scored at the unconstrained latents, whatever their value is rounded to; a
    likelihood has the value alone, and needs not mind. Each value that lost its latents is moved
    by one of their units, away from the edge. By how much the log density changes (``rescore``
    at the moved sites), times the units lost, is what rounding may have cost.
    """
    lost, moved, cost = {}, {}, 0.0
    for name, value in latents.items():
        if (origin := preimage(value)) is None:
            continue
        latent, support = origin
        kept = bijection(support).inv(value)
        off = torch.where((latent - kept).abs() > LOST, latent - kept, 0.0)
        if off.any():
            lost[name] = off.double().abs().reshape(len(off), -1).amax(1)
            moved[name] = remember(bijection(support)(kept - off.sign()), latent, support)
    if not moved:
        return {}
    rounding = 8 * torch.finfo(latent.dtype).eps  # of the sums
    for name, score in rescore(moved).items():
        change = (score - scores[name]).abs() - rounding * scores[name].abs()
        cost = cost + change.nan_to_num(0.0, torch.inf).clamp(min=0)
    counts = {name: int((off * cost > ALLOWED).sum()) for name, off in lost.items()}
    return {name: count for name, count in counts.items() if count}
