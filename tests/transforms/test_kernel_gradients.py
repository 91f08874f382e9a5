"""Derivatives through the kernels' autograd function, where paths and orders meet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import planar_at, scatter
from test_kernels import BOTH, by_kernels, general, planar_units, sylvester_units
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

from pyroflow import Planar
from pyroflow.transforms import Conditioned
from pyroflow.transforms.kernels import autograd
from pyroflow.transforms.kernels.units import Units

Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {
    "image": lambda image, log_det: image.pow(3).sum(),
    "log_det": lambda image, log_det: log_det.square().sum(),
    "both": lambda image, log_det: image.square().sum() + (image[:, 0] * log_det).sum(),
}


def scaled_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether the largest difference is small beside the largest number."""
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1))


@BOTH
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("size", [1, 4])
def test_any_subset_of_inputs_and_outputs(
    size: int, wanted: tuple[int, ...], loss: str, inverse: bool
) -> None:
    """Of z, W, U and b only some require a gradient; the loss reads image, log-det or both."""
    units = planar_units(20, 4, 0.8) if size == 1 else sylvester_units(20, 4, 0.8, 4)
    z, answers = torch.randn(30, 4), []
    for path in (by_kernels, general):
        leaves = [
            t.detach().clone().requires_grad_(i in wanted) for i, t in enumerate((z, *units[:3]))
        ]
        value = LOSSES[loss](*path(leaves[0], Units(*leaves[1:], units.s, size), inverse))
        some = [leaves[i] for i in wanted]
        value.backward(inputs=some)
        assert all(t.grad is None for t in leaves if not t.requires_grad)
        answers.append([t.grad for t in some])
    for found, expected in zip(*answers, strict=True):
        assert scaled_close(found, expected, 1e-11)


def second_order(path: Callable, tensors: list[Tensor], size: int, inverse: bool) -> list[Tensor]:
    """The gradient of a sum of squares of first gradients."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    s = leaves[4] if len(leaves) > 4 else None
    image, log_det = path(leaves[0], Units(*leaves[1:4], s, size), inverse)
    value = LOSSES["both"](image, log_det)
    first = torch.autograd.grad(value, leaves, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))


@BOTH
@pytest.mark.parametrize("size", [1, 3])
def test_second_derivatives(size: int, inverse: bool) -> None:
    units = planar_units(18, 3, 0.6) if size == 1 else sylvester_units(18, 3, 0.6, 3)
    tensors = [t for t in (torch.randn(12, 3), *units[:4]) if t is not None]
    pairs = (second_order(path, tensors, size, inverse) for path in (by_kernels, general))
    for found, expected in zip(*pairs, strict=True):
        assert scaled_close(found, expected, 1e-9)


@BOTH
def test_hessians_by_differences(inverse: bool) -> None:
    """Central differences of first gradients, which the kernels find without the general path."""
    t, x = scatter(Planar(3, 20), 0.6), torch.randn(3)
    direction = t.inv if inverse else t

    def value(x: Tensor) -> Tensor:
        image = direction(x)
        return image.pow(2).sum() + direction.log_abs_det_jacobian(x, image)

    def slope(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(value(x), x)[0]

    matrix = hessian(value, x)
    for column, step in zip(matrix, 1e-6 * torch.eye(3), strict=True):
        difference = (slope(x + step) - slope(x - step)) / 2e-6
        assert scaled_close(difference, column, 1e-7)


# Inputs that meet again.


def twice(t: Conditioned, x: Tensor, inverse: bool) -> Tensor:
    """Images and log-determinants of t after t."""
    direction = t.inv if inverse else t
    middle = direction(x)
    end = direction(middle)
    log_det = direction.log_abs_det_jacobian(x, middle)
    return end.square().sum() + (log_det * direction.log_abs_det_jacobian(middle, end)).sum()


MEETINGS: dict[str, Callable[..., Tensor]] = {
    "a layer twice": lambda w, u, b, inverse: twice(
        planar_at(w, u, b), torch.linspace(-1, 1, 20).reshape(10, 2), inverse
    ),
    "an input made of w": lambda w, u, b, inverse: twice(
        planar_at(w, u, b), w.tanh() + b.unsqueeze(-1), inverse
    ),
    "w is u": lambda w, u, b, inverse: twice(planar_at(w, w, b), u, inverse),
    "w is x": lambda w, u, b, inverse: twice(planar_at(w, u, b), w, inverse),
    "x is w and u": lambda w, u, b, inverse: twice(planar_at(w, w, b), w, inverse),
}


@BOTH
@pytest.mark.parametrize("meeting", MEETINGS)
def test_paths_that_meet_are_counted_once(
    meeting: str, inverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First and second derivatives against the general path, where autograd does the counting."""
    units, answers = planar_units(4, 2, 0.7), []
    for plain in (True, False):
        if not plain:
            monkeypatch.setattr(autograd, "_plain", lambda z: False)
        leaves = [t.clone().requires_grad_() for t in units[:3]]
        value = MEETINGS[meeting](*leaves, inverse)
        options = {"allow_unused": True, "materialize_grads": True}
        first = torch.autograd.grad(value, leaves, create_graph=True, **options)
        again = torch.autograd.grad(value, leaves, retain_graph=True, **options)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, **options)
        answers.append([*first, *again, *second])
    for found, expected in zip(*answers, strict=True):
        assert scaled_close(found, expected, 1e-9)


