"""Row-wise Metropolis against exact conditionals, with guides that are off in every row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import slow
from row_cases import Exact, fitted, normal_rows, poisson_rows
from torch.nn.functional import softplus

import pyroflow as pf
from pyroflow.chains.result import longest_rejection
from pyroflow.transforms.affine import inverse_softplus


def off(exact: Exact, row_3: float = 1.0) -> pf.AutoStructuredFlow:
    """A guide whose rows are off by a fifth of their sd, and too wide, as its globals are."""
    guide = fitted(exact.model, 20)
    affine, G = guide.affine, len(guide.affine.leading())
    with torch.no_grad():
        width = softplus(affine.raw_scale)
        affine.offset[affine.rows()[0][:, 0]] += 0.2 * width[G:]
        width[G:] *= 1.15
        width[:G] *= 1.3
        width[G + 3] *= row_3
        affine.raw_scale.copy_(inverse_softplus(width))
    return guide


def sampled(exact: Exact, guide: pf.AutoStructuredFlow, num: int, **options: object) -> pf.Chains:
    options = {"num_chains": 16, "seed": 0, "progress": False} | options
    return pf.mcmc(exact.model, guide, num_samples=num, **options)


@pytest.mark.parametrize("seed", [0, slow(1)])
@pytest.mark.parametrize("family", [normal_rows, slow(poisson_rows)])
def test_chains_have_the_exact_moments(family: Callable, seed: int) -> None:
    exact = family(50)
    chains = sampled(exact, off(exact), 300, seed=seed)
    assert chains.method == "globals and rows"
    assert chains.level == "good", chains.verdict
    for name, (mean, sd) in {"mu": exact.mu, "theta": exact.theta}.items():
        found = chains.by_site[name]
        apart = (found["mean"] - mean) / found["mcse"]
        assert apart.abs().max() < 4.5
        assert apart.square().mean().sqrt() < 3 if name == "mu" else 1.35
        assert (found["sd"] / sd).log().abs().max() < 0.06


@pytest.mark.slow
def test_rows_by_an_index_have_the_exact_moments() -> None:
    exact = poisson_rows(30, indexed=True)
    chains = sampled(exact, off(exact), 400, method="rows")
    found = chains.by_site["theta"]
    assert ((found["mean"] - exact.theta[0]) / found["mcse"]).abs().max() < 4.5
    assert (found["sd"] / exact.theta[1]).log().abs().max() < 0.06


@pytest.mark.slow
def test_acceptance_does_not_fall_with_the_rows() -> None:
    rates, joint = {}, {}
    for num in (50, 2000):
        exact = normal_rows(num)
        chains = sampled(exact, off(exact), 60, warmup=40, method="rows")
        rates[num], joint[num] = chains.acceptances, chains.expected_acceptance
    assert joint[2000] < 0.01
    assert rates[50].keys() == {"globals", "rows"}
    for part, rate in rates[50].items():
        assert rate > 0.7
        assert rates[2000][part] == pytest.approx(rate, abs=0.05)


def test_a_row_that_stays_is_counted() -> None:
    """Another row always moves, so that the chain does; the row that the guide has wrong stays."""
    exact = normal_rows(50)
    chains = sampled(exact, off(exact, row_3=0.25), 200, wide=0.0)
    assert longest_rejection(chains.moved.reshape(16, 200).T) <= 2
    assert chains.longest_rejection > 20
    assert chains.level == "bad"


def test_where_rows_are_not_needed_or_not_there() -> None:
    exact = normal_rows(8)
    guide = fitted(exact.model, 20)
    assert sampled(exact, guide, 400).method == "independence"
    planar = pf.AutoPlanarFlow(exact.model, num_layers=0).setup()
    with pytest.raises(TypeError, match="'?rows\"? needs an AutoStructuredFlow"):
        sampled(exact, planar, 20, method="rows")
