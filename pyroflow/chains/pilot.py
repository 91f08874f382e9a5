"""A first set of a guide's draws: where chains start, what their acceptance will be, and means."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflow.chains.convergence import mean_and_error
from pyroflow.chains.independence import Proposal, expected_acceptance
from pyroflow.chains.target import Points, Target
from pyroflow.diagnostics.psis import khat_threshold, pareto_smooth
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw
from pyroflow.seeds import drawing

RAW = 4  # one chain in so many starts from a draw of the guide as it is
WIDER = 2.0  # times the base, of starts that are spread
ERRORS = 3.0  # by which two means may differ, were there only one
FALSE_ALARMS = 0.0027  # of a normal variable beyond that


@dataclass
class Pilot:
    """Draws of a guide and their importance weights.

    Attributes:
        points: the guide's own draws, S of them.
        log_weights: their Pareto smoothed log weights, shape (S,), which sum to one.
        khat: of the weights.
        proposed: log weights of all draws of the proposal, its wider part too.
        nonfinite: part of the guide's own draws whose log joint is NaN or +inf.
    """

    points: Points
    log_weights: Tensor
    khat: float
    proposed: Tensor
    nonfinite: float

    @property
    def acceptance(self) -> float:
        """That independence Metropolis with the whole proposal will have."""
        return expected_acceptance(self.proposed)

    def longest_stay(self, num: int) -> float:
        """How many steps a chain is expected to stay at the largest weight of so many proposals.

        From the place with weight w it goes to one in w/E[w'] proposals. Beyond what was drawn,
        the largest weight grows as that of a Pareto tail.
        """
        finite = self.proposed[self.proposed.isfinite()]
        mean = finite.logsumexp(0) - math.log(len(self.proposed))
        khat = min(max(pareto_smooth(self.proposed)[2], 0.0), 1.0)
        growth = max(num / len(self.proposed), 1.0) ** khat
        return (finite.max() - mean).exp().item() * growth

    def starts(self, chains: int, spread: Target | None = None) -> Points:
        """Where the chains begin: draws by their weights, a quarter of them as the guide made them.

        Those of the quarter lie where the guide is too wide or off, so that chains which have not
        forgotten it disagree with the others, and R-hat shows it. With a target to spread over,
        half of them are draws of a base twice as wide, and the others as the guide made them.
        """
        raw = self.points.log_target.isfinite().nonzero().flatten()
        if spread is not None:
            with drawing():
                far = spread.at(WIDER * spread.base.sample((chains,)))
            far = far.at(far.log_target.isfinite().nonzero().flatten()[: chains // 2])
            near = raw[torch.arange(chains - len(far.u), device=raw.device) % len(raw)]
            return spread.at(torch.cat([far.u, self.points.u[near]]))
        by_weight = self.log_weights.exp()
        as_made = min(chains // RAW, chains)
        drawn = chains - as_made
        with drawing():
            order = raw[torch.randperm(len(raw), device=raw.device)]
            repeats = drawn > int((by_weight > 0).sum())
            rows = torch.multinomial(by_weight, drawn, replacement=repeats)
        first = order[torch.arange(as_made, device=raw.device) % len(order)]
        return self.points.at(torch.cat([first, rows.to(first)]))

    def disagreements(self, x: Tensor) -> list[int]:
        """Columns of chains x (C, N, D) whose means differ from the weighted means of the draws.

        By more than three of their common standard errors, or as many as D means may differ by
        chance as seldom as one by three. Where the weighted draws have too heavy a tail for their
        mean to be believed, nothing can be said.
        """
        if not self.khat <= khat_threshold(len(self.points)):
            return []
        means, errors = mean_and_error(x)
        draws = self.points.x.double().cpu()
        weights = self.log_weights.exp().unsqueeze(1)
        draws = torch.where(weights > 0, draws, 0.0)  # those outside may be infinite
        expected = (weights * draws).sum(0)
        variance = (weights * (draws - expected)).square().sum(0)
        level = 1 - FALSE_ALARMS / (2 * len(means))
        bar = max(
            ERRORS,
            torch.special.ndtri(torch.tensor(level, dtype=torch.float64, device="cpu")).item(),
        )
        apart = (means - expected).abs() > bar * (variance + errors.square()).sqrt()
        return [
            i for i in apart.nonzero().flatten().tolist() if self._mean_holds(draws, expected, i)
        ]

    def _mean_holds(self, draws: Tensor, expected: Tensor, column: int) -> bool:
        """Whether the terms of a weighted mean have a tail that lets it converge."""
        distance = (draws[:, column] - expected[column]).abs().log()
        return pareto_smooth(self.log_weights + distance)[2] <= khat_threshold(len(draws))


def take_pilot(bound: BoundModel, target: Target, proposal: Proposal, num: int) -> Pilot:
    """Draw from the proposal, and weigh.

    Raises:
        ValueError: If the log density is finite nowhere; the message names the site.
    """
    with drawing():
        u, own = proposal.sample(num)
    points = target.at(u)
    log_weights = points.log_target - proposal.log_prob(u)
    mine = points.at(own.nonzero().flatten())
    if not bool(mine.log_target.isfinite().any()):
        draw(bound, num).check_weighted()
        raise ValueError(
            f"the log joint is finite at none of {len(mine)} draws of the guide: fit the guide "
            "first, or look at the model's log densities there"
        )
    smoothed, _, khat = pareto_smooth(mine.log_target - target.base.log_prob(mine.u))
    failed = mine.log_joint.isnan() | mine.log_joint.isposinf()
    share = failed.double().mean().item()
    return Pilot(mine, smoothed, khat, log_weights, share)
