"""AmortizedPlanarGuide: supports, plates, contexts, and the rest of Pyro around it."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from amortized_cases import (
    LOSS,
    Y,
    effects_model,
    exact_effects,
    exact_guide,
    rows_model,
)
from pyro.infer import SVI, JitTrace_ELBO, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList
from torch import Tensor, nn

import pyroflow as pf
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw


def constrained_model(x: Tensor, batch: int | None = None) -> None:
    """Several local sites of other supports and shapes; a global one sampled after them."""
    with pyro.plate("rows", len(x), subsample_size=batch) as rows:
        s = pyro.sample("s", dist.LogNormal(0.3, 0.8))
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
        pyro.sample("m", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
    t = pyro.sample("t", dist.Gamma(2.0, 3.0))
    with pyro.plate("data", len(x), subsample=rows):
        pyro.sample("x", dist.Normal(p[..., 0], s + t), obs=x[rows])


@pytest.mark.parametrize("context", ["x", None])
def test_several_constrained_sites_have_their_jacobians(context: str | None) -> None:
    """E_q[prior / q] = 1, whatever q is, only if log q is the density on the supports."""
    x = torch.randn(4)
    model = pyro.poutine.block(constrained_model, hide=["x"])
    guide = pf.AmortizedPlanarGuide(model, "rows", context, num_layers=2, init_scale=1.0)
    guide.setup(x)
    with torch.no_grad():
        for p in guide.local_flow.parameters():
            p += 0.05 * torch.randn_like(p)
        guide.local_flow.affine.raw_scale += 0.3
    weights = []
    for _ in range(2):
        plate = pyro.plate("draws", 5000, dim=-2)
        trace = pyro.poutine.trace(plate(guide)).get_trace(x)
        replayed = pyro.poutine.replay(plate(model), trace=trace)
        model_trace = pyro.poutine.trace(replayed).get_trace(x)
        log_ratio = 0.0
        for name in ("s", "p", "m"):
            site = model_trace.nodes[name]
            log_ratio = log_ratio + site["fn"].log_prob(site["value"])
            log_ratio = log_ratio - trace.nodes[name]["fn"].log_prob(site["value"])
        local = trace.nodes["_AmortizedPlanarGuide_local_rows"]
        weights.append((log_ratio - local["fn"].log_prob(local["value"])).exp())
        t = trace.nodes["t"]["value"]
    assert trace.nodes["s"]["value"].shape == (5000, 4)
    assert trace.nodes["p"]["value"].shape == (5000, 4, 3)
    assert trace.nodes["m"]["value"].shape == (5000, 4, 2, 2)
    assert (t > 0).all()
    assert torch.allclose(torch.cat(weights).mean(0), torch.ones(4), atol=0.15)
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        assert math.isfinite(elbo.loss(constrained_model, guide, x, 2))


def test_plate_left_of_another_and_in_any_place() -> None:
    """Rows in dimension -2, with a global latent in a full plate of dimension -1."""

    def model(y: Tensor, batch: int | None = None) -> None:
        columns = pyro.plate("columns", 3, dim=-1)
        with columns:
            c = pyro.sample("c", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=batch, dim=-2) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with columns:
                pyro.sample("y", dist.Normal(z + c, 1.0), obs=y[rows])

    y = torch.randn(6, 3)
    guide = pf.AmortizedPlanarGuide(model, "rows", "y")
    assert guide(y, 4)["z"].shape == (4, 1)
    problem = BoundModel(model, guide, (y, 4))
    assert problem.max_plate_nesting == 2
    assert draw(problem, 7).log_weights.shape == (7,)
    assert guide.median(y)["z"].shape == (6, 1)
    assert guide.median(y)["c"].shape == (3,)
    assert Predictive(guide, num_samples=5, parallel=True)(y)["z"].shape == (5, 6, 1)


def test_context_forms_agree() -> None:
    def model(a: Tensor, *, b: Tensor) -> None:
        with pyro.plate("rows", 6, subsample_size=2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    a, b = torch.randn(6), torch.randn(6, 2, 2)
    joined = torch.cat([a[:, None], b.flatten(1)], -1)
    forms = {
        "names": ["a", "b"],
        "function": lambda a, *, b: joined,
        "encoder": lambda a, *, b: (joined - joined.mean(0)) / joined.std(0, unbiased=False),
    }
    found = []
    for name, context in forms.items():
        pyro.set_rng_seed(1)
        encoder = nn.Identity() if name == "encoder" else None
        guide = pf.AmortizedPlanarGuide(model, "rows", context, encoder=encoder)
        guide.setup(a, b=b)
        with torch.no_grad():
            guide.local_flow.net.nn.layers[-1].weight.normal_()
        pyro.set_rng_seed(2)
        found.append(guide(a, b=b)["z"])
    assert torch.allclose(found[0], found[1])
    assert torch.allclose(found[0], found[2])


def test_encoder_is_trained_with_the_guide() -> None:
    encoder = nn.Sequential(nn.Unflatten(-1, (1, -1)), nn.Flatten(), nn.Linear(1, 3))
    guide = pf.AmortizedPlanarGuide(
        rows_model, "rows", lambda y, *rest: y[:, None], num_layers=1, encoder=encoder
    )
    svi = SVI(rows_model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    before = encoder[-1].weight.detach().clone()
    for _ in range(3):
        svi.step(Y)
    assert not torch.equal(encoder[-1].weight, before)


def test_fit_guide_takes_it() -> None:
    guide = pf.AmortizedPlanarGuide(rows_model, "rows", "y", num_layers=1)
    before = Trace_ELBO().loss(rows_model, guide, Y, 20)
    options = {"steps": 60, "num_particles": 8, "lr": 0.1, "warm_start": False}
    pf.fit_guide(rows_model, guide, (Y,), seed=0, progress=False, **options)
    assert Trace_ELBO().loss(rows_model, guide, Y, 20) < 0.2 * before


def test_second_guide_and_copy_are_trained_on_their_own() -> None:
    first = exact_guide()
    first(Y)
    second = pf.AmortizedPlanarGuide(rows_model, "rows", "y", num_layers=0)
    for guide in (second, copy.deepcopy(first)):
        guide.setup(Y)
        before = guide.local_flow.affine.offset.item()
        SVI(rows_model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(Y)
        assert guide.local_flow.affine.offset.item() != before
    assert Trace_ELBO().loss(rows_model, first, Y, 20) == pytest.approx(LOSS, abs=1e-9)


@pytest.mark.parametrize("context", ["y", None])
def test_copies_pickles_and_state_dicts_say_the_same(context: str | None) -> None:
    guide = pf.AmortizedPlanarGuide(effects_model, "rows", context, num_layers=2).setup(Y[:4])
    SVI(effects_model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(Y[:4])
    fresh = pf.AmortizedPlanarGuide(effects_model, "rows", context, num_layers=2).setup(Y[:4] + 1)
    fresh.load_state_dict(guide.state_dict())
    expected = guide.median(Y[:4])
    for other in (fresh, copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        for site, value in other.median(Y[:4]).items():
            assert torch.equal(value, expected[site])
        assert other(Y[:4])["z"].shape == (4,)
    assert guide.model is not None
    assert Trace_ELBO().loss(effects_model, copy.deepcopy(guide), Y[:4], 2) > 0


def test_parameters_exist_after_setup_and_follow_dtype() -> None:
    guide = pf.AmortizedPlanarGuide(effects_model, "rows", None).setup(Y)
    names = {name.split(".")[0] for name, _ in guide.named_parameters()}
    assert names == {"global_guide", "local_flow"}
    guide.float()
    assert guide(Y.float())["z"].dtype == torch.float32


def test_jit_and_list_of_guides() -> None:
    y = 1.5 + torch.randn(12)
    guide, log_evidence = exact_effects(y)
    loss = JitTrace_ELBO(ignore_jit_warnings=True).loss(effects_model, guide, y)
    assert loss == pytest.approx(-log_evidence, abs=1e-9)

    def model(y: Tensor) -> None:
        pyro.sample("k", dist.Normal(0.0, 1.0))
        effects_model(y, 4)

    guides = AutoGuideList(model)
    rest = pyro.poutine.block(model, hide=["k"])
    guides.append(pf.AmortizedPlanarGuide(rest, "rows", "y"))
    guides.append(pf.AutoPlanarFlow(pyro.poutine.block(model, expose=["k"]), 1))
    assert {name: v.shape for name, v in guides(y).items()} == {"k": (), "mu": (), "z": (4,)}
    assert math.isfinite(Trace_ELBO().loss(model, guides, y))
