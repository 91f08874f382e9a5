"""Conditional transforms whose parameters are linear in the context: hidden_dims=()."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import pyroflow as pf

EMPTY = {
    "planar": lambda: pf.ConditionalPlanar(3, 2, 4, hidden_dims=()),
    "radial": lambda: pf.ConditionalRadial(3, 2, 4, hidden_dims=()),
    "sylvester": lambda: pf.ConditionalSylvester(3, 2, 2, 2, hidden_dims=()),
}


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
    flow = pf.planar_flow(2, 3, context_dim=2, hidden_dims=())
    for p in flow.parameters():
        nn.init.normal_(p, std=0.3)
    pf.save(flow, tmp_path / "flow.pt")
    loaded = pf.load(tmp_path / "flow.pt")
    context, x = torch.randn(5, 2), torch.randn(5, 2)
    assert torch.equal(loaded(context).log_prob(x), flow(context).log_prob(x))
