"""Planar layers against the paper (arXiv 1505.05770): equations 10 to 13, appendix A.1."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from cases import planar_at

from pyroflow.transforms import ConditionalPlanar, Planar
from pyroflow.transforms.kernels.units import constrain

EPS = torch.finfo(torch.float64).eps


def layers(w: list, u: list, b: list) -> Planar:
    """A Planar with these parameters."""
    t = Planar(len(w[0]), len(w))
    with torch.no_grad():
        for p, value in zip((t.w, t.u, t.b), (w, u, b), strict=True):
            p.copy_(torch.as_tensor(value))
    return t


def random_planar(dim: int, num_layers: int, sd: float = 1.5) -> Planar:
    return layers(*(sd * torch.randn(num_layers, *n) for n in ((dim,), (dim,), ())))


def by_the_paper(w: list, u: list, b: list, x: list) -> tuple[list, float]:
    """z_K of equation 10 and the sum in equation 13, number by number."""
    log_det = 0.0
    for w_k, u_k, b_k in zip(w, u, b, strict=True):
        dot = sum(i * j for i, j in zip(w_k, u_k, strict=True))
        shift = (-1 + math.log(1 + math.exp(dot)) - dot) / sum(i * i for i in w_k)
        u_hat = [i + shift * j for i, j in zip(u_k, w_k, strict=True)]
        a = sum(i * j for i, j in zip(w_k, x, strict=True)) + b_k
        slope = 1 / math.cosh(a) ** 2
        log_det += math.log(abs(1 + sum(i * slope * j for i, j in zip(u_hat, w_k, strict=True))))
        x = [i + j * math.tanh(a) for i, j in zip(x, u_hat, strict=True)]
    return x, log_det


# w = (1, 2), u = (0.3, -0.5), b = 0.1, x = (0.5, -1): wᵀu = -0.7, ‖w‖² = 5, wᵀx + b = -1.4.
# With 40 digits: m(-0.7) = -0.596813951115, û = (0.320637209777, -0.458725580446),
# tanh(-1.4) = -0.885351648202, det = 1 + (1 - 0.783847541) m = 0.870997196886.
ONE = ([[1.0, 2.0]], [[0.3, -0.5]], [0.1])
X = [0.5, -1.0]
Y = [0.216123317848877, -0.593866551279756]
LOG_DET = -0.138116520405944


def test_one_layer_by_hand() -> None:
    t, x = layers(*ONE), torch.tensor(X)
    y = t(x)
    assert y.tolist() == pytest.approx(Y, abs=1e-14)
    assert t.log_abs_det_jacobian(x, y).item() == pytest.approx(LOG_DET, abs=1e-14)
    back = t.inv(torch.tensor(Y))
    assert back.tolist() == pytest.approx(X, abs=1e-14)
    score = t.inv.log_abs_det_jacobian(torch.tensor(Y), back)
    assert score.item() == pytest.approx(-LOG_DET, abs=1e-14)


def test_the_reference_agrees_with_the_hand() -> None:
    y, log_det = by_the_paper(*ONE, X)
    assert y == pytest.approx(Y, abs=1e-14)
    assert log_det == pytest.approx(LOG_DET, abs=1e-14)


@pytest.mark.parametrize(("dim", "num_layers"), [(1, 2), (3, 5), (10, 3), (2, 24)])
def test_stacks_follow_the_paper(dim: int, num_layers: int) -> None:
    w, u, b = (torch.randn(num_layers, *n).tolist() for n in ((dim,), (dim,), ()))
    t, x = layers(w, u, b), torch.randn(6, dim)
    y = t(x)
    log_det = t.log_abs_det_jacobian(x, y)
    for row in range(6):
        expected, expected_log_det = by_the_paper(w, u, b, x[row].tolist())
        assert y[row].tolist() == pytest.approx(expected, abs=1e-12)
        assert log_det[row].item() == pytest.approx(expected_log_det, abs=1e-12)


# m(v) = -1 + ln(1 + eᵛ), to 15 digits.
M = {-5.0: -0.993284651510882, 0.0: -0.306852819440055, 5.0: 4.006715348489118}


@pytest.mark.parametrize("dot", M)
def test_constrained_u_by_hand(dot: float) -> None:
    """w = (3, 4) has ‖w‖² = 25; the part of u across w, (0.4, -0.3), must stay."""
    w = torch.tensor([3.0, 4.0])
    u = dot / 25 * w + torch.tensor([0.4, -0.3])
    expected = [3 * M[dot] / 25 + 0.4, 4 * M[dot] / 25 - 0.3]
    u_hat, s = constrain(w, u)
    assert u_hat.tolist() == pytest.approx(expected, abs=1e-14)
    assert s.item() == pytest.approx(1 + M[dot], abs=1e-14)
    # Far from the hyperplane tanh is one: the layer is the translation by û.
    t = layers([w.tolist()], [u.tolist()], [0.0])
    assert (t(30 * w) - 30 * w).tolist() == pytest.approx(expected, abs=1e-12)
    # On it the determinant is 1 + wᵀû.
    log_det = t.log_abs_det_jacobian(torch.zeros(2), t(torch.zeros(2)))
    assert log_det.item() == pytest.approx(math.log(1 + M[dot]), abs=1e-13)


@pytest.mark.parametrize("num_layers", [0, 1, 8, 64])
@pytest.mark.parametrize("dim", [1, 2, 10, 100])
def test_the_start_is_the_identity(dim: int, num_layers: int) -> None:
    t, x = Planar(dim, num_layers), torch.randn(50, dim)
    y = t(x)
    assert torch.allclose(y, x, rtol=0, atol=1e-13)
    assert torch.allclose(t.inv(y.detach()), x, rtol=0, atol=1e-13)
    log_det = t.log_abs_det_jacobian(x, y)
    assert log_det.shape == (50,)
    assert log_det.abs().max() <= 1e-12
    for p in t.parameters():
        assert p.isfinite().all()
    if num_layers > 1:
        assert (t.w[0] != t.w[1]).any()  # equal layers would stay equal


def test_reset_draws_another_identity() -> None:
    t, x = random_planar(3, 8), torch.randn(5, 3)
    assert not torch.allclose(t(x), x)
    t.reset_parameters()
    first = t.w.clone()
    assert torch.allclose(t(x), x)
    t.reset_parameters()
    assert (t.w != first).all()


def test_a_stack_is_the_chain_of_its_layers() -> None:
    t, x = random_planar(3, 7), torch.randn(20, 3)
    z, log_det = x, torch.zeros(20)
    for k in range(7):
        layer = layers(t.w[k : k + 1].tolist(), t.u[k : k + 1].tolist(), t.b[k : k + 1].tolist())
        image = layer(z)
        log_det = log_det + layer.log_abs_det_jacobian(z, image)
        z = image
    y = t(x)
    assert torch.allclose(y, z, rtol=0, atol=1e-12)
    assert torch.allclose(t.log_abs_det_jacobian(x, y), log_det, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", [(7,), (6, 5)], ids=str)
def test_batched_parameters_are_a_loop(batch: tuple[int, ...]) -> None:
    w, u, b = torch.randn(*batch, 4, 3), torch.randn(*batch, 4, 3), torch.randn(*batch, 4)
    t, x = planar_at(w, u, b), torch.randn(2, *batch, 3)
    y, back = t(x), t.inv(x)
    log_det = t.log_abs_det_jacobian(x, y)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in batch)).view(-1, len(batch)):
        at = tuple(index.tolist())
        one = layers(w[at].tolist(), u[at].tolist(), b[at].tolist())
        rows = x[(slice(None), *at)]
        image = one(rows)
        assert torch.allclose(y[(slice(None), *at)], image, atol=1e-12)
        assert torch.allclose(back[(slice(None), *at)], one.inv(rows), atol=1e-9)
        expected = one.log_abs_det_jacobian(rows, image)
        assert torch.allclose(log_det[(slice(None), *at)], expected, atol=1e-12)


def test_parameters_need_not_share_their_batch() -> None:
    """Shared w and u with biases (7, K), against the same w and u written out."""
    w, u, b = torch.randn(4, 3), torch.randn(4, 3), torch.randn(7, 4)
    mixed = planar_at(w, u, b)
    full = planar_at(w.expand(7, 4, 3), u.expand(7, 4, 3), b)
    for shape in ((), (1,), (7,), (6, 1), (6, 7)):
        x = torch.randn(*shape, 3)
        assert mixed.forward_shape(x.shape) == full(x).shape
        assert torch.allclose(mixed(x), full(x), atol=1e-12)
        assert torch.allclose(mixed.inv(x), full.inv(x), atol=1e-9)


def test_conditional_layers_start_as_the_identity_for_every_context() -> None:
    t, x = ConditionalPlanar(2, 3, 8, hidden_dims=(4,)), torch.randn(7, 2)
    assert torch.allclose(t.condition(torch.randn(7, 3))(x), x, atol=1e-13)
    for p in t.nn.parameters():
        torch.nn.init.normal_(p)
    assert not torch.allclose(t.condition(torch.randn(7, 3))(x), x)
    t.reset_parameters()
    assert torch.allclose(t.condition(torch.randn(7, 3))(x), x, atol=1e-13)


# What Pyro's own layer cannot do (pyro issue 2718).


def test_ours_scores_data_where_pyros_layer_does_not() -> None:
    base, data = dist.Normal(torch.zeros(2), 1.0).to_event(1), torch.tensor([Y])
    stock = dist.transforms.Planar(2)
    with pytest.raises(KeyError, match="intermediates cache"):
        dist.TransformedDistribution(base, [stock]).log_prob(data)
    log_prob = dist.TransformedDistribution(base, [layers(*ONE)]).log_prob(data)
    # ln N((0.5, -1); 0, I) - log_det
    expected = -math.log(2 * math.pi) - 0.625 - LOG_DET
    assert log_prob.tolist() == pytest.approx([expected], abs=1e-13)


# Density on a grid.


@pytest.mark.parametrize(("inverted", "sd"), [(False, 1.5), (True, 1.0)], ids=["layers", "inverse"])
def test_a_density_of_24_layers_integrates_to_one(inverted: bool, sd: float) -> None:
    """Midpoints over the range of 20,000 samples and 30 % more each side.

    Base to data each u is turned so that wᵀu > 0: layers that contract pile the density up in
    ridges that no grid resolves.
    """
    t = random_planar(2, 24, sd)
    if not inverted:
        with torch.no_grad():
            t.u *= (t.w * t.u).sum(-1, keepdim=True).sign()
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    q = dist.TransformedDistribution(base, [t.inv if inverted else t])
    with torch.no_grad():
        y = q.sample((20_000,))
        low, high = y.amin(0), y.amax(0)
        low, high = low - 0.3 * (high - low), high + 0.3 * (high - low)
        cell, n = (high - low) / 500, torch.arange(500) + 0.5
        points = torch.cartesian_prod(low[0] + cell[0] * n, low[1] + cell[1] * n)
        mass = sum(q.log_prob(part).exp().sum() for part in points.split(50_000)) * cell.prod()
    assert mass.item() == pytest.approx(1.0, abs=1e-3)
