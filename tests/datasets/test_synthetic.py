"""The synthetic densities against each other, quadrature, moments and hand-computed values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyroflow import datasets
from pyroflow.datasets import (
    SINE_ENTROPY,
    ring,
    ring_log_prob,
    sine,
    sine_log_prob,
    two_moons,
    two_moons_log_prob,
)

SETS = {"ring": (ring, ring_log_prob), "two_moons": (two_moons, two_moons_log_prob)}
each = pytest.mark.parametrize("name", list(SETS))


def trapezium(y: Tensor, centre: tuple[float, float], start: float, noise: float) -> Tensor:
    """∫ N(y | centre + (cos t, sin t), noise² I) dt/π over a half circle from angle start."""
    t = torch.linspace(0, math.pi, 200_001, dtype=torch.float64) + start
    residual = y - y.new_tensor(centre) - torch.stack([t.cos(), t.sin()], dim=-1)
    density = torch.exp(-0.5 * residual.square().sum(-1) / noise**2) / (2 * math.pi * noise**2)
    return torch.trapezoid(density, t) / math.pi


@each
def test_points(name: str) -> None:
    draw, _ = SETS[name]
    state = torch.get_rng_state()
    assert draw(7).shape == (7, 2)
    assert draw(7).dtype == torch.float32
    assert torch.equal(draw(50), draw(50, 0, noise=0.1))
    assert not torch.equal(draw(50), draw(50, seed=1))
    assert not torch.equal(draw(50), draw(50, noise=0.2))
    assert torch.equal(torch.get_rng_state(), state)


@each
def test_refusals(name: str) -> None:
    draw, log_prob = SETS[name]
    with pytest.raises(ValueError, match=rf"{name}: n expects a positive number of points, got 0"):
        draw(0)
    with pytest.raises(ValueError, match="noise must be a finite number above 0, got 0.0"):
        draw(5, noise=0.0)
    with pytest.raises(ValueError, match="noise must be a finite number above 0, got -1"):
        log_prob(torch.zeros(2), noise=-1)
    with pytest.raises(ValueError, match=rf"{name}_log_prob: y expects last .* shape \(5, 3\)"):
        log_prob(torch.zeros(5, 3))


@each
def test_log_prob_shapes_and_dtypes(name: str) -> None:
    _, log_prob = SETS[name]
    assert log_prob(torch.zeros(2)).shape == ()
    assert log_prob(torch.zeros(6, 5, 2)).shape == (6, 5)
    assert log_prob(torch.tensor([[0.0, math.nan]])).isnan().all()
    y = torch.randn(200, 2)
    single = log_prob(y.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), log_prob(y), rtol=1e-5, atol=1e-4)


@each
@pytest.mark.parametrize("noise", [0.1, 0.4])
def test_density_integrates_to_one(name: str, noise: float) -> None:
    _, log_prob = SETS[name]
    # The densities are smooth and vanish at the edges: the sum converges exponentially.
    axis = torch.linspace(-5, 6, 331, dtype=torch.float64)
    mass = log_prob(torch.cartesian_prod(axis, axis), noise=noise).exp().sum() * (11 / 330) ** 2
    assert mass.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("noise", [0.05, 0.1, 0.7])
@pytest.mark.parametrize("point", [(0.9, 0.3), (0.0, 0.4), (1.6, -0.2), (0.5, 0.25)], ids=str)
def test_densities_against_a_trapezium_rule(point: tuple[float, float], noise: float) -> None:
    y = torch.tensor(point)
    moons = trapezium(y, (0, 0), 0, noise) + trapezium(y, (1, 0.5), math.pi, noise)
    circle = trapezium(y, (0, 0), 0, noise) + trapezium(y, (0, 0), math.pi, noise)
    torch.testing.assert_close(
        two_moons_log_prob(y, noise=noise).exp(), moons / 2, rtol=1e-8, atol=0
    )
    torch.testing.assert_close(ring_log_prob(y, noise=noise).exp(), circle / 2, rtol=1e-8, atol=0)


def test_known_values() -> None:
    # At the centre every point of the circle is 1 away: log N = -50 - log(2 pi / 100).
    assert ring_log_prob(torch.zeros(2)).item() == pytest.approx(-47.232707, abs=1e-6)
    # On the circle exp(-100) I0(100) / (2 pi 0.01), with I0(100) from tables.
    on_circle = math.log(1.07375170713108e42) - 100 - math.log(2 * math.pi * 0.01)
    assert ring_log_prob(torch.tensor([0.6, 0.8])).item() == pytest.approx(on_circle, abs=1e-9)


def test_moons_are_each_other_turned_round() -> None:
    y = 2 * torch.randn(100, 2)
    turned = torch.tensor([1.0, 0.5]) - y
    torch.testing.assert_close(two_moons_log_prob(turned), two_moons_log_prob(y))


def test_far_points_have_the_noise_of_the_nearest_place() -> None:
    y = torch.tensor([0.0, 30.0])
    for log_prob in (ring_log_prob, two_moons_log_prob):
        assert log_prob(y).item() == pytest.approx(-0.5 * 29**2 / 0.01, rel=1e-3)


def moments(x: Tensor) -> Tensor:
    x = x.double()
    return torch.cat([x.mean(0), (x.mT @ x / len(x)).flatten()[[0, 1, 3]]])


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        # E x1² = 1/2 + noise²; by symmetry the rest is 0.
        (ring, [0, 0, 0.54, 0, 0.54]),
        # Means of a moon: cos 0, sin 2/pi. E x1² = (1/2 + 3/2)/2 + noise²,
        # E x1 x2 = (0 + 1/2 - 2/pi)/2, E x2² = 1/2 + (1/4 - 2/pi)/2 + noise².
        (
            two_moons,
            [0.5, 0.25, 1.04, 0.25 - 1 / math.pi, 0.5 + 0.125 - 1 / math.pi + 0.04],
        ),
    ],
    ids=["ring", "two moons"],
)
def test_moments(draw: Callable[..., Tensor], expected: list[float]) -> None:
    # No entry has a standard deviation above 1.3: 5 standard errors are below 0.011.
    found = moments(draw(400_000, seed=2, noise=0.2))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0.011)


@each
def test_points_follow_the_density(name: str) -> None:
    # E exp(log r(y) - log p(y)) = 1 under p for any density r that p covers; here the same set with
    # less noise, for which the ratio is bounded.
    draw, log_prob = SETS[name]
    y = draw(100_000, seed=3, noise=0.3).double()
    ratio = (log_prob(y, noise=0.25) - log_prob(y, noise=0.3)).exp()
    error = ratio.std().item() / len(y) ** 0.5
    assert error < 0.005
    assert ratio.mean().item() == pytest.approx(1.0, abs=5 * error)


def test_sine_entropy_value() -> None:
    # ln 6 = 1.791759, and half the log of 2 pi e / 100 is -0.883646.
    assert pytest.approx(0.908113, abs=1e-6) == SINE_ENTROPY


def test_sine_shape_and_moments() -> None:
    y = sine(200_000, seed=3)
    assert y.shape == (200_000, 2)
    assert y.dtype == torch.float32
    assert y[:, 1].abs().max() <= 3
    # 5 standard errors: U(-3, 3) has variance 3, the noise 0.01.
    assert y[:, 1].mean().item() == pytest.approx(0.0, abs=5 * math.sqrt(3 / 200_000))
    assert y[:, 1].var().item() == pytest.approx(3.0, abs=5 * 3 * math.sqrt(0.8 / 200_000))
    noise = y[:, 0] - y[:, 1].sin()
    assert noise.std().item() == pytest.approx(0.1, abs=5 * 0.1 / math.sqrt(400_000))
    assert noise.mean().item() == pytest.approx(0.0, abs=5 * 0.1 / math.sqrt(200_000))


def test_sine_arguments() -> None:
    assert torch.equal(sine(50), sine(50, seed=0))
    assert not torch.equal(sine(50), sine(50, seed=1))
    with pytest.raises(ValueError, match="n expects a positive number of points, got 0"):
        sine(0)


def test_sine_leaves_the_global_state() -> None:
    before = torch.get_rng_state()
    sine(100)
    assert torch.equal(torch.get_rng_state(), before)


def test_sine_entropy_by_monte_carlo() -> None:
    losses = -sine_log_prob(sine(400_000, seed=1).double())
    # Deviation of a point sqrt(1/2): standard error 0.0011, tolerance four of them.
    assert losses.mean().item() == pytest.approx(SINE_ENTROPY, abs=0.0045)


def test_sine_log_prob_known_values() -> None:
    y = torch.tensor([[0.0, 0.0], [1.2, math.pi / 2], [0.0, 3.01]], dtype=torch.float64)
    # On the curve -ln 6 - ln(0.1 sqrt(2 pi)) = -0.408113; two deviations away 2 less.
    expected = torch.tensor([-0.408113, -2.408113, -math.inf], dtype=torch.float64)
    assert torch.allclose(sine_log_prob(y), expected, atol=1e-6)


def test_sine_density_integrates_to_one() -> None:
    y1 = torch.linspace(-2, 2, 1001, dtype=torch.float64)
    y2 = (torch.arange(600, dtype=torch.float64) + 0.5) / 100 - 3
    density = sine_log_prob(torch.cartesian_prod(y1, y2)).exp()
    assert (density.sum() * 0.004 * 0.01).item() == pytest.approx(1.0, abs=1e-9)


def test_sine_log_prob_shapes() -> None:
    assert sine_log_prob(torch.zeros(2)).shape == ()
    assert sine_log_prob(torch.zeros(6, 5, 2)).shape == (6, 5)
    with pytest.raises(ValueError, match=r"last dimension 2, got shape \(5, 3\)"):
        sine_log_prob(torch.zeros(5, 3))


def test_sine_log_prob_keeps_nan() -> None:
    assert sine_log_prob(torch.tensor([[0.0, math.nan]])).isnan().all()


@pytest.mark.parametrize("draw", [sine, ring, two_moons])
def test_points_do_not_depend_on_the_default_dtype(draw: Callable[..., Tensor]) -> None:
    expected = draw(50, seed=1)
    torch.set_default_dtype(torch.float32)
    found = draw(50, seed=1)
    torch.set_default_dtype(torch.float64)
    assert torch.equal(found, expected)


def test_datasets_offer_the_sets() -> None:
    assert set(datasets.__all__) >= {"sine", "ring", "two_moons", "read_table"}
