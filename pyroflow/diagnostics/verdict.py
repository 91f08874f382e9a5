"""From numbers to words: whether a guide can be used, and what to do if not."""

from __future__ import annotations

from pyroflow.diagnostics.report import Report

NEAR_ESS = 0.95  # weights so even that the k-hat of their tail is of no account
NEAR_GAP, NEAR_GAP_ESS = 0.03, 0.8  # the same by the bound, which is less noisy than the ESS
FAILED = 0.01  # part of the draws that may be NaN, or rounded to an edge
FEW_EFFECTIVE = 100


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


def judge(report: Report, failed: int, funnels: dict[str, list[str]]) -> None:
    """Set level, verdict and advice.

    Args:
        report: the numbers.
        failed: draws with a weight of NaN or inf.
        funnels: sites with their scales, as ``find_funnels`` has them.
    """
    reliable = near_perfect(report) or report.khat <= report.khat_threshold
    if max(failed, _rounded(report)) > FAILED * report.num_samples or not reliable:
        report.level = "bad"
    else:
        report.level = "good" if near_perfect(report) else "resample"
    report.verdict = _words(report, failed)
    report.advice = _advice(report, failed, funnels)


def _rounded(report: Report) -> int:
    return max(report.rounded_sites.values(), default=0)


def _words(report: Report, failed: int) -> str:
    khat = f"k-hat {report.khat:.2f}"
    if report.level == "good":
        words = f"good: the weights are nearly equal (ESS {report.ess_fraction:.1%}), use its draws"
    elif report.level == "resample":
        words = f"usable with resampling: {khat} is below {report.khat_threshold:.2f}"
        if report.ess < FEW_EFFECTIVE:
            words += f", but only {report.ess:.0f} draws are effective"
    elif failed > FAILED * report.num_samples:
        words = f"do not trust: the weights of {failed} of {report.num_samples} draws failed"
    elif _rounded(report) > FAILED * report.num_samples:
        words = (
            f"do not trust: {_rounded(report)} of {report.num_samples} draws are nearer to an edge "
            "of a support than their numbers can say, and the model's density depends on it"
        )
    else:
        words = f"do not trust: {khat} is above {report.khat_threshold:.2f}"
    if undecided(report):
        words += ", but the interval spans it"
    if report.num_nonfinite:
        words += f"; {report.num_nonfinite} draws were not finite and have weight zero"
    return words


def _advice(report: Report, failed: int, funnels: dict[str, list[str]]) -> list[str]:
    advice = []
    if report.num_nonfinite:
        sites = ", ".join(map(repr, report.nonfinite_sites))
        what = "it is NaN or inf" if failed else "the guide leaves the support"
        advice.append(f"look at the log density of {sites}, where {what}")
    if _rounded(report) > FAILED * report.num_samples:
        sites = ", ".join(map(repr, report.rounded_sites))
        advice.append(
            f"let the model take {sites} in float64, or sample its logit or logarithm instead and "
            "write the densities that depend on it by that"
        )
    if report.level == "good":
        return advice
    if funnels:
        scales = ", ".join(sorted({s for found in funnels.values() for s in found}))
        config = ", ".join(f"{site!r}: LocScaleReparam(0.0)" for site in funnels)
        advice.append(
            f"reparametrise the model, a funnel in {scales}: "
            f"pyro.poutine.reparam(model, config={{{config}}}), and make the guide for that"
        )
    if undecided(report) or (report.level == "resample" and report.ess < FEW_EFFECTIVE):
        advice.append("more draws, by a higher num_samples")
    advice.append("more steps in fit_guide, and more layers")
    advice.append("a richer guide: AutoSylvesterFlow, whose layers act on all latents at once")
    return advice
