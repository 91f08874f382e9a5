"""The start of a structured guide with rows that are skewed, beside exact posteriors."""

from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from benchmarks import groups
from cases import slow

import pyroflow as pf
from pyroflow.inference.structured_start import structured_start
from pyroflow.model.bound import BoundModel
from pyroflow.model.log_joint import LogJoint


def bound_of_start(
    model: Callable, args: tuple, *, tails: bool
) -> tuple[pf.AutoStructuredFlow, float]:
    """A guide at its start, and its bound."""
    guide = pf.AutoStructuredFlow(model, tails=tails)
    problem = BoundModel(model, guide, args)
    guide.find_coordinates(problem.args, problem.kwargs)
    log_joint = LogJoint(problem, guide, 64)
    assert structured_start(log_joint, guide)
    with torch.no_grad():
        q = guide.over_coordinates()
        x = q.sample((1000,))
        return guide, (log_joint.values(x) - q.log_prob(x)).double().mean().item()


def started(family: str, found: groups.Data, *, tails: bool) -> tuple[pf.AutoStructuredFlow, float]:
    """A guide at its start, and its divergence from the posterior in nats."""
    guide, bound = bound_of_start(partial(groups.model, family), tuple(found), tails=tails)
    return guide, groups.exact(family, found).log_evidence - bound


@pytest.mark.parametrize("seed", [0, slow(1)])
@pytest.mark.parametrize("family", [slow("Poisson"), "Bernoulli"])
def test_skews_take_most_of_the_divergence_away(family: str, seed: int) -> None:
    found = groups.data(family, 100, 300, seed)
    pyro.set_rng_seed(seed)
    plain, shaped = (started(family, found, tails=tails)[1] for tails in (False, True))
    assert -0.02 < shaped < 0.5 * plain


def test_normal_rows_stay_normal() -> None:
    guide, divergence = started("normal", groups.data("normal", 200, 200), tails=True)
    rows = guide.flow.parts[-2].skew[2:]
    assert divergence < 0.05
    assert rows.abs().max() < 0.02


def cauchy(y: torch.Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("rows", len(y)):
        theta = pyro.sample("theta", dist.StudentT(1.0, 0.0, scale))
        pyro.sample("y", dist.Cauchy(theta, 0.1), obs=y)


@pytest.mark.parametrize("seed", [0, slow(1)])
def test_steps_that_make_the_bound_worse_are_taken_back(seed: int) -> None:
    pyro.set_rng_seed(seed)
    y = dist.Cauchy(0.0, 1.0).sample((30,))
    plain, shaped = (bound_of_start(cauchy, (y,), tails=tails)[1] for tails in (False, True))
    assert shaped > plain - 0.05
