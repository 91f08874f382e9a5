"""A posterior in one call: fits of rising cost, each checked, until one can be trusted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from pyroflow.chains import Chains
from pyroflow.checks import check_count
from pyroflow.diagnostics import Report
from pyroflow.diagnostics.diagnose import checked
from pyroflow.guides import AutoFlow, AutoStructuredFlow, AutoSylvesterFlow
from pyroflow.guides.arguments import data_into_args
from pyroflow.guides.mixture import MixtureGuide
from pyroflow.inference.guide import inspected
from pyroflow.inference.guide_fit import WIDEST_WARM_START, fit_flow, refuse_nonfinite
from pyroflow.inference.objectives import LogJointBound
from pyroflow.ladder.checks import (
    TRUSTED,
    apart,
    chains_over,
    is_exact,
    rank,
    thinned,
    unsettled,
)
from pyroflow.ladder.mixing import Mixing
from pyroflow.ladder.result import Posterior, Rung
from pyroflow.model.arguments import warn_of_forgotten_data
from pyroflow.model.bound import BoundModel, check_latents, check_whole
from pyroflow.seeds import between_draws, one_at_a_time, seeded

STEPS = (300, 1000, 3000)  # of the fits, each going on from the last
CHECKED = 10_000  # draws of a check
MIXTURES = 4  # that are tried after each of them
LAYERS = 6  # of the flow
MOST_LEAPS = 16  # of a trajectory of chains that go on, where more steps of the fit are left


@data_into_args()
@one_at_a_time
def posterior(
    model: Callable,
    *data: Any,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    seed: int = 0,
    num_samples: int = 10_000,
    progress: bool = True,
) -> Posterior:
    """Fit a flow to a model's posterior, check it, and mend it until it can be trusted, or say so.

    In turn, each going on from the last, until the checks of :func:`~pyroflow.diagnose` hold on two
    sets of draws and the Monte Carlo error of every mean is at most 0.05 standard deviations:

    1. A Sylvester flow with a layer for tails, in the coordinates that the model dictates, from
       the best Gaussian: 300 steps, or fewer where nothing is left to gain. Above 256 latents it
       is an :class:`~pyroflow.AutoStructuredFlow`, and there are no chains and no mixtures.
    2. Chains of :func:`~pyroflow.mcmc` over it, which go on while that may settle them, and must
       agree with each other.
    3. A mixture with a flow at each mode of the census, and a wider part where the flow has too
       little mass.
    4. The same after 1,000 more steps of the flow, or of the parts, and after 3,000 more.

    Else the level is "bad", with the reason. Ctrl-C ends it with the best so far, called what
    it is.

    Args:
        model: a Pyro model.
        data: its arguments, as in Pyro's ``svi.step(x, y)``. A tuple or list in
            first place is taken as ``args``, and a dict or None after it as ``kwargs``.
        args: the same as a tuple: for a model whose first argument is a tuple or list.
        kwargs: its keyword arguments.
        seed: makes the result reproducible, without touching the global generator.
        num_samples: draws, at least 1,000; those of chains are fewer where latents are thousands.
        progress: show each rung as it ends.

    Returns:
        Draws and verdict, the guide, and how it was reached.

    Raises:
        TypeError: If the model is not callable, or the arguments are no tuple and dict.
        RuntimeError: If the model has no latents.
        ValueError: If a latent is discrete, a plate subsamples, the latents change from run to run,
            or the log density is finite nowhere near the start (each names the site); if the
            model has parameters of its own, or num_samples is below 1,000.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(y):
        ...     rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Poisson(rate), obs=y)
        >>> post = posterior(model, (torch.tensor([3.0, 1.0, 4.0]),), seed=0, progress=False)
        >>> post.level, f"{post.draws['rate'].mean():.1f}"  # exact: 10 / 4
        ('good', '2.5')
    """
    check_count("num_samples", num_samples, 1000)
    check_count("seed", seed, 0)
    warn_of_forgotten_data(model, args, kwargs or {})
    climb = _Climb(model, args, dict(kwargs or {}), seed, num_samples, progress)
    try:
        climb.run()
    except KeyboardInterrupt:
        if not climb.has_result():
            raise
        climb.reason = "it was interrupted"
    return climb.result()


class _Climb:
    """One way up the ladder."""

    def __init__(
        self, model: Callable, args: tuple, kwargs: dict, seed: int, num: int, progress: bool
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.seed, self.num, self.progress = seed, num, progress
        self.flow, self.guide = AutoFlow(model, (), affine=None), None  # to count the latents with
        self.report: Report | None = None
        self.latest: Report | None = None
        self.chains: Chains | None = None
        self.began = self.last = time.perf_counter()
        self.rungs, self.reason, self.refuted, self.checks = [], "", "", 0

    def has_result(self) -> bool:
        """Whether there is a guide with its report, or a fitted one to report on."""
        flow = self.flow
        if self.report is None and flow.prototype_trace is not None and flow.flow.fitted:
            self._holds(flow, "flow, cut off")
        return self.report is not None

    def run(self) -> None:
        """Climb until a rung holds."""
        with seeded(self.seed):
            self.flow.setup(*self.args, **self.kwargs)
            flow = self.flow = _made(self.model, self.flow.latent_dim)
            problem = _problem(self.model, flow, self.args, self.kwargs)
            bound = LogJointBound(problem, "elbo", 1, None, seed=self.seed)
        make = partial(_made, self.model, flow.latent_dim)
        mixing = Mixing(problem, (flow, bound), make, self.seed)
        for steps in STEPS:
            if len(mixing.parts) > 1:
                if self._by_parts(mixing, steps):
                    return
                continue
            with seeded(self.seed), between_draws():
                fit = fit_flow(bound, steps, self.seed, progress=False)
            # Of many rows chains are cheaper than a second set of draws, and see further.
            by_rows = isinstance(flow, AutoStructuredFlow)
            held = self._holds(flow, f"flow, {fit.steps} steps", twice=not by_rows)
            leaps = MOST_LEAPS if steps < STEPS[-1] else math.inf
            if (held and not by_rows) or self._by_chains(flow, mixing, leaps):
                return
            if held and not self.refuted and self._holds(flow, "the same, other draws"):
                return
            if self._by_mixture(mixing):
                return
            if not fit.steps and len(mixing.parts) < 2:  # with nothing left to gain
                return

    def _holds(self, guide: AutoFlow | MixtureGuide, name: str, twice: bool = True) -> bool:
        """Whether the guide's draws hold two checks, or one; the better guide so far is kept."""
        self.latest = report = self._check(guide, most=3 if twice else 1)
        # A guide that was trained on is no longer the one that its earlier report is of.
        if self.report is None or guide is self.guide or rank(report) >= rank(self.report):
            self.guide, self.report = guide, report
        held = is_exact(guide, report)
        if held and twice:  # what was looked at before is no check of what was chosen by it
            self.latest = report = self._check(guide, report)
            held = is_exact(guide, report)
            self.guide, self.report, self.refuted = guide, report, ""
        self._note(name, report.verdict)
        return held

    def _check(
        self, guide: AutoFlow | MixtureGuide, before: Report | None = None, most: int = 3
    ) -> Report:
        """What at most so many sets of draws say."""
        self.checks += 1
        seed = self.seed + 1000 * self.checks
        return checked((self.model, guide, self.args, self.kwargs), CHECKED, seed, most, before)

    def _by_mixture(self, mixing: Mixing) -> bool:
        """Whether a mixture holds: a part at each mode, and one for what is wider than the flow."""
        for _ in range(0 if _is_wide(self.flow.latent_dim) else MIXTURES):
            with seeded(self.seed), between_draws():
                added = mixing.add(self.latest)
                mixture = mixing.mixture() if added else None
            if mixture is None:
                return False
            if self._holds(mixture, f"mixture of {len(mixture.guides)} flows"):
                return True
        return False

    def _by_parts(self, mixing: Mixing, steps: int) -> bool:
        """Whether the mixture holds after more steps of its parts."""
        with seeded(self.seed), between_draws():
            mixing.train(steps)
            mixture = mixing.mixture()
        name = f"mixture of {len(mixture.guides)} flows, {steps} steps more"
        return self._holds(mixture, name) or self._by_mixture(mixing)

    def _by_chains(self, flow: AutoFlow, mixing: Mixing, most_leaps: float) -> bool:
        """Whether chains agree, where the checks do not say that there is more than they reach."""
        self.refuted = ""
        if self.latest.missed or len(mixing.modes) > 1:
            return False
        chains = chains_over(flow, self.latest, mixing.problem, self.seed, most_leaps)
        if chains is None:
            return False
        given = self.latest, chains, mixing.problem
        other = (apart(*given) or unsettled(*given)) if chains.level == "good" else ""
        self._note(f"{chains.num_chains} chains", f"{chains.verdict}{other and f'; but {other}'}")
        self.chains = None if other else chains
        if chains.level == "good":
            self.refuted = other and f"do not trust: {other}"
        else:
            self.refuted = chains.verdict
        return not self.refuted

    def _note(self, name: str, verdict: str) -> None:
        now = time.perf_counter()
        rung, self.last = Rung(name, now - self.last, verdict), now
        self.rungs.append(rung)
        if self.progress:
            tqdm.write(f"posterior: {rung.name}, {rung.seconds:.1f} s: {rung.verdict}")

    def result(self) -> Posterior:
        """The best so far, called what it is."""
        report, chains = self.report, self.chains
        if chains is not None and chains.level == "good":
            index = thinned(len(chains.log_p), self.num)
            draws = {name: value[index].clone() for name, value in chains.draws.items()}
            level, verdict, ess = "good", chains.verdict, chains.ess
        else:
            draws, ess = report.resample(self.num, seed=self.seed), report.ess
            level, verdict = report.level, report.verdict
            if level in TRUSTED and (self.refuted or not is_exact(self.guide, report)):
                level, tails = "bad", f"the tails of {report.marginals.worst[1]} are not settled"
                verdict = self.refuted or f"do not trust: {tails}"
        error = 1 / math.sqrt(ess) if level in TRUSTED else math.inf
        if self.reason:
            verdict += f"; {self.reason}"
        return Posterior(
            draws,
            level,
            verdict,
            report.log_evidence,
            error,
            self.guide,
            report,
            chains,
            self.rungs,
            time.perf_counter() - self.began,
            self.model,
            self.args,
            self.kwargs,
        )


def _problem(model: Callable, guide: AutoFlow, args: tuple, kwargs: dict) -> BoundModel:
    """Model and guide, found to fit together."""
    problem, valid = inspected(model, guide, args, kwargs)
    check_latents(problem)
    check_whole(problem)
    if problem.learns:
        raise ValueError(
            "the model has parameters (pyro.param, or of a PyroModule), and a posterior is of "
            "its latents alone: train them by fit_guide with a guide, or give them priors by "
            "pyro.sample"
        )
    if not valid and guide.latent_dim > WIDEST_WARM_START:
        refuse_nonfinite(problem)
    return problem


def _is_wide(dim: int) -> bool:
    return dim > WIDEST_WARM_START


def _made(model: Callable, dim: int) -> AutoFlow:
    """A guide for so many latents."""
    made = AutoStructuredFlow if _is_wide(dim) else AutoSylvesterFlow
    return made(model, num_layers=LAYERS, tails=True)
