"""Latents at the edges of their supports: the log joint is exact, whatever the value rounds to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import mpmath as mp
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyroflow import AutoPlanarFlow
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw
from pyroflow.model.log_joint import LogJoint
from pyroflow.model.supports import bijection, preimage

DTYPES = {torch.float32: 2e-5, torch.float64: 1e-12}
POINTS = (-200.0, -95.0, -40.0, -17.0, -3.0, 0.5, 3.0, 17.0, 40.0, 95.0, 200.0)
HIGH = 250  # digits, with which the naive formulas hold


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float64)


def sigmoid(z: mp.mpf) -> mp.mpf:
    return 1 / (1 + mp.exp(-z))


def on_unit(log_density: Callable) -> Callable:
    return lambda z: log_density(sigmoid(z)) + mp.log(sigmoid(z) * (1 - sigmoid(z)))


def on_half_line(log_density: Callable) -> Callable:
    return lambda z: log_density(mp.exp(z)) + z


# By name: the prior of numbers c(·) in a dtype, and its density of z from textbook formulas.
SCALARS = {
    "Beta(0.1, 0.3)": (
        lambda c: dist.Beta(c(0.1), c(0.3)),
        on_unit(lambda x: mp.log(x**-0.9 * (1 - x) ** -0.7 / mp.beta(0.1, 0.3))),
    ),
    "Beta(0.01, 0.01)": (
        lambda c: dist.Beta(c(0.01), c(0.01)),
        on_unit(lambda x: mp.log(x**-0.99 * (1 - x) ** -0.99 / mp.beta(0.01, 0.01))),
    ),
    "Kumaraswamy(0.1, 0.3)": (
        lambda c: dist.Kumaraswamy(c(0.1), c(0.3)),
        on_unit(lambda x: mp.log(0.03 * x**-0.9 * (1 - x**0.1) ** -0.7)),
    ),
    "logit-normal": (
        lambda c: dist.TransformedDistribution(
            dist.Normal(c(0.5), c(30.0)), [dist.transforms.SigmoidTransform()]
        ),
        lambda z: -(((z - 0.5) / 30) ** 2) / 2 - mp.log(30 * mp.sqrt(2 * mp.pi)),
    ),
    "Gamma(0.05, 2)": (
        lambda c: dist.Gamma(c(0.05), c(2.0)),
        on_half_line(lambda x: mp.log(2**0.05 * x**-0.95 / mp.gamma(0.05)) - 2 * x),
    ),
    "Chi2(0.2)": (
        lambda c: dist.Chi2(c(0.2)),
        on_half_line(lambda x: mp.log(x**-0.9 / (2**0.1 * mp.gamma(0.1))) - x / 2),
    ),
    "InverseGamma(0.05, 2)": (
        lambda c: dist.InverseGamma(c(0.05), c(2.0)),
        on_half_line(lambda x: mp.log(2**0.05 * x**-1.05 / mp.gamma(0.05)) - 2 / x),
    ),
    "Weibull(2, 0.1)": (
        lambda c: dist.Weibull(c(2.0), c(0.1)),
        on_half_line(lambda x: mp.log(0.05 * (x / 2) ** -0.9) - (x / 2) ** 0.1),
    ),
    "FisherSnedecor(0.2, 0.4)": (
        lambda c: dist.FisherSnedecor(c(0.2), c(0.4)),
        on_half_line(
            lambda x: mp.log(0.5**0.1 * x**-0.9 * (1 + x / 2) ** -0.3 / mp.beta(0.1, 0.2))
        ),
    ),
    "HalfCauchy(2)": (
        lambda c: dist.HalfCauchy(c(2.0)),
        on_half_line(lambda x: mp.log(4 / mp.pi / (4 + x**2))),
    ),
    "LogNormal(0.5, 30)": (
        lambda c: dist.LogNormal(c(0.5), c(30.0)),
        lambda z: -(((z - 0.5) / 30) ** 2) / 2 - mp.log(30 * mp.sqrt(2 * mp.pi)),
    ),
    "Exponential(2)": (
        lambda c: dist.Exponential(c(2.0)),
        on_half_line(lambda x: mp.log(2) - 2 * x),
    ),
    "Uniform(0, 1)": (lambda c: dist.Uniform(c(0.0), c(1.0)), on_unit(lambda x: mp.mpf(0))),
}


def log_joint(model: Callable, num: int) -> LogJoint:
    pyro.set_rng_seed(0)
    guide = AutoPlanarFlow(model, num_layers=0)
    return LogJoint(BoundModel(model, guide), guide, num)


def check(model: Callable, z: Tensor, truth: list, slopes: list[list], tolerance: float) -> None:
    value, gradient = log_joint(model, len(z)).values_and_gradients(z)
    for found, known in zip(value.tolist(), truth, strict=True):
        assert found == pytest.approx(float(known), rel=tolerance, abs=tolerance)
    for found, known in zip(gradient.tolist(), slopes, strict=True):
        assert found == pytest.approx([float(s) for s in known], rel=10 * tolerance, abs=1e-6)


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("plated", [False, True])
def test_log_joint_and_gradient_far_out(name: str, dtype: torch.dtype, plated: bool) -> None:
    make, log_density = SCALARS[name]

    def model() -> None:
        prior = make(lambda x: torch.tensor(x, dtype=dtype))
        if plated:
            with pyro.plate("rows", 2):
                pyro.sample("x", prior)
        else:
            pyro.sample("x", prior)

    with mp.workdps(HIGH):
        known = {z: (log_density(mp.mpf(z)), mp.diff(log_density, z)) for z in POINTS}
    largest = torch.finfo(dtype).max / 100
    known = {z: pair for z, pair in known.items() if max(map(abs, pair)) < largest}
    assert {-17.0, 17.0} <= set(known)
    copies = 2 if plated else 1
    z = torch.tensor(list(known), dtype=dtype).unsqueeze(-1).expand(-1, copies)
    truth = [copies * value for value, _ in known.values()]
    check(model, z, truth, [copies * [slope] for _, slope in known.values()], DTYPES[dtype])


def corners(dim: int, dtype: torch.dtype) -> Tensor:
    """Points with all combinations of near and far, and far in both directions."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 10.0, 60.0])[torch.randint(3, (12, dim), generator=generator)]
    signs = 2 * torch.randint(2, (12, dim), generator=generator) - 1
    return (scales * signs).clamp(-200, 200).to(dtype) + 0.25


