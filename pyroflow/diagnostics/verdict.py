"""From numbers to words: whether a guide can be used, and what to do if not."""

from __future__ import annotations

from pyroflow.diagnostics.funnel import Funnel
from pyroflow.diagnostics.report import Report

NEAR_ESS = 0.95  # weights so even that the k-hat of their tail is of no account
NEAR_GAP, NEAR_GAP_ESS = 0.03, 0.8  # the same by the bound, which is less noisy than the ESS
# Part of the draws that may be NaN or rounded to an edge; outside, in a guide that is good.
LOST = 0.01
FEW_EFFECTIVE = 100  # an error of the means of a tenth of a standard deviation


def near_perfect(report: Report) -> bool:
    """Whether the weights are nearly equal, so that k-hat cannot condemn the guide.

    Of 41 fits with an ESS above 0.99, the k-hats went from 0.16 to 0.91.
    """
    close = report.gap <= NEAR_GAP and report.ess_fraction >= NEAR_GAP_ESS
    return report.ess_fraction >= NEAR_ESS or close


def undecided(report: Report) -> bool:
    """Whether another set of draws may change the verdict."""
    low, high = report.khat_interval
    return not near_perfect(report) and low < report.khat_threshold < high


def judge(report: Report, funnels: dict[str, Funnel]) -> None:
    """Set level, verdict and advice.

    Args:
        report: the numbers.
        funnels: sites with their scales, as ``find_funnels`` has them.
    """
    even = near_perfect(report)
    if failure := _failure(report):
        report.level, words = "bad", f"do not trust: {failure}"
    elif even and report.outside <= LOST:
        report.level = "good"
        words = f"good: the weights are nearly equal (ESS {report.ess_fraction:.1%}), use its draws"
    else:
        report.level = "resample"
        why = f"k-hat {report.khat:.2f} is below {report.khat_threshold:.2f}"
        why = f"{report.outside:.1%} of the draws are not the posterior's" if even else why
        words = f"usable with resampling: {why}"
    if undecided(report):
        words += ", but the interval spans it"
    report.verdict = words + _lost(report)
    report.advice = _advice(report, funnels)


def _failure(report: Report) -> str | None:
    """Why neither the draws nor their weights can be used, if so."""
    failed = _failed(report)
    if failed > LOST * report.num_samples:
        return f"the weights of {failed} of {report.num_samples} draws failed"
    if (rounded := _rounded(report)) > LOST * report.num_samples:
        return (
            f"{rounded} of {report.num_samples} draws are nearer to an edge of a support than "
            "their numbers can say, and the model's density depends on it"
        )
    if near_perfect(report):
        return None
    if not report.khat <= report.khat_threshold:
        return f"k-hat {report.khat:.2f} is above {report.khat_threshold:.2f}"
    if report.ess < FEW_EFFECTIVE:
        return f"only {report.ess:.0f} of {report.num_samples} draws are effective"
    return None


def _rounded(report: Report) -> int:
    """Draws whose rounding to an edge of a support the model would notice."""
    return max(report.rounded_sites.values(), default=0)


def _failed(report: Report) -> int:
    """Draws with a density that is NaN or infinite."""
    return report.num_nonfinite - round(report.outside * report.num_samples)


def _lost(report: Report) -> str:
    """The draws of weight zero, in words."""
    failed, words = _failed(report), ""
    if report.outside:
        words += f"; {report.outside:.2%} of the draws lie outside the support and have weight zero"
    if failed:
        words += f"; {failed} draws were not finite and have weight zero"
    return words


def _advice(report: Report, funnels: dict[str, Funnel]) -> list[str]:
    advice, sites = [], ", ".join(map(repr, report.nonfinite_sites))
    if _failed(report):
        advice.append(f"look at the log density of {sites}, where it is NaN or inf")
    elif report.outside:
        advice.append(
            f"tell the guide of the support that {sites} cuts off, by latents that cannot leave "
            "it: an interval's bounds, or positive steps in the place of an order"
        )
    if _rounded(report) > LOST * report.num_samples:
        sites = ", ".join(map(repr, report.rounded_sites))
        advice.append(
            f"let the model take {sites} in float64, or sample its logit or logarithm instead and "
            "write the densities that depend on it by that"
        )
    if report.level == "good":
        return advice
    advice += _reparametrised(funnels)
    if undecided(report) or report.ess < FEW_EFFECTIVE:
        advice.append("more draws, by a higher num_samples")
    advice.append("more steps in fit_guide, and more layers")
    advice.append("a richer guide: AutoSylvesterFlow, whose layers act on all latents at once")
    return advice


def _reparametrised(funnels: dict[str, Funnel]) -> list[str]:
    advice = []
    for matrix in (False, True):
        found = {site: funnel for site, funnel in funnels.items() if funnel.matrix == matrix}
        scales = ", ".join(sorted({name for funnel in found.values() for name in funnel.scales}))
        config = ", ".join(f"{site!r}: LocScaleReparam(0.0)" for site in found)
        way = f"pyro.poutine.reparam(model, config={{{config}}})"
        if matrix:
            sites = ", ".join(map(repr, found))
            way = f"write {sites} as loc + scale_tril @ eps with latents eps ~ Normal(0, 1)"
        if found:
            advice.append(
                f"reparametrise the model, a funnel in {scales}: {way}, and make the guide for that"
            )
    return advice
