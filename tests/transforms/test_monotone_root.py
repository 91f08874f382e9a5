"""The scalar solver a + (s - 1) tanh(a) = r on a million random problems and at its limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyroflow.transforms.kernels.units import monotone_root

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
N = 250_000


def residual(a: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """|a + c tanh a - r| over the size of its terms, evaluated in float64.

    c + 1 = s, and a - tanh(a) is written so that s tanh(a) keeps the digits of a tiny s.
    """
    a, r, s = a.double(), r.double(), s.double()
    terms = a.abs() + ((s - 1) * a.tanh()).abs() + r.abs()
    return ((a - a.tanh() + s * a.tanh() - r).abs() / terms).nan_to_num(0.0)


def log_uniform(low: float, high: float) -> Tensor:
    return (math.log(low) + (math.log(high) - math.log(low)) * torch.rand(N)).exp()


def sign() -> Tensor:
    return torch.randint(0, 2, (N,)) * 2.0 - 1


RIGHT_HAND_SIDES = {
    "uniform": lambda s: 2000 * torch.rand(N) - 1000,
    "log-uniform": lambda s: sign() * log_uniform(1e-12, 1e3),
    "near c": lambda s: sign() * (s - 1) * (1 + 0.1 * torch.randn(N)),
    "about one": lambda s: 2 * torch.randn(N),
}


@DTYPES
@pytest.mark.parametrize("sides", RIGHT_HAND_SIDES)
def test_a_million_problems_per_dtype(dtype: torch.dtype, sides: str) -> None:
    """1 + c from 1e-12 to 1e6: within 4 units in the last place in at most 12 steps."""
    s = log_uniform(1e-12, 1e6)
    r = RIGHT_HAND_SIDES[sides](s).clamp(-1e3, 1e3).to(dtype)
    s = s.to(dtype)
    a, steps = monotone_root(r, s, return_steps=True)
    assert a.dtype == dtype
    assert steps <= 12
    assert residual(a, r, s).max() <= 4 * torch.finfo(dtype).eps
    assert (a.sign() == r.sign()).all()


@DTYPES
@pytest.mark.parametrize(
    ("a", "s"),
    [(0.3, 1.0), (1.0, 2.0), (0.5, 0.1), (2.0, 1e-3), (1e-3, 1e4), (12.0, 1e-12), (5.0, 50.0)],
)
def test_known_roots(dtype: torch.dtype, a: float, s: float) -> None:
    """r computed from the root; its error comes back divided by the slope."""
    r, slope = a + (s - 1) * math.tanh(a), math.tanh(a) ** 2 + s / math.cosh(a) ** 2
    root = monotone_root(torch.tensor(r, dtype=dtype), torch.tensor(s, dtype=dtype)).item()
    assert root == pytest.approx(
        a, rel=0, abs=4 * torch.finfo(dtype).eps * (a + abs(r) + s) / slope
    )


@DTYPES
def test_oddness_is_exact(dtype: torch.dtype) -> None:
    r, s = (5 * torch.randn(10_000)).to(dtype), log_uniform(1e-12, 1e6)[:10_000].to(dtype)
    assert torch.equal(monotone_root(-r, s), -monotone_root(r, s))


@DTYPES
def test_limits(dtype: torch.dtype) -> None:
    """r = 0, r = 1e7, slopes at and below the smallest normal number, up to 1e6."""
    tiny = torch.finfo(dtype).smallest_normal
    slopes = torch.tensor([0.0, tiny / 4, tiny, 1e-12, 0.5, 1.0, 1.5, 1e6], dtype=dtype)
    assert (monotone_root(torch.zeros_like(slopes), slopes) == 0).all()
    far, steps = monotone_root(torch.full_like(slopes, 1e7), slopes, return_steps=True)
    assert torch.allclose(far, 1e7 - (slopes - 1), rtol=4 * torch.finfo(dtype).eps)
    assert torch.equal(monotone_root(torch.full_like(slopes, -1e7), slopes), -far)
    assert steps <= 12
    # With s = 0 the equation is a - tanh(a) = r, at a = 1: 1 - 0.761594155955765.
    r = torch.full_like(slopes[:3], 0.238405844044235)
    root = monotone_root(r, slopes[:3])
    assert torch.allclose(root, torch.ones_like(root), rtol=10 * torch.finfo(dtype).eps)
    for r in (1e-30, 1e-12, 1e-6):
        a, steps = monotone_root(torch.full_like(slopes, r), slopes, return_steps=True)
        assert residual(a, torch.full_like(slopes, r), slopes).max() <= 4 * torch.finfo(dtype).eps
        assert steps <= 12


@DTYPES
def test_nan_stays_where_it_is(dtype: torch.dtype) -> None:
    nan = math.nan
    r = torch.tensor([1.0, nan, -2.0, 3.0], dtype=dtype)
    s = torch.tensor([2.0, 2.0, 0.5, nan], dtype=dtype)
    a = monotone_root(r, s)
    assert a.isnan().tolist() == [False, True, False, True]
    clean = torch.tensor([True, False, True, False])
    assert residual(a[clean], r[clean], s[clean]).max() <= 4 * torch.finfo(dtype).eps


def test_shapes_and_gradients() -> None:
    """Shapes broadcast; nothing is recorded, and the inputs stay as they are."""
    r = torch.randn(4, 1, 3, requires_grad=True)
    s = torch.full((5, 1), 0.3)
    a, kept = monotone_root(r, s), r.detach().clone()
    assert a.shape == (4, 5, 3)
    assert not a.requires_grad
    assert torch.equal(r, kept)
    assert (s == 0.3).all()
    assert monotone_root(torch.zeros(0, 3), torch.ones(3)).shape == (0, 3)


@pytest.mark.parametrize("s", [1e4, 1e6, 1e8, 1e12, 1e16, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_tail_of_a_steep_unit(s: float, dtype: torch.dtype) -> None:
    """Where r is near a huge s the root lies where tanh is flat, and Newton's steps are short."""
    a = torch.cat([torch.linspace(0.1, 30, 400), torch.linspace(0.5, 1.5, 100) * s]).to(dtype)
    slope = torch.tensor(s, dtype=dtype)
    exact = a.double() + (slope.double() - 1) * a.double().tanh()
    found = monotone_root(exact.to(dtype), slope).double()
    again = found + (slope.double() - 1) * found.tanh()
    assert found.isfinite().all()
    assert ((again - exact).abs() <= 8 * torch.finfo(dtype).eps * (exact + found)).all()
