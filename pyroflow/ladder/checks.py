"""When a rung of the ladder holds: its draws give all means and standard deviations."""

from __future__ import annotations

import math

import torch

from pyroflow.diagnostics import Report
from pyroflow.diagnostics.marginals import LIMIT, SURE, columns_of, disagreement, marginals
from pyroflow.guides import AutoFlow
from pyroflow.guides.mixture import MixtureGuide
from pyroflow.mcmc import Chains
from pyroflow.model.bound import BoundModel

LEAST_ESS = 400  # an error of the means of a twentieth of a standard deviation
SD_ERROR = 0.05  # standard error of a standard deviation, as a part of it
EVEN = 0.985  # part of the draws, so many effective that there is no tail to speak of
SURE_KHAT = 0.6  # of weight times a latent or its square
PER_CHAIN = 100  # draws, of which mean squares are taken
CHAIN_SD_ERROR = 0.1  # standard error of a standard deviation of chains, as a part of it
COMPARED = 10_000  # draws of the chains, with those of the last check
TRUSTED = ("good", "resample")


def is_exact(guide: AutoFlow | MixtureGuide, report: Report) -> bool:
    """Whether the weighted draws give all means and sds, with a margin for the heaviest tail.

    From a k-hat of 0.5 on, standard errors say too little; the largest of many is high by noise.
    Over one flow chains may decide where there is no such margin.
    """
    if report.level not in TRUSTED or report.ess < LEAST_ESS:
        return False
    if not isinstance(guide, AutoFlow) or report.ess_fraction > EVEN:
        return True
    kinds = [report.marginals] + ([] if report.wide is None else [report.wide.marginals])
    error = report.marginals.smoothed.sd_error.max().item()
    return error <= SD_ERROR and all(found.worst[0] <= SURE_KHAT for found in kinds)


def rank(report: Report) -> tuple[bool, float]:
    """Trusted before not, then by effective draws; what misses mass is worth what it has."""
    return report.level in TRUSTED, report.ess_fraction * (1 - report.missed_share)


def thinned(total: int, num: int) -> slice:
    """Every k-th of the draws, at least ``num`` of them where there are as many."""
    return slice(None, None, max(1, total // num))


def apart(report: Report, chains: Chains, problem: BoundModel) -> str:
    """What draws wider than the flow say against the chains; empty if nothing."""
    every = thinned(len(chains.log_p), COMPARED)
    if report.wide is None:
        return ""
    values = {name: value[every] for name, value in chains.draws.items()}
    columns = columns_of(values, problem.runs.records)
    even = torch.zeros(len(columns.z), dtype=torch.float64, device="cpu")
    found = marginals([columns], [even], report.marginals)
    other, own = report.wide.marginals.smoothed, 1 / math.sqrt(chains.ess)
    mean, sd = ((t.square() + own**2).sqrt() for t in (other.mean_error, other.sd_error))
    # Weights with a tail mostly lack their largest, and make a standard deviation too small.
    sd = sd + (other.sd < found.plain.sd) * LIMIT / SURE
    size, words = disagreement(found.names, found.plain, other, (mean, sd))
    return f"wider draws correct {words}" if size > 1 else ""


def unsettled(report: Report, chains: Chains, problem: BoundModel) -> str:
    """Which standard deviation the chains do not agree on; empty if none.

    R-hat and ESS are of ranks, to which one chain far out in a tail is one rank among many. Each
    chain has a mean square of its own; their spread is the error of the whole.
    """
    num = chains.num_chains
    every = slice(None, None, max(1, chains.num_samples // PER_CHAIN))
    values = {
        name: value.unflatten(0, (num, -1))[:, every].flatten(0, 1)
        for name, value in chains.draws.items()
    }
    z = report.marginals.of(columns_of(values, problem.runs.records)).z.unflatten(0, (num, -1))
    squares = (z - z.mean((0, 1))).square().mean(1)
    error = squares.std(0) / math.sqrt(num) / (2 * squares.mean(0)).clamp(min=1e-300)
    worst, index = error.max(0)
    if worst <= CHAIN_SD_ERROR:
        return ""
    name = report.marginals.names[int(index)]
    return f"the sd of {name} is known to {worst:.0%} only, as a few chains are far out"
