"""Partially centred coordinates: against Pyro's reparametrisation, autograd, and known answers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.reparam import LocScaleReparam
from pyro.optim import Adam
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import pyroflow as pf
from pyroflow.guides.recording import coordinates_of, spread
from pyroflow.model.bound import BoundModel
from pyroflow.model.centring import Downstream, Prior
from pyroflow.model.locations import prior_of
from pyroflow.model.log_joint import LogJoint
from pyroflow.model.recorded import Recorded, _Reader
from pyroflow.targets import eight_schools_centered

F64 = torch.float64


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def hierarchy(family: Callable[[Tensor, Tensor], dist.Distribution]) -> Callable:
    """A site "theta" of a family whose location and scale are other latents."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(number(0.3), number(2.0)))
        tau = pyro.sample("tau", dist.LogNormal(number(0.0), number(0.7)))
        with pyro.plate("groups", 4):
            theta = pyro.sample("theta", family(mu, tau))
            pyro.sample("y", dist.Normal(theta, number(1.5)), obs=torch.arange(4, dtype=F64))

    return model


LOCATED = {
    "Normal": dist.Normal,
    "StudentT": lambda m, s: dist.StudentT(number(4.0), m, s),
    "Cauchy": dist.Cauchy,
    "Laplace": dist.Laplace,
}
OTHERS = {
    "Gumbel": dist.Gumbel,
    "Logistic": dist.Logistic,
    "affine": lambda m, s: dist.TransformedDistribution(
        dist.Normal(number(0.0), number(1.0)).expand([4]), [dist.transforms.AffineTransform(m, s)]
    ),
    "LogNormal": dist.LogNormal,
    "HalfNormal": lambda m, s: dist.HalfNormal(s),
    "HalfCauchy": lambda m, s: dist.HalfCauchy(s),
    "Exponential": lambda m, s: dist.Exponential(s),
    "Gamma": lambda m, s: dist.Gamma(s, m.exp()),
    "InverseGamma": lambda m, s: dist.InverseGamma(s, m.exp()),
    "Weibull": lambda m, s: dist.Weibull(m.exp(), s),
}


def vectors(covariance: bool) -> Callable:
    """Multivariate normals with a random scale, in a plate."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))
        tau = pyro.sample("tau", dist.LogNormal(torch.zeros(3, dtype=F64), 0.5).to_event(1))
        L = tau.diag_embed() @ pyro.sample("L", dist.LKJCholesky(3, number(2.0)))
        options = {"covariance_matrix": L @ L.mT} if covariance else {"scale_tril": L}
        with pyro.plate("groups", 5):
            pyro.sample("theta", dist.MultivariateNormal(mu, **options))

    return model


def walk() -> None:
    """A random walk whose steps are sites of their own."""
    scale, x = pyro.sample("scale", dist.HalfNormal(number(1.0))), number(0.0)
    for t in range(5):
        x = pyro.sample(f"x{t}", dist.Normal(x, scale))


MODELS = {name: hierarchy(family) for name, family in (LOCATED | OTHERS).items()}
MODELS |= {"Cholesky": vectors(False), "covariance": vectors(True), "walk": walk}


def _axes(prior: Prior, generator: torch.Generator) -> Tensor:
    """Random orthogonal axes of all numbers of a site."""
    size = prior.scale.numel()
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=F64)).Q


def moved(model: Callable, seed: int = 0) -> tuple[pf.AutoFlow, torch.nn.Module]:
    """A guide with the model's coordinates at random c, and units at a random place."""
    guide = pf.AutoFlow(model, []).setup()
    start = guide._init_loc()
    guide.coordinates = coordinates_of(model, (), {}, guide.latents, start)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(2, len(start), generator=generator, dtype=F64)
    free = spread(guide.coordinates, dict.fromkeys(guide.centring, 0.0))
    downstream = {}
    for site, prior in zip(guide.coordinates.sites, guide.coordinates.read(start), strict=True):
        sizes = prior.scale.shape, prior.loc.shape, (prior.loc.numel(), site["start"])
        root, gradient, coupling = (torch.randn(n, generator=generator, dtype=F64) for n in sizes)
        curvature = root @ root.mT if prior.matrix else _axes(prior, generator)
        downstream[site["name"]] = Downstream(gradient, curvature, coupling)
    guide.coordinates.set(torch.where(free == 0, noise[0], 1.0), start + noise[1], downstream)
    return guide, guide.coordinates


