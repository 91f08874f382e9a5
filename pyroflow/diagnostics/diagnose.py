"""The draws behind a report."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pyroflow.checks import check_count
from pyroflow.diagnostics.funnel import find_funnels
from pyroflow.diagnostics.psis import khat_interval, khat_threshold, pareto_smooth
from pyroflow.diagnostics.report import Report, advice_on_fit, is_undecided, judge
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import Draws, draw, join
from pyroflow.seeds import one_at_a_time, seeded


@one_at_a_time
def diagnose(
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    num_samples: int = 10_000,
    seed: int | None = 0,
    max_sets: int = 5,
) -> Report:
    """Say whether a guide can be trusted, from importance weights of its own draws.

    One k-hat is noise: at 10,000 draws it strays by 0.1. As long as its interval holds the
    threshold, and the weights are not nearly equal, another set of draws is taken and the k-hats
    are averaged. The other numbers are of all draws together.

    What the guide never draws, such as a mode that it misses, no weight can show:
    :func:`~pyroflow.calibrate` can.

    Args:
        model: A Pyro model.
        guide: A fitted guide for it, of any kind.
        args: Positional arguments of model and guide.
        kwargs: Keyword arguments of model and guide.
        num_samples: Draws of a set, at least 100.
        seed: Makes the report reproducible, without touching the global generator; None for other
            draws each time.
        max_sets: Sets at most; one, where each draw takes a run of the model.

    Returns:
        Numbers, verdict and advice, with the draws themselves.

    Raises:
        ValueError: If the model has no latents, or discrete ones that the guide does not sample;
            if the guide samples other sites than the model, or a point only; if a plate
            subsamples, or a log density is NaN or −inf for every draw (each names the site); if
            num_samples is below 100, or max_sets below 1.

    References:
        Yao, Vehtari, Simpson and Gelman, Yes, but Did It Work?: Evaluating Variational Inference,
        2018, https://arxiv.org/abs/1802.02538, section 3.

    Example:
        >>> from pyroflow import AutoPlanarFlow
        >>> from pyroflow.targets import toy_model
        >>> report = diagnose(toy_model, AutoPlanarFlow(toy_model), num_samples=1000)
        >>> report.level in ("good", "resample", "bad"), report.resample(50)["z"].shape
        (True, torch.Size([50, 2]))
    """
    check_count("num_samples", num_samples, 100)
    check_count("max_sets", max_sets, 1)
    with seeded(seed):
        bound = BoundModel.for_weights(model, guide, args, kwargs)
        sets = [draw(bound, num_samples)]
        if point := sets[0].point:
            raise ValueError(
                f"the guide has one point for site {point!r} and no distribution, so it has no "
                "ELBO or weights: pass a guide with a density there, such as AutoPlanarFlow(model)"
            )
        sets[0].check_weighted()
        report = _report(sets)
        while is_undecided(report) and len(sets) < max_sets and not bound.sequential:
            sets.append(draw(bound, num_samples))
            report = _report(sets)
    judge(report)
    if report.level != "good":
        report.advice += advice_on_fit(report, find_funnels(bound, report.draws))
    return report


def _report(sets: list[Draws]) -> Report:
    draws = join(sets)
    raw, num = draws.log_weights, len(draws)
    finite = raw[raw.isfinite()]
    khats = [pareto_smooth(part.log_weights)[2] for part in sets]
    khat = sum(khats) / len(khats)
    smoothed, log_sum, _ = pareto_smooth(raw)
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
        draws=draws,
        log_weights=smoothed,
    )
