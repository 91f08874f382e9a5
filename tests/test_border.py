"""Where other code meets the transforms: autocast, edits in place, empty batches, memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from cases import CASES, layers
from torch import nn

import pyroflow as pf
from pyroflow.transforms import stack_kernels


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("name", [name for name in CASES if "context" not in name])
def test_autocast_leaves_the_digits_alone(name: str) -> None:
    source = CASES[name]().float()
    value = torch.randn(4, *source.batch, source.dim)
    expected = source(value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = source(value)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "make",
    [
        lambda: pf.ConditionalPlanar(4, 3, 2),
        lambda: pf.ConditionalRadial(4, 3, 2),
        lambda: pf.ConditionalSylvester(4, 3, 2, 2),
    ],
    ids=["planar", "radial", "sylvester"],
)
def test_no_context_no_rows(make: Callable[[], nn.Module]) -> None:
    t = make().condition(torch.randn(0, 3))
    y = t(torch.randn(0, 4))
    assert y.shape == t.inv(y.clone()).shape == (0, 4)
    assert t.log_abs_det_jacobian(torch.randn(0, 4), y).shape == (0,)


def test_a_sample_may_be_edited_in_place() -> None:
    t, x = layers(), torch.randn(5, 2)
    y = t(x)
    y += 1
    y.square().sum().backward()
    found = t.w.grad.clone()
    t.w.grad = None
    (t(x) + 1).square().sum().backward()
    assert torch.allclose(found, t.w.grad)


def test_backward_frees_what_it_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    made, push = [], stack_kernels.push

    def watched(*args: object) -> stack_kernels.Pass:
        done = push(*args)
        made.append(weakref.ref(done.pq))
        return done

    monkeypatch.setattr(stack_kernels, "push", watched)
    t = layers()
    y = t(torch.randn(5, 2))
    y.sum().backward()
    t(torch.zeros(1, 2))  # the cache holds this pair now
    gc.collect()
    assert [ref() is None for ref in made] == [True, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pf.ConditionalPlanar(2, 3, hidden_dims=64), "hidden_dims must be a sequence"),
        (lambda: pf.ConditionalPlanar(2, 3, hidden_dims="64"), "hidden_dims must be a sequence"),
        (
            lambda: pf.ConditionalPlanar(2, 3).condition(torch.zeros(5, 3).float()),
            r"context must be in the network's torch.float64, got torch.float32: convert it",
        ),
        (
            lambda: pf.ConditionalPlanar(2, 3).condition([1.0, 2.0, 3.0]),
            "context must be a tensor, got list",
        ),
        (
            lambda: pf.Flow(torch.distributions.Normal(torch.zeros(2), 1.0), pf.Planar(2)),
            "transforms must be a sequence, got a single transform",
        ),
    ],
)
def test_refusals(call: Callable, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
