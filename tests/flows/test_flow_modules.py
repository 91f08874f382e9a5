"""Flows as modules: directions, copies, dtypes, and densities that integrate to one."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from cases import D, saved, wild
from torch import Tensor

from pyroflow import Flow, Planar, planar_flow
from pyroflow.flows import StandardNormal
from pyroflow.transforms import Affine

DIRECTIONS = pytest.mark.parametrize("direction", ["base_to_data", "data_to_base"])


def copied_by_state(flow: Flow) -> Flow:
    twin = wild(planar_flow(D, 3))
    twin.load_state_dict(flow.state_dict())
    return twin


def saved_state(flow: Flow) -> Flow:
    """Through a file, with torch's safe loader: the extra state must be plain data."""
    buffer = io.BytesIO()
    torch.save(flow.state_dict(), buffer)
    buffer.seek(0)
    twin = wild(planar_flow(D, 3))
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    return twin


COPIES: dict[str, Callable[[Flow], Flow]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda flow: pickle.loads(pickle.dumps(flow)),
    "save": saved,
    "state dict": copied_by_state,
    "saved state dict": saved_state,
}


# Copies.


@DIRECTIONS
@pytest.mark.parametrize("how", COPIES)
def test_copies_keep_the_direction(direction: str, how: str) -> None:
    flow = wild(planar_flow(D, 3, direction=direction))
    flow.fitted = True
    y = flow().rsample((5,))
    flow().log_prob(y).sum().backward()
    data = y.detach().clone()
    twin, expected = COPIES[how](flow), flow().log_prob(data).detach()
    assert torch.allclose(twin().log_prob(data), expected, atol=1e-10)
    assert twin.fitted
    assert [t is part for t, part in zip(twin.transforms(), twin.parts, strict=True)] == [
        direction == "base_to_data",
        True,
    ]
    other = copy.deepcopy(twin)
    with torch.no_grad():
        for p in flow.parameters():
            p += 1.0
    assert torch.allclose(twin().log_prob(data), expected, atol=1e-10)
    assert torch.allclose(other().log_prob(data), expected, atol=1e-10)
    assert not torch.allclose(flow().log_prob(data), expected)


def test_copies_of_an_undecided_flow_are_undecided() -> None:
    flow = planar_flow(D, 3)
    for how in COPIES.values():
        twin = how(flow)
        assert not twin.fitted
        twin.initialize()
        assert twin.transforms()[0] is twin.parts[0]
    assert not flow.fitted


def test_copies_of_mixed_flows_keep_each_direction() -> None:
    parts = [Planar(D, 2).inv, Affine(D), Planar(D, 2), Affine(D, "diagonal").inv]
    flow = wild(Flow(StandardNormal(D), parts))
    data = flow().sample((5,))
    expected = flow().log_prob(data.clone())
    for how in ("deepcopy", "pickle", "save"):
        assert torch.allclose(COPIES[how](flow)().log_prob(data), expected, atol=1e-9)


# Dtypes.


@DIRECTIONS
@pytest.mark.parametrize("context", [None, 3])
def test_double_and_float(direction: str, context: int | None) -> None:
    torch.set_default_dtype(torch.float32)
    flow = wild(planar_flow(D, 3, context, direction=direction, hidden_dims=(4,)), 0.5)
    torch.set_default_dtype(torch.float64)
    single = torch.randn(5, context or 1, dtype=torch.float32)
    data = torch.randn(5, D, dtype=torch.float32)
    low = (flow() if context is None else flow(single)).log_prob(data)
    assert low.dtype == torch.float32
    flow.double()
    q = flow() if context is None else flow(single.double())
    assert q.sample().dtype == torch.float64
    assert torch.allclose(q.log_prob(data.double()), low.double(), atol=1e-4)
    with pytest.raises(ValueError, match=r"torch.float64 parameters, got . in torch.float32"):
        q.log_prob(data)


# Sampling and scoring agree.


@DIRECTIONS
@pytest.mark.parametrize("affine", ["full", None])
def test_densities_integrate_to_one(direction: str, affine: str | None) -> None:
    flow = planar_flow(D, 8, direction=direction, affine=affine)
    with torch.no_grad():
        flow.parts[0].w.normal_()
        flow.parts[0].b.normal_()
        flow.parts[0].u.normal_(std=0.7)
        q = flow()
        y = q.sample((20_000,))
        low, high = y.amin(0), y.amax(0)
        low, high = low - 0.3 * (high - low), high + 0.3 * (high - low)
        cell, n = (high - low) / 400, torch.arange(400) + 0.5
        points = torch.cartesian_prod(low[0] + cell[0] * n, low[1] + cell[1] * n)
        mass = sum(q.log_prob(part).exp().sum() for part in points.split(40_000)) * cell.prod()
    assert mass.item() == pytest.approx(1.0, abs=1e-3)


def cell_counts(y: Tensor, edges: list[Tensor]) -> Tensor:
    cells = [torch.bucketize(column.contiguous(), e) for column, e in zip(y.T, edges, strict=True)]
    side = len(edges[0]) + 1
    return torch.bincount(side * cells[0] + cells[1], minlength=side * side).reshape(side, side)


@DIRECTIONS
def test_samples_follow_the_density(direction: str) -> None:
    """Counts in 36 cells against the integral of exp(log_prob); false alarm 1e-5."""
    flow = planar_flow(D, 4, direction=direction)
    with torch.no_grad():
        flow.parts[0].u.normal_(std=0.7)
        q, n = flow(), 20_000
        y = q.sample((n,))
        low, high = y.amin(0) - 1, y.amax(0) + 1
        cell, m = (high - low) / 420, torch.arange(420) + 0.5
        axes = [low[i] + cell[i] * m for i in (0, 1)]
        mass = q.log_prob(torch.cartesian_prod(*axes)).exp() * cell.prod()
        mass = mass.reshape(6, 70, 6, 70).sum((1, 3))
        edges = [low[i] + (high - low)[i] * torch.arange(1, 6) / 6 for i in (0, 1)]
        counts = cell_counts(y, edges)
        used = mass * n > 20
        chi2 = ((counts - mass * n).square() / (mass * n))[used].sum()
    degrees = int(used.sum())
    assert degrees >= 6
    assert chi2 <= degrees + 4.3 * math.sqrt(2 * degrees) + 12


@DIRECTIONS
def test_mean_log_density_is_minus_the_entropy(direction: str) -> None:
    """Also through the transforms: H = H(base) + E log |det|, with the base's draws known."""
    flow = wild(planar_flow(D, 4, direction=direction), 0.5)
    with torch.no_grad():
        x = torch.randn(20_000, D)
        y, log_det = x, 0.0
        for t in flow.transforms():
            image = t(y)
            log_det = log_det + t.log_abs_det_jacobian(y, image)
            y = image
        entropy = 1 + math.log(2 * math.pi) + log_det.mean()
        fresh = flow().sample((20_000,))
        log_prob = flow().log_prob(fresh.clone())
        error = (log_prob.var() / 20_000 + log_det.var() / 20_000).sqrt()
        assert (log_prob.mean() + entropy).abs() <= 5 * error
