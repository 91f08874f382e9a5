"""Guides that are copied, averaged, saved, loaded, moved and converted."""

import copy
import io
import pickle
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from drop_in_cases import GUIDES, check_all_moved, model, readings, snapshot, trainable
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import init_to_value
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pyroflow as pf


@pytest.fixture(params=GUIDES)
def make(request: pytest.FixtureRequest) -> Callable:
    return GUIDES[request.param]


def steps(guide: pf.AutoFlow, number: int = 3, lr: float = 0.05) -> SVI:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO())
    for _ in range(number):
        svi.step(readings())
    return svi


def density(guide: pf.AutoFlow) -> Tensor:
    with torch.no_grad():
        z = torch.linspace(-1.0, 2.0, 12, dtype=guide.flow.base.loc.dtype).view(6, 2)
        return guide.get_posterior().log_prob(z)


def copied(guide: pf.AutoFlow, how: str) -> pf.AutoFlow:
    return copy.deepcopy(guide) if how == "deepcopy" else pickle.loads(pickle.dumps(guide))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("trained", [0, 3])
def test_copy_is_the_same_distribution_and_trains_by_itself(
    make: Callable, how: str, trained: int
) -> None:
    guide = make(model).setup(readings())
    steps(guide, trained)
    other = copied(guide, how)
    assert torch.equal(density(other), density(guide))
    before, theirs = snapshot(guide), snapshot(other)
    guide(readings())  # both names are in the parameter store now
    steps(other)
    assert all(torch.equal(p, before[name]) for name, p in trainable(guide).items())
    check_all_moved(other, theirs)
    steps(guide)
    check_all_moved(guide, before)


def test_deepcopy_before_set_up_leaves_both_whole(make: Callable) -> None:
    guide = make(model)
    other = copy.deepcopy(guide)
    for each in (guide, other):
        before = snapshot(each.setup(readings()))
        steps(each)
        check_all_moved(each, before)
    assert guide.model is other.model
    assert not {id(p) for p in guide.parameters()} & {id(p) for p in other.parameters()}


def test_pickle_before_set_up_says_what_is_missing(make: Callable) -> None:
    guide = pf.AutoPlanarFlow(model)
    other = copied(guide, "pickle")
    with pytest.raises(
        RuntimeError, match=r"pickled before its first call.* after setup\(\*args\)"
    ):
        other(readings())
    guide(readings())  # as it was


def test_copies_of_a_model_with_parameters_of_its_own(make: Callable) -> None:
    """Its prior carries a graph, which cannot be copied."""

    def empirical(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.5)) * 2
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        w = pyro.sample("w", dist.Uniform(loc - 3, loc + 3))
        pyro.sample("y", dist.Normal(z + w, 1.0).expand([len(y)]).to_event(1), obs=y)

    guide = make(empirical)
    svi = SVI(empirical, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(readings())
    for how in ("deepcopy", "pickle"):
        assert torch.equal(density(copied(guide, how)), density(guide))


def test_guides_that_share_some_names_train_their_own_tensors() -> None:
    """Of the second guide's names in the store only those of the affine layer are taken."""
    for layers in ([pf.Radial(2)], [pf.Planar(2)]):
        guide = pf.AutoFlow(model, layers).setup(readings())
        before = snapshot(guide)
        steps(guide)
        check_all_moved(guide, before)


@pytest.mark.parametrize("exponential", [False, True])
def test_averaged_weights(make: Callable, exponential: bool) -> None:
    guide = make(model).setup(readings())
    options = {"multi_avg_fn": get_ema_multi_avg_fn(0.5)} if exponential else {}
    svi, average = steps(guide, 1), AveragedModel(guide, **options)
    expected = None
    for _ in range(3):
        svi.step(readings())
        average.update_parameters(guide)
        now = torch.cat([p.detach().flatten() for p in guide.parameters()])
        kept = [] if expected is None else [expected]
        if exponential:
            expected = (kept[0] + now) / 2 if kept else now
        else:
            expected = now if not kept else expected + (now - expected) / (_ + 1)
    found = torch.cat([p.detach().flatten() for p in average.module.parameters()])
    assert torch.allclose(found, expected)
    draw = average(readings())
    assert set(draw) == {"loc", "rate"}
    assert average.module.median()["rate"] > 0


def test_state_dict_into_a_fresh_guide(make: Callable) -> None:
    guide = make(model, base_df=8.0)
    steps(guide)
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = make(model, base_df=8.0)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"no parameters yet.* setup\(\*args\)"):
            fresh.load_state_dict(state, strict=strict)
    fresh.setup(readings()).load_state_dict(state)
    assert torch.equal(density(fresh), density(guide))
    before = snapshot(fresh)
    steps(fresh)
    check_all_moved(fresh, before)


