"""The log joint by rows: which term belongs to which row, whatever the model's indexing."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from torch import Tensor

import pyroflow as pf
from pyroflow.guides.structure import GivenGlobals
from pyroflow.model.bound import BoundModel
from pyroflow.model.log_joint import LogJoint
from pyroflow.model.row_terms import RowTerms

F64 = torch.float64


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def plain() -> None:
    mu = pyro.sample("mu", dist.Normal(number(0.0), number(1.0)))
    tau = pyro.sample("tau", dist.HalfNormal(number(1.0)))
    with pyro.plate("groups", 200):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.StudentT(number(4.0), theta, 1.0), obs=torch.ones(200, dtype=F64))


def indexed() -> None:
    """Data attached by an index, one group without any, a site of one number, and a factor."""
    index = torch.arange(90) * 7 % 12
    mu = pyro.sample("mu", dist.Normal(number(0.0), number(1.0)))
    with pyro.plate("groups", 13):
        rate = pyro.sample("rate", dist.Gamma(mu.exp(), number(1.0)))
    obs = torch.ones(90, dtype=F64)
    with pyro.plate("data", 90), pyro.poutine.scale(scale=2.0):
        pyro.sample("y", dist.Poisson(rate[index]), obs=obs)
    pyro.sample("z", dist.Normal(rate[index], 1.0).to_event(1), obs=obs)
    pyro.factor("weight", -mu.square())


def nested() -> None:
    top = pyro.sample("top", dist.Normal(number(0.0), number(1.0)))
    with pyro.plate("districts", 7, dim=-2):
        a = pyro.sample("a", dist.Normal(top, 1.0))
        with pyro.plate("schools", 4, dim=-1):
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("y", dist.Normal(b.exp(), 1.0), obs=torch.ones(7, 4, dtype=F64))


def beside() -> None:
    scale = pyro.sample("scale", dist.LogNormal(number(0.0), number(1.0)))
    with pyro.plate("cats", 8):
        a = pyro.sample("a", dist.Normal(number(0.0), scale))
    with pyro.plate("dogs", 5):
        b = pyro.sample("b", dist.Normal(number(0.0), scale).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(torch.cat([a, b[:, 0]]), 1.0).to_event(1), obs=torch.ones(13))


def walk() -> None:
    scale = pyro.sample("scale", dist.LogNormal(number(0.0), number(1.0)))
    with pyro.plate("steps", 9):
        step = pyro.sample("step", dist.Normal(number(0.0), scale))
    pyro.sample("y", dist.Normal(step.cumsum(0), 1.0).to_event(1), obs=torch.zeros(9))


def given(model: Callable, num: int = 4) -> tuple[LogJoint, pf.AutoStructuredFlow, Tensor]:
    """The log joint, a guide at random parameters in the model's coordinates, and its draws."""
    guide = pf.AutoStructuredFlow(model, tails=True, num_layers=2).setup()
    guide.find_coordinates((), {})
    with pf.seeds.seeded(1), torch.no_grad():
        if guide.coordinates is not None:
            guide.coordinates.set(torch.full_like(guide.coordinates.c, 0.4), guide._init_loc())
        for p in guide.flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
        bound = BoundModel.for_weights(model, guide)
        x = guide.flow().sample((num,))
    return LogJoint(bound, guide, 16), guide, x


@pytest.mark.parametrize("model", [plain, slow(indexed), nested, slow(beside)])
def test_each_row_has_its_own_terms(model: Callable) -> None:
    log_joint, guide, x = given(model)
    rows = guide.affine.rows()
    terms = RowTerms(log_joint, rows, x)
    first, rest = terms(x)
    torch.testing.assert_close(first + rest.sum(1), log_joint.values(x))
    # A row that moves changes its own terms, by as much as the log joint, and no others.
    places = [row for plate in rows for row in plate]
    for j in {0, 3, len(places) - 1}:
        moved = x.clone()
        moved[:, places[j]] = x[:, places[j]] + 0.3
        again, now = terms(moved)
        change = now - rest
        torch.testing.assert_close(change[:, j], log_joint.values(moved) - log_joint.values(x))
        change[:, j] = 0.0
        torch.testing.assert_close(change, torch.zeros_like(change), rtol=0, atol=1e-9)
        torch.testing.assert_close(again, first)


def test_terms_of_several_rows_are_refused() -> None:
    log_joint, guide, x = given(walk)
    assert guide.affine.rows() == []
    with pytest.raises(ValueError, match="no rows"):
        RowTerms(log_joint, [], x)
    with pytest.raises(ValueError, match="site 'y' has a term of several rows"):
        RowTerms(log_joint, [torch.arange(1, 10).unsqueeze(1)], x)


@pytest.mark.parametrize("model", [indexed, nested, beside])
def test_densities_of_rows_given_globals(model: Callable) -> None:
    """q(x) = q(g) Π q(x_j | g), where a row that moves changes its own factor alone."""
    _, guide, x = given(model)
    given_globals = GivenGlobals(guide.flow.transforms())
    with torch.no_grad():
        eps, inner = given_globals.base(x)
        torch.testing.assert_close(given_globals.at(x, inner, eps), x)
        other = given_globals.at(x, inner, eps + 0.2 * torch.randn_like(eps))
        torch.testing.assert_close(other[:, guide.affine.leading()], x[:, guide.affine.leading()])
        change = guide.flow().log_prob(other) - guide.flow().log_prob(x)
        log_q = [given_globals.log_q(*given_globals.base(t)) for t in (x, other)]
        torch.testing.assert_close((log_q[1] - log_q[0]).sum(1), change)
        places = guide.affine.rows()[0][2]
        mixed = x.clone()
        mixed[:, places] = other[:, places]
        found = given_globals.log_q(*given_globals.base(mixed))
        torch.testing.assert_close(found[:, 2], log_q[1][:, 2])
        found[:, 2] = log_q[0][:, 2]
        torch.testing.assert_close(found, log_q[0])


def test_a_density_of_a_row_integrates_to_one() -> None:
    log_joint, guide, x = given(plain, 2)
    given_globals = GivenGlobals(guide.flow.transforms())
    grid = torch.linspace(-12, 12, 20_001, dtype=F64)
    many = x[:1].expand(len(grid), -1).clone()
    with torch.no_grad():
        place = guide.affine.rows()[0][5]
        many[:, place] += grid.unsqueeze(1)
        log_q = given_globals.log_q(*given_globals.base(many))[:, 5]
    assert log_q.logsumexp(0).item() + math.log(grid[1] - grid[0]) == pytest.approx(0, abs=1e-6)
