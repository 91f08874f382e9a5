"""The verdict on a guide: from its weights, its latents, wider draws and the census."""

from __future__ import annotations

import math
import warnings

import pyro
from pyro import poutine
from torch import nn

from pyroflow.diagnostics.causes import Funnel
from pyroflow.diagnostics.marginals import LIMIT, MARGIN, SURE, combined, disagreement
from pyroflow.diagnostics.psis import khat_interval
from pyroflow.diagnostics.report import Report
from pyroflow.diagnostics.wider import UNSEEN, WideReport
from pyroflow.guides import (
    AmortizedPlanarGuide,
    AutoFlow,
    AutoStructuredFlow,
    AutoSylvesterFlow,
)
from pyroflow.guides.mixture import MixtureGuide
from pyroflow.inference.census import WIDEST
from pyroflow.model.bound import BoundModel
from pyroflow.model.comparison import FAILURES
from pyroflow.seeds import seeded
from pyroflow.shown import missing

EVEN_ESS = 0.95  # part of the draws, for weights so even that the draws may do as they are
EVEN_GAP, EVEN_GAP_ESS = 0.03, 0.8  # the same by the bound, which is less noisy than the ESS
# Part of the draws that may be NaN or rounded to an edge; outside, in a guide that is good.
LOST = 0.01
FEW_EFFECTIVE = 100  # an error of the means of a tenth of a standard deviation
MISSED = 0.02  # part of the posterior in modes that a guide may miss

RICHER = {
    AutoSylvesterFlow: "whose layers act on all latents at once",
    AutoStructuredFlow: "a flow of the globals, and the rows of plates given them",
}


def has_even_weights(report: Report) -> bool:
    """Whether the weights are so nearly equal that the draws may do as they are."""
    close = report.gap <= EVEN_GAP and report.ess_fraction >= EVEN_GAP_ESS
    # With several candidates of each row the weights are those of globals, and not of the draws.
    joint = report.rows is None or report.rows.num_candidates == 1
    return (joint and report.ess_fraction >= EVEN_ESS) or close


def is_undecided(report: Report) -> bool:
    """Whether another set of draws may change the verdict."""
    if report.wide is not None and report.wide.sound:
        return False
    if _spans(report, report.khat, report.khat_threshold):
        return True
    worst, _ = report.marginals.worst
    below = report.khat <= report.khat_threshold
    return below and _spans(report, worst, _threshold_of_latents(report))


def _threshold_of_latents(report: Report) -> float:
    """The k-hat that weight times a latent or its square may have."""
    return report.khat_threshold + (MARGIN if report.wide is not None else 0.0)


