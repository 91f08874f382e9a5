"""Radial layers against the paper (arXiv 1505.05770): equation 14, appendix A.2."""

from __future__ import annotations

import copy
import math
from itertools import product

import pyro.distributions as dist
import pytest
import torch
from cases import normal, radial, radial_at, scatter
from pyro.distributions import transforms as pyro_transforms
from torch import Tensor

from pyroflow.flows import AlongPath
from pyroflow.transforms import Affine, ConditionalRadial, Radial
from pyroflow.transforms.radial import constrain


def unsoftplus(v: float) -> float:
    """The x with ln(1 + eˣ) = v."""
    return math.log(math.expm1(v))


def layers(x0: list, alpha: list, s: list) -> Radial:
    """A Radial with these α and s = α + β̂."""
    t = Radial(len(x0[0]), len(x0))
    raw = ([unsoftplus(v) for v in values] for values in (alpha, s))
    with torch.no_grad():
        for p, value in zip((t.x0, t.raw_alpha, t.beta), (x0, *raw), strict=True):
            p.copy_(torch.tensor(value))
    return t


def by_the_paper(x0: list, alpha: list, s: list, x: list) -> tuple[list, float]:
    """The image and log-determinant of equation 14, number by number."""
    log_det = 0.0
    for x0_k, a, s_k in zip(x0, alpha, s, strict=True):
        r = math.dist(x, x0_k)
        beta, h, h_prime = s_k - a, 1 / (a + r), -1 / (a + r) ** 2
        det = (1 + beta * h) ** (len(x) - 1) * (1 + beta * h + beta * h_prime * r)
        log_det += math.log(det)
        x = [i + beta * h * (i - j) for i, j in zip(x, x0_k, strict=True)]
    return x, log_det


