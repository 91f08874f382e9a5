"""What a run of many chains gives: draws, numbers and a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyroflow.arviz import labels
from pyroflow.arviz.export import check_new, container, predicted
from pyroflow.chains.convergence import summarise
from pyroflow.chains.pilot import Pilot
from pyroflow.chains.target import Points
from pyroflow.guides import AutoFlow
from pyroflow.model.bound import BoundModel
from pyroflow.model.program import rows_of
from pyroflow.model.records import is_factor
from pyroflow.model.runs import CHUNK
from pyroflow.seeds import one_at_a_time, seeded
from pyroflow.shown import Shown

if TYPE_CHECKING:
    from arviz import InferenceData
    from xarray import DataTree

LARGEST_RHAT, LEAST_ESS = 1.01, 400
LONGEST = 0.1  # of a chain, in which it may stay where it is
LOST = 0.01  # part of the guide's draws whose log density may be no number

UNSEEN = "a region where the guide has no draws stays unseen"


class Recorded(NamedTuple):
    """x (N, C, D) of chains, the log joint there and whether they moved, (N, C) each; the end."""

    x: Tensor
    log_joint: Tensor
    moved: Tensor
    last: Points


@dataclass(repr=False)
class Chains(Shown):
    """The result of :func:`~pyroflow.mcmc`.

    Attributes:
        draws: By name, the latent sites on their own support, each of shape (S, *shape of the
            site), S = num_chains · num_samples, chain by chain.
        log_p: Shape (S,), the model's log joint at the draws, observed sites included.
        moved: Shape (S,), whether the chain moved in that step.
        rhat: The largest rank-normalised split R-hat of all numbers of all sites. On the real
            line, half-lines and intervals it is that of the unconstrained latents too.
        ess: The smallest of their bulk and tail effective sample sizes.
        acceptance: Part of the proposals that were accepted, of all kinds.
        acceptances: The same by kind, "independence" and "HMC", or "globals" and "rows".
        longest_rejection: The longest run of steps that a chain stayed where it was; of "rows",
            that its globals or one of its rows did.
        method: "independence", "independence and HMC", "HMC", or "globals and rows".
        num_chains: C.
        num_samples: Draws of each chain, after the warm-up.
        seconds: Wall-clock time.
        khat: Shape of the Pareto tail of the guide's importance weights.
        expected_acceptance: Of independence Metropolis, from a pilot set of draws, by which the
            method was chosen.
        nonfinite: Part of the guide's draws whose log density is NaN or +inf.
        disagreements: Names of sites whose means by importance weights are others.
        by_site: By name of a site, its numbers: ``rhat``, ``ess_bulk``, ``ess_tail``, ``mean``,
            ``sd`` and ``mcse``, the Monte Carlo error of the mean; each of the shape of the site,
            the first three and the last NaN for what is constant.
        one_by_one: Whether each point took a run of the model.
        model, args, kwargs: The model and its arguments, for :meth:`to_arviz`.
        level: "good" or "bad".
        verdict: The same in words, with the reasons.
    """

    draws: dict[str, Tensor]
    log_p: Tensor
    moved: Tensor
    rhat: float
    ess: float
    acceptance: float
    acceptances: dict[str, float]
    longest_rejection: int
    method: str
    num_chains: int
    num_samples: int
    seconds: float
    khat: float
    expected_acceptance: float
    nonfinite: float
    disagreements: list[str]
    by_site: dict[str, dict[str, Tensor]]
    one_by_one: bool
    model: Callable
    args: tuple
    kwargs: dict[str, Any]
    level: Literal["good", "bad"] = "bad"
    verdict: str = ""

    @one_at_a_time
    @torch.no_grad()
    def to_arviz(
        self,
        *,
        dims: labels.Dims | None = None,
        coords: labels.Coords | None = None,
        predictions_args: tuple | None = None,
        predictions_kwargs: dict[str, Any] | None = None,
    ) -> InferenceData | DataTree:
        """The draws for ArviZ, with dimensions ``chain`` and ``draw``.

        The group ``posterior`` has the model's latent and deterministic sites, with dimensions
        named by their plates as in :func:`~pyroflow.to_arviz`; ``sample_stats`` has ``lp``, the
        model's log joint, and ``accepted``, whether the chain moved; ``observed_data`` the data.
        The model runs once more at all draws, where it has deterministic sites.

        Args:
            dims: By site, names for all its dimensions instead of those from the plates.
            coords: By dimension, its labels; 0, 1, … otherwise.
            predictions_args: Arguments for predictions, as in :func:`~pyroflow.to_arviz`.
            predictions_kwargs: Likewise.

        Returns:
            An ``InferenceData`` with ArviZ 0.x, a ``DataTree`` with ArviZ 1.x.

        Raises:
            ValueError: If names or labels do not fit.
        """
        new = predictions_args, predictions_kwargs
        check_new(self.model, *new)
        with seeded(0):
            posterior, observed = self._groups()
            groups = predicted(self.model, *new, self.draws)
        stats = {"lp": self.log_p, "accepted": self.moved}
        stats = {name: ([], labels.as_array(values)) for name, values in stats.items()}
        groups |= {"posterior": posterior, "sample_stats": stats, "observed_data": observed}
        groups = {name: group for name, group in groups.items() if group}
        tables = labels.datasets(groups, dims or {}, coords or {}, {}, num_chains=self.num_chains)
        tables["sample_stats"].attrs |= {"method": self.method, "verdict": self.verdict}
        return container(tables)

    def _groups(self) -> tuple[labels.Group, labels.Group]:
        """The posterior and the data, a part of the draws at a time."""
        parts: dict[str, list[labels.Variable]] = {}
        num, first = len(self.log_p), {name: values[0] for name, values in self.draws.items()}
        bound = BoundModel(self.model, None, self.args, self.kwargs, first)
        data = bound.observed
        for start in range(0, num, CHUNK):
            rows = range(start, min(start + CHUNK, num))
            sites = bound.runs.evaluate(rows_of(self.draws, rows), len(rows))
            others = [n for n in sites if n not in data and not is_factor(sites[n].record)]
            for name, variable in labels.drawn_sites(sites, others).items():
                parts.setdefault(name, []).append(variable)
        joined = {name: labels.joined(found) for name, found in parts.items()}
        return joined, {name: labels.observed_values(sites[name].record) for name in data}

    def _shown(self) -> tuple[str, dict[str, str]]:
        rates = ", ".join(f"{kind} {rate:.2f}" for kind, rate in self.acceptances.items())
        draws = f"{self.num_chains} chains of {self.num_samples} in {self.seconds:.1f} s"
        rows = {
            "verdict": self.verdict,
            "draws": f"{draws}, by {self.method}",
            "R-hat": f"{self.rhat:.4f}, the largest",
            "ESS": f"{self.ess:.0f}, the smallest ({self.ess / self.seconds:.0f} a second)",
            "acceptance": f"{rates}; longest run of rejections {self.longest_rejection}",
            "guide": f"k-hat {self.khat:.2f}, expected acceptance {self.expected_acceptance:.2f}",
        }
        return "", rows


@torch.no_grad()
def result(
    model: Callable,
    bound: BoundModel,
    pilot: Pilot,
    rates: dict[str, float],
    recorded: Recorded,
    one_by_one: bool,
) -> Chains:
    """The draws on their supports, chain by chain, and what there is to say of them."""
    x = recorded.x.transpose(0, 1)
    num_chains, num_samples = x.shape[:2]
    values, log_det = bound.guide.constrain(x.flatten(0, 1))
    draws = {name: value.detach() for name, value in values.items()}  # without their latents
    by_site = {n: _numbers(v.unflatten(0, (num_chains, num_samples))) for n, v in draws.items()}
    chains = Chains(
        draws=draws,
        log_p=recorded.log_joint.T.flatten() - log_det.double(),
        moved=recorded.moved.T.flatten(),
        rhat=_worst(by_site, "rhat"),
        ess=min(_worst(by_site, "ess_bulk", -1.0), _worst(by_site, "ess_tail", -1.0)),
        acceptance=sum(rates.values()) / len(rates),
        acceptances=rates,
        longest_rejection=longest_rejection(recorded.moved),
        method=" and ".join(rates),
        num_chains=num_chains,
        num_samples=num_samples,
        seconds=0.0,
        khat=pilot.khat,
        expected_acceptance=pilot.acceptance,
        nonfinite=pilot.nonfinite,
        disagreements=_sites_of(pilot.disagreements(x), bound.guide),
        by_site=by_site,
        one_by_one=one_by_one,
        model=model,
        args=bound.args,
        kwargs=bound.kwargs,
    )
    judge(chains)
    return chains


def _numbers(chains: Tensor) -> dict[str, Tensor]:
    """The numbers of a site's draws (C, N, *shape), each of its shape."""
    found = summarise(chains.flatten(2) if chains.dim() > 2 else chains.unsqueeze(2))
    return {name: number.reshape(chains.shape[2:]) for name, number in found.items()}


