"""The ascent to the modes, the best Gaussian that it leads to, and where a guide is placed."""

import math
import sys
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyroflow as pf
from pyroflow.inference.ascent import ascend, rescale
from pyroflow.inference.gaussian_start import Gaussian, best_gaussian, initialize
from pyroflow.model.bound import BoundModel
from pyroflow.model.log_joint import LogJoint
from pyroflow.model.runs import Runs
from pyroflow.targets import eight_schools_centered


class Density:
    """A log density of latents z (S, D) in place of a model's log joint."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function, self.runs = function, Runs(function)

    def values_and_gradients(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = self.function(z)
            (gradient,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), gradient


LOC = torch.tensor([0.5, -3.0, 20.0, 1e4, 0.0], dtype=torch.float64)
SCALES = torch.tensor([1e-3, 1e-1, 1e1, 1e4, 1.0], dtype=torch.float64)
CORRELATION = 0.99999


def hard_factor() -> Tensor:
    """Scales from 1e-3 to 1e4, and a correlation of 0.99999 between the first and the last."""
    correlation = torch.eye(5)
    correlation[0, 4] = correlation[4, 0] = CORRELATION
    correlation[1, 2] = correlation[2, 1] = -0.5
    return SCALES[:, None] * torch.linalg.cholesky(correlation)


def hard_gaussian(log_normaliser: float = 0.0) -> Density:
    factor = hard_factor()

    def log_p(z: Tensor) -> Tensor:
        white = torch.linalg.solve_triangular(factor, (z - LOC).mT, upper=False)
        log_det = factor.diagonal().log().sum()
        return log_normaliser - white.square().sum(0) / 2 - log_det - 2.5 * math.log(2 * math.pi)

    return Density(log_p)


def relative_error(covariance: Tensor) -> float:
    """The largest |eigenvalue| of Σ⁻¹(found − Σ): it sees the narrow directions too."""
    factor = hard_factor()
    white = torch.linalg.solve_triangular(factor, covariance, upper=False)
    white = torch.linalg.solve_triangular(factor, white.mT, upper=False)
    return torch.linalg.matrix_norm(white - torch.eye(5), 2).item()


def test_newton_finds_a_hard_gaussian_in_a_few_steps() -> None:
    starts = 2 * torch.randn(4, 5)
    points = ascend(hard_gaussian(), starts, 60)
    assert len(points.z) <= 8
    assert torch.equal(points.z[0], starts)
    steps = len(points.z)
    assert points.value.shape == (steps, 4)
    assert points.scale.shape == (steps, 4, 5, 5)
    white = torch.linalg.solve_triangular(hard_factor(), (points.z[-1] - LOC).mT, upper=False)
    assert white.abs().max() < 1e-3
    for factor in points.scale[-1]:
        covariance = factor @ factor.mT
        assert torch.allclose(covariance.diagonal(), SCALES.square(), rtol=1e-3)
        assert relative_error(covariance) < 1e-3


def test_every_step_ascends_and_values_are_those_of_the_points() -> None:
    """Rosenbrock's valley: the Hessian is indefinite on part of the way."""
    valley = Density(lambda z: -(1 - z[:, 0]).square() - 100 * (z[:, 1] - z[:, 0] ** 2).square())
    points = ascend(valley, torch.tensor([[-1.2, 1.0], [0.0, 3.0]]), 60)
    assert (points.value.diff(dim=0) >= 0).all()
    flat = points.z.reshape(-1, 2)
    assert torch.equal(
        valley.values_and_gradients(flat)[0].reshape(points.value.shape), points.value
    )
    assert torch.allclose(points.z[-1], torch.ones(2), atol=1e-2)


def test_scale_is_the_inverse_of_the_absolute_hessian() -> None:
    """At a saddle with curvatures −4 and +9, in any units before."""
    saddle = Density(lambda z: -2 * z[:, 0].square() + 4.5 * z[:, 1].square() + z.sum(1))
    for unit in (1e-2, 1.0, 50.0):
        gradient, scale = rescale(saddle, torch.zeros(1, 2), unit * torch.eye(2)[None])
        assert torch.allclose(gradient, torch.ones(1, 2))
        expected = torch.tensor([1 / 4, 1 / 9]).diag()
        assert torch.allclose(scale[0] @ scale[0].mT, expected, rtol=1e-6, atol=1e-8)


def test_scale_stays_where_the_hessian_is_not_finite() -> None:
    edge = Density(lambda z: (-z).sqrt().sum(1))  # not a number a little right of zero
    before = torch.tensor([[[2.0, 0.0], [1.0, 3.0]]])
    _, scale = rescale(edge, torch.full((1, 2), -1e-9), before)
    assert torch.allclose(scale @ scale.mT, before @ before.mT)


