"""Sylvester layers against the paper (arXiv 1803.05649): equations 13 and 14."""

from __future__ import annotations

import copy
import math
import pickle

import pyro.distributions as dist
import pytest
import torch
from cases import planar_at, saved, scatter, sylvester_at, wild
from torch import Tensor
from torch.autograd.functional import jacobian

from pyroflow import ConditionalSylvester, Sylvester, sylvester_flow
from pyroflow.transforms import Conditioned
from pyroflow.transforms.sylvester import KINDS, bind_diagonal, orthonormal

EACH_KIND = pytest.mark.parametrize("kind", KINDS)
FREE = pytest.mark.parametrize("kind", ["householder", "qr"])


def random_sylvester(dim: int, units: int, layers: int, kind: str, sd: float = 1.0) -> Sylvester:
    return scatter(Sylvester(dim, units, layers, kind), sd)


def by_the_paper(t: Conditioned, x: Tensor) -> tuple[Tensor, Tensor]:
    """z of equation 13 and the logarithm of the product in equation 14, naively, layer by layer."""
    log_det = torch.zeros(x.shape[:-1])
    for frame, R, R_tilde, b in zip(t.frame, t.R, t.R_tilde, t.b, strict=True):
        Q, r, r_tilde = orthonormal(frame, t.orthogonal).T, R.diagonal(), R_tilde.diagonal()
        p, sign, beta = r_tilde.abs(), r_tilde.sign(), 1 + r_tilde.abs()
        bound = sign * (-1 / p + torch.log(1 + torch.exp(beta * (sign * r + 1 / p))) / beta)
        R, R_tilde = torch.triu(R, 1) + torch.diag(bound), torch.triu(R_tilde)
        a = x @ Q @ R_tilde.T + b
        log_det = log_det + torch.log(torch.prod(1 + bound * r_tilde / torch.cosh(a) ** 2, -1))
        x = x + torch.tanh(a) @ R.T @ Q.T
    return x, log_det


@EACH_KIND
@pytest.mark.parametrize(("dim", "units", "layers"), [(1, 1, 2), (4, 4, 3), (5, 2, 1), (7, 3, 6)])
def test_layers_follow_the_paper(kind: str, dim: int, units: int, layers: int) -> None:
    t, x = random_sylvester(dim, units, layers, kind), torch.randn(9, dim)
    y = t(x)
    expected, log_det = by_the_paper(t, x)
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)
    assert torch.allclose(t.log_abs_det_jacobian(x, y), log_det, rtol=0, atol=1e-11)


# Two dimensions and Qᵀ = the frame: R̃ = ((2, 1), (0, -1)), R = ((0.5, 0.25), (0, 0.7)),
# b = (0.1, 0.2), x = (0.3, -1), so a = (-0.3, 1.2). With 40 digits the bound diagonal of R is
# -1/2 + ln(1 + e^(3 (0.5 + 1/2)))/3 = 0.516195783857894 and, r̃ being negative,
# 1 - ln(1 + e^(2 (-0.7 + 1)))/2 = 0.481256024757057. One unit keeps the first row and column, and
# a = 2 · 0.3 + 0.1 = 0.7.
R_TILDE, R, B, X = [[2.0, 1.0], [9.0, -1.0]], [[0.5, 0.25], [9.0, 0.7]], [0.1, 0.2], [0.3, -1.0]
BY_HAND = {
    1: ([0.611972098447459, -1.0], 0.503982140697551),
    2: ([0.358039309420893, -0.598798697808923], 0.506395947866322),
}


@pytest.mark.parametrize("units", BY_HAND)
def test_two_dimensions_by_hand(units: int) -> None:
    """What stands below the diagonals of R and R̃, the 9s, does not count."""
    parts = (torch.tensor(t)[:units, :units].unsqueeze(0) for t in (R, R_TILDE))
    frame, b = torch.eye(2)[:units].unsqueeze(0), torch.tensor([B])[:, :units]
    t, x = sylvester_at(frame, *parts, b, "triangular"), torch.tensor(X)
    expected, log_det = BY_HAND[units]
    y = t(x)
    assert y.tolist() == pytest.approx(expected, abs=1e-14)
    assert t.log_abs_det_jacobian(x, y).item() == pytest.approx(log_det, abs=1e-14)
    assert t.inv(torch.tensor(expected)).tolist() == pytest.approx(X, abs=1e-13)