def _worst(by_site: dict[str, dict[str, Tensor]], name: str, sign: float = 1.0) -> float:
    """The largest of a number times the sign, of all that vary; NaN if one of these has none."""
    found = [numbers[name][numbers["sd"] != 0] for numbers in by_site.values()]
    values = torch.cat(found)
    return (sign * values).max().item() * sign if len(values) else math.nan


def _sites_of(columns: Sequence[int], guide: AutoFlow) -> list[str]:
    """The sites that some of the D numbers belong to."""
    pairs = zip(guide.latents, guide.latents.sizes, strict=True)
    owners = [name for site, size in pairs for name in [site.name] * size]
    return list(dict.fromkeys(owners[column] for column in columns))


def longest_rejection(moved: Tensor) -> int:
    """The longest run of steps without a move, of chains (N, C)."""
    step = torch.arange(len(moved), device=moved.device).unsqueeze(1)
    last = torch.where(moved, step, -1).cummax(0).values
    return int((step - last).max())


def judge(chains: Chains) -> None:
    """Set level and verdict."""
    found = "; ".join(_failures(chains))
    chains.level = "bad" if found else "good"
    numbers = f"R-hat {chains.rhat:.4f}, ESS {chains.ess:.0f}, acceptance {chains.acceptance:.2f}"
    words = f"do not trust: {found}" if found else f"good: {numbers}"
    chains.verdict = "; ".join([words, *_remarks(chains), UNSEEN])