@pytest.mark.parametrize("name", MODELS)
def test_the_map_is_exact_both_ways(name: str) -> None:
    _, coordinates = moved(MODELS[name])
    x = torch.randn(6, len(coordinates.c), generator=torch.Generator().manual_seed(1), dtype=F64)
    z = coordinates(x)
    assert (z - x).abs().max() > 0.1
    torch.testing.assert_close(coordinates.inv(z.clone()), x, rtol=1e-9, atol=1e-9)
    jacobians = [torch.autograd.functional.jacobian(coordinates, row) for row in x]
    expected = torch.stack([j.slogdet().logabsdet for j in jacobians])
    torch.testing.assert_close(coordinates.log_abs_det_jacobian(x, z), expected)
    back, log_det = coordinates.inverse_and_log_det(z.clone())
    torch.testing.assert_close(log_det, expected)
    assert torch.autograd.gradcheck(
        lambda x: coordinates.forward_and_log_det(x), x[:1].clone().requires_grad_()
    )


@pytest.mark.parametrize("c", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", LOCATED)
def test_the_density_is_that_of_pyros_reparametrisation(name: str, c: float) -> None:
    model = MODELS[name]
    guide = pf.AutoFlow(model, [], centring={"theta": c})
    log_joint = LogJoint(BoundModel(model, guide), guide, 5)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2), dtype=F64)
    pyros = poutine.reparam(model, config={"theta": LocScaleReparam(c)})
    written = "theta" if c == 1 else "theta_decentered"
    for row, found in zip(x, log_joint.values(x), strict=True):
        values = {"mu": row[0], "tau": row[1].exp(), written: row[2:]}
        trace = poutine.trace(poutine.condition(pyros, values)).get_trace()
        torch.testing.assert_close(found, trace.log_prob_sum() + row[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["HalfNormal", "HalfCauchy", "Exponential", "Weibull", "LogNormal"]
)
def test_location_and_scale_take_a_family_to_one_distribution(name: str) -> None:
    standard = []
    for m, s in [(0.4, 0.5), (-1.0, 2.0)]:
        fn = OTHERS[name](number(m), number(s))
        with pf.seeds.seeded(0):
            draws = fn.rsample((20,)).log()
        prior = prior_of(fn)
        standard.append((draws - prior.loc) / prior.scale)
    torch.testing.assert_close(*standard)


@pytest.mark.parametrize("family", [dist.Gamma, dist.InverseGamma])
def test_location_and_scale_of_gamma_variables_are_moments_of_the_logarithm(family: type) -> None:
    fn = family(number(1.7), number(0.4))
    with pf.seeds.seeded(0):
        draws = fn.sample((200_000,)).log()
    prior = prior_of(fn)
    torch.testing.assert_close(draws.mean(), prior.loc, rtol=0, atol=0.01)
    torch.testing.assert_close(draws.std(), prior.scale, rtol=0.01, atol=0)


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def test_a_funnel_is_normal_in_its_coordinates() -> None:
    guide = pf.AutoSylvesterFlow(funnel, num_layers=1)
    fit = pf.fit_guide(funnel, guide, seed=0, progress=False)
    assert guide.centring["x"].abs().max() < 0.01
    assert abs(fit.best_loss) < 0.005  # the log evidence is 0
    with pf.seeds.seeded(0):
        v = guide.get_posterior().sample((20_000,))[:, 0]
    assert abs(v.std() - 3) < 0.06


def uneven() -> None:
    """Groups with known answer: variances of the data from 0.01 to 2,500."""
    sd = torch.logspace(-1, 1.7, 12)
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("groups", 12):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sd), obs=torch.linspace(-1, 3, 12))