def true_log_det(t: torch.distributions.Transform, x: Tensor) -> Tensor:
    return torch.stack([torch.linalg.slogdet(jacobian(t, row))[1] for row in x])


def test_our_determinant_is_right_where_pyros_is_not() -> None:
    """Stock Pyro multiplies x with S Qᵀ from the wrong side, and its determinant does not know."""
    x = torch.randn(8, 4)
    stock = scatter(dist.transforms.Sylvester(4, 4), 1.0)
    error = stock.log_abs_det_jacobian(x, stock(x)) - true_log_det(stock, x)
    assert (error.abs() > 0.05).sum() >= 4
    ours = random_sylvester(4, 4, 1, "householder")
    error = ours.log_abs_det_jacobian(x, ours(x)) - true_log_det(ours, x)
    assert error.abs().max() <= 1e-10
    assert torch.allclose(ours.inv(ours(x).clone()), x, atol=1e-9)


def test_one_unit_is_a_planar_layer() -> None:
    """w = r̃ q and û = r̂ q, for three layers in a row; softplus(wᵀu) = 1 + wᵀû."""
    t, x = random_sylvester(5, 1, 3, "householder", sd=1.5), torch.randn(20, 5)
    q = orthonormal(t.frame, "householder")
    bound, s = bind_diagonal(t.R, t.R_tilde)
    assert torch.allclose(1 + bound * t.R_tilde, s, rtol=1e-12, atol=0)
    w, u = t.R_tilde @ q, torch.log(torch.expm1(s)) / t.R_tilde * q
    planar = planar_at(w.squeeze(1), u.squeeze(1), t.b.squeeze(1))
    y, expected = t(x), planar(x)
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)
    log_dets = (s.log_abs_det_jacobian(x, s(x)) for s in (t, planar))
    assert torch.allclose(*log_dets, rtol=0, atol=1e-12)
    assert torch.allclose(t.inv(x), planar.inv(x), rtol=0, atol=1e-9)


def test_layers_are_the_chain_of_single_layers() -> None:
    t, x = random_sylvester(4, 3, 5, "householder"), torch.randn(20, 4)
    z, log_det = x, torch.zeros(20)
    for k in range(5):
        one = sylvester_at(*(p[k : k + 1] for p in (t.frame, t.R, t.R_tilde, t.b)))
        image = one(z)
        log_det, z = log_det + one.log_abs_det_jacobian(z, image), image
    y = t(x)
    assert torch.allclose(y, z, rtol=0, atol=1e-12)
    assert torch.allclose(t.log_abs_det_jacobian(x, y), log_det, rtol=0, atol=1e-12)


# Orthonormal rows.


