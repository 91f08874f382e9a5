"""Draws and densities of the guides on constrained supports."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from drop_in_cases import GUIDES, check_all_moved, snapshot
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import init_to_sample, init_to_value
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor
from torch.distributions import biject_to

import pyroflow as pf

PRIORS = {
    "real": lambda: dist.Normal(0.0, 1.0),
    "real_vector": lambda: dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    "positive": lambda: dist.LogNormal(0.0, 1.0),
    "nonnegative": lambda: dist.HalfCauchy(1.0),
    "unit_interval": lambda: dist.Beta(2.0, 3.0),
    "interval": lambda: dist.Uniform(-2.0, torch.tensor([0.5, 2.0])).to_event(1),
    "greater_than": lambda: dist.Pareto(torch.tensor([0.5, 2.0]), 1.0).to_event(1),
    "simplex": lambda: dist.Dirichlet(torch.ones(3)),
    "simplex rows": lambda: dist.Dirichlet(torch.ones(2, 3)).to_event(1),
    "ordered": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0).to_event(1), [dist.transforms.OrderedTransform()]
    ),
    "corr_cholesky": lambda: dist.LKJCholesky(3, 1.0),
    "covariance factor": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0).to_event(1), [dist.transforms.CorrCholeskyTransform()]
    ),
}


@pytest.fixture(params=GUIDES)
def make(request: pytest.FixtureRequest) -> Callable:
    return GUIDES[request.param]


def scattered(guide: pf.AutoFlow, *args: object) -> pf.AutoFlow:
    """The guide set up, and away from its start."""
    guide.setup(*args)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return guide


@pytest.mark.parametrize("support", PRIORS)
def test_draws_and_density_on_every_support(make: Callable, support: str) -> None:
    """The density against that of the trace, and by change of variables in autograd."""
    prior = PRIORS[support]()

    def model() -> None:
        pyro.sample("z", prior)

    guide = scattered(make(model, init_loc_fn=init_to_sample))
    draws = Predictive(model, guide=guide, num_samples=50, parallel=True)()["z"]
    assert prior.support.check(draws).all()
    assert draws.shape == (50, *prior.batch_shape, *prior.event_shape)
    trace = poutine.trace(guide).get_trace()
    value = trace.nodes["z"]["value"]
    found = guide.log_prob({"z": value})
    assert found.item() == pytest.approx(trace.log_prob_sum().item(), rel=1e-9, abs=1e-9)
    together = guide.log_prob({"z": draws})
    single = torch.stack([guide.log_prob({"z": draw}) for draw in draws[:5]])
    assert torch.allclose(together[:5], single)
    assert together.requires_grad


@pytest.mark.parametrize("support", PRIORS)
def test_training_on_every_support_lowers_the_loss(support: str) -> None:
    """Towards zero, which it is where the guide is the prior."""
    prior = PRIORS[support]()

    def model() -> None:
        pyro.sample("z", prior)

    guide = pf.AutoPlanarFlow(model, 2, init_loc_fn=init_to_sample).setup()
    elbo, before = Trace_ELBO(num_particles=16, vectorize_particles=True), snapshot(guide)
    elbo.max_plate_nesting = 1
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
    losses = [svi.step() for _ in range(40)]
    assert sum(losses[-5:]) / 5 < 0.5 * sum(losses[:5]) / 5
    check_all_moved(guide, before)


@pytest.mark.parametrize("support", ["real", "positive", "unit_interval", "nonnegative"])
def test_density_integrates_to_one(make: Callable, support: str) -> None:
    prior = PRIORS[support]()
    guide = scattered(make(lambda: pyro.sample("z", prior), init_scale=0.5))
    z = torch.linspace(-12.0, 12.0, 80_001)
    grid = biject_to(prior.support)(z).unique()  # finer where the support ends
    with torch.no_grad():
        density = guide.log_prob({"z": grid}).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=2e-3)


def test_density_integrates_to_one_on_the_simplex_and_beside_a_second_site() -> None:
    def model() -> None:
        pyro.sample("p", dist.Dirichlet(torch.ones(2)))
        pyro.sample("s", dist.LogNormal(0.0, 1.0))

    guide = scattered(pf.AutoPlanarFlow(model, 3, init_scale=0.4))
    p, s = torch.linspace(0.001, 0.999, 800), torch.linspace(-6.0, 6.0, 800).exp()
    P, S = torch.meshgrid(p, s, indexing="ij")
    with torch.no_grad():
        density = guide.log_prob({"p": torch.stack([P, 1 - P], -1), "s": S}).exp()
    assert density.shape == (800, 800)
    total = torch.trapezoid(torch.trapezoid(density, s), p)
    assert total.item() == pytest.approx(1.0, abs=5e-3)


def test_depth_zero_has_the_density_of_the_known_distribution() -> None:
    def model(loc: Tensor) -> None:
        pyro.sample("s", dist.LogNormal(loc, 1.0).to_event(1))
        pyro.sample("a", dist.Normal(0.0, 1.0))

    two = torch.tensor([0.5, 2.0])
    start = init_to_value(values={"s": two.exp(), "a": torch.tensor(0.0)})
    guide = pf.AutoPlanarFlow(model, 0, init_scale=0.3, init_loc_fn=start)
    s, a = torch.rand(4, 5, 2) + 0.1, torch.randn(4, 5)
    expected = dist.LogNormal(two, 0.3).log_prob(s).sum(-1) + dist.Normal(0.0, 0.3).log_prob(a)
    found = guide.log_prob({"s": s, "a": a}, two)  # sets the guide up
    assert torch.allclose(found, expected)
    # as Predictive returns them beside a plate
    assert torch.allclose(guide.log_prob({"s": s, "a": a[..., None]}), expected)


def pair() -> None:
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("p", dist.Dirichlet(torch.ones(3)))


a, p = torch.tensor(0.3).double(), torch.tensor([0.2, 0.3, 0.5]).double()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"a": a}, r"lacks \['p'\]"),
        ({"a": a, "p": p, "q": a}, r"has \['q'\].*\['a', 'p'\]"),
        ({"a": a, "p": p[:2]}, r"site 'p' with shape \(\*B, \*\(3,\)\), got \(2,\)"),
        ({"a": a, "p": 2 * p}, r"site 'p' strictly inside its support, Simplex"),
        ({"a": a * torch.nan, "p": p}, "site 'a' strictly inside its support"),
        ({"a": a.expand(4), "p": p.expand(5, 3)}, r"\(4,\) at 'a' and \(5,\) at 'p'"),
        ({"a": a.expand(4, 1), "p": p.expand(4, 2, 3)}, r"\(4, 1\) at 'a' and \(4, 2\) at 'p'"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_site(values: dict, match: str) -> None:
    guide = pf.AutoPlanarFlow(pair, 1).setup()
    with pytest.raises(ValueError, match=match):
        guide.log_prob(values)


@pytest.mark.parametrize("prior", ["lower triangle", "sequential plate"])
def test_what_no_bijection_reaches_is_refused_by_site(prior: str) -> None:
    def model() -> None:
        if prior == "lower triangle":
            base = dist.Normal(torch.zeros(2, 2), 1.0).to_event(2)
            to_lower = dist.transforms.LowerCholeskyTransform()
            pyro.sample("S", dist.TransformedDistribution(base, [to_lower]))
        for i in pyro.plate("turns", 2):
            pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))

    match = "site 'S'.*no bijection" if prior == "lower triangle" else "site 'z_0'.*plate 'turns'"
    guide = pf.AutoPlanarFlow(model, 1)
    for _ in range(2):
        with pytest.raises(ValueError, match=match):
            guide.setup()


def test_values_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(TypeError, match="map site names to tensors, got Tensor"):
        pf.AutoPlanarFlow(pair, 1).log_prob(a)


LEVELS = [0, 0.05, 0.5, 0.95, 1]  # with integers, as users write them


def check_quantiles(found: Tensor, draws: Tensor) -> None:
    """Against other draws on the support, (S, *shape), by the share of them below."""
    assert found.shape == (len(LEVELS), *draws.shape[1:])
    assert (found.diff(dim=0) >= 0).all()
    for quantile, level in zip(found, LEVELS, strict=True):
        moves = draws.std(0) > 1e-6  # the zeros of a Cholesky factor do not
        share = (draws <= quantile).double().mean(0)[moves]
        assert (share - level).abs().max() < 0.025


@pytest.mark.parametrize("support", [*PRIORS, "less_than", "correlations"])
def test_quantiles_and_median_are_those_of_draws_on_the_support(support: str) -> None:
    bounded = dist.ImproperUniform(
        constraints.independent(constraints.less_than(-1.0), 1), (), (2,)
    )
    matrix = dist.ImproperUniform(constraints.corr_matrix, (), (3, 3))
    priors = PRIORS | {"less_than": lambda: bounded, "correlations": lambda: matrix}
    prior = priors[support]()

    def model() -> None:
        pyro.sample("z", prior)

    guide = scattered(pf.AutoPlanarFlow(model, 3, init_scale=0.5, init_loc_fn=init_to_median))
    with pyro.plate("draws", 20_000), torch.no_grad():
        draws = guide()["z"]
    found = guide.quantiles(LEVELS)["z"]
    check_quantiles(found, draws)
    assert torch.equal(guide.median()["z"], found[2])


def test_quantiles_of_a_dirichlet_are_those_of_its_beta_marginals() -> None:
    weights = torch.tensor([2.0, 3.0, 5.0])
    betas = dist.Beta(weights, weights.sum() - weights)

    def model() -> None:
        pyro.sample("p", dist.Dirichlet(weights))

    guide = pf.AutoPlanarFlow(model, 4)
    pf.fit_guide(model, guide, steps=500, seed=0, progress=False)
    expected = betas.sample((200_000,)).quantile(torch.tensor([0.05, 0.5, 0.95]), dim=0)
    assert torch.allclose(guide.quantiles([0.05, 0.5, 0.95])["p"], expected, atol=0.02)


@pytest.mark.parametrize("coupled", [False, True])
def test_quantiles_of_rows_are_those_of_draws_on_the_support(coupled: bool) -> None:
    def rows() -> None:
        pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("rows", 12, dim=-2):
            pyro.sample("z", dist.Dirichlet(torch.ones(4)))
            pyro.sample("s", dist.Gamma(2.0, 1.0))

    options = {"num_layers": 2, "init_scale": 0.5, "condition_on_globals": coupled}
    guide = pf.AmortizedPlanarGuide(rows, "rows", **options).setup()
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.2 * torch.randn_like(p))
    with pyro.plate("draws", 20_000, dim=-3), torch.no_grad():
        draws = guide()
    found = guide.quantiles(LEVELS)
    for name, shape in {"w": (3,), "z": (12, 1, 4), "s": (12, 1)}.items():
        check_quantiles(found[name], draws[name].reshape(20_000, *shape))


@pytest.mark.slow
@pytest.mark.usefixtures("float32")
def test_quantiles_of_many_latents() -> None:
    def model() -> None:
        pyro.sample("z", dist.LogNormal(torch.zeros(1700), 1.0).to_event(1))

    guide = pf.AutoPlanarFlow(model, 0, affine="diagonal", init_scale=1.0)
    assert torch.allclose(guide.quantiles([0.5])["z"], guide.affine.offset.exp(), rtol=0.06)


def test_wrong_levels_are_refused() -> None:
    def model() -> None:
        pyro.sample("z", dist.LogNormal(0.0, 1.0))

    guide = pf.AutoPlanarFlow(model, 0)
    for wrong in (0.5, [0.1, 1.5], [-0.1], [torch.nan], [[0.5]]):
        with pytest.raises(ValueError, match=r"quantiles must be a sequence.* in \[0, 1\].* got"):
            guide.quantiles(wrong)
