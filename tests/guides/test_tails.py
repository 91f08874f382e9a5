"""Guides with a sinh-arcsinh layer behind their stack: where it stands, and what it gains."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import init_to_value
from torch import Tensor

import pyroflow as pf
from pyroflow.inference.gaussian_start import Gaussian, initialize
from tests.cases import scatter

MAKERS = {
    "planar": pf.AutoPlanarFlow,
    "sylvester": lambda model, *args, **options: pf.AutoSylvesterFlow(model, 2, *args, **options),
}
MAKE = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def pair() -> None:
    pyro.sample("z", dist.Normal(torch.tensor([1.0, -2.0]), 3.0).to_event(1))


def log_prob(guide: pf.AutoFlow, z: Tensor) -> Tensor:
    return guide.get_posterior().log_prob(z).detach()


@MAKE
@pytest.mark.parametrize("num_layers", [0, 3])
def test_it_stands_last_before_the_affine_layer_and_changes_nothing_at_the_start(
    make: Callable, num_layers: int
) -> None:
    start = init_to_value(values={"z": torch.tensor([0.5, -1.0])})
    guide, plain = (
        make(pair, num_layers, init_loc_fn=start, tails=tails).setup() for tails in (True, False)
    )
    before = [pf.Planar if make is pf.AutoPlanarFlow else pf.Sylvester] if num_layers else []
    assert [type(part) for part in guide.flow.parts] == [*before, pf.SinhArcsinh, pf.Affine]
    assert (guide.stack is None) == (num_layers == 0)
    z = 3 * torch.randn(20, 2)
    assert torch.allclose(log_prob(guide, z), log_prob(plain, z), rtol=1e-12)
    bare = make(pair, num_layers, None, tails=True).setup()
    assert type(bare.flow.parts[-1]) is pf.SinhArcsinh
    assert bare.affine is None


@MAKE
@pytest.mark.parametrize("num_layers", [0, 2, "auto"])
def test_growing_keeps_it(make: Callable, num_layers: int | str) -> None:
    guide = make(pair, num_layers, tails=True).setup()
    scatter(guide, 0.4)
    z, first = torch.randn(20, 2), guide.num_layers
    before, tail = log_prob(guide, z), guide.flow.parts[-2]
    guide.grow(2)
    assert guide.num_layers == len(guide.stack.b) == first + 2
    assert guide.flow.parts[-2] is tail
    assert len(guide.flow.parts) == 3
    assert torch.allclose(log_prob(guide, z), before, rtol=1e-10)


@MAKE
def test_copies_and_state_dicts_have_it(make: Callable) -> None:
    guide = make(pair, 2, tails=True).setup()
    scatter(guide, 0.4)
    fresh, z = make(pair, 2, tails=True).setup(), torch.randn(20, 2)
    fresh.load_state_dict(guide.state_dict())
    for other in (fresh, copy.deepcopy(guide)):
        assert torch.equal(log_prob(other, z), log_prob(guide, z))
    with pytest.raises(ValueError, match=r"state_dict is of a flow of 2 .* has 3"):
        fresh.load_state_dict(make(pair, 2).setup().state_dict())
    with pytest.raises(ValueError, match="tails must be one of False, True; got 'heavy'"):
        make(pair, 2, tails="heavy")


def test_the_warm_start_makes_up_for_it_where_it_has_moved() -> None:
    """As for other layers, the guide gets the moments of the Gaussian."""
    guide = pf.AutoPlanarFlow(pair, 0, tails=True).setup()
    with torch.no_grad():
        guide.flow.parts[0].skew.copy_(torch.tensor([0.6, -0.3]))
    loc, scale = torch.tensor([50.0, -3.0]), torch.tensor([[2.0, 0.0], [0.3, 0.1]])
    initialize(guide, Gaussian(loc, scale, 0.0))
    z = guide.get_posterior().sample((50_000,))
    white = torch.linalg.solve_triangular(scale, (z - loc).mT, upper=False)
    assert torch.allclose(white.mean(1), torch.zeros(2), atol=0.06)
    assert torch.allclose(torch.cov(white), torch.eye(2), atol=0.12)


def test_the_path_derivative_is_zero_at_a_skewed_posterior_with_heavy_tails() -> None:
    layer = scatter(pf.SinhArcsinh(2), 0.5)

    def model() -> None:
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [layer]))

    start = init_to_value(values={"z": torch.zeros(2)})
    options = {"init_loc_fn": start, "init_scale": 1.0, "tails": True}
    guide = pf.AutoPlanarFlow(model, 2, "diagonal", **options).setup()
    guide.flow.parts[1].load_state_dict(layer.state_dict())
    for path, largest in ((False, math.inf), (True, 1e-10)):
        guide.path_derivative = path
        loss = Trace_ELBO().differentiable_loss(model, guide)
        found = torch.autograd.grad(loss, list(guide.parameters()))
        worst = max(g.abs().max().item() for g in found)
        assert (0 if path else 0.1) <= worst < largest


COUNTS = torch.tensor([0.0, 1, 2, 0, 1, 2, 0, 1, 2, 0])


def rates() -> None:
    """Posterior Gamma(1 + count, 2), independent, and evidence Π 2^(−1 − count)."""
    with pyro.plate("rows", 10):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(1.0), 1.0))
        pyro.sample("count", dist.Poisson(rate), obs=COUNTS)


def test_skewed_posteriors_that_no_gaussian_fits() -> None:
    """Rates in log space: the best Gaussian's KL is known, and with tails it is many times less.

    log Gamma(a) has density e^{az − e^z}/Γ(a), and the bound of N(m, s²), a m − e^{m + s²/2} + its
    entropy, is highest at s² = 1/a and m = log a − s²/2.
    """
    gaussian = 0.0
    for a in (COUNTS + 1).tolist():
        location = math.log(a) - 1 / (2 * a)
        bound = a * location - a + math.log(2 * math.pi * math.e / a) / 2
        gaussian += math.lgamma(a) - bound
    guide = pf.AutoPlanarFlow(rates, 0, tails=True)
    pf.fit_guide(rates, guide, steps=300, seed=0, progress=False)
    report = pf.diagnose(rates, guide, num_samples=10_000, seed=1)
    kl = -math.log(2) * (COUNTS + 1).sum().item() - report.elbo
    assert gaussian == pytest.approx(0.5313, abs=1e-4)
    assert -4 * report.elbo_se < kl < gaussian / 8
    assert report.ess_fraction > 0.7
