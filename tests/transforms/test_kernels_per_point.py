"""Parameters of each point's own: the layers in a row against the general path."""

from __future__ import annotations

import pytest
import torch
from cases import given_planar

from pyroflow.transforms.kernels import autograd, per_point, reference
from pyroflow.transforms.kernels.units import TANH, Units, constrain


@pytest.mark.parametrize("planar", [False, True], ids=["s", "no s"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("cached", [1, 50, 10**6])
@pytest.mark.parametrize(("N", "K", "D"), [(7, 4, 3), (5, 1, 2), (6, 6, 1), (3, 0, 2), (0, 2, 2)])
def test_in_chunks_of_any_size(
    N: int,
    K: int,
    D: int,
    cached: int,
    inverse: bool,
    planar: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With s as units that are û, without as planar layers by u, one of them of norm zero."""
    monkeypatch.setattr(per_point, "CACHED", cached)
    parts = given_planar(D, K, (N,), sd=1.5).parts
    w, u, b = (parts[name].detach() for name in ("w", "u", "b"))
    if planar and N and K:
        w[0, 0] = 0.0
    u_hat, s = constrain(w, u)
    units = Units(w, u, b, None) if planar else Units(w, u_hat, b, s)
    z, grad_image, grad_log_det = torch.randn(N, D), torch.randn(N, D), torch.randn(N)
    done = (per_point.inverse if inverse else per_point.forward)(z, units)
    leaves = [t.clone().requires_grad_() for t in (z, *units[:4]) if t is not None]
    made = Units(*leaves[1:], *[None] * planar)
    image, log_det, _ = reference.evaluate(leaves[0], made, inverse, None, TANH)
    assert torch.allclose(done.image, image, atol=1e-9)
    assert torch.allclose(done.log_det, log_det, atol=1e-9)
    total = (image * grad_image).sum() + (log_det * grad_log_det).sum()
    expected = torch.autograd.grad(total, leaves, materialize_grads=True, allow_unused=True)
    found = per_point.gradients(
        z, units, done, grad_image, grad_log_det, inverse=inverse, needs=(True, True)
    )
    assert (found[4] is None) == planar
    for one, other in zip(found[: 5 - planar], expected, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_only_the_gradients_that_are_wanted(inverse: bool) -> None:
    parts = given_planar(3, 4, (5,)).parts
    w, u, b = (parts[name].detach() for name in ("w", "u", "b"))
    u_hat, s = constrain(w, u)
    units, z = Units(w, u_hat, b, s), torch.randn(5, 3)
    done = (per_point.inverse if inverse else per_point.forward)(z, units)
    options = {"inverse": inverse, "needs": (True, False)}
    grads = per_point.gradients(z, units, done, z, None, **options)
    every = per_point.gradients(z, units, done, z, None, inverse=inverse, needs=(True, True))
    assert torch.allclose(grads[0], every[0], atol=1e-13)
    assert grads[1:] == (None, None, None, None)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("batch", [(1, 4), (1, 1, 4), (1, 2, 4)])
def test_serve_a_batch_with_a_dimension_of_one_sample(
    batch: tuple, inverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tuple(size for size in batch if size > 1)
    parts = given_planar(3, 5, own, sd=1.5).parts
    leaves = [parts[name].detach().requires_grad_() for name in ("w", "u", "b")]
    z = torch.randn(*batch, 3)

    def grads_at(z: torch.Tensor) -> tuple:
        units = Units(*leaves, None)
        image, found = autograd.evaluate_stack(z, units, inverse=inverse)
        assert image.shape == z.shape
        assert found.log_det.shape == z.shape[:-1]
        total = image.square().sum() + found.log_det.sin().sum()
        return image, *torch.autograd.grad(total, leaves)

    expected = grads_at(z.reshape(*own, 3))
    monkeypatch.setattr(reference, "evaluate", None)
    for found, right in zip(grads_at(z), expected, strict=True):
        assert torch.allclose(found.reshape(right.shape), right, atol=1e-12)