# x − x0 = (3, 4), so r = 5; α = 3, so h = 1/8 and h' = −1/64; β̂ = s − 3.
# s = 1: β̂h = −1/4, β̂h'r = 10/64: det = 0.75 · 0.90625.
# s = 7: β̂h = 1/2, β̂h'r = −20/64: det = 1.5 · 1.1875.
# In three dimensions x = (2, 1, 2), r = 3, α = 1, s = 4: det = 1.75² · (1.75 − 9/16).
BY_HAND = {
    "contracts": ([1.0, -1.0], 3.0, 1.0, [4.0, 3.0], [3.25, 2.0], 0.6796875),
    "expands": ([1.0, -1.0], 3.0, 7.0, [4.0, 3.0], [5.5, 5.0], 1.78125),
    "in 3-D": ([0.0, 0.0, 0.0], 1.0, 4.0, [2.0, 1.0, 2.0], [3.5, 1.75, 3.5], 3.63671875),
    "in 1-D": ([1.0], 1.0, 3.0, [-2.0], [-3.5], 1.125),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_one_layer_by_hand(name: str) -> None:
    x0, alpha, s, x, y, det = BY_HAND[name]
    t = layers([x0], [alpha], [s])
    image = t(torch.tensor(x))
    assert image.tolist() == pytest.approx(y, abs=1e-14)
    log_det = t.log_abs_det_jacobian(torch.tensor(x), torch.tensor(y))
    assert log_det.item() == pytest.approx(math.log(det), abs=1e-14)
    back = t.inv(torch.tensor(y))
    assert back.tolist() == pytest.approx(x, abs=1e-13)
    score = t.inv.log_abs_det_jacobian(torch.tensor(y), back)
    assert score.item() == pytest.approx(-math.log(det), abs=1e-14)
    expected, expected_log_det = by_the_paper([x0], [alpha], [s], x)
    assert expected == pytest.approx(y, abs=1e-14)
    assert expected_log_det == pytest.approx(math.log(det), abs=1e-14)


@pytest.mark.parametrize(("dim", "num_layers"), [(1, 2), (3, 5), (10, 3), (2, 24)])
def test_stacks_follow_the_paper(dim: int, num_layers: int) -> None:
    x0 = torch.randn(num_layers, dim).tolist()
    alpha, s = ((0.1 + 2 * torch.rand(num_layers)).tolist() for _ in range(2))
    t, x = layers(x0, alpha, s), torch.randn(6, dim)
    y = t(x)
    log_det = t.log_abs_det_jacobian(x, y)
    for row in range(6):
        expected, expected_log_det = by_the_paper(x0, alpha, s, x[row].tolist())
        assert y[row].tolist() == pytest.approx(expected, abs=1e-12)
        assert log_det[row].item() == pytest.approx(expected_log_det, abs=1e-12)


def test_a_stack_is_the_chain_of_pyros_layers() -> None:
    """The parameters copied one by one; Pyro's names are alpha_prime and beta_prime."""
    t, x = radial(3, 7).parts, torch.randn(20, 3)
    z, log_det = x.clone(), torch.zeros(20)
    for k in range(7):
        stock = pyro_transforms.Radial(3)
        with torch.no_grad():
            stock.x0.copy_(t.x0[k])
            stock.alpha_prime.copy_(t.raw_alpha[k : k + 1])
            stock.beta_prime.copy_(t.beta[k : k + 1])
        image = stock(z)
        log_det = log_det + stock.log_abs_det_jacobian(z, image)
        z = image
    y = t(x)
    assert torch.allclose(y, z, rtol=0, atol=1e-12)
    assert torch.allclose(t.log_abs_det_jacobian(x, y), log_det, rtol=0, atol=1e-12)


def test_ours_scores_data_where_pyros_layer_does_not() -> None:
    x0, alpha, s, x, y, det = BY_HAND["contracts"]
    stock = dist.TransformedDistribution(normal(), [pyro_transforms.Radial(2)])
    with pytest.raises(KeyError, match="intermediates cache"):
        stock.log_prob(torch.tensor(y))
    q = dist.TransformedDistribution(normal(), [layers([x0], [alpha], [s])])
    expected = -math.log(2 * math.pi) - 12.5 - math.log(det)
    assert q.log_prob(torch.tensor(y)).item() == pytest.approx(expected, abs=1e-12)


# The inverse.


def bisected(length: float, alpha: float, s: float) -> float:
    """The r with r (r + s) / (r + α) = length, which rises with r."""
    low, high = 0.0, length + alpha
    while True:
        r = (low + high) / 2
        if r in (low, high):
            return r
        low, high = (r, high) if r * ((r + s) / (r + alpha)) < length else (low, r)


@pytest.mark.parametrize("alpha", [1e-6, 0.3, 1.0, 40.0])
@pytest.mark.parametrize("s", [1e-6, 0.5, 1.0, 70.0])
def test_the_inverse_finds_the_root(alpha: float, s: float) -> None:
    """On both sides of the sign change at length = s, and on it."""
    lengths = [1e-100, 1e-12, 1e-3, s * (1 - 1e-9), s, s * (1 + 1e-9), 3.0, 1e6, 1e15]
    t = layers([[0.0, 0.0]], [alpha], [s])
    alpha, s = (v.item() for v in constrain(t.raw_alpha, t.beta))
    y = torch.tensor(lengths).unsqueeze(-1) * torch.tensor([0.6, -0.8])
    x = t.inv(y)
    expected = torch.tensor([bisected(length, alpha, s) for length in lengths])
    # Next to the centre x = y − β̂ y/(r + s) subtracts, to within rounding of y itself.
    rounding = 1e-14 * (expected + y.norm(dim=-1))
    assert ((x[:, 0] - 0.6 * expected).abs() <= rounding).all()
    assert ((x[:, 1] + 0.8 * expected).abs() <= rounding).all()


def test_derivatives_where_the_root_changes_its_form() -> None:
    """R = 2 = s, α = 1, D = 1: r² = 2, and dx/dy = (r + 1)² / (r² + 2r + 2) by equation 14."""
    t, y = layers([[0.0]], [1.0], [2.0]), torch.tensor([2.0], requires_grad=True)
    x = t.inv(y)
    root = math.sqrt(2)
    assert x.item() == pytest.approx(root)
    (slope,) = torch.autograd.grad(x, y, create_graph=True)
    expected = (root + 1) ** 2 / (4 + 2 * root)
    assert slope.item() == pytest.approx(expected, abs=1e-12)
    (bend,) = torch.autograd.grad(slope, y)
    step = 1e-5
    left, right = (
        torch.autograd.functional.jacobian(t.inv, torch.tensor([2 + h])).item()
        for h in (-step, step)
    )
    assert bend.item() == pytest.approx((right - left) / (2 * step), abs=1e-8)


# The start.


@pytest.mark.parametrize("num_layers", [0, 1, 8, 64])
@pytest.mark.parametrize("dim", [1, 2, 10])
def test_the_start_is_the_identity(dim: int, num_layers: int) -> None:
    t, x = Radial(dim, num_layers), torch.randn(50, dim)
    y = t(x)
    assert torch.equal(y, x)
    assert y is not x
    assert torch.equal(t.inv(x.clone()), x)
    assert torch.equal(t.log_abs_det_jacobian(x, y), torch.zeros(50))
    alpha, s = constrain(t.raw_alpha, t.beta)
    assert torch.allclose(alpha, torch.ones(num_layers))
    assert torch.equal(alpha, s)


def test_centres_lie_where_a_standard_normal_does() -> None:
    x0 = Radial(3, 3000).x0.detach()
    assert torch.allclose(x0.mean(0), torch.zeros(3), atol=0.1)
    assert torch.allclose(x0.T.cov(), torch.eye(3), atol=0.12)


def test_reset_draws_another_identity_from_the_seed() -> None:
    t, x, drawn = radial(3, 8).parts, torch.randn(5, 3), []
    assert not torch.allclose(t(x), x)
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        t.reset_parameters()
        assert torch.equal(t(x), x)
        drawn.append(t.x0.detach().clone())
    assert torch.equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).all()


