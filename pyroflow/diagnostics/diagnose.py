"""The draws behind a report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch

from pyroflow.checks import check_count
from pyroflow.diagnostics.causes import find_funnels, find_symmetries
from pyroflow.diagnostics.marginals import Columns, columns_of, effect, marginals
from pyroflow.diagnostics.report import Report, unjudged
from pyroflow.diagnostics.rows import RowWeights, Weighed
from pyroflow.diagnostics.verdict import advice_on_fit, is_undecided, judge
from pyroflow.diagnostics.wider import WideReport, wide_draws
from pyroflow.guides import AmortizedPlanarGuide, AutoStructuredFlow
from pyroflow.guides.arguments import data_into_args
from pyroflow.guides.flow_guide import FlowGuide
from pyroflow.inference.census import WIDEST, Mode, census, starts_around
from pyroflow.inference.missed import Missed, missed_by, modes_missed, shares_missed
from pyroflow.model.bound import BoundModel
from pyroflow.model.comparison import FAILURES
from pyroflow.model.draws import Draws, draw
from pyroflow.model.log_joint import LogJoint
from pyroflow.model.log_joint_at_hand import LogJointInFull
from pyroflow.seeds import between_draws, one_at_a_time, seeded

LEAST_WIDE = 1000  # draws wider than the guide
LEAST_DEAR = 1000  # draws of the guide, where each is dear
LEAST_ESS = 0.05  # part of the guide's draws that are effective, for wider ones to be of use
BY_ROWS = AutoStructuredFlow, AmortizedPlanarGuide  # whose rows are independent given globals
NUMBERS = 2**25  # in a set of draws of all rows
POINTS, FEW_POINTS = 128, 16  # at which the log joint is evaluated at a time, and of many rows


@data_into_args("num_samples", "seed", "max_sets")
@one_at_a_time
def diagnose(
    model: Callable,
    guide: Callable,
    *data: Any,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    num_samples: int = 10_000,
    seed: int | None = 0,
    max_sets: int = 5,
) -> Report:
    """Say whether a guide can be trusted, by three kinds of check.

    1. Importance weights of its own draws: k-hat of the weights, and of the weights times each
       unconstrained latent and its square, so that a wrong standard deviation shows; the means
       and standard deviations of the draws, with and without weights. One k-hat is noise: at
       10,000 draws it strays by 0.1. As long as its interval holds the threshold, another set of
       draws is taken and the k-hats are averaged. The other numbers are of all draws together. Of
       an :class:`~pyroflow.AutoStructuredFlow` or an :class:`~pyroflow.AmortizedPlanarGuide` in
       full globals have marginal weights, and rows their own.
    2. For these and guides of the :class:`~pyroflow.AutoFlow` family, draws of a mixture wider than
       the guide, which see heavier tails than its own. Where they are sound, they decide.
    3. For that family, with up to 256 latents, a census of the modes of the posterior: what the
       guide never draws no weight can show. For an :class:`~pyroflow.AutoStructuredFlow` of more,
       a search from a few starts.

    The last two need a model that runs many draws at once, and are left out, as the report says,
    where the first already condemns the guide.

    Args:
        model: A Pyro model.
        guide: A fitted guide for it, of any kind.
        data: Arguments of model and guide, as in Pyro's ``svi.step(x, y)``. A tuple or list in
            first place is taken as ``args``, and a dict or None after it as ``kwargs``.
        args: The same as a tuple: for a model whose first argument is a tuple or list.
        kwargs: Keyword arguments of model and guide.
        num_samples: Draws of a set, at least 100; fewer, down to 1,000, where the data are many.
        seed: Makes the report reproducible, without touching the global generator; None for other
            draws each time.
        max_sets: Sets at most; one, where each draw takes a run of the model.

    Returns:
        Numbers, verdict and advice, with the draws themselves.

    Raises:
        ValueError: If the model has no latents, or discrete ones that the guide does not sample;
            if the guide samples other sites than the model, or a point only; if a plate
            subsamples, of whose rows the guide does not know all; if a log density is NaN or −inf
            for every draw (each names the site); if num_samples is below 100, or max_sets below 1.

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
    return checked((model, guide, args, kwargs), num_samples, seed, max_sets)


