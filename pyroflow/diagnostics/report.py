"""What the draws of a guide say about it: numbers, a verdict in words, and what to try next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from pyroflow.checks import check_count
from pyroflow.diagnostics.funnel import Funnel
from pyroflow.diagnostics.psis import systematic
from pyroflow.model.draws import Draws
from pyroflow.seeds import seeded

Level = Literal["good", "resample", "bad"]

EVEN_ESS = 0.95  # part of the draws, for weights so even that the k-hat of their tail is noise
EVEN_GAP, EVEN_GAP_ESS = 0.03, 0.8  # the same by the bound, which is less noisy than the ESS
# Part of the draws that may be NaN or rounded to an edge; outside, in a guide that is good.
LOST = 0.01
FEW_EFFECTIVE = 100  # an error of the means of a tenth of a standard deviation


@dataclass(repr=False)
class Report:
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
        outside: Part of the draws that lie where the model's density is zero.
        num_nonfinite: Draws whose weight is not a positive finite number, those and the ones where
            a density is NaN or infinite; it was taken as zero.
        nonfinite_sites: By site, the draws where its log density is not finite.
        rounded_sites: By site, the draws so near an edge of its support that the value is
            rounded, where the rest of the model would say something else of the draw.
        level: "good": the guide's draws can be used as they are; "resample": those of
            :meth:`resample` can; "bad": neither. A guide with more than 1 % of its draws outside
            is never "good", and one with fewer than 100 effective draws always "bad".
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

    def __str__(self) -> str:
        low, high = self.khat_interval
        sets = f", mean of {self.num_sets} sets" if self.num_sets > 1 else ""
        rows = {
            "verdict": self.verdict,
            "ELBO": f"{self.elbo:.3f} ± {self.elbo_se:.3f}",
            "log evidence": f"{self.log_evidence:.3f} ± {self.log_evidence_se:.3f}",
            "KL(q ‖ p)": f"{self.gap:.3f}, their difference",
            "ESS": f"{self.ess:.0f} of {self.num_samples} draws ({self.ess_fraction:.1%})",
            "k-hat": f"{self.khat:.2f} (90 % interval {low:.2f} to {high:.2f}{sets}), "
            f"threshold {self.khat_threshold:.2f}",
        }
        if self.num_nonfinite:
            part, sites = self.num_nonfinite / self.num_samples, str(self.nonfinite_sites)[1:-1]
            rows["zero weight"] = f"{self.num_nonfinite} draws ({part:.1%}), not finite at {sites}"
        if self.rounded_sites:
            sites = str(self.rounded_sites)[1:-1]
            rows["rounded"] = f"draws at an edge of the support, at {sites}"
        for number, line in enumerate(self.advice):
            rows["try next" if number == 0 else " " * number] = line
        return "\n".join(f"{label:<13} {text}" for label, text in rows.items())

    __repr__ = __str__


def has_even_weights(report: Report) -> bool:
    """Whether the weights are nearly equal, so that k-hat cannot condemn the guide.

    Of 41 fits with an ESS above 0.99, the k-hats went from 0.16 to 0.91.
    """
    close = report.gap <= EVEN_GAP and report.ess_fraction >= EVEN_GAP_ESS
    return report.ess_fraction >= EVEN_ESS or close


def is_undecided(report: Report) -> bool:
    """Whether another set of draws may change the verdict."""
    low, high = report.khat_interval
    return not has_even_weights(report) and low < report.khat_threshold < high


def judge(report: Report) -> None:
    """Set level, verdict, and advice on the model's densities."""
    failed = report.num_nonfinite - round(report.outside * report.num_samples)
    rounded = max(report.rounded_sites.values(), default=0)
    even = has_even_weights(report)
    if failure := _failure(report, failed, rounded):
        report.level, words = "bad", f"do not trust: {failure}"
    elif even and report.outside <= LOST:
        report.level = "good"
        words = f"good: the weights are nearly equal (ESS {report.ess_fraction:.1%}), use its draws"
    else:
        report.level = "resample"
        why = f"k-hat {report.khat:.2f} is below {report.khat_threshold:.2f}"
        why = f"{report.outside:.1%} of the draws are not the posterior's" if even else why
        words = f"usable with resampling: {why}"
    if is_undecided(report):
        words += ", but the interval spans it"
    if report.outside:
        words += f"; {report.outside:.2%} of the draws lie outside the support and have weight zero"
    if failed:
        words += f"; {failed} draws were not finite and have weight zero"
    report.verdict = words
    report.advice = _advice_on_densities(report, failed, rounded)


def _failure(report: Report, failed: int, rounded: int) -> str | None:
    """Why neither the draws nor their weights can be used, if so."""
    num = report.num_samples
    if failed > LOST * num:
        return f"the weights of {failed} of {num} draws failed"
    if rounded > LOST * num:
        return (
            f"{rounded} of {num} draws are nearer to an edge of a support than their numbers can "
            "say, and the model's density depends on it"
        )
    if has_even_weights(report):
        return None
    if not report.khat <= report.khat_threshold:
        return f"k-hat {report.khat:.2f} is above {report.khat_threshold:.2f}"
    if report.ess < FEW_EFFECTIVE:
        return f"only {report.ess:.0f} of {num} draws are effective"
    return None


def _advice_on_densities(report: Report, failed: int, rounded: int) -> list[str]:
    advice, sites = [], ", ".join(map(repr, report.nonfinite_sites))
    if failed:
        advice.append(f"look at the log density of {sites}, where it is NaN or inf")
    elif report.outside:
        advice.append(
            f"tell the guide of the support that {sites} cuts off, by latents that cannot leave "
            "it: an interval's bounds, or positive steps in the place of an order"
        )
    if rounded > LOST * report.num_samples:
        sites = ", ".join(map(repr, report.rounded_sites))
        advice.append(
            f"let the model take {sites} in float64, or sample its logit or logarithm instead and "
            "write the densities that depend on it by that"
        )
    return advice


def advice_on_fit(report: Report, funnels: dict[str, Funnel]) -> list[str]:
    """What to try where a guide is not good, by the sites that form a funnel."""
    advice = []
    for matrix in (False, True):
        found = {site: funnel for site, funnel in funnels.items() if funnel.matrix == matrix}
        if not found:
            continue
        scales = ", ".join(sorted({name for funnel in found.values() for name in funnel.scales}))
        if matrix:
            sites = ", ".join(map(repr, found))
            way = f"write {sites} as loc + scale_tril @ eps with latents eps ~ Normal(0, 1)"
        else:
            config = ", ".join(f"{site!r}: LocScaleReparam(0.0)" for site in found)
            way = f"pyro.poutine.reparam(model, config={{{config}}})"
        advice.append(
            f"reparametrise the model, a funnel in {scales}: {way}, and make the guide for that"
        )
    if is_undecided(report) or report.ess < FEW_EFFECTIVE:
        advice.append("more draws, by a higher num_samples")
    advice.append("more steps in fit_guide, and more layers")
    advice.append("a richer guide: AutoSylvesterFlow, whose layers act on all latents at once")
    return advice
