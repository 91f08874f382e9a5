"""Planar layers at the ends of their range: wᵀu, the pre-activation a, ‖w‖, float32."""

from __future__ import annotations

import math

import pytest
import torch
from cases import planar_at
from torch import Tensor

from pyroflow.transforms.kernels.units import constrain

DOTS = [-80.0, -40.0, -17.0, -5.0, -0.51, -0.49, 0.0, 5.0, 17.0, 80.0]
PRE_ACTIVATIONS = [0.0, 1e-8, -0.3, 3.0, -20.0, 100.0, -1e4, 1e4]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def assert_finite(w: Tensor, u: Tensor, inverse: bool) -> None:
    """Images, log-determinants and all their gradients, rows of w and u by pre-activations."""
    n, x = len(PRE_ACTIVATIONS), torch.tensor([0.7, -0.2], dtype=w.dtype)
    w, u = w.repeat_interleave(n, 0), u.repeat_interleave(n, 0)
    b = torch.tensor(PRE_ACTIVATIONS, dtype=w.dtype).repeat(len(w) // n) - w @ x
    leaves = [x.expand_as(w), w.unsqueeze(1), u.unsqueeze(1), b.unsqueeze(1)]
    leaves = [t.clone().requires_grad_() for t in leaves]
    t = planar_at(*leaves[1:])
    t = t.inv if inverse else t
    y = t(leaves[0])
    log_det = t.log_abs_det_jacobian(leaves[0], y)
    for value in (y, log_det):
        gradients = torch.autograd.grad(value.sum(), leaves, retain_graph=True)
        for result in (value, *gradients):
            good = result.isfinite().reshape(len(w), -1).all(1)
            assert good.all(), torch.cat([w, u, b.unsqueeze(1)], 1)[~good][:3]


@DTYPES
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_large_slopes_are_finite(dtype: torch.dtype, inverse: bool) -> None:
    """wᵀu from -80 to 80 with ‖w‖ from 1 to 1e-8."""
    along, across = torch.tensor([0.6, 0.8], dtype=dtype), torch.tensor([-0.4, 0.3], dtype=dtype)
    pairs = [(dot, norm) for dot in DOTS for norm in (1.0, 1e-2, 1e-5, 1e-8)]
    if inverse and dtype == torch.float32:
        # The inverse's derivative is about |û|/det: 80/‖w‖ · e⁸⁰ is out of float32's range.
        pairs = [(dot, norm) for dot, norm in pairs if dot > -80 or norm == 1]
    w = torch.stack([norm * along for _, norm in pairs])
    u = torch.stack([dot / norm * along + across for dot, norm in pairs])
    assert_finite(w, u, inverse)


@DTYPES
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_vanishing_weights_are_finite(dtype: torch.dtype, inverse: bool) -> None:
    """‖w‖ from 1 to 0 exactly, with u of ordinary size."""
    smallest = torch.finfo(dtype).smallest_normal
    norms = [10.0**-k for k in range(46)] + [math.sqrt(smallest), smallest, smallest / 8, 0.0]
    w = torch.tensor(norms, dtype=dtype).unsqueeze(1) * torch.tensor([0.6, 0.8], dtype=dtype)
    for u in ([0.3, -0.5], [0.0, 0.0], [-2.0, -1.0], [5.0, 2.0]):
        assert_finite(w, torch.tensor(u, dtype=dtype).expand_as(w), inverse)


@DTYPES
@pytest.mark.parametrize("dot", [-80.0, -17.0, 0.0, 21.0, 80.0])
def test_log_det_of_large_slopes_by_hand(dtype: torch.dtype, dot: float) -> None:
    """ln(tanh²a + ln(1 + e^(wᵀu)) / cosh²a) for a layer that reads a from one coordinate."""
    w, slope = torch.tensor([[1.0, 0.0]], dtype=dtype), math.log1p(math.exp(dot))
    t, eps = planar_at(w, dot * w, torch.zeros(1, dtype=dtype)), torch.finfo(dtype).eps
    for a in (0.0, 0.25, 3.0, -6.0, 10.0, 300.0, -1e4):
        x = torch.tensor([a, 2.0], dtype=dtype)
        bend = (2 * math.exp(-abs(a)) / (1 + math.exp(-2 * abs(a)))) ** 2
        expected = math.log(math.tanh(a) ** 2 + slope * bend)
        log_det = t.log_abs_det_jacobian(x, t(x)).item()
        assert log_det == pytest.approx(expected, rel=8 * eps, abs=8 * eps)


@DTYPES
def test_slopes_below_the_smallest_number(dtype: torch.dtype) -> None:
    """wᵀu = -1000: det is e⁻¹⁰⁰⁰ on the hyperplane; what comes is finite and very negative."""
    w = torch.tensor([[0.6, 0.8]], dtype=dtype)
    t, x = planar_at(w, -1000 * w, torch.zeros(1, dtype=dtype)), torch.zeros(2, dtype=dtype)
    log_det = t.log_abs_det_jacobian(x, t(x))
    assert log_det.isfinite()
    assert log_det < -87
    assert t.inv(t(x)).isfinite().all()


@DTYPES
def test_short_weights_with_a_long_u_stay_invertible(dtype: torch.dtype) -> None:
    """‖w‖² below sqrt(tiny) and wᵀu = -5: the constraint is the paper's all the same."""
    norm = 1e-12 if dtype == torch.float32 else 1e-80
    w = norm * torch.tensor([[0.6, 0.8]], dtype=dtype)
    u = -5 / norm * torch.tensor([[0.6, 0.8]], dtype=dtype)
    t, x = planar_at(w, u, torch.zeros(1, dtype=dtype)), torch.zeros(2, dtype=dtype)
    log_det = t.log_abs_det_jacobian(x, t(x)).item()
    assert log_det == pytest.approx(math.log(math.log1p(math.exp(-5))), rel=1e-5)


@DTYPES
def test_weights_of_zero_have_a_known_limit(dtype: torch.dtype) -> None:
    """At w = 0 the layer is the translation by u tanh(b), with determinant 1, both ways."""
    w, u = torch.zeros(1, 2, dtype=dtype), torch.tensor([[0.3, -0.5]], dtype=dtype)
    t, x = planar_at(w, u, torch.full((1,), 0.7, dtype=dtype)), torch.ones(2, dtype=dtype)
    y = t(x)
    expected = torch.tensor([1 + 0.3 * math.tanh(0.7), 1 - 0.5 * math.tanh(0.7)], dtype=dtype)
    assert torch.allclose(y, expected, rtol=1e-6)
    assert t.log_abs_det_jacobian(x, y).abs() <= torch.finfo(dtype).eps
    assert torch.allclose(t.inv(expected), x, rtol=1e-6)


def test_float32_error_is_that_of_the_terms() -> None:
    """|y32 - y64| within a few eps of |x| + Σ |û h|; stacks that enlarge errors are not meant."""
    eps = torch.finfo(torch.float32).eps
    for dim, num_layers, sd in ((2, 1, 2.0), (2, 32, 1.0), (10, 16, 1.0), (50, 64, 0.3)):
        sizes = ((num_layers, dim), (num_layers, dim), (num_layers,))
        parameters = [(sd * torch.randn(size)).float() for size in sizes]
        t = planar_at(*parameters)
        x = torch.randn(500, dim, dtype=torch.float32)
        exact = planar_at(*(p.double() for p in parameters))
        u_hat = constrain(exact.w, exact.u)[0]
        terms = x.abs().amax(-1) + u_hat.norm(dim=-1).sum()
        error = (t(x).double() - exact(x.double())).abs().amax(-1)
        assert (error <= 20 * eps * terms).all()