def checked(
    given: tuple, num_samples: int, seed: int | None, max_sets: int, before: Report | None = None
) -> Report:
    """As :func:`diagnose`, of (model, guide, args, kwargs).

    ``before`` is an earlier report on the same guide. Where draws are dear its modes are taken:
    other draws can refute the first ones, but ascents find again what they found.
    """
    with seeded(seed):
        bound = BoundModel.for_weights(*given, in_full=True)
        in_full = LogJointInFull.of(bound, POINTS)
        sets = _Sets(bound, bound.runs.few(num_samples, LEAST_DEAR), in_full)
        report = sets.report()
        with pyro.validation_enabled(False):
            far = _FarChecks(bound, sets, before if bound.runs.dear else None)
            far.widen(report)
            while is_undecided(report) and len(sets.draws) < max_sets and not bound.sequential:
                sets.take()
                report = sets.report(report.wide)
            far.count(report)
            judge(report)
        if sets.size < num_samples:
            many = "data" if bound.runs.dear else "latents"
            report.fewer = f"{sets.size:,} a set and not {num_samples:,}, as the {many} are many"
    if report.level != "good":
        known = report.missed and bound.guide.latent_dim <= WIDEST  # their covariances
        symmetries = find_symmetries(bound.guide, report.modes) if known else []
        funnels = {} if bound.subsampled else find_funnels(bound, report.draws)
        report.advice += symmetries + advice_on_fit(report, funnels, bound)
    return report