def evidence_of_uneven() -> float:
    """By quadrature over mu and log tau, the rest integrated out."""
    sd = torch.logspace(-1, 1.7, 12, dtype=F64)
    mu, t = torch.linspace(-9, 11, 801, dtype=F64), torch.linspace(-9, 4, 1301, dtype=F64)
    M, T = torch.meshgrid(mu, t, indexing="ij")
    log_p = (
        dist.Normal(number(0.0), 5.0).log_prob(M)
        + dist.HalfNormal(number(2.0)).log_prob(T.exp())
        + T
    )
    for s, y in zip(sd, torch.linspace(-1, 3, 12, dtype=F64), strict=True):
        log_p = log_p + dist.Normal(M, (T.exp().square() + s**2).sqrt()).log_prob(y)
    return log_p.flatten().logsumexp(0).item() + math.log((mu[1] - mu[0]) * (t[1] - t[0]))


@pytest.mark.slow
def test_uneven_groups_are_centred_as_their_data_say() -> None:
    guide = pf.AutoSylvesterFlow(uneven, num_layers=4)
    fit = pf.fit_guide(uneven, guide, steps=300, seed=0, progress=False)
    c = guide.centring["theta"]
    assert c[0] > 0.9 > 0.05 > c[-1]
    assert bool((c.diff() < 0.02).all())
    plain = pf.AutoSylvesterFlow(uneven, num_layers=4, centring=None)
    before = pf.fit_guide(uneven, plain, steps=300, seed=0, progress=False)
    evidence = evidence_of_uneven()
    assert fit.best_loss + evidence < 0.09 < before.best_loss + evidence


@pytest.mark.slow
def test_eight_schools_as_written() -> None:
    guide = pf.AutoSylvesterFlow(eight_schools_centered)
    fit = pf.fit_guide(eight_schools_centered, guide, steps=150, seed=0, progress=False)
    assert fit.best_loss < 31.312 + 0.04  # the log evidence, by quadrature


def test_a_guide_keeps_its_coordinates_in_copies_and_files(tmp_path: Path) -> None:
    guide, coordinates = moved(MODELS["Cholesky"])
    pf.save(guide, tmp_path / "guide.pt")
    loaded = pf.load(tmp_path / "guide.pt")
    other = pf.AutoFlow(MODELS["Cholesky"], []).setup()
    other.load_state_dict(guide.state_dict())
    values = guide()
    for copied in (loaded, other, copy.deepcopy(guide)):
        assert copied.coordinates is not coordinates
        torch.testing.assert_close(copied.log_prob(values), guide.log_prob(values))
        torch.testing.assert_close(copied.centring, guide.centring)
    plain = pf.AutoFlow(MODELS["Cholesky"], []).setup()
    other.load_state_dict(plain.state_dict())
    assert other.coordinates is None


def test_the_guide_moves_with_its_dtype() -> None:
    guide = pf.AutoFlow(uneven, [], centring={"theta": 0.2}).setup()
    double = guide.double().constrain(torch.ones(14, dtype=F64))[0]["theta"]
    single = guide.float().constrain(torch.ones(14, dtype=torch.float32))[0]["theta"]
    assert (double.dtype, single.dtype) == (F64, torch.float32)
    torch.testing.assert_close(double.float(), single)


