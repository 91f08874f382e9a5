"""Pyro's NeuTraReparam around the guides: never called, loaded, in plates, one draw and many."""

from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from drop_in_cases import GUIDES
from pyro import poutine
from pyro.infer import MCMC, NUTS, JitTrace_ELBO, Trace_ELBO
from pyro.infer.reparam import NeuTraReparam
from saved_cases import moved, returned
from torch import Tensor
from torch.distributions import biject_to

import pyroflow as pf


@pytest.fixture(params=GUIDES)
def make(request: pytest.FixtureRequest) -> Callable:
    return GUIDES[request.param]


def no_plate() -> None:
    pyro.sample("s", dist.LogNormal(0.0, 1.0))
    pyro.sample("p", dist.Dirichlet(torch.ones(3)))


def one_plate() -> None:
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", 4):
        pyro.sample("z", dist.Normal(0.0, s))
        pyro.sample("p", dist.Dirichlet(torch.ones(3)))


def two_plates() -> None:
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("outer", 2, dim=-2):
        pyro.sample("u", dist.Uniform(-1.0, 3.0))
        with pyro.plate("inner", 4, dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(5), s.unsqueeze(-1)).to_event(1))


def plate_of_one() -> None:
    with pyro.plate("rows", 1):
        pyro.sample("z", dist.Gamma(2.0, 1.0))
    pyro.sample("w", dist.Normal(0.0, 1.0))


MODELS = [no_plate, one_plate, two_plates, plate_of_one]


def by_hand(guide: pf.AutoFlow, base: Tensor) -> dict[str, Tensor]:
    """The sites at one draw of the base: its image, cut into pieces of the sites' sizes."""
    x, start, found = guide.get_transform()(base), 0, {}
    for site in guide.latents:
        shape = site.unconstrained_shape
        piece = x[start : start + shape.numel()].reshape(shape)
        found[site.name] = biject_to(site.support)(piece)
        start += shape.numel()
    return found


def reparametrised(guide: pf.AutoFlow, model: Callable) -> tuple[NeuTraReparam, Callable]:
    neutra = NeuTraReparam(guide)
    return neutra, poutine.reparam(model, config=lambda _: neutra)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "batch", [(), (7,), *map(slow, [(1,), (4,), (2, 4), (3, 7), (1, 6)]), (2, 3, 4)]
)
@torch.no_grad()
def test_every_draw_is_mapped_as_one_alone(make: Callable, model: Callable, batch: tuple) -> None:
    """Sizes of draws and chains may be those of the plates."""
    guide = moved(make(model, init_scale=0.4).setup())
    neutra, reparam = reparametrised(guide, model)
    nodes = poutine.trace(reparam).get_trace().stochastic_nodes
    (name,) = [name for name in nodes if name not in guide.plates]
    base = torch.randn(*batch, guide.latent_dim)
    found = neutra.transform_sample(base)
    flat = base.reshape(-1, guide.latent_dim)
    rows = [by_hand(guide, row) for row in flat]
    for site in guide.latents:
        expected = torch.stack([row[site.name] for row in rows])
        expected = expected.reshape(batch + site.value.shape)
        assert found[site.name].shape == expected.shape
        assert torch.allclose(found[site.name], expected)
    run = poutine.trace(poutine.condition(reparam, data={name: flat[-1]})).get_trace()
    run.compute_log_prob()
    log_density = 0.0
    for site in guide.latents:
        value = run.nodes[site.name]["value"]
        assert torch.allclose(value, rows[-1][site.name])
        log_density = log_density + run.nodes[site.name]["log_prob_sum"]
    values = {site.name: run.nodes[site.name]["value"] for site in guide.latents}
    plain = poutine.trace(poutine.condition(model, data=values)).get_trace().log_prob_sum()
    log_base = guide.get_base_dist().log_prob(flat[-1])
    assert torch.allclose(log_density, plain - guide.log_prob(values) + log_base)


def test_a_loaded_guide_need_not_be_called(tmp_path: Path) -> None:
    guide = moved(pf.AutoPlanarFlow(one_plate, 2).setup())
    found = []
    for each in (guide, returned(guide, tmp_path)):
        neutra, reparam = reparametrised(each, one_plate)
        pyro.set_rng_seed(1)
        trace = poutine.trace(reparam).get_trace()
        assert trace.log_prob_sum().isfinite()
        found.append(trace.nodes["p"]["value"])
    assert torch.equal(*found)


def test_draws_of_a_sampler_come_back_to_the_sites() -> None:
    guide = pf.AutoPlanarFlow(one_plate, 1).setup()
    neutra, reparam = reparametrised(guide, one_plate)
    kernel = NUTS(reparam, max_tree_depth=2)
    mcmc = MCMC(kernel, num_samples=8, warmup_steps=4, disable_progbar=True)
    mcmc.run()
    for chains in (False, True):
        draws = mcmc.get_samples(group_by_chain=chains)
        (base,) = draws.values()
        found = neutra.transform_sample(base)
        assert found["p"].shape == base.shape[:-1] + (4, 3)
        assert found["z"].shape == base.shape[:-1] + (4,)
        assert torch.allclose(found["p"].sum(-1), torch.tensor(1.0))


@pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
@pytest.mark.parametrize("elbo", [Trace_ELBO, JitTrace_ELBO])
@pytest.mark.parametrize("model", MODELS)
def test_particles_keep_their_place_beside_the_plates(model: Callable, elbo: type) -> None:
    for particles in (1, 4):
        guide = pf.AutoPlanarFlow(model, 1).setup()
        options = {"num_particles": particles, "vectorize_particles": True}
        loss = elbo(**options, max_plate_nesting=2).loss_and_grads(model, guide)
        assert torch.as_tensor(loss).isfinite()