@FREE
@pytest.mark.parametrize("sd", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_rows_are_orthonormal(kind: str, sd: float, dtype: torch.dtype, atol: float) -> None:
    for units, dim in ((1, 1), (1, 6), (2, 5), (5, 5), (10, 40)):
        Q_T = orthonormal(sd * torch.randn(8, units, dim, dtype=dtype), kind)
        products = Q_T @ Q_T.mT
        assert torch.allclose(products, torch.eye(units, dtype=dtype), rtol=0, atol=atol)


def test_householder_is_the_product_of_reflections() -> None:
    for units, dim in ((1, 3), (3, 5), (4, 4)):
        frame, product = torch.randn(units, dim), torch.eye(dim)
        for v in frame:
            product = product @ (torch.eye(dim) - 2 * torch.outer(v, v) / v.dot(v))
        Q_T = orthonormal(frame, "householder")
        assert torch.allclose(Q_T, product[:, :units].T, rtol=0, atol=1e-12)


def test_qr_is_the_process_of_gram_and_schmidt() -> None:
    frame, rows = torch.randn(3, 5), []
    for v in frame:
        v = v - sum((v.dot(q) * q for q in rows), torch.zeros(5))
        rows.append(v / v.norm())
    assert torch.allclose(orthonormal(frame, "qr"), torch.stack(rows), rtol=0, atol=1e-12)


@pytest.mark.parametrize("first", [1e-9, 0.0, -1e-9])
def test_qr_is_smooth_where_lapack_changes_the_sign(first: float) -> None:
    """q = v/‖v‖ with the derivative (I - q qᵀ)/‖v‖ on either side of v₁ = 0."""
    frame = torch.tensor([[first, 2.0]])
    q = torch.tensor([first / 2, 1.0])
    assert torch.allclose(orthonormal(frame, "qr")[0], q, rtol=0, atol=1e-15)
    matrix = jacobian(lambda v: orthonormal(v, "qr"), frame)[0, :, 0]
    assert torch.allclose(matrix, (torch.eye(2) - torch.outer(q, q)) / 2, atol=1e-12)


@FREE
def test_a_frame_with_a_row_of_zeros_has_finite_rows(kind: str) -> None:
    frame = torch.randn(2, 3, 5)
    frame[0, 1], frame[1] = 0.0, 0.0
    frame.requires_grad_()
    Q_T = orthonormal(frame, kind)
    assert torch.allclose(Q_T @ Q_T.mT, torch.eye(3), rtol=0, atol=1e-12)
    if kind == "householder":  # the Q of a qr is not unique there, and has no derivative
        Q_T.pow(3).sum().backward()
        assert frame.grad.isfinite().all()


# The start.


@EACH_KIND
@pytest.mark.parametrize(("dim", "units"), [(1, 1), (2, 1), (2, 2), (6, 4), (30, 30)])
@pytest.mark.parametrize("layers", [0, 1, 5])
def test_the_start_is_the_identity(kind: str, dim: int, units: int, layers: int) -> None:
    t, x = Sylvester(dim, units, layers, kind), torch.randn(20, dim)
    y = t(x)
    assert torch.allclose(y, x, rtol=0, atol=1e-13)
    assert torch.allclose(t.inv(y.detach()), x, rtol=0, atol=1e-13)
    log_det = t.log_abs_det_jacobian(x, y)
    assert log_det.shape == (20,)
    assert log_det.abs().max() <= 1e-12


@EACH_KIND
def test_reset_draws_the_identity_again_and_repeats_under_a_seed(kind: str) -> None:
    t, x, states = random_sylvester(4, 3, 2, kind), torch.randn(5, 4), []
    assert not torch.allclose(t(x), x)
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        t.reset_parameters()
        assert torch.allclose(t(x), x, rtol=0, atol=1e-13)
        states.append({name: p.clone() for name, p in t.named_parameters()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["b"], states[2]["b"])


# The ends of the range.


@EACH_KIND
@pytest.mark.parametrize("dot", [-80.0, -20.0, 80.0])
def test_float32_at_the_ends_of_the_diagonal(kind: str, dot: float) -> None:
    """Finite both ways, and float64's numbers to float32's rounding.

    A map of slope 80, and gradients beside a bend of slope e⁻⁸⁰, enlarge the rounding of a.
    """
    t, x = random_sylvester(4, 3, 1, kind, sd=0.3).float(), torch.randn(50, 4).float()
    with torch.no_grad():
        t.R_tilde.diagonal(dim1=-2, dim2=-1).fill_(2.0)
        t.R.diagonal(dim1=-2, dim2=-1).fill_(dot / 2)
    exact = copy.deepcopy(t).double()
    results = zip(*(both_ways(one, x.to(one.b.dtype)) for one in (t, exact)), strict=True)
    for i, (single, double) in enumerate(results):
        assert single.isfinite().all()
        tolerance = 50 * torch.finfo(torch.float32).eps if i < 2 else 1e-4
        assert (single - double).abs().max() <= tolerance * double.abs().max().clamp(min=1)


def both_ways(t: Sylvester, x: Tensor) -> list[Tensor]:
    """y, the log-determinant, the gradients of their sum, and y again, of x as solved."""
    x = x.clone().requires_grad_()
    y = t(x)
    log_det = t.log_abs_det_jacobian(x, y)
    gradients = torch.autograd.grad(log_det.sum() + y.sum(), [x, *t.parameters()])
    with torch.no_grad():
        back = t.inv(y.clone())
    return [y, log_det, *gradients, t(back)]


@pytest.mark.parametrize("dot", [-20.0, -80.0, 80.0])
def test_log_det_on_a_bend_by_hand(dot: float, float32: None) -> None:
    """a = 0 and r̃ = 1 have the determinant softplus(2 r + 2)/2, which 1 + r̂ would round away."""
    one = torch.ones(1, 1, 1)
    R, x = dot / 2 * one, torch.zeros(1)
    t = sylvester_at(torch.ones(1, 1, 1), R, one, torch.zeros(1, 1), "triangular")
    expected = math.log(math.log1p(math.exp(dot + 2)) / 2)
    assert t.log_abs_det_jacobian(x, t(x)).item() == pytest.approx(expected, rel=1e-6)


# Errors and copies.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_units": 4}, "num_units must be at most input_dim = 3.* got 4"),
        ({"num_units": 0}, "num_units must be an integer of at least 1, got 0"),
        ({"num_layers": -1}, "num_layers must be an integer of at least 0, got -1"),
        ({"input_dim": 0}, "input_dim must be an integer of at least 1, got 0"),
        ({"orthogonal": "cayley"}, "orthogonal must be one of 'householder', .*; got 'cayley'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    good = {"input_dim": 3, "num_units": 2}
    with pytest.raises(ValueError, match=message):
        Sylvester(**(good | options))
    if "input_dim" not in options:
        with pytest.raises(ValueError, match=message):
            sylvester_flow(**(good | options))


def test_a_context_of_the_wrong_size_is_named() -> None:
    t = ConditionalSylvester(3, context_dim=4, num_units=2)
    with pytest.raises(
        ValueError, match=r"context must have last dimension 4 .*got shape \(7, 3\)"
    ):
        t.condition(torch.randn(7, 3))


@EACH_KIND
def test_a_conditional_layer_starts_as_the_identity_for_every_context(kind: str) -> None:
    t, x = ConditionalSylvester(3, 4, 2, 3, kind, hidden_dims=(5,)), torch.randn(7, 3)
    context = torch.randn(7, 4)
    assert torch.allclose(t.condition(context)(x), x, rtol=0, atol=1e-13)
    moved = scatter(t, 0.5).condition(context)
    for row in range(7):
        one = t.condition(context[row])
        assert torch.allclose(moved(x)[row], one(x[row]), atol=1e-12)
        assert torch.allclose(moved.inv(x)[row], one.inv(x[row]), atol=1e-9)


@EACH_KIND
@pytest.mark.parametrize("context_dim", [None, 4], ids=["plain", "conditional"])
def test_flows_travel(kind: str, context_dim: int | None) -> None:
    """state_dict, deepcopy, pickle and torch.save keep the density."""
    options = {"num_units": 2, "num_layers": 2, "context_dim": context_dim, "orthogonal": kind}
    flow, other = (wild(sylvester_flow(3, **options), 0.5) for _ in range(2))
    context = [] if context_dim is None else [torch.randn(7, context_dim)]
    y = flow(*context).sample((7,) if context_dim is None else ())
    log_prob = flow(*context).log_prob(y)
    assert not torch.allclose(other(*context).log_prob(y), log_prob)
    other.load_state_dict(flow.state_dict())
    for copied in (other, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), saved(flow)):
        assert torch.allclose(copied(*context).log_prob(y.clone()), log_prob, atol=1e-9)