@pytest.mark.parametrize("latents", [torch.float32, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_takes_the_dtype_of_the_latents(
    make: Callable, latents: torch.dtype, default: torch.dtype
) -> None:
    def narrow() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=latents), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(2, dtype=latents))

    torch.set_default_dtype(default)
    try:
        guide = make(narrow, base_df=9.0)
        svi = SVI(narrow, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        svi.step()
        before = snapshot(guide)
        svi.step()
        check_all_moved(guide, before)
        assert guide()["z"].dtype == guide.median()["z"].dtype == latents
        assert {p.dtype for p in (*guide.parameters(), *guide.flow.buffers())} == {latents}
        draw = guide.get_posterior().sample((5,))
        assert guide.log_prob({"z": draw}).dtype == latents
    finally:
        torch.set_default_dtype(torch.float64)


def bounded() -> None:
    pyro.sample("z", dist.Uniform(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])).to_event(1))


def test_conversion_moves_the_bounds_of_the_supports_too(make: Callable) -> None:
    guide = make(bounded, base_df=9.0).setup().float()
    assert guide()["z"].dtype == torch.float32
    guide.double()
    assert guide()["z"].dtype == torch.float64
    assert (guide.quantiles([0.999])["z"] <= torch.tensor([1.0, 2.0, 3.0])).all()


@pytest.mark.parametrize("kind", ["planar", "sylvester"])
def test_every_tensor_moves_with_the_guide(kind: str) -> None:
    guide = GUIDES[kind](bounded, base_df=9.0).setup().to("meta")
    tensors = [*guide.parameters(), *guide.flow.buffers(), guide.flow.base.loc]
    assert {t.device.type for t in tensors} == {"meta"}
    support = guide.prototype_trace.nodes["z"]["fn"].support.base_constraint
    assert support.upper_bound.is_meta
    with pyro.validation_enabled(False):
        z = torch.zeros(3, device="meta")
        values = {site["name"]: site["value"] for site, _ in guide._unpack_latent(z)}
    assert values["z"].is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_moves_to_the_gpu_and_trains_there(make: Callable) -> None:
    guide = make(bounded).setup().to("cuda")

    def model() -> None:
        high = torch.tensor([1.0, 2.0, 3.0], device="cuda")
        pyro.sample("z", dist.Uniform(torch.zeros_like(high), high).to_event(1))

    before = snapshot(guide)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(3):
        svi.step()
    check_all_moved(guide, before)
    assert guide()["z"].is_cuda
    assert guide.median()["z"].is_cuda


def test_starts_where_it_is_told(make: Callable) -> None:
    start = {"loc": torch.tensor(1.5), "rate": torch.tensor(4.0)}
    guide = pf.AutoSylvesterFlow(
        model, init_loc_fn=init_to_value(values=start), init_scale=0.01
    ).setup(readings())
    median = guide.median()
    assert all(torch.allclose(median[site], start[site], rtol=0.01) for site in start)
    draws = guide.get_posterior().sample((20_000,))
    assert torch.allclose(draws.std(0), torch.full((2,), 0.01), rtol=0.05)