def test_conditional_layers_start_as_the_identity_for_every_context() -> None:
    t, x = ConditionalRadial(2, 3, 8, hidden_dims=(4,)), torch.randn(7, 2)
    assert torch.equal(t.condition(torch.randn(7, 3))(x), x)
    for p in t.nn.parameters():
        torch.nn.init.normal_(p)
    assert not torch.allclose(t.condition(torch.randn(7, 3))(x), x)
    t.reset_parameters()
    assert torch.equal(t.condition(torch.randn(7, 3))(x), x)


def test_names_and_shapes_of_the_parameters() -> None:
    """The names a checkpoint relies on."""
    shapes = {name: tuple(p.shape) for name, p in Radial(3, 4).named_parameters()}
    assert shapes == {"x0": (4, 3), "raw_alpha": (4,), "beta": (4,)}
    with pytest.raises(ValueError, match="input_dim must be an integer of at least 1, got 0"):
        Radial(0)
    with pytest.raises(ValueError, match="num_layers must be an integer of at least 0, got -1"):
        Radial(2, -1)


# Batches.


@pytest.mark.parametrize("batch", [(7,), (6, 5)], ids=str)
def test_batched_parameters_are_a_loop(batch: tuple[int, ...]) -> None:
    parameters = torch.randn(*batch, 4, 3), torch.randn(*batch, 4), torch.randn(*batch, 4)
    t, x = radial_at(*parameters), torch.randn(2, *batch, 3)
    y, back = t(x), t.inv(x)
    log_det = t.log_abs_det_jacobian(x, y)
    for at in product(*(range(n) for n in batch)):
        one, rows = radial_at(*(p[at] for p in parameters)), x[(slice(None), *at)]
        image = one(rows)
        assert torch.allclose(y[(slice(None), *at)], image, atol=1e-12)
        assert torch.allclose(back[(slice(None), *at)], one.inv(rows), atol=1e-10)
        expected = one.log_abs_det_jacobian(rows, image)
        assert torch.allclose(log_det[(slice(None), *at)], expected, atol=1e-12)


@pytest.mark.parametrize("num_layers", [0, 4])
def test_parameters_need_not_share_their_batch(num_layers: int) -> None:
    """Shared centres with widths (7, K), against the same centres written out."""
    x0, (raw_alpha, beta) = torch.randn(num_layers, 3), torch.randn(2, 7, num_layers)
    mixed = radial_at(x0, raw_alpha, beta)
    full = radial_at(x0.expand(7, num_layers, 3), raw_alpha, beta)
    for shape in ((), (1,), (7,), (6, 1), (6, 7)):
        x = torch.randn(*shape, 3)
        y = mixed(x)
        assert mixed.forward_shape(x.shape) == y.shape
        assert mixed.log_abs_det_jacobian(x, y).shape == y.shape[:-1]
        assert torch.allclose(y, full(x), atol=1e-12)
        assert torch.allclose(mixed.inv(x), full.inv(x), atol=1e-10)


# Path derivatives.


def gradients(value: Tensor, theta: list) -> list[Tensor]:
    return torch.autograd.grad(
        value, theta, allow_unused=True, materialize_grads=True, retain_graph=True
    )


def test_the_path_derivative_vanishes_at_the_target() -> None:
    chain = [radial(2, 4, sd=1.0).parts, scatter(Affine(2), 0.5)]
    q, plain = AlongPath(normal(), chain), dist.TransformedDistribution(normal(), chain)
    target = dist.TransformedDistribution(normal(), copy.deepcopy(chain))
    theta = [p for t in chain for p in t.parameters()]
    y = q.rsample((20,))
    assert torch.allclose(q.log_prob(y), plain.log_prob(y.clone()), atol=1e-9)
    along = gradients((q.log_prob(y) - target.log_prob(y)).sum(), theta)
    whole = gradients((plain.log_prob(y) - target.log_prob(y)).sum(), theta)
    noise = max(g.abs().max() for g in whole)
    assert noise > 0.1
    assert max(g.abs().max() for g in along) <= 1e-11 * (1 + noise)
