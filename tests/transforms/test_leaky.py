"""Planar layers with a leaky ReLU: piecewise linear, with an inverse in closed form."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from cases import leaky, planar_at, saved
from torch import Tensor
from torch.autograd.functional import jacobian

from pyroflow import ConditionalPlanar, Planar
from pyroflow.transforms import Conditioned
from pyroflow.transforms.kernels.units import LeakyReLU, constrain

LEAKY = {"nonlinearity": "leaky_relu"}

# w = (1, 2), u = (0.3, -0.5), b = 0.1, negative slope 0.2: wᵀu = -0.7, ‖w‖² = 5. With 40 digits
# m(-0.7) = -0.596813951114542, so û = u + (m + 0.7)/5 w = (0.320637209777092, -0.458725580445817).
# Left of the bend: x = (0.5, -1), a = -1.4, h = -0.28, det = 1 + 0.2 m.
# Right of it: x = (0.5, 1), a = h = 2.6, det = s = 1 + m.
M = -0.596813951114542
BY_HAND = {
    "left": ([0.5, -1.0], [0.410221581262414, -0.871556837475171], 1 + 0.2 * M),
    "right": ([0.5, 1.0], [1.333656745420438, -0.192686509159124], 1 + M),
}


def by_hand() -> Conditioned:
    w, u, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.3, -0.5]]), torch.tensor([0.1])
    return planar_at(w, u, b, negative_slope=0.2, **LEAKY)


@pytest.mark.parametrize("side", BY_HAND)
def test_one_layer_by_hand(side: str) -> None:
    x, y, det = BY_HAND[side]
    t, point = by_hand(), torch.tensor(x)
    image = t(point)
    assert image.tolist() == pytest.approx(y, abs=1e-14)
    assert t.log_abs_det_jacobian(point, image).item() == pytest.approx(math.log(det), abs=1e-14)
    back = t.inv(torch.tensor(y))
    assert back.tolist() == pytest.approx(x, abs=1e-14)
    score = t.inv.log_abs_det_jacobian(torch.tensor(y), back).item()
    assert score == pytest.approx(-math.log(det), abs=1e-14)


def by_the_formula(t: Conditioned, x: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """y = x + û leaky(a) and the logarithm of 1 + (s - 1) h'(a), layer by layer."""
    log_det = torch.zeros(x.shape[:-1])
    for w, u, b in zip(t.w, t.u, t.b, strict=True):
        u_hat = constrain(w, u)[0]
        a = x @ w + b
        h = torch.where(a < 0, slope, 1.0)
        log_det = log_det + (1 + u_hat.dot(w) * h).log()
        x = x + (a * h).unsqueeze(-1) * u_hat
    return x, log_det


@pytest.mark.parametrize("slope", [0.01, 0.2, 0.9])
@pytest.mark.parametrize(("dim", "layers", "sd"), [(1, 1, 2.0), (2, 5, 1.0), (10, 40, 0.3)])
def test_stacks_follow_the_formula(dim: int, layers: int, sd: float, slope: float) -> None:
    parts = sd * torch.randn(layers, dim), sd * torch.randn(layers, dim), torch.randn(layers)
    t, x = planar_at(*parts, negative_slope=slope, **LEAKY), torch.randn(30, dim)
    y, (expected, log_det) = t(x), by_the_formula(t, x, slope)
    scale = expected.abs().max()
    assert torch.allclose(y, expected, rtol=0, atol=1e-12 * scale)
    assert torch.allclose(t.log_abs_det_jacobian(x, y), log_det, rtol=0, atol=1e-12)
    assert torch.allclose(t(t.inv(y.clone())), y, rtol=0, atol=1e-11 * scale)


def test_the_inverse_searches_no_roots(searches: list[int]) -> None:
    t = leaky(3, 12).parts
    x = t.inv(torch.randn(50, 3))
    t.log_abs_det_jacobian(x, t(x)).sum().backward()
    assert searches == []
    Planar(3, 12).inv(torch.randn(50, 3))
    assert searches  # the fixture sees the tanh


# The bend.


def test_on_the_bend_a_layer_is_continuous() -> None:
    """There the layer leaves x where it is, and its determinant is that of the right side."""
    t, x, step = by_hand(), torch.tensor([0.9, -0.5]), 1e-9 * torch.tensor([1.0, 2.0])
    assert torch.allclose(t(x), x, rtol=0, atol=1e-15)
    assert torch.allclose(t.inv(x), x, rtol=0, atol=1e-15)
    for side, det in ((x - step, 1 + 0.2 * M), (x, 1 + M), (x + step, 1 + M)):
        y = t(side)
        assert torch.allclose(y, x, rtol=0, atol=1e-8)
        assert torch.allclose(t.inv(y.clone()), side, rtol=0, atol=1e-15)
        assert t.log_abs_det_jacobian(side, y).exp().item() == pytest.approx(det, abs=1e-12)
        matrix = jacobian(t, side)
        assert torch.linalg.det(matrix).item() == pytest.approx(det, abs=1e-12)
        inverse = jacobian(t.inv, y.detach().clone())
        assert torch.allclose(inverse @ matrix, torch.eye(2), atol=1e-12)


