"""Guides fitted to simulated data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyroflow.calibration.result import Calibration, summarise
from pyroflow.calibration.simulator import Simulator
from pyroflow.checks import check_count, check_fraction
from pyroflow.inference.guide import fit_guide
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw
from pyroflow.seeds import seeded
from pyroflow.threads import one_at_a_time

PARTICLES = 32  # of the default fit, which is done many times

Fitter = Callable[[Callable, Callable, tuple, dict[str, Any]], Any]


@one_at_a_time
def calibrate(
    model: Callable,
    make_guide: Callable[[Callable], Callable],
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    *,
    data: Mapping[str, str] | Iterable[str] | None = None,
    num_simulations: int = 100,
    num_samples: int = 1000,
    fit: Fitter | None = None,
    steps: int = 500,
    level: float = 0.05,
    seed: int | None = None,
    progress: bool = True,
) -> Calibration:
    r"""Fit a guide to data sets that the model made, and ask where the true values lie in it.

    M times, latents θ₀ are drawn from the prior and data from the model, a new guide is fitted
    to the data, and p = Pr_q(θ < θ₀) is estimated for every scalar. Of an exact posterior p is
    uniform. Where p and 1 − p are not distributed alike, the guide is biased: this is the test
    of Yao et al., with its p-value from random reflections p ↦ 1 − p, which is right for any M
    (the two samples depend on each other, so that the tables of the two-sample test are not).
    The spread of p about ½ tells guides that are too narrow or too wide.

    Against :func:`~pyroflow.diagnose` it takes M fits and speaks of the average over the prior
    and not of the data at hand, but of each latent by itself, and it sees modes that were missed.

    Args:
        model: a Pyro model; its data are simulated at the observed sites.
        make_guide: from a model to a new guide, such as :class:`~pyroflow.AutoPlanarFlow`. It
            gets the model with the simulated data observed.
        args: positional arguments of model and guide, with data of the shape to simulate.
        kwargs: keyword arguments, likewise.
        data: the sites to simulate; by default those that are observed. A mapping from site to
            the name of a model's argument hands the simulated data to that argument too: for
            data that are used elsewhere than in ``obs=``, or by the guide.
        num_simulations: M.
        num_samples: the guide's draws for each p.
        fit: called as fit(model, guide, args, kwargs); by default
            :func:`~pyroflow.fit_guide` with 32 particles.
        steps: of the default fit.
        level: false alarm rate of all verdicts together, which is shared out evenly.
        seed: makes the result reproducible, without touching the global generator.
        progress: show a progress bar.

    Raises:
        ValueError: no site to simulate, one that is not in the model or has no latents, an
            argument that the model does not take, a factor or an improper prior, which cannot be
            drawn from, a plate that subsamples; each is named. An option out of range.

    References:
        Yao, Vehtari, Simpson and Gelman, Yes, but Did It Work?: Evaluating Variational Inference,
        2018, https://arxiv.org/abs/1802.02538, section 4 and algorithm 2.

    Example:
        >>> from functools import partial
        >>> import pyro, pyro.distributions as dist, pyroflow as pf
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> guide = partial(pf.AutoPlanarFlow, num_layers=0)
        >>> options = {"num_simulations": 3, "steps": 5, "seed": 0, "progress": False}
        >>> pf.calibrate(model, guide, (torch.zeros(4),), **options).probabilities["loc"].shape
        torch.Size([3])
    """
    check_count("num_simulations", num_simulations, 2)
    check_count("num_samples", num_samples, 1)
    check_count("steps", steps, 1)
    check_fraction("level", level)
    fit = fit or _default_fit(steps)
    with seeded(seed):  # by itself, as this run of the model is no simulation
        simulator = Simulator(model, tuple(args), dict(kwargs or {}), data)
    rows: list[dict[str, Tensor]] = []
    with seeded(seed):
        for _ in tqdm(range(num_simulations), desc="calibrate", disable=not progress):
            # A store of its own, or each guide would go on from the parameters of the last.
            with pyro.get_param_store().scope():
                rows.append(_probabilities(simulator, make_guide, fit, num_samples))
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return summarise(stacked, level)


def _default_fit(steps: int) -> Fitter:
    def fit(model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        options = {"steps": steps, "num_particles": PARTICLES, "progress": False}
        fit_guide(model, guide, args, kwargs, **options)

    return fit


def _probabilities(
    simulator: Simulator, make_guide: Callable, fit: Fitter, num_samples: int
) -> dict[str, Tensor]:
    """The part of a new guide's draws below the latents that made its data."""
    truth, model, args, kwargs = simulator.draw()
    guide = make_guide(model)
    fit(model, guide, args, kwargs)
    problem = BoundModel.for_weights(model, guide, args, kwargs)
    sites = draw(problem, num_samples).sites
    return {
        name: ((values < truth[name]).double().sum(0) + 0.5) / (num_samples + 1)
        for name, values in sites.items()
    }
