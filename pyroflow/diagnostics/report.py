"""What the draws of a guide say about it: numbers, a verdict in words, and what to try next."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pyroflow.checks import check_count
from pyroflow.diagnostics.marginals import Marginals
from pyroflow.diagnostics.psis import (
    khat_interval,
    khat_threshold,
    pareto_smooth,
    shapes_of,
    systematic,
)
from pyroflow.diagnostics.wider import WideReport
from pyroflow.inference.census import Mode
from pyroflow.inference.missed import Missed
from pyroflow.model.draws import Draws, join
from pyroflow.seeds import seeded
from pyroflow.shown import Shown

WORST = 3  # rows that are named
FEWEST = 10  # draws for each number that is fitted to them

Level = Literal["good", "resample", "bad"]


@dataclass
class RowReport:
    """What the weights of single rows say, given the globals.

    Attributes:
        names: of the rows, by their first numbers, as "theta[3]".
        khat: shape (R,), of the weights of each row.
        ess_fraction: shape (R,), part of a row's draws that are effective.
        num_candidates: draws of each row behind a marginal weight of the globals.
        noise: variance that they leave in its logarithm.
    """

    names: list[str]
    khat: Tensor
    ess_fraction: Tensor
    num_candidates: int
    noise: float

    @classmethod
    def of(
        cls, names: list[str], given: Tensor, leading: Tensor, num_candidates: int, noise: float
    ) -> RowReport:
        """From log weights of rows (S, R) given the globals (S, G)."""
        found = _less_globals(given, leading)
        ess = (2 * found.logsumexp(0) - (2 * found).logsumexp(0)).exp() / len(found)
        return cls(names, shapes_of(found).cpu(), ess.cpu(), num_candidates, noise)

    @property
    def worst(self) -> list[int]:
        """The rows with the fewest effective draws, the worst first."""
        return self.ess_fraction.argsort()[:WORST].tolist()

    def __str__(self) -> str:
        found = [
            f"{self.names[j]} (ESS {self.ess_fraction[j]:.1%}, k-hat {self.khat[j]:.2f})"
            for j in self.worst
        ]
        return f"{len(self.names)}, {self.num_candidates} candidates each; worst {', '.join(found)}"


def _less_globals(log_weights: Tensor, leading: Tensor) -> Tensor:
    """Log weights (S, R) without what a square function of the globals (S, G) explains of them.

    That is how likely a row's data are at other globals, which is no fault of the row's draws.
    """
    finite = log_weights.isfinite()
    known = log_weights.where(finite, 0.0)
    mean = known.sum(0) / finite.sum(0)
    if not leading.shape[1]:
        return log_weights - mean
    off = (known - mean).where(finite, 0.0)
    unit = (leading - leading.mean(0)) / leading.std(0).clamp(min=1e-300)
    design = torch.cat([torch.ones_like(unit[:, :1]), unit, unit.square()], 1)
    if not design.shape[1] <= len(design) // FEWEST:
        return log_weights - mean
    return log_weights - mean - design @ torch.linalg.lstsq(design, off).solution


@dataclass(repr=False)
class Report(Shown):
    """The report of :func:`~pyroflow.diagnose`, in nats where it is a log density.

    Attributes:
        elbo: Mean of log p − log q over the draws where it is a number; −inf if a draw lies
            where the model's density is zero.
        elbo_se: Its standard error; NaN where the ELBO is −inf.
        log_evidence: Log of the mean Pareto smoothed weight. Smoothing costs a bias that is
            small against the error of the raw mean, which has no finite variance from k = 0.5
            on, and neither of them sees what the guide never draws.
        log_evidence_se: Its standard error by the delta method; too small where ``level`` is
            "bad".
        ess: Effective number of the draws, 1/Σw² of the smoothed weights.
        ess_fraction: The same as a part of ``num_samples``.
        khat: Shape of the Pareto tail of the weights, a mean over the sets of draws; −inf if the
            largest weights are equal.
        khat_interval: 90 % interval of it.
        khat_threshold: The k-hat up to which as many draws as a set has with a weight are enough.
        num_samples: Draws in all, S.
        num_sets: Sets that they were drawn in.
        fewer: Why they are fewer than was asked for, in words; empty where they are not.
        outside: Part of the draws that lie where the model's density is zero.
        num_nonfinite: Draws whose weight is not a positive finite number, those and the ones where
            a density is NaN or infinite; it was taken as zero.
        nonfinite_sites: By site, the draws where its log density is not finite.
        rounded_sites: By site, the draws so near an edge of its support that the value is
            rounded, where the rest of the model would say something else of the draw.
        rows: Of an :class:`~pyroflow.AutoStructuredFlow`, what the weights of single rows of its
            plates say. The log evidence, ``ess``, ``khat`` and ``log_weights`` are then those of
            the marginal weights of its globals, with rows drawn anew, which do not collapse where
            the rows are many; ``draws`` have of each row one of several candidates, by its weight;
            the ELBO is of the guide's own draws. None for other guides, and where a term of the
            model depends on several rows.
        by_rows: The same in words, or why the weights are not by rows; where plates subsample,
            which rows they are of.
        marginals: Mean, standard deviation and k-hat of each unconstrained latent, as the draws
            and as their weights have it.
        wide: The same by draws of a mixture wider than the guide; None where they were not taken.
        modes: Of the posterior, in the coordinates of the guide's flow, as the census found them.
        missed: Those that the guide does not draw.
        missed_share: The part of the posterior that is in them, about, and at least.
        missed_effect: The largest change that these modes make in a mean or a standard deviation
            of a latent, in tenths of the standard deviation.
        census: What the census found, or why it was not taken, in words.
        level: "good": the guide's draws can be used as they are; "resample": those of
            :meth:`resample` can; "bad": neither. A guide with more than 1 % of its draws outside
            is never "good", and one with fewer than 100 effective draws whose weights are uneven
            always "bad".
        verdict: The same in words, with the reason.
        advice: What to try next, most promising first; empty where nothing is amiss.
        draws: The draws themselves, with log p and log q.
        log_weights: Shape (S,), the smoothed log weights, which sum to one.
    """

    elbo: float
    elbo_se: float
    log_evidence: float
    log_evidence_se: float
    ess: float
    ess_fraction: float
    khat: float
    khat_interval: tuple[float, float]
    khat_threshold: float
    num_samples: int
    num_sets: int
    outside: float
    num_nonfinite: int
    nonfinite_sites: dict[str, int]
    rounded_sites: dict[str, int]
    draws: Draws
    log_weights: Tensor
    marginals: Marginals
    fewer: str = ""
    rows: RowReport | None = None
    by_rows: str = ""
    wide: WideReport | None = None
    modes: list[Mode] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)
    missed_share: float = 0.0
    missed_effect: float = 0.0
    census: str = "not taken"
    level: Level = "bad"
    verdict: str = ""
    advice: list[str] = field(default_factory=list)

    @property
    def gap(self) -> float:
        """Log evidence − ELBO, the estimated KL(q ‖ p) in nats."""
        return self.log_evidence - self.elbo

    def resample(self, num_samples: int, seed: int | None = None) -> dict[str, Tensor]:
        """Posterior draws: the guide's, each as often as its Pareto smoothed weight says.

        Systematic resampling, in random order. Draws repeat where the weights vary or
        ``num_samples`` is more than the guide's own draws; averages are worth ``ess``
        independent draws at most.

        Args:
            num_samples: n.
            seed: Makes them reproducible, without touching the global generator.

        Returns:
            By site name, a tensor of shape (n, *shape of the site).

        Raises:
            ValueError: If ``num_samples`` is below 1.
        """
        check_count("num_samples", num_samples, 1)
        with seeded(seed):
            return self.draws.at(systematic(self.log_weights, num_samples)).sites

    def _shown(self) -> tuple[str, dict[str, str]]:
        low, high = self.khat_interval
        sets = f", mean of {self.num_sets} sets" if self.num_sets > 1 else ""
        rows = {
            "verdict": self.verdict,
            "ELBO": f"{self.elbo:.3f} ± {self.elbo_se:.3f} nats",
            "log evidence": f"{self.log_evidence:.3f} ± {self.log_evidence_se:.3f} nats",
            "KL(q ‖ p)": f"{self.gap:.3f} nats, their difference",
            "ESS": f"{self.ess:.0f} of {self.num_samples} draws ({self.ess_fraction:.1%})",
            "k-hat": f"{self.khat:.2f} (90 % interval {low:.2f} to {high:.2f}{sets}), "
            f"threshold {self.khat_threshold:.2f}",
            "latents": "k-hat of weight times latent and its square up to {:.2f}, at {}".format(
                *self.marginals.worst
            ),
            "rows": self.by_rows,
            "wider draws": str(self.wide) if self.wide else "not taken",
            "census": self.census,
        }
        if not self.by_rows:
            del rows["rows"]
        if self.fewer:
            rows["draws"] = self.fewer
        if self.num_nonfinite:
            part, sites = self.num_nonfinite / self.num_samples, str(self.nonfinite_sites)[1:-1]
            rows["zero weight"] = f"{self.num_nonfinite} draws ({part:.1%}), not finite at {sites}"
        if self.rounded_sites:
            sites = str(self.rounded_sites)[1:-1]
            rows["rounded"] = f"draws at an edge of the support, at {sites}"
        for number, line in enumerate(self.advice):
            rows["try next" if number == 0 else " " * number] = line
        return "", rows


def unjudged(
    sets: list[Draws], weighed: list[Draws], found: Marginals, wide: WideReport | None
) -> Report:
    """Without a verdict: of sets of draws, as they are and as they are weighed."""
    draws, chosen = join(sets), join(weighed)
    raw, num = draws.log_weights, len(draws)
    finite = raw[raw.isfinite()]
    khats = [pareto_smooth(part.log_weights)[2] for part in weighed]
    khat = sum(khats) / len(khats)
    smoothed, log_sum, _ = pareto_smooth(chosen.log_weights)
    ess = 1 / (2 * smoothed).exp().sum().item()
    outside = int((draws.log_p.isneginf() & draws.log_q.isfinite()).sum())
    weighted = max(1, len(finite) // len(sets))
    return Report(
        elbo=-math.inf if outside else finite.mean().item(),
        elbo_se=math.nan if outside else (finite.std() / math.sqrt(len(finite))).item(),
        log_evidence=log_sum - math.log(num),
        log_evidence_se=math.sqrt(max(0.0, 1 / ess - 1 / num)),
        ess=ess,
        ess_fraction=ess / num,
        khat=khat,
        khat_interval=khat_interval(khat, weighted, len(sets)),
        khat_threshold=khat_threshold(weighted),
        num_samples=num,
        num_sets=len(sets),
        outside=outside / num,
        num_nonfinite=num - len(finite),
        nonfinite_sites=draws.nonfinite,
        rounded_sites=draws.rounded,
        draws=chosen,
        log_weights=smoothed,
        marginals=found,
        wide=wide,
    )