def test_dirichlet_far_out(dtype: torch.dtype) -> None:
    concentration = (0.1, 0.2, 0.3)

    def log_density(*z: mp.mpf) -> mp.mpf:
        a, left, total = concentration, mp.mpf(1), -mp.log(mp.mpf(1))
        for k, logit in enumerate(z):
            part = sigmoid(logit - mp.log(len(z) - k))
            total += (a[k] - 1) * mp.log(left * part) + mp.log(left * part * (1 - part))
            left *= 1 - part
        norm = mp.gamma(sum(a)) / mp.fprod(map(mp.gamma, a))
        return total + (a[-1] - 1) * mp.log(left) + mp.log(norm)

    def model() -> None:
        pyro.sample("x", dist.Dirichlet(torch.tensor(concentration, dtype=dtype)))

    z = corners(2, dtype)
    with mp.workdps(HIGH):
        points = [tuple(map(mp.mpf, point)) for point in z.tolist()]
        truth = [log_density(*point) for point in points]
        slopes = [[mp.diff(log_density, p, n) for n in ((1, 0), (0, 1))] for p in points]
    check(model, z, truth, slopes, DTYPES[dtype])


@pytest.mark.parametrize("eta", [0.1, 1.0])
@pytest.mark.parametrize("matrix", [False, True])
def test_lkj_in_five_dimensions_far_out(dtype: torch.dtype, eta: float, matrix: bool) -> None:
    """Canonical partial correlations are independent: (1 + r)/2 ~ Beta(α, α), r = tanh z."""
    D, make = 5, dist.LKJ if matrix else dist.LKJCholesky
    alphas = [eta + (D - 2 - j) / 2 for i in range(D) for j in range(i)]

    def model() -> None:
        pyro.sample("x", make(D, torch.tensor(eta, dtype=dtype)))

    z = corners(len(alphas), dtype)
    if matrix:  # its Cholesky factor comes first; near singular ones have no inverse
        z = z.clamp(-3, 3)
    points = [list(zip(alphas, point, strict=True)) for point in z.tolist()]
    log_norm = sum(mp.log(mp.beta(0.5, a)) for a in alphas)
    truth = [sum(-2 * a * mp.log(mp.cosh(x)) for a, x in point) - log_norm for point in points]
    slopes = [[-2 * a * mp.tanh(x) for a, x in point] for point in points]
    check(model, z, truth, slopes, DTYPES[dtype])