def test_best_gaussian_of_a_hard_gaussian_is_itself() -> None:
    found = best_gaussian(hard_gaussian(log_normaliser=7.5), torch.zeros(5))[0]
    assert found.bound == pytest.approx(7.5, abs=1e-6)
    white = torch.linalg.solve_triangular(hard_factor(), (found.loc - LOC)[:, None], upper=False)
    assert white.abs().max() < 1e-4
    assert relative_error(found.scale @ found.scale.mT) < 1e-3
    assert torch.equal(found.scale, found.scale.tril())
    assert (found.scale.diagonal() > 0).all()


@pytest.mark.parametrize("a", [1.0, 2.0, 5.0])
def test_best_gaussian_of_a_skewed_density(a: float) -> None:
    """z = log of a Gamma(a) variable, log p = a z − exp z: the optimum is known.

    E[a − exp z] = 0 and E[exp z] = 1/s² give s² = 1/a and m = log a − 1/(2a). One answer has the
    noise of its draws; the mean of eight must be there.
    """
    skewed = Density(lambda z: (a * z - z.exp()).sum(1))
    m, s = math.log(a) - 1 / (2 * a), a**-0.5
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    best = a * m - a + math.log(s) + entropy
    laplace = a * math.log(a) - a * math.exp(0.5 / a) + math.log(s) + entropy
    found = []
    for seed in range(8):
        pyro.set_rng_seed(seed)
        loc, scale, bound = best_gaussian(skewed, torch.zeros(1))[0]
        exact = (a * loc - (loc + scale.square()[0] / 2).exp() + scale[0].log()).item() + entropy
        assert max(laplace, best - 0.025) < exact <= best + 1e-12
        found.append([(loc.item() - m) / s, scale.item() ** 2 / s**2, bound - best])
    shift, variance, excess = torch.tensor(found).mean(0).tolist()
    assert shift == pytest.approx(0.0, abs=0.06)
    assert variance == pytest.approx(1.0, abs=0.1)
    assert excess == pytest.approx(0.0, abs=0.03)


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_heavier_mode_is_chosen(side: float) -> None:
    where = side * torch.tensor([1.5, 1.0])

    def log_p(z: Tensor) -> Tensor:
        heavy = dist.Normal(where, 0.2).log_prob(z).sum(1) + math.log(0.9)
        light = dist.Normal(-where, 0.2).log_prob(z).sum(1) + math.log(0.1)
        return torch.logaddexp(heavy, light)

    found = best_gaussian(Density(log_p), torch.zeros(2))[0]
    assert torch.allclose(found.loc, where, atol=1e-3)
    assert torch.allclose(found.scale, 0.2 * torch.eye(2), atol=1e-3)
    assert found.bound == pytest.approx(math.log(0.9), abs=1e-3)


def test_density_without_a_mode_and_the_same_bits_from_the_same_seed() -> None:
    """The log evidence is −31.31; the funnel's density has no bound as tau falls to 0."""
    guide = pf.AutoPlanarFlow(eight_schools_centered, 0)
    problem = BoundModel(eight_schools_centered, guide)
    log_joint, start = LogJoint(problem, guide, 128), guide._init_loc()
    pyro.set_rng_seed(5)
    found = best_gaussian(log_joint, start)[0]
    assert -36 < found.bound < -31.31
    z = found.loc + torch.randn(20_000, 10) @ found.scale.mT
    q = dist.MultivariateNormal(found.loc, scale_tril=found.scale)
    assert -36 < (log_joint.values(z) - q.log_prob(z)).mean().item() < -31.31
    pyro.set_rng_seed(5)
    again = best_gaussian(log_joint, start)[0]
    assert again.bound == found.bound
    assert torch.equal(again.loc, found.loc)
    assert torch.equal(again.scale, found.scale)


def test_none_where_nothing_is_finite() -> None:
    assert best_gaussian(Density(lambda z: z.sum(1) * math.nan), torch.zeros(2))[0] is None
    assert best_gaussian(Density(lambda z: z.sum(1) - math.inf), torch.zeros(2))[0] is None


def test_starts_that_are_not_finite_are_moved_nearer() -> None:
    """Only a ball around the start is in the support."""

    def log_p(z: Tensor) -> Tensor:
        inside = 0.25 - z.square().sum(1)
        return 20 * inside.log()

    found = best_gaussian(Density(log_p), torch.tensor([0.01, -0.02]))[0]
    assert found.loc.norm() < 0.05
    assert math.isfinite(found.bound)


