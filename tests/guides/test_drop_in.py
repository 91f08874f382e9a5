"""The guides where Pyro's own guides are used: its ELBOs, plates, lists and predictions."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from drop_in_cases import (
    GUIDES,
    check_all_moved,
    check_posterior,
    mixture,
    model,
    readings,
    snapshot,
    train,
)
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from torch import Tensor

import pyroflow as pf

MANY = {"num_particles": 32, "vectorize_particles": True, "max_plate_nesting": 1}

ELBOS = {
    "Trace": lambda: Trace_ELBO(),
    "TraceMeanField": lambda: TraceMeanField_ELBO(),
    "TraceGraph": lambda: TraceGraph_ELBO(),
    "TraceEnum": lambda: TraceEnum_ELBO(max_plate_nesting=1),
    "Renyi": lambda: RenyiELBO(alpha=0.9, **MANY),
    "JitTrace": lambda: JitTrace_ELBO(),
    "vectorized": lambda: Trace_ELBO(**MANY),
    "vectorized TraceMeanField": lambda: TraceMeanField_ELBO(**MANY),
    "vectorized JitTrace": lambda: JitTrace_ELBO(**MANY),
}
QUICK = ("Trace", "TraceMeanField", "TraceGraph", "vectorized")

# What tracing has to say of Pyro's own code.
quiet_tracing = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit", "ignore:TraceEnum_ELBO found no sample"
)


@pytest.fixture(params=GUIDES)
def make(request: pytest.FixtureRequest) -> Callable:
    return GUIDES[request.param]


@quiet_tracing
@pytest.mark.parametrize("name", [n if n in QUICK else slow(n) for n in ELBOS])
def test_every_elbo_trains_every_parameter_to_the_posterior(make: Callable, name: str) -> None:
    guide, y = make(model).setup(readings()), readings()
    before = snapshot(guide)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.2, "lrd": 0.98}), ELBOS[name]())
    train(lambda: svi.step(y), 100)
    check_all_moved(guide, before)
    check_posterior(guide)


@quiet_tracing
def test_elbos_agree_on_one_draw(make: Callable) -> None:
    """TraceMeanField_ELBO too, which loses the Jacobian of ``rate`` with a plain Delta."""
    guide, y, losses = make(model), readings(), {}
    guide(y)
    for name in ("Trace", "TraceMeanField", "TraceGraph", "TraceEnum", "JitTrace"):
        elbo = ELBOS[name]()
        loss = elbo.differentiable_loss if name == "JitTrace" else elbo.loss
        loss(model, guide, y)  # a first run may draw more, to compile
        pyro.set_rng_seed(1)
        losses[name] = torch.as_tensor(loss(model, guide, y)).item()
    pyro.set_rng_seed(1)
    draw = guide(y)
    log_q = guide.log_prob(draw)
    log_p = poutine.trace(poutine.condition(model, data=draw)).get_trace(y).log_prob_sum()
    assert losses["Trace"] == pytest.approx((log_q - log_p).item(), rel=1e-12)
    assert losses == pytest.approx(dict.fromkeys(losses, losses["Trace"]), rel=1e-12)


@pytest.mark.parametrize("local", [False, True])
def test_elbo_as_a_module_with_a_torch_optimizer(make: Callable, local: bool) -> None:
    y = readings()
    with pyro.settings.context(module_local_params=local):
        guide = make(model)
        guide(y)
        elbo = Trace_ELBO(**MANY)(model, guide)
        before = snapshot(guide)
        optimizer = torch.optim.Adam(elbo.parameters(), lr=0.2)

        def step() -> None:
            optimizer.zero_grad()
            elbo(y).backward()
            optimizer.step()

        train(step)
        check_all_moved(guide, before)
        check_posterior(guide)


def test_predictive_in_parallel(make: Callable) -> None:
    guide, y = make(model, init_scale=0.2).setup(readings()), readings()
    sites = ("loc", "rate", "y")
    options = {"guide": guide, "num_samples": 2000, "return_sites": sites}
    parallel = Predictive(model, parallel=True, **options)(y)
    with torch.no_grad():
        z = guide.get_posterior().sample((2000,))
    assert parallel["loc"].numel() == 2000
    assert parallel["loc"].mean().item() == pytest.approx(z[:, 0].mean().item(), abs=0.03)
    assert parallel["rate"].log().std().item() == pytest.approx(z[:, 1].std().item(), rel=0.1)
    assert guide.log_prob({site: parallel[site] for site in ("loc", "rate")}).shape == (2000, 1)


def regression(x: Tensor, y: Tensor | None, index: Tensor | None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    size = None if index is not None else 10
    with pyro.plate("rows", 100, subsample_size=size, subsample=index) as rows:
        seen.append(rows)
        pyro.sample("y", dist.Normal(slope * x[rows], 0.5), obs=y[rows])


seen: list[Tensor] = []


@pytest.mark.parametrize("given", [False, True])
def test_minibatches_with_indices_of_pyro_or_of_the_user(make: Callable, given: bool) -> None:
    x = torch.linspace(-1.0, 1.0, 100)
    y = 2.0 * x + 0.5 * torch.randn(100)
    precision = 1.0 + 4 * x.square().sum()
    guide = make(regression)
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(80):
        index = torch.randperm(100)[:20] if given else None
        svi.step(x, y, index)
        # one run of the model: the guide makes no plate for rows without latents (pyro #3468)
        assert index is None or torch.equal(seen[-1], index)
    expected = 4 * (x * y).sum() / precision
    assert guide.median()["slope"].item() == pytest.approx(expected.item(), abs=0.3)


@quiet_tracing
@pytest.mark.parametrize("elbo", [TraceEnum_ELBO, JitTraceEnum_ELBO])
def test_enumerated_discrete_sites(make: Callable, elbo: type) -> None:
    y = torch.cat([torch.linspace(-2.2, -1.8, 10), torch.linspace(1.8, 2.2, 10)])
    start = {"loc": torch.tensor([-1.0, 1.0])}
    init = pyro.infer.autoguide.init_to_value(values=start)
    guide = make(poutine.block(mixture, hide=["side"]), init_loc_fn=init)
    enumerated = config_enumerate(mixture, "parallel")
    svi = SVI(enumerated, guide, pyro.optim.Adam({"lr": 0.1}), elbo(max_plate_nesting=1))
    train(lambda: svi.step(y))
    assert torch.allclose(guide.median()["loc"], torch.tensor([-2.0, 2.0]), atol=0.3)


@pytest.mark.parametrize("rival", [AutoNormal, AutoDelta])
def test_part_of_a_guide_list(make: Callable, rival: type) -> None:
    guide, y = AutoGuideList(model), readings()
    guide.append(make(poutine.block(model, expose=["loc"])))
    guide.append(rival(poutine.block(model, expose=["rate"])))
    guide(y)
    before = snapshot(guide)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.2}), Trace_ELBO(**MANY))
    train(lambda: svi.step(y))
    check_all_moved(guide, before)
    check_posterior(guide)
    assert set(guide.median()) == {"loc", "rate"}


def test_two_guides_in_one_list_and_a_second_list() -> None:
    y = readings()
    for _ in range(2):  # the second list finds the first one's names in the parameter store
        guide = AutoGuideList(model)
        for site in ("loc", "rate"):
            guide.append(pf.AutoPlanarFlow(poutine.block(model, expose=[site]), 2))
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.2}), Trace_ELBO(**MANY))
        train(lambda svi=svi: svi.step(y))
        check_posterior(guide)


def test_quantiles_are_those_of_its_draws_on_the_support(make: Callable) -> None:
    guide, y = make(model, init_scale=0.3), readings()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(**MANY))
    train(lambda: svi.step(y), 20)
    draws = Predictive(guide, num_samples=20_000, parallel=True)(y)
    levels = [0.1, 0.5, 0.9]
    found, median = guide.quantiles(levels), guide.median()
    for site in ("loc", "rate"):
        expected = draws[site].flatten().quantile(torch.tensor(levels))
        spread = expected[2] - expected[0]
        assert (found[site] - expected).abs().max() < 0.05 * spread
        assert torch.equal(median[site], found[site][1])


def test_parameters_exist_after_one_setup_call(make: Callable) -> None:
    called = []

    def counted(y: Tensor) -> None:
        called.append(len(y))
        model(y)

    guide = make(counted)
    assert list(guide.parameters()) == []
    assert guide.setup(readings()) is guide
    before = list(guide.parameters())
    assert before
    guide.setup(readings())
    guide(readings())
    assert [id(p) for p in guide.parameters()] == [id(p) for p in before]
    assert called == [20]


def test_the_same_rows_run_in_full(make: Callable) -> None:
    def full(y: Tensor) -> None:
        with pyro.plate("rows", 20):
            z = pyro.sample("z", dist.Normal(0.0, 10.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    y = torch.arange(20.0) / 4
    guide = make(full, affine="diagonal")
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True)
    svi = SVI(full, guide, pyro.optim.Adam({"lr": 0.2}), elbo)
    train(lambda: svi.step(y), 100)
    assert (guide.median()["z"] - y * 100 / 100.25).abs().max() < 0.6


def test_all_public_guides_are_covered() -> None:
    names = {name for name in pf.__all__ if name.startswith("Auto")}
    # AutoStructuredFlow has its own in test_structured.
    assert names == {"AutoFlow", "AutoPlanarFlow", "AutoStructuredFlow", "AutoSylvesterFlow"}
