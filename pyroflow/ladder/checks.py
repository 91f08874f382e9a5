"""When a rung of the ladder holds: by its draws, and by chains over it."""

from __future__ import annotations

import math

import pyro
import torch

from pyroflow.chains import Chains
from pyroflow.chains.sampler import Sampler
from pyroflow.diagnostics import Report
from pyroflow.diagnostics.marginals import LIMIT, SURE, columns_of, disagreement, marginals
from pyroflow.guides import AutoFlow, AutoStructuredFlow
from pyroflow.guides.mixture import MixtureGuide
from pyroflow.inference.guide_fit import WIDEST_WARM_START
from pyroflow.model.bound import BoundModel
from pyroflow.model.comparison import FAILURES
from pyroflow.seeds import seeded

LEAST_ESS = 400  # an error of the means of a twentieth of a standard deviation
SD_ERROR = 0.05  # standard error of a standard deviation, as a part of it
EVEN = 0.985  # part of the draws, so many effective that there is no tail to speak of
SURE_KHAT = 0.6  # of weight times a latent or its square
PER_CHAIN = 100  # draws, of which mean squares are taken
CHAIN_SD_ERROR = 0.1  # standard error of a standard deviation of chains, as a part of it
COMPARED, LEAST_COMPARED = 10_000, 1000  # draws of the chains, with those of the last check
NUMBERS = 1e7  # in them, for the most draws
TRUSTED = ("good", "resample")

LEAST_SHARE = 0.05  # of the guide's draws that are effective, for chains that propose them
NATS_EACH = 0.05  # by which they may fall for each latent, for chains of HMC over the flow
CHAINS, CHAIN_DRAWS = 128, 500
CHAINS_BY_ROWS, MOST_BY_ROWS, LEAST_BY_ROWS = 32, 320, 128  # chains, and draws of each
CHAIN_NUMBERS = 3e7  # in them, for the most draws


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
    dim = len(report.marginals.names)
    every = thinned(len(chains.log_p), min(COMPARED, max(LEAST_COMPARED, int(NUMBERS / dim))))
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


def chains_over(
    flow: AutoFlow, report: Report, problem: BoundModel, seed: int, most_leaps: float
) -> Chains | None:
    """Chains over the flow; None where it is too far from the posterior for any.

    They propose its draws where these do for weights. In many latents they may do for none though
    the flow is off by little in each: then it is HMC alone, from starts that are spread. Where
    rows are independent given globals, each moves by itself, and the globals with all of them.
    """
    even, by_rows = report.ess_fraction >= LEAST_SHARE, isinstance(flow, AutoStructuredFlow)
    if by_rows:
        each = int(CHAIN_NUMBERS / (CHAINS_BY_ROWS * flow.latent_dim))
        num, each = CHAINS_BY_ROWS, min(MOST_BY_ROWS, max(LEAST_BY_ROWS, each))
        options = {"method": "rows", "spread": not even}
    # Where the search for modes is coarse, chains in one of them would agree.
    elif flow.latent_dim > WIDEST_WARM_START or (
        not even and report.ess_fraction < math.exp(-NATS_EACH * flow.latent_dim)
    ):
        return None
    else:
        num, each = (CHAINS, CHAIN_DRAWS) if even else (CHAINS // 2, CHAIN_DRAWS // 2)
        options = {} if even else {"method": "HMC", "spread": True}
    with seeded(seed), pyro.validation_enabled(False):
        given = problem.model, flow, problem.args, problem.kwargs
        try:
            sampler = Sampler(*given, each, num, **options)
        except FAILURES:
            if not by_rows:
                raise
            return None  # its rows cannot be told apart
        return sampler.run_on(each, most_leaps)
