"""Every transform of the table: determinants, round trips, shapes, constraints, dtypes."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from cases import CASES, SHAPES, Source, planar_at
from torch import Size, Tensor
from torch.distributions import constraints

from pyroflow.transforms import Affine, Bijection, Planar

EPS = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps
BOTH = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


@pytest.fixture(params=CASES)
def source(request: pytest.FixtureRequest) -> Source:
    return CASES[request.param]()


def lead_shapes(source: Source) -> list[tuple[int, ...]]:
    """Batch shapes of inputs that broadcast with the parameters."""
    return [(), source.batch, (4, *source.batch), (2, 3, *source.batch)] if source.batch else SHAPES


def inputs(source: Source, shape: tuple[int, ...], sd: float = 2.0) -> Tensor:
    """Inputs of the full batch shape, so that each row of the output has its own."""
    full = torch.broadcast_shapes(shape, source.batch)
    return sd * torch.randn(*full, source.dim)


def jacobian(source: Source, value: Tensor, inverse: bool) -> Tensor:
    """The Jacobian matrix at every row of value, by autograd."""
    value = value.clone().requires_grad_()
    image, _ = source(value, inverse)
    rows = [torch.autograd.grad(c.sum(), value, retain_graph=True)[0] for c in image.unbind(-1)]
    return torch.stack(rows, -2)


def stretch(source: Source, value: Tensor, inverse: bool) -> Tensor:
    """How far the map can enlarge a small error at value, its own size added."""
    image = source(value, inverse)[0]
    size = 1 + value.abs().amax(-1) + image.abs().amax(-1)
    return size * (1 + torch.linalg.matrix_norm(jacobian(source, value, inverse), 2))


@BOTH
def test_log_det_is_that_of_the_jacobian(source: Source, inverse: bool) -> None:
    for shape in lead_shapes(source):
        value = inputs(source, shape)
        matrix = jacobian(source, value, inverse)
        sign, expected = torch.linalg.slogdet(matrix)
        log_det = source(value, inverse)[1]
        rounding = 10 * EPS * torch.linalg.cond(matrix)  # that of slogdet itself
        assert log_det.shape == expected.shape == value.shape[:-1]
        assert ((log_det - expected).abs() <= 1e-10 * (1 + expected.abs()) + rounding).all()
        assert (sign == 1).all()


def test_log_dets_agree_by_every_route(source: Source) -> None:
    x = inputs(source, ())
    t = source.transform()
    y = t(x)
    kept = t.log_abs_det_jacobian(x, y)
    assert torch.allclose(t.log_abs_det_jacobian(x.clone(), y.clone()), kept, atol=1e-12)
    assert torch.equal(t.inv.log_abs_det_jacobian(y, x), -kept)


@BOTH
def test_round_trips(source: Source, inverse: bool) -> None:
    """From y the error is that of rounding; from x the inverse's Jacobian enlarges it."""
    for shape in lead_shapes(source):
        there = inputs(source, shape, sd=3.0)
        back = source(there, not inverse)[0].detach().clone()
        again = source(back, inverse)[0]
        error = (again - there).abs().amax(-1)
        assert (error <= 20 * EPS * stretch(source, back, inverse)).all()


def test_shapes_broadcast_with_the_parameters(source: Source) -> None:
    for shape in lead_shapes(source):
        t, x = source.transform(), torch.randn(*shape, source.dim)
        expected = Size((*torch.broadcast_shapes(shape, source.batch), source.dim))
        assert t(x).shape == t.inv(x).shape == expected
        assert t.forward_shape(x.shape) == t.inverse_shape(x.shape) == expected
        assert t.inv.forward_shape(x.shape) == t.inv.inverse_shape(x.shape) == expected
        assert t.log_abs_det_jacobian(x.expand(expected), t(x)).shape == expected[:-1]
        rows = t(x.expand(expected).clone())
        assert torch.allclose(t(x), rows, atol=1e-12)


def test_constraints_and_inverse_of_the_inverse(source: Source) -> None:
    t = source.transform()
    assert t.inv.inv is t
    assert t.inv is t.inv
    assert t.bijective
    for space in (t.domain, t.codomain, t.inv.domain, t.inv.codomain):
        assert space is constraints.real_vector
        assert space.event_dim == 1
    y = t(inputs(source, (7,) if source.batch == () else ()))
    assert t.codomain.check(y).all()


# Other dtypes. In float64 the results are known, to float32's eyes, exactly.