def _spans(report: Report, khat: float, threshold: float) -> bool:
    """Whether the interval around a k-hat holds the threshold."""
    num = max(1, (report.num_samples - report.num_nonfinite) // report.num_sets)
    low, high = khat_interval(khat, num, report.num_sets)
    return low < threshold < high


def judge(report: Report) -> None:
    """Set level, verdict, and advice on the model's densities."""
    failed = report.num_nonfinite - round(report.outside * report.num_samples)
    rounded = max(report.rounded_sites.values(), default=0)
    if failure := _failure(report, failed, rounded):
        report.level, words = "bad", f"do not trust: {failure}"
    elif not (uneven := _uneven(report)):
        report.level = "good"
        words = f"good: the weights are nearly equal (ESS {report.ess_fraction:.1%}), use its draws"
    elif unsure := _unsure(report):
        report.level, words = "bad", f"do not trust: {unsure}"
    else:
        report.level, words = "resample", f"usable with resampling: {uneven}"
    if report.outside:
        words += f"; {report.outside:.2%} of the draws lie outside the support and have weight zero"
    if failed:
        words += f"; {failed} draws were not finite and have weight zero"
    if 0 < report.missed_share <= MISSED and report.missed_effect <= 1:
        words += f"; its draws miss {report.missed_share:.1%} of the mass or more"
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
    if report.missed_share > MISSED or report.missed_effect > 1:
        return missing(report.missed, report.missed_share)
    if (report.wide is None or not report.wide.sound) and (heavy := _heavy(report)):
        return heavy
    return _unseen(report, report.wide) if report.wide is not None else None


def _heavy(report: Report) -> str | None:
    """What says that the weights have no such moments as the draws would give."""
    threshold = report.khat_threshold
    worst, name = report.marginals.worst
    if not report.khat <= threshold:
        return f"k-hat {report.khat:.2f} is above {threshold:.2f}{_doubt(report)}"
    if report.ess < FEW_EFFECTIVE:
        return f"only {report.ess:.0f} of {report.num_samples} draws are effective"
    threshold = _threshold_of_latents(report)
    if not worst <= threshold:
        return f"k-hat {worst:.2f} of weight times {name} or its square is above {threshold:.2f}"
    return None


def _doubt(report: Report) -> str:
    spans = _spans(report, report.khat, report.khat_threshold)
    return ", but the interval spans it" if spans else ""


def _unseen(report: Report, wide: WideReport) -> str | None:
    """What wider draws find that the weighted draws of the guide do not, if anything.

    Where their weights, or those times a latent or its square, have a heavy tail, their standard
    errors say too little, and are not allowed for.
    """
    worst, name = wide.marginals.worst
    if wide.unseen:
        return wide.unseen
    low, _ = khat_interval(worst, len(wide.log_weights))
    tail = low > wide.khat_threshold + MARGIN
    sure = 0.0 if tail or wide.khat_interval[0] > wide.khat_threshold else 1.0
    error = sure * math.hypot(wide.log_evidence_se, report.log_evidence_se)
    more = wide.log_evidence - report.log_evidence
    if more > UNSEEN + SURE * error:
        return f"wider draws find {math.expm1(more):.0%} more mass than its own"
    own, other = report.marginals.smoothed, wide.marginals.smoothed
    errors = combined(own.mean_error, other.mean_error), combined(own.sd_error, other.sd_error)
    errors = sure * errors[0], sure * errors[1]
    size, words = disagreement(report.marginals.names, own, other, errors)
    found = f", and a tail of {name} with a k-hat of {worst:.2f}" if tail else ""
    return f"wider draws correct {words}{found}" if size > 1 else None


def _uneven(report: Report) -> str | None:
    """Why the draws need their weights, if so."""
    if report.outside > LOST:
        return f"{report.outside:.1%} of the draws are not the posterior's"
    if not has_even_weights(report):
        if _heavy(report):
            return "wider draws agree with the weighted ones"
        return f"k-hat {report.khat:.2f} is below {report.khat_threshold:.2f}{_doubt(report)}"
    found = report.marginals
    size, words = disagreement(found.names, found.plain, found.smoothed, found.moved)
    if size > 1:
        return f"the weights correct {words}"
    if max(error.max().item() for error in found.moved) > LIMIT:
        return "the weights leave open by how much they correct the draws"
    if report.wide is None:
        return None
    own, other = found.plain, report.wide.marginals.smoothed
    errors = combined(own.mean_error, other.mean_error), combined(own.sd_error, other.sd_error)
    size, words = disagreement(found.names, own, other, errors)
    return f"wider draws correct {words}" if size > 1 else None


def _unsure(report: Report) -> str | None:
    """Why the weighted draws are too few, if so."""
    if report.ess < FEW_EFFECTIVE:
        return f"only {report.ess:.0f} of {report.num_samples} draws are effective"
    if name := report.marginals.uncertain():
        return f"too few draws are effective for the mean and sd of {name}"
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


def advice_on_fit(report: Report, funnels: dict[str, Funnel], bound: BoundModel) -> list[str]:
    """What to try where a guide is not good, by the sites that form a funnel."""
    advice, mixture = [], isinstance(bound.guide, MixtureGuide)
    if any(missed.apart for missed in report.missed) and not mixture:
        advice.append("fit guides from several starts (init_loc_fn), one at each mode")
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
    return advice + ([] if mixture else _advice_on_guide(bound))


def _advice_on_guide(bound: BoundModel) -> list[str]:
    """What may be more of in the guide, and a richer one that takes the model."""
    guide, more = bound.guide, []
    if isinstance(guide, nn.Module):
        trained = any(p.requires_grad for p in guide.parameters())
    else:
        trained = any(node["type"] == "param" for node in bound.guide_trace.nodes.values())
    if trained:
        layers = isinstance(guide, AmortizedPlanarGuide) or hasattr(guide, "num_layers")
        what = ", and more layers" * layers or ", and more transforms" * isinstance(guide, AutoFlow)
        more = [f"more steps in fit_guide{what}"]
    return more + _richer(bound)


def _richer(bound: BoundModel) -> list[str]:
    guide, nodes = bound.guide, bound.model_trace.nodes
    wide = sum(nodes[name]["value"].numel() for name in bound.latents) > WIDEST
    if isinstance(guide, AutoSylvesterFlow) and not guide.tails:
        return ["tails=True, a last layer for the skew and the tails of each latent"]
    kinds = list(reversed(RICHER)) if wide else list(RICHER)
    if isinstance(guide, AutoSylvesterFlow):  # all are
        kinds = [AutoSylvesterFlow] * (isinstance(guide, AutoStructuredFlow) and not wide)
    made = next((kind for kind in kinds if _takes(kind, bound)), None)
    return [f"a richer guide: {made.__name__}, {RICHER[made]}"] if made else []


def _takes(made: type[AutoFlow], bound: BoundModel) -> bool:
    """Whether guides of a kind can be made for a model, and have rows if they are for such."""
    try:
        with seeded(0), poutine.block(), pyro.get_param_store().scope(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = made(bound.given).setup(*bound.args, **bound.kwargs)
    except FAILURES:
        return False
    return made is not AutoStructuredFlow or bool(found.kinds)