def test_pyros_own_inference_trains_in_given_coordinates() -> None:
    pyro.clear_param_store()
    guide = pf.AutoFlow(uneven, [], centring={"theta": torch.full((12,), 0.5)})
    svi = SVI(uneven, guide, Adam({"lr": 0.02}), Trace_ELBO(8, vectorize_particles=True))
    with pf.seeds.seeded(0):
        losses = [svi.step() for _ in range(60)]
    assert sum(losses[-20:]) < sum(losses[:20])
    trace = poutine.trace(guide).get_trace()
    draws = {name: trace.nodes[name]["value"] for name in guide.latents.sites}
    expected = trace.log_prob_sum()
    torch.testing.assert_close(guide.log_prob(draws), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("centring", "said"),
    [
        ("none", "'auto', None, or c by site"),
        ({"theta": 1.5}, "c in \\[0, 1\\] for site 'theta'"),
        ({"mu": 0.0}, "site 'mu', which cannot be moved"),
        ({"theta": torch.zeros(3)}, "site 'theta' as a number or with shape \\(12,\\)"),
    ],
)
def test_what_cannot_be_is_refused(centring: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pf.AutoPlanarFlow(uneven, centring=centring).setup()


def test_a_model_without_hierarchy_has_no_coordinates() -> None:
    def model() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Gamma(2.0, 1.0))

    guide = pf.AutoPlanarFlow(model, num_layers=0)
    pf.fit_guide(model, guide, steps=1, progress=False)
    assert guide.coordinates is None
    assert guide.centring == {}


@pytest.mark.parametrize(
    "other", [dist.Beta(2.0, 2.0), dist.Dirichlet(torch.ones(3)), dist.LKJCholesky(3, 2.0)]
)
def test_latents_that_torch_cannot_sample_while_it_records_are_no_obstacle(other: object) -> None:
    def model() -> None:
        pyro.sample("other", other)
        funnel()

    guide = pf.AutoFlow(model, []).setup()
    guide.find_coordinates((), {})
    assert list(guide.centring) == ["x"]


def test_what_depends_on_control_flow_is_left_as_written() -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        wide = 2.0 if scale > 1 else 1.0
        pyro.sample("x", dist.Normal(0.0, scale * wide))

    guide = pf.AutoPlanarFlow(model, num_layers=0)
    pf.fit_guide(model, guide, steps=1, num_particles=2, progress=False)
    assert guide.coordinates is None


def test_a_recording_refuses_random_numbers_and_unknown_operations() -> None:
    with pytest.raises(ValueError, match="draws random numbers"):
        Recorded.of(lambda x: (x + torch.randn(3),), torch.zeros(3))
    with pytest.raises(ValueError, match="from_file"):
        Recorded([["from_file.default", ["secret"], {}]], [], [{"step": 0}])(torch.zeros(3))


IN_PLACE = {
    "squeeze_": lambda y: y.unsqueeze(0).squeeze_(),
    "squeeze_(dim)": lambda y: y.unsqueeze(0).squeeze_(0),
    "squeeze_(dims)": lambda y: y.reshape(1, 2, 1, 3).squeeze_((0, 2)),
    "unsqueeze_": lambda y: y.unsqueeze_(1),
    "t_": lambda y: y.t_(),
    "transpose_": lambda y: y.transpose_(0, 1),
    "swapaxes_": lambda y: y.swapaxes_(0, 1),
    "as_strided_": lambda y: y.as_strided_((3, 2), (1, 3)),
}


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_a_shape_that_torch_changes_in_place_is_recorded_as_a_view(change: Callable) -> None:
    """Without functionalisation, as inside of torch's own operations."""

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return change(x.exp()), change(torch.arange(6.0).reshape(2, 3).exp()) * x.sum()

    graph = make_fx(function)(torch.zeros(2, 3))
    recorded, x = Recorded(*_Reader(graph).read()), torch.rand(2, 3)
    for _ in range(2):
        for found, expected in zip(recorded(x), function(x), strict=True):
            assert torch.equal(found, expected)
    assert not any("_." in name for name, _, _ in recorded.steps)


