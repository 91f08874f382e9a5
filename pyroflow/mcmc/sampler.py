"""Exact draws from a posterior, by many chains over a fitted guide."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyroflow.checks import check_choice, check_count
from pyroflow.guides import AutoFlow
from pyroflow.mcmc.chains import Chains, judge
from pyroflow.mcmc.convergence import LEAST_DRAWS, summarise
from pyroflow.mcmc.hmc import HMC
from pyroflow.mcmc.independence import Independence, Proposal
from pyroflow.mcmc.pilot import Pilot, take_pilot
from pyroflow.mcmc.target import Points, Target
from pyroflow.model.bound import BoundModel, check_latents, check_sites
from pyroflow.seeds import between_draws, one_at_a_time, seeded

METHODS = ("independence", "independence and HMC", "HMC")
MOSTLY, IN_TURNS = 0.5, 0.05  # acceptances above which independence does most, or is of use
STAY = 0.02  # of a chain, the longest expected stay without HMC; the longest of all is longer
PERIOD = 8  # steps to one of HMC, where independence does most

CHAINS, CHAINS_ONE_BY_ONE = 128, 8
PILOT, PILOT_ONE_BY_ONE = 10_000, 200  # draws
WARMUP, WARMUP_HMC = 100, 400

Kernel = Independence | HMC


class Recorded(NamedTuple):
    """What chains left: x (N, C, D), the log joint there and whether they moved, (N, C) each."""

    x: Tensor
    log_joint: Tensor
    moved: Tensor


@one_at_a_time
def mcmc(
    model: Callable,
    guide: AutoFlow,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    num_samples: int = 1000,
    num_chains: int | None = None,
    seed: int | None = 0,
    *,
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

    A pilot set of the guide's draws says which by default. Where over half of the proposals will
    be accepted, it is the first, or, if a chain would stay for long where its weight is large,
    eight of its steps to one of HMC; where over 5 %, it is the last; and else HMC alone. The
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
        args: Positional arguments of model and guide.
        kwargs: Keyword arguments of model and guide.
        num_samples: Draws of each chain, at least 4.
        num_chains: C; by default 128, and 8 where each point takes a run of the model.
        seed: Makes the draws reproducible, without touching the global generator; None for others
            each time.
        warmup: Steps before those, which are left out; by default 100, and 400 where HMC does
            half of them or all.
        method: One of the three above, or "auto".
        wide: Part of the proposals that come from the wider distribution, from 0 to below 1.
        progress: Show a progress bar.

    Returns:
        The draws, with R-hat, effective sample sizes and a verdict.

    Raises:
        TypeError: If the guide is of another family.
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
    began = time.perf_counter()
    with seeded(seed), pyro.validation_enabled(False):
        bound = _bound(model, guide, args, kwargs)
        with between_draws():
            target = Target(bound, guide, num_chains or CHAINS)
            slow = target.log_joint.one_by_one
            chains = num_chains or (CHAINS_ONE_BY_ONE if slow else CHAINS)
            target.log_joint.num = chains
            proposal = Proposal(target.base, float(wide))
            pilot = take_pilot(bound, target, proposal, PILOT_ONE_BY_ONE if slow else PILOT)
            if method == "auto":
                method = _method(pilot, chains, num_samples)
            mostly = method != "HMC" and pilot.acceptance > MOSTLY
            if warmup is None:
                warmup = WARMUP if mostly or method == "independence" else WARMUP_HMC
            kernels = _kernels(method, target, proposal, chains, (warmup, num_samples))
            period = PERIOD if mostly else 1
            options = {"warmup": warmup, "period": period, "progress": progress}
            recorded = run(kernels, pilot.starts(chains), num_samples, **options)
        return _result(model, bound, pilot, kernels, recorded, slow, began)


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


def _bound(
    model: Callable, guide: AutoFlow, args: tuple, kwargs: dict[str, Any] | None
) -> BoundModel:
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


def _kernels(
    method: str, target: Target, proposal: Proposal, chains: int, steps: tuple[int, int]
) -> list[Kernel]:
    made: list[Kernel] = []
    if method != "HMC":
        made.append(Independence(target, proposal, chains, sum(steps)))
    if method != "independence":
        made.append(HMC(target, steps[0]))
    return made


def run(
    kernels: Sequence[Kernel],
    points: Points,
    num_samples: int,
    *,
    warmup: int,
    period: int = 1,
    progress: bool = False,
) -> Recorded:
    """Let chains go from points, and record after the warm-up.

    A step is one of each kernel; after the warm-up, of the second one in every ``period`` alone.
    """
    chains, dim = points.x.shape
    x = points.x.new_empty(num_samples, chains, dim)
    log_joint = points.log_joint.new_empty(num_samples, chains)
    moved = torch.empty(num_samples, chains, dtype=torch.bool, device=x.device)
    with tqdm(total=warmup + num_samples, desc="mcmc", disable=not progress) as bar:
        for i in range(-warmup, num_samples):
            if i == 0:
                for kernel in kernels:
                    kernel.settle()
            before = points.u
            for kernel in kernels if i < 0 or i % period == 0 else kernels[:1]:
                points = kernel.step(points)
            if i >= 0:
                x[i], log_joint[i] = points.x, points.log_joint
                moved[i] = (points.u != before).any(1)
            bar.update()
    return Recorded(x, log_joint, moved)


@torch.no_grad()
def _result(
    model: Callable,
    bound: BoundModel,
    pilot: Pilot,
    kernels: Sequence[Kernel],
    recorded: Recorded,
    one_by_one: bool,
    began: float,
) -> Chains:
    """The draws on their supports, chain by chain, and what there is to say of them."""
    x = recorded.x.transpose(0, 1)
    num_chains, num_samples = x.shape[:2]
    values, log_det = bound.guide.constrain(x.flatten(0, 1))
    draws = {name: value.detach() for name, value in values.items()}  # without their latents
    by_site = {n: _numbers(v.unflatten(0, (num_chains, num_samples))) for n, v in draws.items()}
    rates = {kernel.name: sum(kernel.rates) / len(kernel.rates) for kernel in kernels}
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
    chains.seconds = time.perf_counter() - began
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