def test_the_tails_are_linear_and_need_not_be_those_of_the_base() -> None:
    """Past the last bend second differences vanish; a tanh would shift by a constant there."""
    t = leaky(2, 8, sd=1.0).parts
    directions = torch.nn.functional.normalize(torch.randn(30, 2), dim=-1)
    near, middle, far = (t(r * directions) for r in (1e4, 2e4, 3e4))
    assert torch.allclose(far - middle, middle - near, rtol=0, atol=1e-6)
    assert ((far - middle) / 1e4 - directions).norm(dim=-1).max() > 0.1
    tanh = planar_at(t.w, t.u, t.b)
    shift = [tanh(r * directions) - r * directions for r in (1e4, 2e4)]
    assert torch.allclose(*shift, rtol=0, atol=1e-6)


def test_extreme_slopes_are_finite() -> None:
    """wᵀu from -80 to 80, both sides: the determinants are s and 0.8 + 0.2 s."""
    for dot in (-80.0, -20.0, 0.0, 80.0):
        w = torch.tensor([[0.6, 0.8]])
        t = planar_at(w, dot * w, torch.zeros(1), **LEAKY)
        s = math.log1p(math.exp(dot))
        for a, det in ((3.0, s), (-3.0, 0.8 + 0.2 * s)):
            x = a * w[0]
            log_det = t.log_abs_det_jacobian(x, t(x)).item()
            assert log_det == pytest.approx(math.log(det), abs=1e-12)


# float64 parameters where float32 is the default.


def test_the_slope_has_the_digits_of_the_input(float32: None) -> None:
    a = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    assert LeakyReLU(0.2).slope(a).tolist() == [0.2, 1.0]
    t, x = leaky(3, 4).parts.double(), torch.randn(5, 3, dtype=torch.float64)
    matrices = torch.stack([jacobian(t, row) for row in x])
    log_det = t.log_abs_det_jacobian(x, t(x))
    assert torch.allclose(torch.linalg.slogdet(matrices)[1], log_det, rtol=0, atol=1e-12)


# Options and copies.


@pytest.mark.parametrize("slope", [0, 1, -0.1, 1.5, math.nan, "0.2"])
def test_bad_slopes_are_named(slope: object) -> None:
    with pytest.raises(ValueError, match="negative_slope must be a fraction between 0 and 1, got"):
        Planar(2, negative_slope=slope, **LEAKY)
    with pytest.raises(ValueError, match="negative_slope must be a fraction between 0 and 1, got"):
        ConditionalPlanar(2, 3, negative_slope=slope, **LEAKY)


def test_an_unknown_nonlinearity_is_named() -> None:
    message = "nonlinearity must be one of 'tanh', 'leaky_relu'; got 'relu'"
    with pytest.raises(ValueError, match=message):
        Planar(2, nonlinearity="relu")
    with pytest.raises(ValueError, match=message):
        planar_at(*torch.zeros(2, 1, 2), torch.zeros(1), nonlinearity="relu")
    with pytest.raises(ValueError, match=message):
        ConditionalPlanar(2, 3, nonlinearity="relu")


def test_copies_keep_the_nonlinearity() -> None:
    t, x = leaky(2, 3).parts, torch.randn(5, 2)
    t.activation.negative_slope = 0.4
    y = t(x)
    for copied in (copy.deepcopy(t), pickle.loads(pickle.dumps(t)), saved(t)):
        assert torch.equal(copied(x), y)
        assert copied.activation.negative_slope == 0.4
    tanh = Planar(2, 3)
    tanh.load_state_dict(t.state_dict())  # a state holds numbers only
    assert not torch.allclose(tanh(x), y)


def test_the_start_is_the_identity() -> None:
    for dim, layers in ((1, 1), (2, 8), (10, 64)):
        t, x = Planar(dim, layers, **LEAKY), torch.randn(20, dim)
        y = t(x)
        assert torch.allclose(y, x, rtol=0, atol=1e-12)
        assert t.log_abs_det_jacobian(x, y).abs().max() <= 1e-12
        assert torch.allclose(t.inv(y.detach()), x, rtol=0, atol=1e-12)


def test_contexts_decide_leaky_layers_too() -> None:
    t, x = ConditionalPlanar(2, 3, 2, negative_slope=0.5, **LEAKY), torch.randn(7, 2)
    torch.nn.init.normal_(t.nn.nn.layers[-1].weight)
    layers = t.condition(torch.randn(7, 3))
    y = layers(x)
    for row in range(7):
        one = planar_at(*(p[row] for p in (layers.w, layers.u, layers.b)))
        one.activation = LeakyReLU(0.5)
        expected, log_det = by_the_formula(one, x[row], 0.5)
        assert torch.allclose(y[row], expected, atol=1e-12)
        assert torch.allclose(layers.log_abs_det_jacobian(x, y)[row], log_det, atol=1e-12)