class _Sets:
    """The sets of a guide's own draws, and what they say."""

    def __init__(self, bound: BoundModel, size: int, in_full: LogJointInFull | None) -> None:
        self.bound, self.size, self.in_full = bound, size, in_full
        self.draws: list[Draws] = []
        self.columns: list[Columns] = []
        self.weighed: list[Weighed] = []
        self.rows: RowWeights | None = None
        self.why_joint = ""
        if in_full is not None:
            self.size = min(size, max(LEAST_DEAR, NUMBERS // bound.guide.latent_dim))
            self.why_joint = f"weighed together, of {in_full.part.subsampling}"
        elif isinstance(bound.guide, BY_ROWS) and not bound.learns:
            self._by_rows(self._find_rows)
        self.take()
        first = self.draws[0]
        if point := first.point:
            raise ValueError(
                f"the guide has one point for site {point!r} and no distribution, so it has no "
                "ELBO or weights: pass a guide with a density there, such as AutoPlanarFlow(model)"
            )
        first.check_weighted()

    def take(self) -> None:
        """One more set."""
        draws = self.in_full.draw if self.in_full else partial(draw, self.bound)
        self.draws.append(draws(self.size))
        self.columns.append(columns_of(self.draws[-1].sites, self.bound.runs.records))
        if self.rows is not None:
            self._by_rows(self._weigh)

    def _by_rows(self, step: Callable[[], None]) -> None:
        """A step of the weights by rows, without which they are joint."""
        try:
            with between_draws(), pyro.validation_enabled(False):
                step()
        except FAILURES as error:
            self.rows, self.why_joint = None, f"weighed together, as {error}"

    def _find_rows(self) -> None:
        few = self.bound.runs.few(POINTS, FEW_POINTS, rows=True)
        self.rows = RowWeights(self.bound, few)
        self.size = min(self.size, self.rows.most)

    def _weigh(self) -> None:
        self.weighed.append(self.rows.weigh(self.draws[-1], self.columns[-1]))

    def report(self, wide: WideReport | None = None) -> Report:
        """Without a verdict."""
        weighed, columns = self.draws, self.columns
        if self.rows is not None:
            weighed, columns, *_ = zip(*self.weighed, strict=True)
        found = marginals(columns, [part.log_weights for part in weighed])
        if wide is not None:
            wide = WideReport.of(wide.columns, wide.log_weights, found, wide.unseen)
        report = unjudged(self.draws, weighed, found, wide)
        report.rows = None if self.rows is None else self.rows.report(self.weighed)
        report.by_rows = str(report.rows or self.why_joint)
        return report


class _FarChecks:
    """The checks that see further than the guide's own draws, as far as they can be made."""

    def __init__(self, bound: BoundModel, sets: _Sets, before: Report | None) -> None:
        self.bound, self.size, self.rows = bound, max(LEAST_WIDE, sets.size), sets.rows
        self.known = [] if before is None else before.modes
        self.log_joint: LogJoint | None = sets.in_full
        self.why = self._why_not()

    def _why_not(self) -> str | None:
        if not isinstance(self.bound.guide, FlowGuide) and self.rows is None:
            return "the guide is not of the AutoFlow family"
        if self.bound.learns:
            return "the model has parameters"
        if self.bound.sequential:
            return "each draw takes a run of the model"
        return None

    def widen(self, report: Report) -> None:
        """Add what wider draws say, unless the guide is past saving."""
        if self.why is None and report.ess_fraction < LEAST_ESS:
            self.why = "too few of the guide's draws are effective"
        if self.why is not None:
            report.census = f"not taken: {self.why}"
            return
        try:
            with between_draws():
                bound, rows, size = self.bound, self.rows, self.size
                known = rows.log_joint if rows else self.log_joint
                self.log_joint = known or LogJoint(bound, bound.guide, POINTS)
                found = rows.wide(size) if rows else wide_draws(bound, self.log_joint, size)
        except FAILURES as error:  # such as a matrix that is singular far from the guide
            self.why = f"the model fails far from the guide's draws ({error})"
            return
        columns, log_weights, *unseen = found
        report.wide = WideReport.of(columns, log_weights, report.marginals, *unseen)

    def count(self, report: Report) -> None:
        """Add the census of modes."""
        guide = self.bound.guide
        rows = isinstance(guide, AutoStructuredFlow)
        if self.why is None and not isinstance(guide, FlowGuide):
            self.why = "its rows are those of networks"
        if self.why is None and guide.latent_dim > WIDEST and not rows:
            self.why = f"it is for up to {WIDEST} latents, and there are {guide.latent_dim}"
        if self.why is None:
            try:
                with between_draws():
                    modes, missed = self._counted(report)
                    if self.rows is not None:
                        missed = [part for part in missed if self.rows.misses(part.mode.loc)]
            except FAILURES as error:
                self.why = f"the model fails far from the guide's draws ({error})"
        if self.why is not None:
            report.census = f"not taken: {self.why}"
            return
        report.modes, report.missed = modes, missed
        shares = shares_missed(missed, report.log_evidence)
        report.missed_share = sum(shares)
        if missed:
            there = torch.stack([part.mode.loc for part in missed])
            there = columns_of(guide.constrain(there)[0], self.bound.runs.records)
            report.missed_effect = effect(report.marginals, there, shares)
        report.census = f"{len(modes)} modes" if len(modes) != 1 else "one mode"
        if missed:
            share = f"{report.missed_share:.1%} of the mass"
            report.census += f"; the guide's draws miss {share} in {len(missed)} of them"

    def _counted(self, report: Report) -> tuple[list[Mode], list[Missed]]:
        """The modes, and those missed; above 256 latents the guide's own is all that it draws."""
        guide, log_joint, evidence = self.bound.guide, self.log_joint, report.log_evidence
        wide = guide.latent_dim > WIDEST
        starts = None if self.known and not wide else starts_around(self.bound, guide, log_joint)
        if wide:
            missed = modes_missed(log_joint, guide, starts, evidence)
            own = guide.affine.centre[guide.affine.place]
            own = Mode(own, own.new_zeros(0, 0), evidence, 1, own)
            return [own, *(m.mode for m in missed)], missed
        modes = self.known or census(log_joint, starts)
        drawn = guide.unconstrain(report.draws.sites)[0], report.log_weights.exp()
        return modes, missed_by(modes, log_joint, guide.flow(), evidence, drawn)
