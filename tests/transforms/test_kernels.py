"""The hand-written passes against the general path: values and first derivatives."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from cases import planar_at, scatter
from torch import Tensor

from pyroflow import Planar, Sylvester
from pyroflow.transforms.kernels import autograd, reference, shared
from pyroflow.transforms.kernels.units import TANH, Units, constrain

EPS = torch.finfo(torch.float64).eps
BOTH = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def planar_units(num_units: int, dim: int, sd: float) -> Units:
    sizes = (num_units, dim), (num_units, dim), (num_units,)
    return Units(*(sd * torch.randn(size) for size in sizes), None)


def sylvester_units(num_units: int, dim: int, sd: float, size: int) -> Units:
    t = scatter(Sylvester(dim, size, num_units // size), sd)
    with torch.no_grad():
        return t._units(t._map_parameters())


def general(z: Tensor, units: Units, inverse: bool) -> tuple[Tensor, Tensor]:
    return reference.evaluate(z, units, inverse, None, TANH)[:2]


def by_kernels(z: Tensor, units: Units, inverse: bool) -> tuple[Tensor, Tensor]:
    image, found = autograd.evaluate_stack(z, units, inverse=inverse)
    assert found.done is not None
    return image, found.log_det


def results(path: object, z: Tensor, units: Units, inverse: bool, weights: Tensor) -> list[Tensor]:
    """Image, log-determinant and the gradients of a mixture of both in all that decides them."""
    leaves = [t.clone().requires_grad_() for t in (z, *units[:4]) if t is not None]
    s = leaves[4] if len(leaves) > 4 else None
    image, log_det = path(leaves[0], Units(*leaves[1:4], s, units.size), inverse)
    loss = (image * weights[:, :-1]).sum() + (log_det * weights[:, -1]).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [image.detach(), log_det.detach(), *gradients]


def assert_same(z: Tensor, units: Units, inverse: bool) -> None:
    """The error of each result is measured against its largest number."""
    weights = torch.randn(len(z), z.shape[1] + 1)
    tolerance = 1e-10 if len(units.b) <= 17 else 1e-8  # deep stacks enlarge rounding errors
    pairs = (results(path, z, units, inverse, weights) for path in (by_kernels, general))
    for found, expected in zip(*pairs, strict=True):
        assert found.shape == expected.shape
        if found.numel():
            size = expected.abs().max().clamp(min=1)
            assert (found - expected).abs().max() <= tolerance * size


@BOTH
@pytest.mark.parametrize("sd", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("num_units", [0, 1, 15, 16, 17, 32, 33, 80])
def test_planar_units(num_units: int, sd: float, inverse: bool) -> None:
    """Around the sizes of the blocks, of one batched solve, and of narrow and large arrays."""
    units = planar_units(num_units, 5, sd)
    for N in (0, 1, 3, 512, 513, *([1000] if num_units > 32 else [])):
        assert_same(torch.randn(N, 5), units, inverse)


@BOTH
@pytest.mark.parametrize("sd", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("num_units", "size"), [(3, 3), (16, 4), (20, 5), (80, 2), (80, 16)])
def test_layers_of_several_units(num_units: int, size: int, sd: float, inverse: bool) -> None:
    units = sylvester_units(num_units, 16, sd, size)
    for N in (1, 3, 513, *([1000] if num_units > 32 else [])):
        assert_same(torch.randn(N, 16), units, inverse)


@BOTH
def test_one_number_a_point(inverse: bool) -> None:
    for num_units in (1, 40):
        assert_same(torch.randn(20, 1), planar_units(num_units, 1, 1.0), inverse)


# The inverse where Newton's method for a block does not end.


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of columns that each call of the unit-by-unit solver was left with."""
    columns, solve = [], shared._solve_in_turn

    def counted(r: Tensor, coupling: Tensor, s: Tensor) -> Tensor:
        columns.append(r.shape[1])
        return solve(r, coupling, s)

    monkeypatch.setattr(shared, "_solve_in_turn", counted)
    return columns


