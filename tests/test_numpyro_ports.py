"""The posteriors in numpyro's language are those in Pyro's, and its NUTS is run beside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from benchmarks.hierarchies.models import log_joint
from benchmarks.judging import judge, least_ess
from benchmarks.numpyro_nuts.remote import Numpyro
from benchmarks.problems import POSTERIORS, find, reference_draws
from benchmarks.remote import connect

NUM = 20


@pytest.fixture(scope="module")
def numpyro() -> Iterator[Numpyro]:
    remote, note = connect(Numpyro)
    if remote is None:
        pytest.skip(note)
    with remote:
        yield remote


@pytest.mark.parametrize("name", POSTERIORS)
def test_log_densities_differ_by_a_constant(name: str, numpyro: Numpyro) -> None:
    try:
        problem, draws = find(name), reference_draws(name, NUM)
    except ValueError as missing:
        pytest.skip(str(missing))
    theirs = numpyro.log_joint(problem, draws)
    ours = torch.tensor(
        [
            log_joint(problem.model, problem.args, {site: v[row] for site, v in draws.items()})
            for row in range(NUM)
        ]
    )
    assert ours.std() > 0.1
    difference = theirs - ours
    assert (difference - difference[0]).abs().max() < 1e-6 * ours.std()


def test_chain_of_numpyro_is_the_posterior(numpyro: Numpyro) -> None:
    problem = find("groups-uneven_42")
    draws, warmup, seconds = numpyro.chain(problem, seed=0, warmup=500, rounds=2)
    assert {site: tuple(v.shape) for site, v in draws.items()} == {
        "mu": (1000,),
        "tau": (1000,),
        "theta": (1000, 40),
    }
    assert 0 < warmup < seconds
    found = judge(draws, problem.reference)
    noise = least_ess(draws, problem.reference) ** -0.5
    assert noise < 0.15
    assert found["mean error"] < 5 * noise
    assert found["sd error"] < 5 * noise
    again, *_ = numpyro.chain(problem, seed=0, warmup=500, rounds=2)
    assert torch.equal(again["mu"], draws["mu"])