@BOTH
def test_float32_agrees_with_float64(source: Source, inverse: bool) -> None:
    single = copy.deepcopy(source).float()
    value = inputs(source, (4, *source.batch)).float()
    exact = copy.deepcopy(single).double()  # the rounded parameters
    scale = stretch(exact, value.double(), inverse)
    results, gradients = [], []
    for module, v in ((single, value), (exact, value.double())):
        v = v.clone().requires_grad_()
        image, log_det = module(v, inverse)
        (image.square().sum(-1) / 2 - log_det).sum().backward()
        results.append((image.double(), log_det.double()))
        gradients.append([t.grad.double() for t in (v, *module.parameters()) if t.grad is not None])
    (image, log_det), (exact_image, exact_log_det) = results
    assert ((image - exact_image).abs().amax(-1) <= 4 * EPS32 * scale).all()
    assert ((log_det - exact_log_det).abs() <= 4 * EPS32 * scale).all()
    for gradient, expected in zip(*gradients, strict=True):
        assert (gradient - expected).norm() <= 4 * EPS32 * scale.max() * (1 + expected.norm())
    assert all(r.dtype == torch.float32 for r in single(value, inverse))


@pytest.mark.parametrize("module_dtype", [torch.float32, torch.float64], ids=str)
def test_a_dtype_that_is_not_the_default(module_dtype: torch.dtype) -> None:
    other = torch.float64 if module_dtype == torch.float32 else torch.float32
    sources = {name: CASES[name]() for name in CASES}
    try:
        torch.set_default_dtype(other)
        for name, source in sources.items():
            source.to(module_dtype)
            value = torch.randn(4, *source.batch, source.dim, dtype=module_dtype)
            for inverse in (False, True):
                image, log_det = source(value, inverse)
                assert image.dtype == log_det.dtype == module_dtype, name
                (image.sum() + log_det.sum()).backward()
            for p in source.parameters():
                assert p.dtype == module_dtype, name
                assert p.grad is None or p.grad.isfinite().all(), name
    finally:
        torch.set_default_dtype(torch.float64)


# What the border check says.


def test_inputs_of_a_wrong_size(source: Source) -> None:
    t = source.transform()
    message = rf"expects . with last dimension {source.dim}, got shape \(5, {source.dim + 1}\)"
    for call in (t, t.inv):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(5, source.dim + 1))
        with pytest.raises(ValueError, match=r"got shape \(\)"):
            call(torch.zeros(()))
    with pytest.raises(ValueError, match=message):
        t.log_abs_det_jacobian(torch.zeros(5, source.dim + 1), torch.zeros(5, source.dim + 1))


def test_inputs_of_a_wrong_dtype(source: Source) -> None:
    t = source.transform()
    message = (
        r"has torch.float64 parameters, got . in torch.float32: convert .* \w\.to\(torch.float64\)"
    )
    for call in (t, t.inv):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(*source.batch, source.dim, dtype=torch.float32))


def test_inputs_that_do_not_broadcast() -> None:
    message = "has parameters of batch shape (7,), which does not broadcast with x of shape (5, 2)"
    w = torch.ones(7, 1, 2)
    planar, affine = planar_at(w, w, torch.zeros(7, 1)), Affine(2).at(w[:, 0], w[:, 0], w.mT @ w)
    for name, t in (("Planar", planar), ("Affine", affine)):
        with pytest.raises(ValueError, match=re.escape(f"{name} {message}")):
            t(torch.zeros(5, 2))


def test_at_takes_as_many_tensors_as_are_trained(source: Source) -> None:
    family = getattr(source.parts, "start", source.parts)
    if isinstance(family, Bijection):
        twin = family.at(*family.trained())
        for one, other in zip(twin._map_parameters(), family._map_parameters(), strict=True):
            assert one is other
        with pytest.raises(ValueError, match=r"\w+\.at expects \w+, .*, got 1"):
            family.at(torch.zeros(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Planar(0), "input_dim must be an integer of at least 1, got 0"),
        (lambda: Planar(2.0), "input_dim must be an integer of at least 1, got 2.0"),
        (lambda: Planar(2, -1), "num_layers must be an integer of at least 0, got -1"),
        (lambda: Affine(0), "input_dim must be an integer of at least 1, got 0"),
        (lambda: Affine(2, "banded"), "affine must be one of 'full', 'diagonal'; got 'banded'"),
        (lambda: Affine(2, init_scale=0.0), "init_scale must be a finite number above 0, got 0.0"),
    ],
)
def test_arguments(make: type, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
