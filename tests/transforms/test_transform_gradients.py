"""Every transform of the table: derivatives by finite differences and under torch.func."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import CASES, Source, slow
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacrev, vmap

BOTH = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
LARGE = 60  # numbers to differentiate in, beyond which random projections are checked


@pytest.fixture(params=CASES)
def source(request: pytest.FixtureRequest) -> Source:
    return CASES[request.param]()


def trainable(source: Source) -> dict[str, Tensor]:
    """The parameters, without the hidden layers of a context network."""
    return {
        name: p.detach().clone().requires_grad_()
        for name, p in source.named_parameters()
        if "layers.0" not in name
    }


def as_function(source: Source, names: list[str], inverse: bool) -> Callable:
    """(value, *parameters) to the image and the log-determinant."""

    def call(value: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return functional_call(source, dict(zip(names, parameters, strict=True)), (value, inverse))

    return call


@BOTH
def test_first_and_second_derivatives(source: Source, inverse: bool) -> None:
    """By finite differences, in the input and in every parameter."""
    with torch.no_grad():
        for p in source.parameters():
            p *= 0.6  # the differences of a nearly folded inverse are those of rounding
    parameters = trainable(source)
    call = as_function(source, list(parameters), inverse)
    value = torch.randn(*source.batch, source.dim, requires_grad=True)
    arguments = (value, *parameters.values())
    fast = sum(t.numel() for t in arguments) > LARGE
    assert gradcheck(call, arguments, fast_mode=fast)
    assert gradgradcheck(call, arguments, fast_mode=True)


@BOTH
def test_vmap_over_inputs(source: Source, inverse: bool) -> None:
    value = torch.randn(4, *source.batch, source.dim)
    expected = source(value, inverse)
    for in_dim in (0, 1):
        mapped = vmap(lambda v: source(v, inverse), in_dims=in_dim)(value.movedim(0, in_dim))
        for result, direct in zip(mapped, expected, strict=True):
            assert torch.allclose(result, direct, atol=1e-10)
    twice = vmap(vmap(lambda v: source(v, inverse)))(torch.stack([value, 2 * value]))
    assert torch.allclose(twice[0][0], expected[0], atol=1e-10)


@BOTH
@pytest.mark.parametrize("rows", [(), (3,), slow((5,))], ids=str)
def test_vmap_over_stacked_parameters(source: Source, inverse: bool, rows: tuple) -> None:
    """Against a loop. As many sets as rows (3) is a case of its own: misplaced axes broadcast."""
    sets, shape = 3, (*rows, *source.batch, source.dim)
    parameters = [p.detach() for p in source.parameters()]
    stacked = [p + 0.3 * torch.randn(sets, *p.shape) for p in parameters]
    call = as_function(source, [name for name, _ in source.named_parameters()], inverse)
    for value, in_dim in ((torch.randn(sets, *shape), 0), (torch.randn(shape), None)):
        mapped = vmap(call, in_dims=(in_dim, *[0] * len(stacked)))(value, *stacked)
        for i in range(sets):
            one = call(value if in_dim is None else value[i], *(p[i] for p in stacked))
            for result, expected in zip(mapped, one, strict=True):
                assert torch.allclose(result[i], expected, atol=1e-9)


@BOTH
def test_func_grad_and_jacrev(source: Source, inverse: bool) -> None:
    """Per-sample gradients in input and parameters, against autograd row by row."""
    names = [name for name, _ in source.named_parameters()]
    call = as_function(source, names, inverse)
    parameters = tuple(p.detach().clone().requires_grad_() for p in source.parameters())
    values = torch.randn(3, *source.batch, source.dim)

    def loss(value: Tensor, *parameters: Tensor) -> Tensor:
        image, log_det = call(value, *parameters)
        return image.square().sum() / 2 - log_det.sum()

    in_dims = (0, *[None] * len(parameters))
    each = tuple(range(1 + len(parameters)))
    frozen = tuple(p.detach() for p in parameters)
    mapped = vmap(grad(loss, argnums=each), in_dims=in_dims)(values, *frozen)
    for i, row in enumerate(values):
        row = row.clone().requires_grad_()
        expected = torch.autograd.grad(
            loss(row, *parameters), (row, *parameters), allow_unused=True, materialize_grads=True
        )
        for result, direct in zip(mapped, expected, strict=True):
            assert torch.allclose(result[i], direct, rtol=1e-8, atol=1e-8)
    matrix = jacrev(lambda v: call(v, *frozen)[0])(values[0])
    row = values[0].clone().requires_grad_()
    first = torch.autograd.grad(call(row, *frozen)[0].flatten()[0], row)[0]
    assert torch.allclose(matrix.reshape(-1, row.numel())[0], first.flatten(), atol=1e-10)


@BOTH
def test_every_parameter_has_a_gradient(source: Source, inverse: bool) -> None:
    """After one backward of a log density no parameter is left out, and none is zero."""
    base = torch.distributions.Normal(torch.zeros(source.dim), 1.0)
    t = source.transform().inv if inverse else source.transform()
    q = torch.distributions.TransformedDistribution(base, [t])
    q.log_prob(torch.randn(4, *source.batch, source.dim)).sum().backward()
    for name, p in source.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        # In one dimension nothing lies below the diagonal, and nothing can be turned.
        idle = source.dim == 1 and name.endswith(("lower", "frame"))
        assert idle or (p.grad != 0).any(), name