@BOTH
def test_a_layer_used_twice_gets_the_sum_of_two_copies_gradients(inverse: bool) -> None:
    """With no derivative of the general path on either side."""
    t, x = scatter(Planar(3, 20), 0.6), torch.randn(10, 3)
    copies = [planar_at(*(p.detach().clone() for p in (t.w, t.u, t.b))) for _ in range(2)]
    leaves = [p.requires_grad_() for one in copies for p in (one.w, one.u, one.b)]

    def loss(first: Conditioned, second: Conditioned) -> Tensor:
        ways = [s.inv if inverse else s for s in (first, second)]
        middle = ways[0](x)
        end = ways[1](middle)
        log_det = ways[0].log_abs_det_jacobian(x, middle)
        return end.square().sum() + (log_det + ways[1].log_abs_det_jacobian(middle, end)).sum()

    found = torch.autograd.grad(loss(t, t), (t.w, t.u, t.b))
    apart = torch.autograd.grad(loss(*copies), leaves)
    for both, one, two in zip(found, apart[:3], apart[3:], strict=True):
        assert scaled_close(both, one + two, 1e-12)


# Ways to ask.


@BOTH
def test_vectorized_jacobians(inverse: bool) -> None:
    units, z = planar_units(20, 4, 0.8), torch.randn(5, 4)

    def images(z: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        return by_kernels(z, Units(W, *units[1:]), inverse)

    looped = jacobian(images, (z, units.W))
    vectorized = jacobian(images, (z, units.W), vectorize=True)
    for found, expected in zip(vectorized, looped, strict=True):
        for one, other in zip(found, expected, strict=True):
            assert scaled_close(one, other, 1e-11)


@BOTH
def test_backward_can_be_repeated(inverse: bool) -> None:
    """Scratch arrays are shared between backward passes; what they hold must not matter."""
    t, z = scatter(Planar(3, 20), 0.8), torch.randn(10, 3, requires_grad=True)
    direction = t.inv if inverse else t
    image = direction(z)
    log_det = direction.log_abs_det_jacobian(z, image)
    leaves = [z, *t.parameters()]
    together = torch.autograd.grad(image.sum() + log_det.sum(), leaves, retain_graph=True)
    for _ in range(2):
        parts = [torch.autograd.grad(v.sum(), leaves, retain_graph=True) for v in (image, log_det)]
        for both, one, two in zip(together, *parts, strict=True):
            assert scaled_close(one + two, both, 1e-12)


@BOTH
def test_gradients_that_are_expanded_or_strided(inverse: bool) -> None:
    units, z = planar_units(20, 4, 0.8), torch.randn(10, 4)
    leaves = [t.clone().requires_grad_() for t in (z, *units[:3])]
    outputs = by_kernels(leaves[0], Units(*leaves[1:], None), inverse)
    odd = torch.randn(4, 10).T, torch.randn(1).expand(10)
    plain = [g.contiguous() for g in odd]
    pairs = (torch.autograd.grad(outputs, leaves, g, retain_graph=True) for g in (odd, plain))
    for found, expected in zip(*pairs, strict=True):
        assert scaled_close(found, expected, 1e-13)


def test_an_edit_between_forward_and_backward_is_refused() -> None:
    """As autograd does; a gradient at values that are gone would be wrong."""
    for name in ("w", "u", "b"):
        t = scatter(Planar(3, 4), 0.8)
        loss = t(torch.randn(5, 3)).sum()
        with torch.no_grad():
            getattr(t, name).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    x = torch.randn(5, 3)
    loss = t(x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