SUPPORTS = {
    "simplex": (dist.constraints.simplex, 4),
    "corr_cholesky": (dist.constraints.corr_cholesky, 10),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_log_det_is_that_of_the_jacobian(name: str) -> None:
    support, dim = SUPPORTS[name]
    t, z = bijection(support), torch.randn(dim, dtype=torch.float64)

    def free(z: Tensor) -> Tensor:
        y = t(z)
        return y[:-1] if y.dim() == 1 else y[tuple(torch.tril_indices(*y.shape, -1))]

    expected = torch.autograd.functional.jacobian(free, z).slogdet().logabsdet
    torch.testing.assert_close(t.log_abs_det_jacobian(z, t(z)), expected)


def test_maps_are_inverted_in_float32_wherever_the_value_holds_the_latents() -> None:
    simplex, factor = (bijection(support) for support, _ in SUPPORTS.values())
    z = torch.tensor([[12.0, 12.0, 12.0, 12.0], [-20.0, 15.0, -30.0, 10.0]])
    torch.testing.assert_close(simplex.inv(simplex(z)), z, rtol=1e-5, atol=1e-5)
    z = torch.tensor([[9.0, -9.0, 9.0, 3.0, 8.0, -7.0]])
    torch.testing.assert_close(factor.inv(factor(z)), z, rtol=1e-5, atol=1e-5)


BOUNDED = {
    "positive": dist.constraints.positive,
    "unit": dist.constraints.unit_interval,
    "interval": dist.constraints.interval(10.0, 11.0),
    "tensor bounds": dist.constraints.interval(torch.tensor(0.0), torch.tensor(7.0)),
    "tensors and numbers": dist.constraints.interval(0.0, torch.tensor(7.0).expand(5)),
    "greater": dist.constraints.greater_than(5.0),
    "less": dist.constraints.less_than(5.0),
    "softplus": dist.constraints.softplus_positive,
}


@pytest.mark.parametrize("name", BOUNDED)
def test_values_are_finite_and_inside_the_bounds(name: str) -> None:
    support = BOUNDED[name]
    x = bijection(support)(torch.tensor([-200.0, -30.0, 0.0, 30.0, 200.0]))
    assert x.isfinite().all()
    assert (x > getattr(support, "lower_bound", -math.inf)).all()
    assert (x < getattr(support, "upper_bound", math.inf)).all()


@pytest.mark.usefixtures("float32")
def test_weights_of_draws_by_traces_are_exact() -> None:
    def model() -> None:
        with pyro.plate("rows", 3):
            pyro.sample("x", dist.Beta(torch.tensor(0.1), torch.tensor(0.1)))

    pyro.set_rng_seed(0)
    guide = AutoPlanarFlow(model, num_layers=0, init_scale=60.0).setup()
    problem = BoundModel(model, guide)
    assert problem.max_plate_nesting == 1
    particles = pyro.plate("particles", 200, dim=-2)  # as Pyro's ELBOs have them
    q = pyro.poutine.trace(particles(guide)).get_trace()
    m = pyro.poutine.trace(pyro.poutine.replay(particles(problem.model), trace=q)).get_trace()
    by_traces = m.nodes["x"]["fn"].log_prob(m.nodes["x"]["value"]).double()
    check_beta(preimage(q.nodes["x"]["value"]).latent, by_traces)
    draws = draw(problem, 200)
    check_beta(preimage(draws.sites["x"]).latent, draws.log_p, dims=1)


def check_beta(z: Tensor, log_p: Tensor, dims: int = 0) -> None:
    """Beta(0.1, 0.1) at the latents z, summed over the last ``dims`` dimensions."""
    z = z.double()
    assert z.abs().max() > 100
    log_det = torch.nn.functional.logsigmoid(z) + torch.nn.functional.logsigmoid(-z)
    expected = -0.9 * log_det - (2 * math.lgamma(0.1) - math.lgamma(0.2))
    expected = expected.sum(-1) if dims else expected
    torch.testing.assert_close(log_p, expected, rtol=1e-5, atol=1e-4)


def test_a_subclass_with_a_density_of_its_own_keeps_it() -> None:
    class Truncated(dist.Beta):
        def log_prob(self, value: Tensor) -> Tensor:
            return super().log_prob(value) + 1

    def model(make: Callable = Truncated) -> None:
        pyro.sample("x", make(torch.tensor(2.0), torch.tensor(2.0)))

    z = torch.tensor([[0.5], [2.0]])
    own = log_joint(model, 2).values(z)
    torch.testing.assert_close(own, log_joint(lambda: model(dist.Beta), 2).values(z) + 1)
