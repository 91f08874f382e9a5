"""The bound on the diagonals of Sylvester layers: r̂ r̃ > −1 with no pole at r̃ = 0."""

from __future__ import annotations

import math

import pytest
import torch
from cases import scatter, sylvester_at

from pyroflow import Sylvester
from pyroflow.transforms.sylvester import bind_diagonal


def test_no_pole_where_a_diagonal_changes_its_sign() -> None:
    """Near r̃ = 0 the bound is −∞ from the one side and ∞ from the other, and r̂ is r."""
    r_tilde = torch.tensor([-0.01, -1e-9, 0.0, 1e-30, 1e-9, 0.01], requires_grad=True)
    for r in (-3.0, 0.0, 3.0):
        bound, s = bind_diagonal(torch.full((6,), r), r_tilde)
        assert torch.allclose(bound, torch.tensor(r), rtol=0, atol=1e-15)
        assert torch.allclose(s, 1 + r * r_tilde, rtol=1e-14, atol=0)
        (slope,) = torch.autograd.grad(bound.sum(), r_tilde, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum() + (s**2).sum(), r_tilde)
        assert slope.abs().max() < 1e-30
        assert torch.allclose(bend, 2 * r * (1 + r * r_tilde), rtol=1e-12, atol=1e-30)


@pytest.mark.parametrize("r", [-3.0, 0.5, 3.0])
def test_derivatives_near_zero_in_float32(r: float) -> None:
    """As those of float64 to rounding: ln s ≈ r r̃ bends by −r², where 1/r̃ is up to 1e6."""
    found = []
    for dtype in (torch.float32, torch.float64):
        r_tilde = torch.tensor([-0.05, -1e-3, 1e-6, 1e-5, 1e-4, 1e-2], dtype=dtype).requires_grad_()
        bound, s = bind_diagonal(torch.full((6,), r, dtype=dtype), r_tilde)
        first = torch.autograd.grad(s.log().sum(), r_tilde, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), r_tilde)[0]
        found.append(torch.stack([bound, s, first, second]).double().detach())
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6)


def test_the_bound_holds_in_float32_far_below_it() -> None:
    """r̂ there is −1/r̃ to rounding, and not the difference of r and its multiple."""
    r = torch.tensor([-100.0, -100.0, -10.0], dtype=torch.float32)
    r_tilde = torch.tensor([3.0, 30.0, 1000.0], dtype=torch.float32)
    bound, s = bind_diagonal(r, r_tilde)
    assert (s > 0).all()
    assert torch.allclose(bound * r_tilde, torch.full_like(r, -1), rtol=0, atol=2e-7)


def test_second_derivatives_against_differences() -> None:
    r = torch.tensor([-2.0, -0.4, 0.7, 3.0], requires_grad=True)
    r_tilde = torch.tensor([0.8, -1.7, 2.5, 0.3], requires_grad=True)
    assert torch.autograd.gradcheck(bind_diagonal, (r, r_tilde))
    assert torch.autograd.gradgradcheck(bind_diagonal, (r, r_tilde))


@pytest.mark.parametrize("r_tilde", [-30.0, -1.0, -0.1, 0.1, 1.0, 30.0])
def test_diagonals_are_bound_and_mirrored(r_tilde: float) -> None:
    """From the bound on, r̂ rises to r; (r, r̃) and (−r, −r̃) make the same unit, turned around."""
    r = torch.linspace(-20, 20, 81)
    bound, s = bind_diagonal(r, torch.full((81,), r_tilde))
    mirrored, same = bind_diagonal(-r, torch.full((81,), -r_tilde))
    assert torch.equal(mirrored, -bound)
    assert torch.equal(same, s)
    assert (s > 0).all()
    assert torch.allclose(1 + bound * r_tilde, s, rtol=0, atol=1e-12)
    assert (math.copysign(1, r_tilde) * s.diff() > 0).all()
    far = math.copysign(1, r_tilde) * r > 8
    assert torch.allclose(bound[far], r[far], rtol=0, atol=math.exp(-8))


@pytest.mark.parametrize("kind", ["householder", "qr"])
def test_an_amortised_layer_moves_nothing_far_while_a_diagonal_crosses_zero(kind: str) -> None:
    """Each row of the shift is at most the sum of a row of |R|, whatever R̃."""
    t, x = scatter(Sylvester(6, 3, 1, kind), 1.0), torch.randn(41, 6)
    R_tilde = t.R_tilde.detach().expand(41, 1, 3, 3).clone()
    R_tilde[:, 0, 1, 1] = torch.linspace(-1e-3, 1e-3, 41)
    swept = sylvester_at(t.frame, t.R, R_tilde, t.b, kind)
    assert (swept(x) - x).norm(dim=-1).max() <= 2 * t.R.abs().sum()
    assert torch.allclose(swept.inv(swept(x).clone()), x, atol=1e-12)