def test_support_that_no_gaussian_keeps_to() -> None:
    """A Gamma variable left on its own scale: finite at the start, not a number left of zero."""
    half = Density(lambda z: (5 * z.log() - z).sum(1))
    for seed in range(8):
        pyro.set_rng_seed(seed)
        found = best_gaussian(half, torch.full((2,), 3.0))[0]
        assert found is not None
        assert math.isfinite(found.bound)


@pytest.mark.usefixtures("float32")
def test_float32() -> None:
    precision = torch.tensor([[1.0, 0.5], [0.5, 2.0]])
    loc = torch.tensor([3.0, -1.0])
    target = dist.MultivariateNormal(loc, precision_matrix=precision)
    found = best_gaussian(Density(target.log_prob), torch.zeros(2))[0]
    assert found.loc.dtype == found.scale.dtype == torch.float32
    assert torch.allclose(found.loc, loc, atol=1e-2)
    assert torch.allclose(found.scale @ found.scale.mT, precision.inverse(), atol=1e-2)
    assert found.bound == pytest.approx(0.0, abs=1e-3)


PLACED = Gaussian(
    torch.tensor([1.0, -200.0, 0.03], dtype=torch.float64),
    torch.tensor([[2.0, 0, 0], [30.0, 40.0, 0], [-0.01, 0.02, 0.01]], dtype=torch.float64),
    0.0,
)


def placed_guide(affine: str, num_layers: int = 3) -> pf.AutoPlanarFlow:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    return pf.AutoPlanarFlow(model, num_layers, affine=affine).setup()


@pytest.mark.parametrize("num_layers", [0, 3])
def test_full_affine_layer_is_the_gaussian(num_layers: int) -> None:
    guide = placed_guide("full", num_layers)
    initialize(guide, PLACED)
    loc, scale = guide.affine.loc_and_scale()
    assert torch.allclose(loc, PLACED.loc)
    assert torch.allclose(scale, PLACED.scale)


def test_diagonal_affine_layer_is_the_mean_field_optimum() -> None:
    """The KL divergence of a diagonal Gaussian from a full one has its gradient zero there."""
    guide = placed_guide("diagonal")
    initialize(guide, PLACED)
    loc, scale = guide.affine.loc_and_scale()
    assert torch.allclose(loc, PLACED.loc)
    assert torch.allclose(scale, torch.inverse(PLACED.scale @ PLACED.scale.mT).diagonal() ** -0.5)
    log_scale = scale.detach().log().requires_grad_()
    q = dist.MultivariateNormal(loc.detach(), scale_tril=log_scale.exp().diag())
    p = dist.MultivariateNormal(PLACED.loc, scale_tril=PLACED.scale)
    torch.distributions.kl_divergence(q, p).backward()
    assert log_scale.grad.abs().max() < 1e-9


@pytest.mark.parametrize("affine", ["full", "diagonal"])
def test_layers_that_are_not_the_identity_are_made_up_for(affine: str) -> None:
    guide = placed_guide(affine)
    with torch.no_grad():
        for parameter in guide.planar.parameters():
            parameter.copy_(torch.randn_like(parameter))
        inside = guide.get_base_dist().sample((1000,))
        for t in guide.get_transforms()[:-1]:
            inside = t(inside)
    assert (inside.var(0) - 1).abs().max() > 0.3  # so there is something to make up for
    initialize(guide, PLACED)
    z = guide.get_posterior().sample((50_000,)).detach()
    covariance = PLACED.scale @ PLACED.scale.mT
    if affine == "full":
        white = torch.linalg.solve_triangular(PLACED.scale, (z - PLACED.loc).mT, upper=False).mT
        assert torch.allclose(torch.cov(white.T), torch.eye(3), atol=0.12)
    else:
        sd = covariance.inverse().diagonal() ** -0.5
        white = (z - PLACED.loc) / sd
        assert torch.allclose(white.std(0), torch.ones(3), rtol=0.06)
    assert torch.allclose(white.mean(0), torch.zeros(3), atol=0.08)


def test_a_bar_shows_the_start(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With much data it takes minutes; without ``progress`` nothing is written."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for progress in (True, False):
        guide = pf.AutoPlanarFlow(eight_schools_centered, num_layers=2)
        options = {"steps": 3, "seed": 0, "progress": progress}
        pf.fit_guide(eight_schools_centered, guide, **options)
        written = capsys.readouterr().err
        assert ("fit_guide, start: 100%" in written) == progress
        assert bool(written) == progress
