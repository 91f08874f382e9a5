"""The sinh-arcsinh layer against Jones & Pewsey 2009, and at the ends of its range."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import given_sinh_arcsinh, normal, scatter
from torch import Tensor

from pyroflow import Affine, ConditionalSinhArcsinh, Flow, SinhArcsinh
from pyroflow.flows import AlongPath, FlowDistribution, StandardNormal
from pyroflow.transforms.sinh_arcsinh import _log_cosh

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def layer(skew: list[float], delta: list[float]) -> SinhArcsinh:
    """A layer with these ε and δ."""
    t = SinhArcsinh(len(skew))
    with torch.no_grad():
        t.skew.copy_(torch.tensor(skew))
        t.raw.copy_(torch.tensor(delta).expm1().log())
    return t


# By hand: ε, δ, x, y and dy/dx = δ √(1 + y²)/√(1 + x²), with sinh(2 asinh x) = 2x √(1 + x²) and
# sinh(asinh v + ln 2) = (5v + 3 √(1 + v²))/4.
BY_HAND = {
    "heavier": (0.0, 2.0, 0.75, 1.875, 3.4),
    "lighter": (0.0, 0.5, 1.875, 0.75, 1 / 3.4),
    "skewed": (math.log(2), 1.0, 0.75, 1.875, 1.7),
    "skewed and heavier": (math.log(2), 2.0, 0.75, 63 / 16, 6.5),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_values_by_hand(name: str) -> None:
    skew, delta, x, y, slope = BY_HAND[name]
    t, x = layer([skew], [delta]), torch.tensor([x])
    assert t(x).item() == pytest.approx(y, abs=1e-14)
    assert t.inv(torch.tensor([y])).item() == pytest.approx(x.item(), abs=1e-14)
    assert t.log_abs_det_jacobian(x, t(x)).item() == pytest.approx(math.log(slope), abs=1e-14)


@pytest.mark.parametrize(("skew", "delta"), [(0.0, 0.6), (-0.8, 1.0), (1.3, 1.7)])
def test_the_density_is_that_of_the_paper(skew: float, delta: float) -> None:
    """Equation 2: f(y) = {2π(1 + y²)}^(−1/2) δ √(1 + S²) exp(−S²/2), S = sinh(δ asinh y − ε)."""
    q = FlowDistribution(StandardNormal(1)(), [layer([skew / delta], [1 / delta])])
    for y in (-40.0, -1.5, 0.0, 0.3, 7.0):
        s = math.sinh(delta * math.asinh(y) - skew)
        expected = math.log(delta) + 0.5 * math.log((1 + s * s) / (2 * math.pi * (1 + y * y)))
        expected -= s * s / 2
        assert q.log_prob(torch.tensor([y])).item() == pytest.approx(expected, rel=1e-13)


def test_second_derivatives_at_the_origin() -> None:
    """y'' = δ² sinh ε; of the log-determinant δ tanh ε and δ² (1 − tanh² ε) − 1."""
    for skew, delta in ((0.0, 1.0), (0.0, 1.8), (0.7, 0.4)):
        t, x = layer([skew], [delta]), torch.zeros(1, requires_grad=True)
        y = t(x)
        log_det = t.log_abs_det_jacobian(x, y)
        found = []
        for value in (y.sum(), log_det):
            (slope,) = torch.autograd.grad(value, x, create_graph=True)
            found += [slope.item(), torch.autograd.grad(slope, x, retain_graph=True)[0].item()]
        tanh = math.tanh(skew)
        bend = delta**2 * (1 - tanh**2) - 1
        expected = [delta * math.cosh(skew), delta**2 * math.sinh(skew), delta * tanh, bend]
        assert found == pytest.approx(expected, abs=1e-14)


# Precision and range.


@DTYPES
def test_far_out_it_keeps_its_digits(dtype: torch.dtype) -> None:
    """On both sides: asinh of a large negative number must not cancel."""
    sizes = torch.tensor([0.0, 1e-30, 1e-8, 1e-3, 1.0, 1e2, 1e4, 1e6, 1e8, 1e15], dtype=dtype)
    value = torch.cat([-sizes.flip(0), sizes]).unsqueeze(-1)
    t, eps = layer([0.4], [1.3]).to(dtype), torch.finfo(dtype).eps
    exact = copy.deepcopy(t).double()
    skew, delta = exact.skew.item(), math.log1p(math.exp(exact.raw.item()))
    for found, inverse in ((t, False), (t.inv, True)):
        image = found(value)
        log_det = found.log_abs_det_jacobian(value, image)
        for v, y, det in zip(value[:, 0].tolist(), image[:, 0], log_det, strict=True):
            a = (math.asinh(v) - skew) / delta if inverse else delta * math.asinh(v) + skew
            slope = -math.log(delta) if inverse else math.log(delta)
            slope += math.log(math.cosh(a)) - math.log(math.cosh(math.asinh(v)))
            assert y.item() == pytest.approx(math.sinh(a), rel=4 * eps * (1 + abs(a)), abs=4 * eps)
            assert det.item() == pytest.approx(slope, abs=8 * eps * (1 + abs(a)))


@DTYPES
@pytest.mark.parametrize("sd", [1.0, 2.0])
def test_round_trips(dtype: torch.dtype, sd: float) -> None:
    """Rounding of a = δ asinh x + ε is a relative error of y, and comes back divided by δ."""
    t, x = scatter(SinhArcsinh(500), sd).to(dtype), torch.randn(20, 500).to(dtype)
    y = t(x)
    back = t.inv(y.clone())
    delta = torch.nn.functional.softplus(t.raw)
    rounding = (1 + y.asinh().abs() + t.skew.abs()) / delta * (1 + x * x).sqrt()
    assert ((back - x).abs() <= 4 * torch.finfo(dtype).eps * rounding).all()
    assert y.isfinite().all()


@DTYPES
def test_the_range_of_the_dtype(dtype: torch.dtype) -> None:
    """Images end at sinh(88) or sinh(709), and are infinite beyond; log-determinants are not."""
    end = math.floor(math.log(torch.finfo(dtype).max))
    t, x = SinhArcsinh(1).to(dtype), torch.zeros(2, 1, dtype=dtype)
    t = t.at(torch.tensor([[end], [-end - 2]], dtype=dtype), t.raw)
    y = t(x)
    assert y[0].isfinite()
    assert y[1] == -torch.inf
    expected = [end - math.log(2), end + 2 - math.log(2)]
    assert t.log_abs_det_jacobian(x, y).tolist() == pytest.approx(expected, rel=1e-6)


@DTYPES
def test_every_raw_parameter_is_a_bijection(dtype: torch.dtype) -> None:
    """Also where the softplus underflows: log-determinants and gradients stay finite."""
    raw = torch.tensor([-1e4, -80.0, -20.0, 0.0, 20.0], dtype=dtype).requires_grad_()
    skew = torch.full((5,), 0.5, dtype=dtype)
    t, x = SinhArcsinh(5).at(skew, raw), torch.full((5,), 1.5, dtype=dtype)
    y = t(x)
    log_det = t.log_abs_det_jacobian(x, y)
    for value in (y.sum(), log_det):
        assert value.isfinite()
        assert torch.autograd.grad(value, raw, retain_graph=True)[0].isfinite().all()
    backwards = t.inv.log_abs_det_jacobian(x, t.inv(x))
    assert backwards.isfinite()


@DTYPES
def test_log_cosh(dtype: torch.dtype) -> None:
    a = torch.tensor([0.0, 1e-3, 1.0, 30.0, 44.5, 700.0, 1e9], dtype=dtype)
    a = torch.cat([a, -a]).requires_grad_()
    value = _log_cosh(a)
    (slope,) = torch.autograd.grad(value.sum(), a, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), a)
    eps = torch.finfo(dtype).eps
    for v, *found in zip(a.tolist(), value.tolist(), slope.tolist(), bend.tolist(), strict=True):
        log_cosh = abs(v) - math.log(2) + math.log1p(math.exp(-2 * abs(v)))
        expected = [log_cosh, math.tanh(v), 1 - math.tanh(v) ** 2]
        assert found == pytest.approx(expected, rel=4 * eps, abs=4 * eps)


# The start.


def test_the_start_is_the_identity() -> None:
    t, x = SinhArcsinh(3), 3 * torch.randn(50, 3)
    assert torch.allclose(t(x), x, rtol=1e-14, atol=1e-14)
    assert torch.allclose(t.inv(x.clone()), x, rtol=1e-14, atol=1e-14)
    assert torch.allclose(t.log_abs_det_jacobian(x, t(x)), torch.zeros(50), atol=1e-14)
    assert {n: tuple(p.shape) for n, p in t.named_parameters()} == {"skew": (3,), "raw": (3,)}
    assert not torch.allclose(scatter(t, 1.0)(x), x)
    t.reset_parameters()
    assert torch.allclose(t(x), x, rtol=1e-14, atol=1e-14)
    with pytest.raises(ValueError, match="input_dim must be an integer of at least 1, got 0"):
        SinhArcsinh(0)


def test_the_conditional_form_starts_as_the_identity_for_every_context() -> None:
    t, x = ConditionalSinhArcsinh(2, 3, hidden_dims=(4,)), torch.randn(7, 2)
    context = torch.randn(7, 3)
    assert torch.allclose(t.condition(context)(x), x, atol=1e-14)
    scatter(t, 1.0)
    at = t.condition(context)
    assert torch.allclose(at(x)[3], t.condition(context[3])(x[3]))
    assert not torch.allclose(at(x), x, atol=0.1)
    t.reset_parameters()
    assert torch.allclose(t.condition(context)(x), x, atol=1e-14)


def test_a_flow_turns_it_like_any_layer() -> None:
    """And an affine layer takes the moments of the data only where it is the identity."""
    y = 5 + 3 * torch.randn(100, 2)
    flow = Flow(StandardNormal(2), [SinhArcsinh(2), Affine(2)], "auto")
    flow.initialize(y)
    assert flow.steps[0][1]
    assert torch.allclose(flow.parts[1].loc_and_scale()[0], y.mean(0))
    moved = Flow(StandardNormal(2), [scatter(SinhArcsinh(2), 0.5), Affine(2)], "auto")
    before = moved().log_prob(y)
    moved.initialize(y)
    assert torch.equal(moved().log_prob(y), before)


def test_the_path_derivative_vanishes_at_the_target() -> None:
    def gradients(value: Tensor) -> list[Tensor]:
        options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        return torch.autograd.grad(value, theta, **options)

    chain = [given_sinh_arcsinh(2, ()).transform(), scatter(Affine(2), 0.5)]
    theta = [*chain[0].trained(), *chain[1].parameters()]
    q, plain = AlongPath(normal(), chain), FlowDistribution(normal(), chain)
    fixed = [copy.deepcopy(chain[0].family).at(*(p.detach() for p in chain[0].trained()))]
    target = FlowDistribution(normal(), [*fixed, copy.deepcopy(chain[1])])
    y = q.rsample((20,))
    assert torch.allclose(q.log_prob(y), plain.log_prob(y.clone()), atol=1e-9)
    whole = gradients((plain.log_prob(y) - target.log_prob(y)).sum())
    assert max(g.abs().max() for g in whole) > 0.1
    along = gradients((q.log_prob(y) - target.log_prob(y)).sum())
    assert max(g.abs().max() for g in along) <= 1e-10
