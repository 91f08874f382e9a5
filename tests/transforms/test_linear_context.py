"""Conditional transforms whose parameters are linear in the context: hidden_dims=()."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import pyroflow as pf
from pyroflow.flows import StandardNormal

EMPTY = {
    "planar": lambda: pf.ConditionalPlanar(3, 2, 4, hidden_dims=()),
    "radial": lambda: pf.ConditionalRadial(3, 2, 4, hidden_dims=()),
    "sylvester": lambda: pf.ConditionalSylvester(3, 2, 2, 2, hidden_dims=()),
}


C = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("make", EMPTY.values(), ids=EMPTY)
def test_parameters_are_linear_in_the_context(make: Callable) -> None:
    t = make()
    start = [p.detach() for p in t.condition(torch.zeros(2))._map_parameters()]
    for p in t.nn.parameters():
        nn.init.normal_(p)
    at = {c: t.condition(torch.tensor(c))._map_parameters() for c in [(0.0, 0.0), (1.0, -2.0)]}
    there = t.condition(torch.tensor([0.5, -1.0]))._map_parameters()
    for before, zero, end, middle in zip(start, *at.values(), there, strict=True):
        assert torch.allclose(middle, (zero + end) / 2)
        assert middle.shape == before.shape
    assert not torch.allclose(at[0.0, 0.0][0], at[1.0, -2.0][0])


def test_a_linear_map_is_one_layer_whose_rows_are_the_parameters() -> None:
    t = pf.ConditionalPlanar(3, 2, 4, hidden_dims=())
    assert [tuple(p.shape) for p in t.nn.parameters()] == [(4 * (3 + 3 + 1), 2), (28,)]
    with torch.no_grad():
        t.nn.nn.weight[12, 1] = 7.0  # the first of u, after the 12 of w
    moved = t.condition(torch.tensor([0.0, 1.0]))
    assert torch.allclose(moved.u[0, 0], t.planar.u[0, 0] + 7.0)
    assert torch.equal(moved.w, t.planar.w)


def test_refuses_a_context_in_another_dtype() -> None:
    with pytest.raises(ValueError, match="context must be in the network's torch.float64"):
        pf.ConditionalPlanar(3, 2, hidden_dims=()).condition(torch.zeros(2, dtype=torch.float32))


def test_saves_and_loads(tmp_path: Path) -> None:
    layers = pf.ConditionalPlanar(2, 2, 3, hidden_dims=(), bound=0.5)
    flow = pf.Flow(StandardNormal(2), [layers.inv, pf.ConditionalAffine(2, 2, hidden_dims=())])
    for p in flow.parameters():
        nn.init.normal_(p, std=0.3)
    pf.save(flow, tmp_path / "flow.pt")
    loaded = pf.load(tmp_path / "flow.pt")
    context, x = torch.randn(5, 2), torch.randn(5, 2)
    assert torch.equal(loaded(context).log_prob(x), flow(context).log_prob(x))


BOUNDED = {
    "planar": lambda c: pf.ConditionalPlanar(3, 2, 4, hidden_dims=(), bound=c),
    "radial": lambda c: pf.ConditionalRadial(3, 2, 4, hidden_dims=(), bound=c),
    "sinh-arcsinh": lambda c: pf.ConditionalSinhArcsinh(3, 2, hidden_dims=(5,), bound=c),
    "sylvester": lambda c: pf.ConditionalSylvester(3, 2, 2, 2, hidden_dims=(), bound=c),
    "affine": lambda c: pf.ConditionalAffine(3, 2, hidden_dims=(), bound=c),
}


@pytest.mark.parametrize("make", BOUNDED.values(), ids=BOUNDED)
def test_a_bound_holds_at_any_context_and_spares_small_outputs(make: Callable) -> None:
    torch.manual_seed(0)
    t, free = make(1.5), make(None)
    for p in t.nn.parameters():
        nn.init.normal_(p)
    free.load_state_dict(t.state_dict())
    for size in (1e-3, 1.0, 1e8):
        found, added = [m.nn(size * C, [0.0 * p for p in m.start.trained()]) for m in (t, free)]
        for bounded, plain, start in zip(found, added, t.start.trained(), strict=True):
            rows = start.dim() > 1
            length = plain.norm(dim=-1, keepdim=True) if rows else plain.abs()
            assert torch.allclose(bounded, plain / (1 + (length / 1.5) ** 2).sqrt(), rtol=1e-4)
            assert (bounded.norm(dim=-1) if rows else bounded.abs()).max() <= 1.5 * (1 + 1e-6)
    x = torch.randn(5, 3)
    at = t.condition(1e8 * C)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda x, c: t.condition(c)(x)))(x, 1e8 * C)
    log_det = torch.linalg.slogdet(jacobians.double()).logabsdet
    assert torch.allclose(at.log_abs_det_jacobian(x, at(x)).double(), log_det, atol=1e-4)
    assert torch.allclose(at.inv(at(x).clone()), x, atol=1e-3)
    assert not torch.allclose(free.condition(1e8 * C)(x), x, atol=1e3)


def test_a_bound_keeps_the_start_and_has_gradients_there() -> None:
    t = pf.ConditionalPlanar(3, 2, 4, bound=1.0)
    at = t.condition(C)
    assert torch.allclose(at(torch.zeros(5, 3)), torch.zeros(5, 3), atol=1e-6)
    at(torch.ones(5, 3)).sum().backward()
    last = t.nn.nn.layers[-1].weight.grad
    assert last.isfinite().all()
    assert last.any()
    for bound in (0, -1.0, float("inf"), "small"):
        with pytest.raises(ValueError, match="bound must be a finite number above 0"):
            pf.ConditionalPlanar(3, 2, bound=bound)
