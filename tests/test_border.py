"""Where other code meets the transforms: half precision, autocast, edits in place, memory."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from cases import CASES, layers, scatter
from torch import nn

import pyroflow as pf
from pyroflow.targets import eight_schools_noncentered as eight_schools
from pyroflow.transforms.kernels import shared


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


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@HALVES
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("name", [name for name in CASES if "context" not in name])
def test_half_precision_is_right_to_its_rounding(
    name: str, inverse: bool, dtype: torch.dtype
) -> None:
    """Against float64 at the same rounded parameters: each result is rounded once."""
    source = CASES[name]().to(dtype)
    wide = copy.deepcopy(source).double()
    value = torch.randn(9, *source.batch, source.dim).to(dtype)
    found, expected = source(value, inverse), wide(value.double(), inverse)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert torch.allclose(one.double(), other, rtol=torch.finfo(dtype).eps, atol=2e-4)
    gradients = torch.autograd.grad(found[0].float().sum(), list(source.parameters()))
    precise = torch.autograd.grad(expected[0].sum(), list(wide.parameters()))
    for one, other in zip(gradients, precise, strict=True):
        assert one.dtype == dtype
        assert torch.allclose(one.double(), other.to(dtype).double(), rtol=0.01, atol=0.01)


@HALVES
@pytest.mark.usefixtures("float32")
def test_fits_in_half_precision_are_refused(dtype: torch.dtype) -> None:
    flow = pf.planar_flow(2, 4).to(dtype)
    message = rf"Flow must be in float32 or float64 to be fitted, got {dtype} in 'parts\.0\.w'"
    with pytest.raises(ValueError, match=message):
        pf.fit_density(flow, torch.randn(50, 2), seed=0, progress=False)
    with pytest.raises(ValueError, match=message):
        pf.fit_energy(flow, pf.targets.energy(1), seed=0, progress=False)
    guide = pf.AutoPlanarFlow(eight_schools, 2).setup().to(dtype)
    with pytest.raises(ValueError, match=r"AutoPlanarFlow must be in float32 or float64"):
        pf.fit_guide(eight_schools, guide, seed=0, progress=False)


@HALVES
@pytest.mark.parametrize(
    "make",
    [
        lambda: pf.ConditionalPlanar(4, 3, 2),
        lambda: pf.ConditionalPlanar(4, 3, 2, nonlinearity="leaky_relu"),
        lambda: pf.ConditionalRadial(4, 3, 2),
        lambda: pf.ConditionalSylvester(4, 3, 2, 2, "qr"),
        lambda: pf.ConditionalAffine(4, 3),
    ],
    ids=["planar", "leaky", "radial", "sylvester", "affine"],
)
def test_half_precision_of_conditional_flows(make: Callable, dtype: torch.dtype) -> None:
    """The network rounds as well, at every weight: a few times in all."""
    context, y = torch.randn(50, 3).to(dtype), torch.randn(50, 4).to(dtype)
    flow = pf.Flow(pf.flows.StandardNormal(4), [scatter(make(), 0.3)]).to(dtype)
    wide = copy.deepcopy(flow).double()
    found = flow(context).log_prob(y)
    expected = wide(context.double()).log_prob(y.double())
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0.05)


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
    made, push = [], shared.forward

    def watched(*args: object) -> shared.Pass:
        done = push(*args)
        made.append(weakref.ref(done.pq))
        return done

    monkeypatch.setattr(shared, "forward", watched)
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