def is_short(chains: Chains) -> bool:
    """Whether longer chains may mend something: they disagree, or few draws are effective."""
    agree, enough = chains.rhat <= LARGEST_RHAT, chains.ess >= LEAST_ESS
    return not (agree and enough and chains.longest_rejection < LONGEST * chains.num_samples)


def times_as_long(chains: Chains) -> float:
    """By how much longer they would agree: the square of R-hat less one falls as their length."""
    return (chains.rhat**2 - 1) / (LARGEST_RHAT**2 - 1)


def _failures(chains: Chains) -> list[str]:
    found = []
    if not chains.rhat <= LARGEST_RHAT:
        found.append(
            f"R-hat {chains.rhat:.3f} is above {LARGEST_RHAT}: the chains disagree, or are too "
            "short (raise num_samples)"
        )
    if not chains.ess >= LEAST_ESS:
        found.append(f"only {chains.ess:.0f} draws are effective, and {LEAST_ESS} are needed")
    if chains.longest_rejection >= LONGEST * chains.num_samples:
        found.append(
            f"a chain stayed where it was for {chains.longest_rejection} of {chains.num_samples} "
            "steps"
        )
    if chains.disagreements:
        sites = ", ".join(map(repr, chains.disagreements))
        found.append(f"means by importance weights are others than those of the chains, at {sites}")
    if chains.nonfinite > LOST:
        found.append(f"the log density is no number at {chains.nonfinite:.1%} of the guide's draws")
    if not math.isfinite(float(chains.log_p.sum())):
        found.append("the log density is not finite at all draws")
    return found


def _remarks(chains: Chains) -> list[str]:
    found = []
    if chains.method == "HMC":
        found.append(
            f"by HMC alone, as {chains.expected_acceptance:.0%} of the guide's draws would be "
            "accepted: a better guide is faster"
        )
    if chains.one_by_one:
        found.append(
            "each point took a run of the model, so that there are few chains: write it so that "
            "draws can run side by side"
        )
    return found
