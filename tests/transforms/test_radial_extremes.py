"""Radial layers at a centre and at the ends of their range: α, β, distances, float32."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from cases import radial_at
from torch import Tensor

from pyroflow.transforms import Conditioned
from pyroflow.transforms.radial import constrain

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
BOTH = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def layer(x0: Tensor, alpha: float, s: float) -> Conditioned:
    """One layer with this α and s = α + β̂."""
    raw = (torch.tensor([math.log(math.expm1(v))]) for v in (alpha, s))
    return radial_at(x0.unsqueeze(0), *raw)


# At the centre.


@BOTH
@pytest.mark.parametrize(("alpha", "s"), [(3.0, 1.0), (1.0, 4.0), (1.0, 1.0)])
def test_the_centre_itself(alpha: float, s: float, inverse: bool) -> None:
    """x0 stays; next to it the map is d -> d s/α; the log-determinant has a cone there."""
    x0 = torch.tensor([0.7, -1.3, 0.2])
    t, x = layer(x0, alpha, s), x0.clone().requires_grad_()
    t, ratio = (t.inv, alpha / s) if inverse else (t, s / alpha)
    y = t(x)
    log_det = t.log_abs_det_jacobian(x, y)
    assert torch.equal(y, x0)
    assert log_det.item() == pytest.approx(3 * math.log(ratio), abs=1e-13)
    assert torch.autograd.grad(log_det, x, retain_graph=True)[0].tolist() == [0.0, 0.0, 0.0]
    matrix = torch.autograd.functional.jacobian(t, x0)
    assert torch.allclose(matrix, ratio * torch.eye(3), atol=1e-13)
    hessian = torch.autograd.functional.hessian(
        lambda x: t(x).sum() + t.log_abs_det_jacobian(x, t(x)), x0
    )
    assert hessian.isfinite().all()


# The ends of the range.

RAW = [-1e4, -80.0, -20.0, 0.0, 20.0, 80.0, 1e4]
DISTANCES = [0.0, 1e-45, 1e-30, 1e-19, 1e-15, 1e-6, 1.0, 80.0, 1e15]


@DTYPES
@BOTH
@pytest.mark.parametrize("centre", [0.0, 1.0])
def test_all_is_finite(dtype: torch.dtype, inverse: bool, centre: float) -> None:
    """Images, log-determinants and their gradients, at every pair of raw parameters."""
    rows = torch.tensor(list(product(RAW, RAW, DISTANCES)), dtype=dtype)
    x = centre + rows[:, 2:] * torch.tensor([0.6, -0.8], dtype=dtype)
    leaves = [x, torch.full((len(rows), 1, 2), centre, dtype=dtype), rows[:, :1], rows[:, 1:2]]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    t = radial_at(*leaves[1:])
    t = t.inv if inverse else t
    y = t(leaves[0])
    log_det = t.log_abs_det_jacobian(leaves[0], y)
    for value in (y, log_det):
        gradients = torch.autograd.grad(value.sum(), leaves, retain_graph=True)
        for result in (value, *gradients):
            good = result.isfinite().reshape(len(rows), -1).all(1)
            assert good.all(), rows[~good][:3]


@DTYPES
@pytest.mark.parametrize("raw_alpha", [-25.0, -17.0, 0.0, 80.0])
@pytest.mark.parametrize("beta", [-25.0, -17.0, 0.0, 80.0])
def test_nothing_cancels(dtype: torch.dtype, raw_alpha: float, beta: float) -> None:
    """1 + β̂h would be 0 in float32 for β = −17 and −25, next to the centre."""
    alpha, s = (max(v, 0.0) + math.log1p(math.exp(-abs(v))) for v in (raw_alpha, beta))
    parameters = (torch.zeros(1, 3), torch.tensor([raw_alpha]), torch.tensor([beta]))
    t, eps = radial_at(*(p.to(dtype) for p in parameters)), torch.finfo(dtype).eps
    for r in (0.0, 1e-30, 1e-12, 1e-6, 1.0, 1e4, 1e15):
        x = r * torch.tensor([0.0, 0.6, -0.8], dtype=dtype)
        log_det = t.log_abs_det_jacobian(x, t(x)).item()
        f = (r + s) / (r + alpha)
        g = (r * (r + alpha) + alpha * (r + s)) / (r + alpha) ** 2
        expected = 2 * math.log(f) + math.log(g)
        assert log_det == pytest.approx(expected, rel=20 * eps, abs=20 * eps)


def test_float32_keeps_s_above_its_floor() -> None:
    """2⁻⁴⁰ there; float64 has e⁻⁸⁰ itself."""
    beta = torch.tensor([-80.0, -1e4])
    for value in constrain(beta, beta):
        assert value[0].item() == pytest.approx(math.exp(-80), rel=1e-12)
        assert value[1] > 0
    for value in constrain(beta.float(), beta.float()):
        assert value.tolist() == [2.0**-40, 2.0**-40]


@pytest.mark.parametrize("inverse", [False, True])
def test_short_distances_in_float32(inverse: bool) -> None:
    """Below 1e-19, where squares vanish, an image is still within rounding of α = 80."""
    x = torch.tensor([[1e-30, 0.0], [1e-20, -1e-20], [0.0, 3e-19]], dtype=torch.float32)
    for raw_alpha, beta in product((-80.0, -20.0, 80.0), repeat=2):
        parameters = (torch.zeros(1, 2), torch.tensor([raw_alpha]), torch.tensor([beta]))
        single = radial_at(*(p.float() for p in parameters))
        alpha, s = (v.double() for v in constrain(single.raw_alpha, single.beta))
        exact = radial_at(parameters[0], *((v.expm1().log()) for v in (alpha, s)))
        t, u = (single.inv, exact.inv) if inverse else (single, exact)
        error = (t(x).double() - u(x.double())).abs().max().item()
        assert error <= torch.finfo(torch.float32).eps * max(alpha.item(), s.item())
