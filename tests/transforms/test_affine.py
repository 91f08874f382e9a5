"""Affine layers: values by hand, moments, units, and Pyro's parametrisation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pyroflow.transforms import Affine, ConditionalAffine

# softplus(v) = ln(1 + eᵛ) is 2 at ln(e² - 1), 3 at ln(e³ - 1).
RAW = [math.log(math.e**2 - 1), math.log(math.e**3 - 1)]


@torch.no_grad()
def prepared(kind: str) -> Affine:
    """Offset (1, -1), A = diag(2, 3) · ((1, 0), (0.5, 1)), C = ((2, 0), (1, 4)), centre (10, 20).

    Where diagonal, A = (2, 3) and C = (2, 4).
    """
    t = Affine(2, kind)
    t.offset.copy_(torch.tensor([1.0, -1.0]))
    t.raw_scale.copy_(torch.tensor(RAW))
    t.centre.copy_(torch.tensor([10.0, 20.0]))
    t.unit.copy_(
        torch.tensor([[2.0, 0.0], [1.0, 4.0]]) if kind == "full" else torch.tensor([2.0, 4.0])
    )
    if kind == "full":
        t.lower.copy_(torch.tensor([[9.0, 9.0], [0.5, 9.0]]))  # only 0.5 counts
    return t


def test_full_by_hand() -> None:
    """loc = centre + C offset = (12, 17); A = ((2, 0), (1.5, 3)), L = C A = ((4, 0), (8, 12))."""
    t, x = prepared("full"), torch.tensor([0.5, -1.0])
    loc, scale = t.loc_and_scale()
    assert torch.allclose(loc, torch.tensor([12.0, 17.0]))
    assert torch.allclose(scale, torch.tensor([[4.0, 0.0], [8.0, 12.0]]))
    y = t(x)
    assert torch.allclose(y, torch.tensor([14.0, 9.0]))
    assert t.log_abs_det_jacobian(x, y).item() == pytest.approx(math.log(48))
    assert torch.allclose(t.inv(torch.tensor([14.0, 9.0])), x)


def test_diagonal_by_hand() -> None:
    """loc = (10 + 2, 20 - 4), L = (2 · 2, 4 · 3)."""
    t, x = prepared("diagonal"), torch.tensor([0.5, -1.0])
    y = t(x)
    assert torch.allclose(y, torch.tensor([14.0, 4.0]))
    assert t.log_abs_det_jacobian(x, y).item() == pytest.approx(math.log(48))
    assert torch.allclose(t.inv(torch.tensor([14.0, 4.0])), x)


def test_the_start() -> None:
    for kind in ("full", "diagonal"):
        t, x = Affine(3, kind), torch.randn(5, 3)
        assert torch.allclose(t(x), x, rtol=0, atol=1e-15)
        t = Affine(3, kind, init_loc=torch.tensor([1.0, 2.0, 3.0]), init_scale=0.1)
        assert torch.allclose(t(x), torch.tensor([1.0, 2.0, 3.0]) + 0.1 * x)
    for init_scale in (1e-12, 1e6):
        scale = Affine(1, "diagonal", init_scale=init_scale).loc_and_scale()[1]
        assert scale.item() == pytest.approx(init_scale, rel=1e-12)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_standardize_takes_the_moments(kind: str) -> None:
    """Of four points by hand: mean (2, 1), variances 4/3 and 8/3, covariance 4/3."""
    t = prepared(kind)
    t.standardize(torch.tensor([[1.0, -1.0], [3.0, 3.0], [1.0, 1.0], [3.0, 1.0]]))
    loc, scale = t.loc_and_scale()
    assert torch.allclose(loc, torch.tensor([2.0, 1.0]))
    covariance = scale @ scale.T if kind == "full" else scale.square().diag()
    across = 4 / 3 if kind == "full" else 0.0
    assert torch.allclose(covariance, torch.tensor([[4 / 3, across], [across, 8 / 3]]))


def test_standardize_refuses_columns_that_follow_from_others() -> None:
    y = torch.randn(20, 1) * torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match=r"linearly independent, got 20 rows of 2 columns"):
        Affine(2).standardize(y)
    Affine(2, "diagonal").standardize(y)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_recentre_keeps_the_map(kind: str) -> None:
    t, x = prepared(kind), torch.randn(5, 2)
    y = t(x)
    t.recentre()
    assert torch.allclose(t(x), y)
    assert (t.offset == 0).all()
    with torch.no_grad():
        t.offset += 1.0  # one unit now is one present scale
    loc, scale = t.loc_and_scale()
    moved = scale.sum(-1) if kind == "full" else scale
    assert torch.allclose(
        loc, torch.tensor([12.0, 17.0] if kind == "full" else [12.0, 16.0]) + moved
    )


def test_conditional_layers_start_as_one_map() -> None:
    t = ConditionalAffine(2, 3, hidden_dims=(4,))
    t.standardize(torch.randn(100, 2) * 5 + 1)
    x = torch.randn(7, 2)
    assert torch.allclose(t.condition(torch.randn(7, 3))(x), t.affine(x))


def by_definition(t: Affine, trained: list[Tensor]) -> tuple[Tensor, Tensor]:
    """loc = centre + C offset and L = C diag(softplus(raw)) (I + N), in dense matrices."""
    offset, raw, lower = trained
    A = torch.diag_embed(raw.exp().log1p()) @ (lower.tril(-1) + torch.eye(offset.shape[-1]))
    return t.centre + (t.unit @ offset.unsqueeze(-1)).squeeze(-1), t.unit @ A


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows", [2, 9], ids=["few rows", "many rows"])
@pytest.mark.parametrize("batch", [(), (3,)], ids=["one map", "a map a row"])
def test_values_and_gradients_whatever_the_number_of_rows(
    batch: tuple, rows: int, seed: int
) -> None:
    """With fewer than D rows the factors act in turn, with more their product."""
    torch.manual_seed(seed)
    D, t = 6, Affine(6)
    t.standardize(3 + 2 * torch.randn(50, D) @ torch.randn(D, D))
    trained = [torch.randn(*batch, *p.shape, requires_grad=True) for p in t.trained()]
    x = torch.randn(rows, *batch, D, requires_grad=True)
    there, back = t.at(*trained), t.at(*trained)
    loc, L = by_definition(t, trained)
    y = loc + (L @ x.unsqueeze(-1)).squeeze(-1)
    solved = torch.linalg.solve(L, (x - loc).unsqueeze(-1)).squeeze(-1)
    log_det = torch.linalg.slogdet(L)[1].expand(rows, *batch)
    pairs = [
        (there(x), y),
        (there.log_abs_det_jacobian(x, y), log_det),
        (back.inv(x), solved),
        (t._compose(x, there._map_parameters())[1], L),
    ]
    weights = [torch.randn_like(expected) for _, expected in pairs]
    sums = [sum((w * p[i]).sum() for w, p in zip(weights, pairs, strict=True)) for i in (0, 1)]
    found, expected = (torch.autograd.grad(total, [x, *trained]) for total in sums)
    for one, other in [*pairs, *zip(found, expected, strict=True)]:
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9 * other.abs().max().item())


def test_few_rows_take_no_product_of_two_matrices() -> None:
    """A step at D = 64 with two draws: D³ alone would be 2 · 64³ operations."""
    t = Affine(64)
    with FlopCounterMode(display=False) as counter:
        y = t(torch.randn(2, 64))
        x, log_det, _ = t.inverse_along_path(y, y)
        (x.sum() + log_det.sum() + y.sum()).backward()
    assert 0 < counter.get_total_flops() < 64**3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_moments_in_half_precision(dtype: torch.dtype) -> None:
    t, wide = Affine(2), Affine(2)
    y = (300 + 2 * torch.randn(1000, 2)).to(dtype)
    t.to(dtype).standardize(y)
    wide.standardize(y.double())
    for one, other in zip(t.loc_and_scale(), wide.loc_and_scale(), strict=True):
        assert one.dtype == dtype
        assert torch.allclose(one.double(), other, rtol=3 * torch.finfo(dtype).eps)
