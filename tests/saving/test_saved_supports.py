"""Guides in files: every support that Pyro knows a bijection for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor

import pyroflow as pf
from tests.saved_cases import assert_same, made, returned


def improper(support: constraints.Constraint, *event_shape: int) -> Callable:
    return lambda: pyro.sample("x", dist.ImproperUniform(support, (), event_shape))


def in_plates() -> None:
    with pyro.plate("outer", 3, dim=-2):
        pyro.sample("a", dist.Gamma(2.0, 1.0))
        with pyro.plate("inner", 2, dim=-1):
            pyro.sample("x", dist.Dirichlet(torch.ones(4)))


JOINED = [constraints.real, constraints.greater_than(2.0)]

MODELS: dict[str, Callable] = {
    "real": lambda: pyro.sample("x", dist.Normal(0.0, 1.0)),
    "real_vector": lambda: pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), torch.eye(3))),
    "positive": lambda: pyro.sample("x", dist.LogNormal(0.0, 1.0)),
    "nonnegative": lambda: pyro.sample("x", dist.HalfNormal(1.0)),
    "greater_than": lambda: pyro.sample("x", dist.Pareto(2.0, 3.0)),
    "less_than": improper(constraints.less_than(-1.0)),
    "unit_interval": lambda: pyro.sample("x", dist.Beta(2.0, 3.0)),
    "half_open": improper(constraints.half_open_interval(1.0, 4.0)),
    "interval": lambda: pyro.sample("x", dist.Uniform(torch.tensor([1.0, 2.0]), 4.0).to_event(1)),
    "independent": lambda: pyro.sample("x", dist.Gamma(2.0, torch.ones(2, 3)).to_event(2)),
    "simplex": lambda: pyro.sample("x", dist.Dirichlet(torch.ones(4))),
    "corr_cholesky": lambda: pyro.sample("x", dist.LKJCholesky(3, 1.0)),
    "corr_matrix": improper(constraints.corr_matrix, 3, 3),
    "ordered": improper(constraints.ordered_vector, 4),
    "positive_ordered": improper(constraints.positive_ordered_vector, 4),
    "softplus_positive": improper(constraints.softplus_positive),
    "stacked": improper(constraints.stack([constraints.real, constraints.positive], -1), 2),
    "joined": improper(constraints.cat(JOINED, -1, [3, 2]), 5),
    "in_plates": in_plates,
}


def seeded_draw(guide: pf.AutoFlow) -> dict[str, Tensor]:
    pyro.set_rng_seed(5)
    return guide()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_support_comes_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.set_default_dtype(dtype)
    try:
        guide = made(MODELS[name], (), init_loc_fn=init_to_median)
    finally:
        torch.set_default_dtype(torch.float64)
    loaded = returned(guide, tmp_path)
    there, here = (seeded_draw(each) for each in (guide, loaded))
    assert_same(there, here)
    assert {value.dtype for value in here.values()} == {dtype}
    for site in guide.latents:
        support = loaded.latents.sites[site.name].support
        assert repr(support) == repr(site.support)
        assert support.check(here[site.name]).all()
    assert torch.equal(guide.log_prob(there), loaded.log_prob(here))


@pytest.mark.parametrize("name", ["in_plates", "corr_matrix", "joined", "interval"])
def test_the_support_is_compared_with_the_model(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    guide = made(model, (), init_loc_fn=init_to_median)
    loaded = returned(guide, tmp_path, model=model)
    assert_same(seeded_draw(guide), seeded_draw(loaded))


class Odd(type(constraints.real)):
    """A user's own support."""


def test_an_unknown_support_is_refused_by_site(tmp_path: Path) -> None:
    guide = made(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), ())
    guide.latents.sites["x"] = replace(guide.latents.sites["x"], support=Odd())
    with pytest.raises(TypeError, match=r"Odd, the support of site 'x', .*state_dict"):
        pf.save(guide, tmp_path / "guide.pt")
