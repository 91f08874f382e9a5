"""pf.neutra: Pyro's NUTS in the base space of a guide, and the way back."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from chains_cases import FACTOR, MEAN, gaussian, poor_guide
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyroflow as pf


def plates() -> None:
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 4, dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(5), s.unsqueeze(-1)).to_event(1))
        pyro.sample("p", dist.Dirichlet(torch.ones(3)))


def sampled(model: Callable, num: int, warmup: int, **options: object) -> MCMC:
    pyro.set_rng_seed(0)
    run = MCMC(NUTS(model, **options), num, warmup, disable_progbar=True)
    run.run()
    return run


def test_nuts_draws_the_posterior() -> None:
    base = pf.neutra(gaussian, poor_guide(gaussian, 0.5))
    run = sampled(base.model, 80, 30, max_tree_depth=3)
    z = base.transform(run.get_samples())["z"]
    assert z.shape == (80, 3)
    assert torch.allclose(z.mean(0), MEAN, atol=0.45)
    assert torch.allclose(z.T.cov(), FACTOR @ FACTOR.T, atol=0.5)


@pytest.mark.parametrize("batch", [(6,), (4,), (3, 7), (2, 4)])
def test_draws_keep_their_plates(batch: tuple[int, ...]) -> None:
    """Sizes of draws and chains may be those of the plates; each draw is mapped as one alone."""
    guide = poor_guide(plates, 0.4)
    base = pf.neutra(plates, guide)
    u = torch.randn(*batch, guide.latent_dim)
    found = base.transform(u)
    shapes = {"s": (), "z": (2, 4, 5), "p": (2, 4, 3)}
    assert {name: v.shape for name, v in found.items()} == {
        name: batch + shape for name, shape in shapes.items()
    }
    (name,) = [n for n in poutine.trace(base.model).get_trace().stochastic_nodes if "shared" in n]
    last = (-1,) * len(batch)
    run = poutine.trace(poutine.condition(base.model, data={name: u[last]})).get_trace()
    for site, value in found.items():
        assert torch.allclose(run.nodes[site]["value"], value[last])
    assert all(map(torch.equal, found.values(), base.transform({name: u}).values()))


def test_the_guide_is_taken_as_it_is() -> None:
    guide = poor_guide(gaussian, 0.5)
    base, u = pf.neutra(gaussian, guide), torch.randn(4, 3)
    before = base.transform(u)["z"]
    with torch.no_grad():
        guide.planar.b += 1
    assert torch.equal(base.transform(u)["z"], before)
    assert all(p.requires_grad for p in guide.parameters())


@pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
def test_compiled_models_say_the_same() -> None:
    base = pf.neutra(gaussian, poor_guide(gaussian, 0.5))
    plain = sampled(base.model, 6, 0, max_tree_depth=3).get_samples()
    options = {"jit_compile": True, "ignore_jit_warnings": True}
    compiled = sampled(base.model, 6, 0, max_tree_depth=3, **options).get_samples()
    assert all(map(_close, plain.values(), compiled.values()))


def _close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-6)


def test_refusals() -> None:
    with pytest.raises(TypeError, match="of the AutoFlow family"):
        pf.neutra(gaussian, AutoNormal(gaussian))
    with pytest.raises(ValueError, match="the guide was never set up"):
        pf.neutra(gaussian, pf.AutoPlanarFlow(gaussian))
    base = pf.neutra(gaussian, poor_guide(gaussian))
    u = torch.zeros(4, 3)
    with pytest.raises(
        ValueError, match=r"draws must be those of the one latent .* got \['a', 'b'"
    ):
        base.transform({"a": u, "b": u})
    with pytest.raises(ValueError, match=r"draws expects shape \(n, 3\)"):
        base.transform(u[:, :2])
    with pytest.raises(ValueError, match=r"draws expects shape \(n, 3\)"):
        base.transform(u[0])