def test_a_single_number_may_have_coordinates() -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.5))
        pyro.sample("x", dist.Normal(0.0, scale))

    guide = pf.AutoPlanarFlow(model, num_layers=0)
    fit = pf.fit_guide(model, guide, seed=0, progress=False)
    assert guide.centring["x"].shape == ()
    assert abs(fit.best_loss) < 1e-3  # exact at c = 0; the log evidence is 0


def test_a_walk_given_its_scale_is_normal_along_axes_of_its_own() -> None:
    """Given the scale the steps are normal with a precision that the data correlate."""
    y = torch.tensor([0.3, 0.9, 0.2, 0.8, 1.9, 2.2, 1.7, 2.9, 3.4, 3.1])

    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(-1.0, 0.5))
        with pyro.plate("steps", len(y)):
            step = pyro.sample("step", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(step.cumsum(-1), 0.3).to_event(1), obs=y)

    guide = pf.AutoPlanarFlow(model, num_layers=0)
    fit = pf.fit_guide(model, guide, steps=1, seed=0, progress=False)
    t = torch.linspace(-5, 3, 2001, dtype=F64)
    root = torch.ones(len(y), len(y), dtype=F64).tril()
    cov = t.exp().square()[:, None, None] * (root @ root.T) + 0.09 * torch.eye(len(y), dtype=F64)
    log_p = dist.MultivariateNormal(torch.zeros(len(y), dtype=F64), cov).log_prob(y.to(F64))
    log_p = log_p + dist.Normal(number(-1.0), number(0.5)).log_prob(t)
    evidence = log_p.logsumexp(0).item() + math.log(t[1] - t[0])
    assert fit.best_loss + evidence < 0.02
    plain = pf.AutoPlanarFlow(model, num_layers=0, centring=None)
    before = pf.fit_guide(model, plain, steps=1, seed=0, progress=False)
    assert before.best_loss + evidence > 0.06


TIMES = torch.linspace(0, 4, 20, dtype=F64)
SERIES = 3 + (2 * TIMES).sin() + 0.2 * (17 * TIMES).cos()


def matern(length: Tensor) -> Tensor:
    """A covariance that is nearly singular."""
    q = (TIMES[:, None] - TIMES).abs() / length
    return (1 + q) * (-q).exp() + 1e-6 * torch.eye(20, dtype=F64)


@pytest.mark.slow
def test_a_process_beside_an_intercept_that_the_data_tell_from_it_in_part() -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(number(3.0), number(0.5)))
        length = pyro.sample("length", dist.LogNormal(number(0.0), number(0.5)))
        zero = torch.zeros(20, dtype=F64)
        f = pyro.sample("f", dist.MultivariateNormal(zero, matern(length)))
        pyro.sample("y", dist.Normal(mu + f, number(0.1)).to_event(1), obs=SERIES)

    guide = pf.AutoPlanarFlow(model, num_layers=0)
    fit = pf.fit_guide(model, guide, steps=1, seed=0, progress=False)
    t = torch.linspace(-4, 4, 801, dtype=F64)
    noise = 0.01 * torch.eye(20, dtype=F64) + 0.25
    cov = torch.stack([matern(length) + noise for length in t.exp()])
    log_p = dist.MultivariateNormal(torch.full((20,), 3.0, dtype=F64), cov).log_prob(SERIES)
    log_p = log_p + dist.Normal(number(0.0), number(0.5)).log_prob(t)
    evidence = log_p.logsumexp(0).item() + math.log(t[1] - t[0])
    assert fit.best_loss + evidence < 0.05


def test_points_of_many_latents_are_moved_side_by_side() -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("rows", 1000):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(1000))

    guide = pf.AutoStructuredFlow(model).setup()
    guide.find_coordinates((), {})
    runs = 0

    def counted(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal runs
        runs += 1
        return moved(*args)

    coordinates = guide.coordinates
    moved, coordinates.to_z = coordinates.to_z, counted
    coordinates.move(torch.zeros(600, 1001), *coordinates.tensors())
    assert runs == 2
