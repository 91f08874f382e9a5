"""The ports of the hierarchies against their stored log densities, and the judge of draws."""

from __future__ import annotations

import functools

import pytest
import torch
from benchmarks.hierarchies.models import FOLDER, NAMES, load, log_joint
from benchmarks.judging import columns, from_draws, judge
from pyro.distributions import constraints
from torch import Tensor

needs_data = pytest.mark.skipif(not FOLDER.exists(), reason=f"the hierarchies are not in {FOLDER}")
hierarchy = functools.cache(load)


@needs_data
@pytest.mark.parametrize("name", NAMES)
def test_log_joint_is_the_stored_one(name: str) -> None:
    found = hierarchy(name)
    for row in range(5):
        values = {site: value[row] for site, value in found.draws.items()}
        expected = pytest.approx(found.log_joint[row].item(), rel=1e-6)
        assert log_joint(found.model, found.args, values) == expected


@needs_data
@pytest.mark.parametrize("name", NAMES)
def test_reference_draws_are_judged_right(name: str) -> None:
    found = hierarchy(name)
    errors = judge(found.draws, found.reference)
    noise = len(found.draws[next(iter(found.draws))]) ** -0.5
    assert errors["mean error"] < 5 * noise
    assert errors["sd error"] < 5 * noise


def normal(num: int, loc: float, scale: float) -> Tensor:
    """Evenly spaced quantiles of a Gaussian."""
    p = (torch.arange(num) + 0.5) / num
    return loc + scale * torch.special.ndtri(p)


def test_judge_finds_the_worst_column() -> None:
    supports = {"x": constraints.real, "s": constraints.positive}
    x = normal(20_000, 1.0, 2.0)
    reference = from_draws({"x": x, "s": x.exp()}, supports)
    found = judge({"x": normal(1000, 1.5, 2.0), "s": normal(1000, 1.0, 1.5).exp()}, reference)
    assert found["mean error"] == pytest.approx(0.25, abs=1e-3)
    assert found["sd error"] == pytest.approx(0.25, abs=5e-3)
    assert (found["mean at"], found["sd at"]) == ("x", "s")


def test_judge_of_a_heavy_column_needs_no_moments() -> None:
    supports = {"x": constraints.independent(constraints.real, 1)}
    p = (torch.arange(20_000) + 0.5) / 20_000
    cauchy = (torch.pi * (p - 0.5)).tan().unsqueeze(-1).expand(-1, 2)
    reference = from_draws({"x": cauchy}, supports, heavy=("x",))
    same = judge({"x": cauchy[::20]}, reference)
    assert max(same["mean error"], same["sd error"]) < 0.03
    bounded = judge({"x": cauchy[::20].clamp(-3, 3)}, reference)  # its tails cut, quartiles right
    assert bounded["sd error"] > 0.5
    shifted = judge({"x": cauchy[::20] + torch.tensor([0.0, 1.0])}, reference)
    assert shifted["mean error"] == pytest.approx(0.6745, abs=0.01)  # by a quarter of the draws
    assert shifted["mean at"] == "x[1]"


def test_draws_on_an_edge_are_counted() -> None:
    supports = {"s": constraints.positive}
    reference = from_draws({"s": normal(20_000, 0.0, 1.0).exp()}, supports)
    s = normal(2000, 0.0, 1.0).exp()
    s[:10] = 0.0
    assert judge({"s": s}, reference)["mean error"] < 0.1
    s[:30] = 0.0
    assert judge({"s": s}, reference)["sd error"] == torch.inf
    s[:30] = torch.nan
    assert judge({"s": s}, reference)["mean error"] == torch.inf


def test_columns_are_on_the_unconstrained_scale() -> None:
    rho = torch.tensor([0.3, -0.9])
    rows = [torch.ones(2), torch.zeros(2), rho, (1 - rho**2).sqrt()]
    draws = {
        "L": torch.stack(rows, -1).reshape(2, 2, 2),
        "s": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "p": torch.tensor([0.25, 0.5]),
    }
    supports = {
        "L": constraints.corr_cholesky,
        "s": constraints.independent(constraints.positive, 1),
        "p": constraints.unit_interval,
    }
    expected = torch.stack(
        [rho.atanh(), draws["s"][:, 0].log(), draws["s"][:, 1].log(), draws["p"].logit()], -1
    )
    torch.testing.assert_close(columns(draws, supports), expected)


def test_unknown_hierarchy_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="name must be one of neal-funnel.*; got 'neal'"):
        load("neal")
    with pytest.raises(ValueError, match="set PYROFLOW_HIERARCHIES"):
        load("irt-2pl", "no such folder")