@pytest.mark.parametrize("N", [300, 1000])
def test_columns_without_an_end_are_solved_in_turn(N: int, in_turn: list[int]) -> None:
    """64 units of sd 2 in 2 dimensions, where ‖dy/dx‖ is about 10⁴ and enlarges x's rounding."""
    units, y = planar_units(64, 2, 2.0), 3 * torch.randn(N, 2)
    x, _ = by_kernels(y, units, inverse=True)
    assert in_turn
    assert max(in_turn) < N / 10  # few are left
    columns = torch.eye(2).unsqueeze(1).expand(2, N, 2)
    leaf = x.clone().requires_grad_()
    image, _ = general(leaf, units, False)
    rows = [torch.autograd.grad(image, leaf, column, retain_graph=True)[0] for column in columns]
    slope = torch.linalg.matrix_norm(torch.stack(rows, 1), 2)
    u_hat = constrain(units.W, units.U)[0]
    terms = y.abs().amax(-1) + u_hat.norm(dim=-1).sum()
    residual = (image - y).abs().amax(-1)
    assert (residual <= 5 * EPS * (1 + slope) * terms).all()


def test_the_last_resort_alone_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every column is taken for one that did not end."""
    units, y = planar_units(20, 3, 1.5), torch.randn(30, 3)
    expected = by_kernels(y, units, inverse=True)

    def endless(r: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return torch.full_like(r, torch.nan), torch.arange(r.shape[1])

    monkeypatch.setattr(shared, "_solve_together", endless)
    for found, value in zip(by_kernels(y, units, inverse=True), expected, strict=True):
        assert torch.allclose(found, value, rtol=0, atol=1e-11)


# Rows that are no numbers.


@BOTH
@pytest.mark.parametrize("N", [40, 600])
@pytest.mark.parametrize("size", [1, 4])
def test_bad_rows_stay_among_themselves(size: int, N: int, inverse: bool) -> None:
    units = planar_units(20, 4, 1.0) if size == 1 else sylvester_units(20, 4, 1.0, size)
    bad, good = torch.randn(N, 4), torch.ones(N, dtype=torch.bool)
    clean = bad.clone()
    for row, value in ((3, torch.nan), (11, torch.inf), (N - 1, -torch.inf)):
        bad[row, row % 4], good[row] = value, False
    weights = torch.randn(N, 5)
    found = results(by_kernels, bad, units, inverse, weights)
    expected = results(by_kernels, clean, units, inverse, weights)
    for result, value in zip(found[:3], expected[:3], strict=True):  # also the gradient in z
        assert torch.allclose(result[good], value[good], rtol=1e-11, atol=1e-11)
    assert not found[0][~good].isfinite().all(-1).any()


@BOTH
def test_a_row_of_w_that_is_zero_is_a_translation(inverse: bool) -> None:
    """By u tanh(b), with determinant 1, between four layers that are not."""
    w, u, b = planar_units(5, 3, 1.0)[:3]
    w[2] = 0.0
    z = torch.randn(30, 3)
    first, last = (planar_at(w[k], u[k], b[k]) for k in (slice(0, 2), slice(3, 5)))
    shift = u[2] * b[2].tanh()
    x = first.inv(last.inv(z) - shift) if inverse else z
    y = last(first(x) + shift)
    middle = first(x)
    log_det = first.log_abs_det_jacobian(x, middle)
    log_det = log_det + last.log_abs_det_jacobian(middle + shift, last(middle + shift))
    weights = torch.randn(30, 4)
    found = results(by_kernels, z, Units(w, u, b, None), inverse, weights)
    assert torch.allclose(found[0], x if inverse else y, atol=1e-12)
    assert torch.allclose(found[1], log_det, atol=1e-12)
    assert all(t.isfinite().all() for t in found)
    reference = results(general, z, Units(w, u, b, None), inverse, weights)
    for t, expected in zip(found, reference, strict=True):
        assert torch.allclose(t, expected, rtol=1e-10, atol=1e-10)


# Layouts, modes and memory.


@BOTH
def test_layouts_do_not_matter(inverse: bool) -> None:
    """Transposed, sliced and expanded inputs and parameters, and any batch shape."""
    W, U, b = planar_units(20, 4, 0.8)[:3]
    wide, tall = torch.randn(8, 30)[::2], torch.randn(30, 8)[:, 1::2]
    strided = Units(torch.cat([W, U], 1)[:, :4], U.T.contiguous().T, b.repeat(2)[:20], None)
    for z in (wide.T, tall, torch.randn(4).expand(30, 4), torch.randn(6, 5, 4).transpose(0, 1)):
        plain = z.contiguous()
        expected = by_kernels(plain, Units(W, U, b, None), inverse)
        for found, value in zip(by_kernels(z, strided, inverse), expected, strict=True):
            assert torch.allclose(found, value, rtol=0, atol=1e-12)
        if z.dim() == 2:
            assert_same(z, strided, inverse)
    assert by_kernels(torch.randn(4), strided, inverse)[1].shape == ()


@BOTH
def test_modes_do_not_matter(inverse: bool) -> None:
    t, z = scatter(Planar(3, 20), 1.0), torch.randn(30, 3)
    direction = t.inv if inverse else t
    image = direction(z)
    log_det = direction.log_abs_det_jacobian(z, image)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            other = direction(z.clone())
            assert torch.equal(other, image)
            score = direction.log_abs_det_jacobian(z.clone(), other)
        assert torch.allclose(score, log_det, rtol=0, atol=1e-12)


def test_an_edited_log_det_is_not_remembered() -> None:
    """log_det += ... is how sums are written; the cache must not hand out the sum."""
    for t in (scatter(Planar(3, 4), 1.0), scatter(Sylvester(3, 2, 2), 1.0)):
        x = torch.randn(5, 3)
        y = t(x)
        log_det = t.log_abs_det_jacobian(x, y)
        expected = log_det.detach().clone()
        log_det += 1
        assert torch.equal(t.log_abs_det_jacobian(x, y), expected)


def test_work_is_freed() -> None:
    """Of 50 steps each way the last work is alive, by counting references; without t none is."""
    t, works = scatter(Planar(2, 20), 0.5), []
    gc.collect()
    gc.disable()
    try:
        for step in range(100):
            z = torch.randn(64, 2)
            pair = (t.inv(z), z) if step % 2 else (z, t(z))
            loss = sum(p.square().sum() for p in pair) - t.log_abs_det_jacobian(*pair).sum()
            loss.backward()
            last = t._cache.inverse if step % 2 else t._cache.forward
            works.append(weakref.ref(last.intermediates.done.h))
        del last
        del loss, pair, z
        assert sum(work() is not None for work in works) <= 2
    finally:
        gc.enable()
    del t  # with its inverse a cycle, made by torch
    gc.collect()
    assert all(work() is None for work in works)


# float32.


@pytest.mark.parametrize(("dim", "num_units"), [(2, 32), (40, 80)])
def test_float32_error_is_that_of_the_terms(dim: int, num_units: int) -> None:
    """|y32 - y64| within a few eps of |x| + Σ |û h|, at parameters as training leaves them."""
    torch.manual_seed(1)
    w = torch.nn.functional.normalize(torch.randn(num_units, dim), dim=-1) * 1.5
    u, b = 0.3 * torch.randn(num_units, dim), torch.randn(num_units)
    exact = planar_at(*(p.float().double() for p in (w, u, b)))
    single = planar_at(*(p.float() for p in (w, u, b)))
    x = torch.randn(2000, dim).float()
    y = exact(x.double())
    h = exact._cache.forward.intermediates.done.h
    u_hat = constrain(exact.w, exact.u)[0]
    terms = x.abs().double().amax(-1) + (h.abs() * u_hat.norm(dim=-1, keepdim=True)).sum(0)
    error = (single(x).double() - y).abs().amax(-1) / terms / torch.finfo(torch.float32).eps
    assert error.max() <= 20
    assert error.median() <= 2
