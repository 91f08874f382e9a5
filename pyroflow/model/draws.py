"""Draws from a guide with what the model and the guide say of each."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyroflow.checks import check_count
from pyroflow.model.bound import BoundModel
from pyroflow.model.records import Sites, Values
from pyroflow.model.rounding import rounded_draws
from pyroflow.seeds import seeded


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
    """

    sites: dict[str, Tensor]
    log_p: Tensor
    log_q: Tensor
    nonfinite: dict[str, int] = field(default_factory=dict)
    rounded: dict[str, int] = field(default_factory=dict)

    @property
    def log_weights(self) -> Tensor:
        """Log p(x, z) − log q(z), shape (S,), as they come: they may be −inf or NaN."""
        return self.log_p - self.log_q

    @property
    def point(self) -> str | None:
        """A site with one value in all of several draws, as of a guide that has no density."""
        for name, values in self.sites.items():
            if len(values) > 1 and bool((values == values[0]).all()):
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
        return Draws(sites, self.log_p[rows], self.log_q[rows])


@torch.no_grad()
def draw(problem: BoundModel, num_samples: int, seed: int | None = None) -> Draws:
    """Draw from the guide and score the draws under model and guide.

    Pyro's validation is off meanwhile, so that one draw outside a support costs its own weight
    and not the run. Where a plate subsamples the data, ``log_p`` is an estimate.

    Args:
        problem: model and guide.
        num_samples: S.
        seed: makes the draws reproducible, without touching the global generator.

    Raises:
        ValueError: If the model has no latent sites; if a site changes its shape, is not in every
            run, or is one of the guide only; if num_samples is below 1.

    Example:
        >>> from pyroflow import AutoPlanarFlow
        >>> from pyroflow.targets import eight_schools_centered
        >>> guide = AutoPlanarFlow(eight_schools_centered, num_layers=0)
        >>> problem = BoundModel(eight_schools_centered, guide)
        >>> draws = draw(problem, 20, seed=0)
        >>> draws.sites["theta"].shape, draws.sites["tau"].shape, draws.log_weights.shape
        (torch.Size([20, 8]), torch.Size([20]), torch.Size([20]))
    """
    check_count("num_samples", num_samples, 1)
    problem.check_sites()
    with seeded(seed):
        guided = problem.guide_draws(num_samples)
        latents = {name: guided[name].values for name in problem.latents}

        def scores(latents: Values) -> dict[str, Tensor]:
            return _scores(problem.runs.evaluate(latents, num_samples))

        scored = scores(latents)
        rounded = rounded_draws(latents, scored, lambda moved: scores(latents | moved))
    by_site = [scored, _scores(guided)]
    log_p, log_q = (torch.stack(list(parts.values())).sum(0) for parts in by_site)
    nonfinite = {}
    for name, values in [pair for parts in by_site for pair in parts.items()]:
        if count := int((~values.isfinite()).sum()):
            nonfinite[name] = max(count, nonfinite.get(name, 0))
    return Draws(latents, log_p, log_q, nonfinite, rounded)


def _scores(sites: Sites) -> dict[str, Tensor]:
    """By site, the log density of each draw, shape (S,)."""
    return {name: s.by_draw(torch.float64) for name, s in sites.items() if s.log_prob is not None}


def join(parts: list[Draws]) -> Draws:
    """The draws of several runs as one."""
    return Draws(
        {name: torch.cat([part.sites[name] for part in parts]) for name in parts[0].sites},
        torch.cat([part.log_p for part in parts]),
        torch.cat([part.log_q for part in parts]),
        _summed([part.nonfinite for part in parts]),
        _summed([part.rounded for part in parts]),
    )


def _summed(counts: list[dict[str, int]]) -> dict[str, int]:
    names = sorted({name for part in counts for name in part})
    return {name: sum(part.get(name, 0) for part in counts) for name in names}
