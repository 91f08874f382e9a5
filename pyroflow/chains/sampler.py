"""Exact draws from a posterior, by many chains over a fitted guide."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch

from pyroflow.chains.convergence import LEAST_DRAWS
from pyroflow.chains.hmc import HMC
from pyroflow.chains.independence import Independence, Proposal
from pyroflow.chains.pilot import Pilot, take_pilot
from pyroflow.chains.result import Chains, Recorded, is_short, judge, result, times_as_long
from pyroflow.chains.row_wise import RowWise, row_wise
from pyroflow.chains.target import Points, Target
from pyroflow.checks import check_choice, check_count
from pyroflow.guides import AutoFlow
from pyroflow.guides.arguments import data_into_args
from pyroflow.model.bound import BoundModel, check_latents, check_sites
from pyroflow.progress import progress_bar
from pyroflow.seeds import between_draws, one_at_a_time, seeded

METHODS = ("independence", "independence and HMC", "HMC", "rows")
MOSTLY, IN_TURNS = 0.5, 0.05  # acceptances above which independence does most, or is of use
STAY = 0.02  # of a chain, the longest expected stay without HMC; the longest of all is longer
PERIOD = 8  # steps to one of HMC, where independence does most

CHAINS, CHAINS_ONE_BY_ONE, CHAINS_WIDE = 128, 8, 16  # the last, of more than 256 latents
PILOT, PILOT_ONE_BY_ONE = 10_000, 200  # draws
WIDE, NUMBERS, LEAST_PILOT = 256, 1e7, 1000  # latents, and numbers of a pilot set, for fewer draws
WARMUP, WARMUP_HMC = 100, 400

LONGER_RUNS = 2  # after a first one whose chains disagree
NEAR_RHAT = 1.1  # above which HMC in each step is not tried
MOST_THIN, MARGIN = 4, 1.2  # steps to a draw, and by how much they exceed what R-hat asks for

Kernel = Independence | HMC | RowWise


@data_into_args("num_samples", "num_chains", "seed")
@one_at_a_time
def mcmc(
    model: Callable,
    guide: AutoFlow,
    *data: Any,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    num_samples: int = 1000,
    num_chains: int | None = None,
    seed: int | None = 0,
    warmup: int | None = None,
    method: str = "auto",
    wide: float = 0.05,
    progress: bool = True,
) -> Chains:
    r"""Draw from the exact posterior, by many chains in the base space of a fitted guide.

    There the posterior has the density p(T(u)) \|det T'(u)\|, close to the flow's base if the guide
    is good. All chains run side by side, by one of three methods:

    - ``"independence"``: Metropolis steps whose proposals are the guide's own draws, 5 % of them
      from a wider distribution. No gradient is needed.
    - ``"HMC"``: Hamiltonian trajectories over the guide, with the step size, the length and a unit
      of each number found in the warm-up.
    - ``"independence and HMC"``: in turns.
    - ``"rows"``: of an :class:`~pyroflow.AutoStructuredFlow`, steps of the globals, with which the
      rows move, and steps in which each row accepts or rejects by itself. Its acceptance does not
      fall with the number of rows.

    A pilot set of the guide's draws says which by default. Where over half of the proposals will
    be accepted, it is the first, or, if a chain would stay for long where its weight is large,
    eight of its steps to one of HMC; where over 5 %, it is both in turns; and else HMC alone. Where
    the first does not do for a structured guide, it is the last, if rows can be told apart. The
    result's ``method`` says which it was. Energies are in float64, whatever the model's dtype.
    Chains start from draws by their importance weights, a quarter of them from the guide's draws
    as they are.

    It does not mend what the guide has never seen: a far mode, or the neck of a funnel, is as
    invisible to chains that start from the guide's draws and move over its map.

    See Also:
        :func:`~pyroflow.diagnose`, which weighs the guide's draws; :func:`~pyroflow.neutra`, for
        Pyro's own samplers.

    References:
        Hoffman et al., NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using neural
        transport, 2019, https://arxiv.org/abs/1903.03704; Hoffman, Radul and Sountsov, An
        adaptive-MCMC scheme for setting trajectory lengths in Hamiltonian Monte Carlo, 2021,
        https://proceedings.mlr.press/v130/hoffman21a.html.

    Args:
        model: A Pyro model.
        guide: A guide of the :class:`~pyroflow.AutoFlow` family, fitted to it.
        data: Arguments of model and guide, as in Pyro's ``svi.step(x, y)``. A tuple or list in
            first place is taken as ``args``, and a dict or None after it as ``kwargs``.
        args: The same as a tuple: for a model whose first argument is a tuple or list.
        kwargs: Keyword arguments of model and guide.
        num_samples: Draws of each chain, at least 4.
        num_chains: C; by default 128, 16 of more than 256 latents, and 8 where each point takes a
            run of the model.
        seed: Makes draws reproducible without touching the global generator; None for new draws.
        warmup: Steps before those, left out; by default 100, and 400 where HMC does half or all.
        method: One of the four above, or "auto".
        wide: Part of the proposals that come from the wider distribution, from 0 to below 1.
        progress: Show a progress bar, in a notebook or on a terminal.

    Returns:
        The draws, with R-hat, effective sample sizes and a verdict.

    Raises:
        TypeError: If the guide is of another family, or has no rows for the method "rows".
        ValueError: If the guide was never fitted or set up, or for other latents; if a latent site
            is discrete, or a plate subsamples; if the log density is finite nowhere (each names
            the site); if an option is out of range.

    Example:
        >>> from pyroflow import AutoPlanarFlow, fit_guide
        >>> from pyroflow.targets import eight_schools_noncentered as model
        >>> guide = AutoPlanarFlow(model, num_layers=2)
        >>> fit = fit_guide(model, guide, steps=20, seed=0, progress=False)
        >>> chains = mcmc(model, guide, num_samples=100, num_chains=16, progress=False)
        >>> chains.draws["theta_trans"].shape, chains.acceptance > 0.3
        (torch.Size([1600, 8]), True)
    """
    check_count("num_samples", num_samples, LEAST_DRAWS)
    check_count("num_chains", CHAINS if num_chains is None else num_chains, 1)
    check_count("warmup", WARMUP if warmup is None else warmup, 0)
    check_choice("method", method, ("auto", *METHODS))
    if isinstance(wide, bool) or not isinstance(wide, int | float) or not 0 <= wide < 1:
        raise ValueError(f"wide must be a number from 0 to below 1, got {wide!r}")
    with seeded(seed), pyro.validation_enabled(False):
        options = {"warmup": warmup, "method": method, "wide": wide}
        sampler = Sampler(model, guide, args, kwargs, num_samples, num_chains, **options)
        return sampler.run(num_samples, progress=progress)


class Sampler:
    """Chains over a guide, which go on from where they are with each :meth:`run`.

    Args:
        model, guide, args, kwargs, num_chains, warmup, method, wide: as of :func:`mcmc`.
        num_samples: draws of each chain in the first run.
        spread: whether half of the chains start from draws of a base twice as wide, and the
            others from the guide's as they are: where its weights say little, chains that do not
            forget their start are what can be seen.
    """

    def __init__(
        self,
        model: Callable,
        guide: AutoFlow,
        args: tuple,
        kwargs: dict[str, Any] | None,
        num_samples: int,
        num_chains: int | None = None,
        *,
        warmup: int | None = None,
        method: str = "auto",
        wide: float = 0.05,
        spread: bool = False,
    ) -> None:
        self.began, self.model = time.perf_counter(), model
        self.bound = _bound(model, guide, args, kwargs)
        with between_draws():
            dim = guide.latent_dim
            chains = CHAINS if dim <= WIDE else CHAINS_WIDE
            self.target = target = Target(self.bound, guide, num_chains or chains)
            self.slow = slow = target.log_joint.one_by_one
            self.num_chains = num_chains or (CHAINS_ONE_BY_ONE if slow else chains)
            if slow:
                target.log_joint.num = self.num_chains
            self.proposal = Proposal(target.base, float(wide))
            most = max(LEAST_PILOT, int(NUMBERS / dim))
            num = PILOT_ONE_BY_ONE if slow else min(PILOT, most)
            self.pilot = pilot = take_pilot(self.bound, target, self.proposal, num)
            self.points = pilot.starts(self.num_chains, target if spread else None)
        auto, self.rows = method == "auto", None
        if auto:
            method = _method(pilot, self.num_chains, num_samples)
        if method == "rows" or (auto and method != "independence"):
            given = pilot.points, self.num_chains, float(wide)
            self.rows = row_wise(target, guide, *given, needed=not auto)
            method = "rows" if self.rows else method
        mostly = method != "HMC" and pilot.acceptance > MOSTLY
        if warmup is None:
            short = mostly or method in ("independence", "rows")
            warmup = WARMUP if short else WARMUP_HMC
        self.independent = method in ("independence", "independence and HMC")
        self.hmc = HMC(target, warmup) if "HMC" in method else None
        self.warmup, self.period = warmup, PERIOD if mostly else 1

    def run(self, num_samples: int, *, thin: int = 1, progress: bool = False) -> Chains:
        """So many draws of each chain, one in ``thin`` steps, after a warm-up the first time."""
        steps, kernels = self.warmup + num_samples * thin, []
        with between_draws():
            if self.independent:
                kernels.append(Independence(self.target, self.proposal, self.num_chains, steps))
            kernels += [kernel for kernel in (self.rows, self.hmc) if kernel is not None]
            options = {"warmup": self.warmup, "period": self.period, "thin": thin}
            recorded = run(kernels, self.points, num_samples, **options, progress=progress)
        self.points, self.warmup = recorded.last, 0
        parts = self.rows.parts if self.rows else kernels
        rates = {part.name: sum(part.rates) / len(part.rates) for part in parts}
        chains = result(self.model, self.bound, self.pilot, rates, recorded, self.slow)
        if self.rows is not None:  # a chain moves where only one of its rows does
            chains.longest_rejection = math.ceil(self.rows.longest / thin)
            judge(chains)
        chains.seconds = time.perf_counter() - self.began
        return chains

    def run_on(self, num_samples: int, most_leaps: float = math.inf) -> Chains:
        """So many draws of each chain, anew from longer runs while these may settle them.

        What went before is then warm-up, adapted kernels stay. First HMC takes its turn in every
        step; then more steps make a draw, as many as R-hat asks for. Not so where its trajectories
        take more leapfrog steps than ``most_leaps``.
        """
        chains, more_turns = self.run(num_samples), self.period > 1
        for _ in range(LONGER_RUNS):
            longer = MARGIN * times_as_long(chains)
            near = chains.rhat <= NEAR_RHAT if more_turns else longer <= MOST_THIN
            leaps = 1.0 if self.hmc is None else self.hmc.length / self.hmc.step_size
            if not near or leaps > most_leaps or not is_short(chains):
                break
            thin = 1 if more_turns else max(2, math.ceil(longer))
            self.period, more_turns = 1, False
            chains = self.run(num_samples, thin=thin)
        return chains


def check_guide(guide: AutoFlow) -> None:
    """Raise ``TypeError`` if it has no map from a base space, ``ValueError`` if not set up."""
    if not isinstance(guide, AutoFlow):
        raise TypeError(
            "guide must be of the AutoFlow family, such as AutoPlanarFlow(model), whose flow is a "
            "map between a base space and the latents (a mixture has no such map, its parts have); "
            f"got {type(guide).__name__}"
        )
    if guide.prototype_trace is None:
        raise ValueError(
            "the guide was never set up, so there is no map to sample over: fit it first, by "
            "fit_guide(model, guide, args)"
        )


def _bound(model: Callable, guide: AutoFlow, args: tuple, kwargs: dict | None) -> BoundModel:
    """Model and guide, found to fit together."""
    check_guide(guide)
    check_latents(start := BoundModel(model, args=args, kwargs=kwargs))
    guide.check_model(start.model_trace)
    bound = BoundModel.for_weights(model, guide, args, kwargs)
    check_sites(bound)
    return bound


def _method(pilot: Pilot, chains: int, num_samples: int) -> str:
    if pilot.acceptance <= IN_TURNS:
        return "HMC"
    stays = pilot.longest_stay(chains * num_samples) > STAY * num_samples
    return "independence and HMC" if stays or pilot.acceptance <= MOSTLY else "independence"


def run(
    kernels: Sequence[Kernel],
    points: Points,
    num_samples: int,
    *,
    warmup: int,
    period: int = 1,
    thin: int = 1,
    progress: bool = False,
) -> Recorded:
    """Let chains go from points, and record one in ``thin`` steps after the warm-up.

    A step is one of each kernel; after the warm-up, of the second one in every ``period`` alone.
    """
    chains, dim = points.x.shape
    x = points.x.new_empty(num_samples, chains, dim)
    log_joint = points.log_joint.new_empty(num_samples, chains)
    moved = torch.empty(num_samples, chains, dtype=torch.bool, device=x.device)
    steps, last = num_samples * thin, points.u
    with progress_bar("mcmc", warmup + steps, progress) as bar:
        for i in range(-warmup, steps):
            if i == 0:
                last = points.u
                for kernel in kernels:
                    kernel.settle()
            for kernel in kernels if i < 0 or i % period == 0 else kernels[:1]:
                points = kernel.step(points)
            if i >= 0 and (i + 1) % thin == 0:
                row = i // thin
                x[row], log_joint[row] = points.x, points.log_joint
                moved[row] = (points.u != last).any(1)
                last = points.u
            bar.update()
    return Recorded(x, log_joint, moved, points)
