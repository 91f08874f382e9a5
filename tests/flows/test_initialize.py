"""A flow before its first fit: what is new is set up, and what was trained is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import D, scatter, wild
from pyro.distributions import transforms as pyro_transforms
from torch import Tensor

from pyroflow import (
    AutoPlanarFlow,
    Flow,
    Planar,
    fit_density,
    fit_energy,
    fit_guide,
    planar_flow,
    radial_flow,
    sylvester_flow,
)
from pyroflow.flows import StandardNormal
from pyroflow.targets import eight_schools_noncentered, energy
from pyroflow.transforms import Affine, Radial


def test_an_open_direction_is_decided_once() -> None:
    """The layers are redrawn as the identity, and the affine layer takes the data's moments."""
    flow = planar_flow(D, 3)
    data = torch.randn(500, D) @ torch.tensor([[2.0, 0.0], [1.0, 0.5]]) + torch.tensor([3.0, -4.0])
    flow.initialize(data)
    assert flow.fitted
    centred = data - data.mean(0)
    covariance = centred.T @ centred / 499
    expected = torch.distributions.MultivariateNormal(data.mean(0), covariance).log_prob(data)
    assert torch.allclose(flow().log_prob(data), expected, atol=1e-9)
    assert flow.transforms()[0] is flow.parts[0].inv
    kept = [p.clone() for p in flow.parameters()]
    flow.initialize()
    flow.initialize(10 * data)
    assert all(torch.equal(p, q) for p, q in zip(flow.parameters(), kept, strict=True))
    assert flow.transforms()[0] is flow.parts[0].inv


@pytest.mark.parametrize(
    ("asked", "with_data", "inverted"),
    [
        ("auto", False, False),
        ("auto", True, True),
        ("base_to_data", True, False),
        ("data_to_base", False, True),
    ],
)
def test_a_chosen_direction_stays(asked: str, with_data: bool, inverted: bool) -> None:
    flow = planar_flow(D, 3, direction=asked)
    flow.initialize(*([torch.randn(50, D)] if with_data else []))
    first = flow.transforms()[0]
    assert (first is flow.parts[0].inv) == inverted
    assert (first is flow.parts[0]) != inverted


@pytest.mark.parametrize("context", [None, 3])
def test_without_data_keeps_the_affine_layer(context: int | None) -> None:
    flow = planar_flow(D, 3, context, affine="diagonal", hidden_dims=(4,))
    affine = flow.parts[1] if context is None else flow.parts[1].affine
    with torch.no_grad():
        affine.offset.copy_(torch.tensor([1.0, 2.0]))
    flow.initialize()
    q = flow() if context is None else flow(torch.randn(4, context))
    expected = (
        torch.distributions.Normal(torch.tensor([1.0, 2.0]), 1.0).log_prob(torch.zeros(D)).sum()
    )
    assert torch.allclose(q.log_prob(torch.zeros(D)), expected, atol=1e-10)


def test_a_conditional_flow_is_initialized_for_every_context() -> None:
    flow = planar_flow(D, 3, context_dim=3, hidden_dims=(4,))
    data = 5 + 2 * torch.randn(500, D)
    flow.initialize(data)
    covariance = torch.cov(data.T)
    expected = torch.distributions.MultivariateNormal(data.mean(0), covariance).log_prob(data[:7])
    assert torch.allclose(flow(torch.randn(7, 3)).log_prob(data[:7]), expected, atol=1e-9)


def test_initializing_is_reproducible_from_a_seed() -> None:
    flows = [planar_flow(D, 3), planar_flow(D, 3)]
    for flow in flows:
        torch.manual_seed(7)
        flow.initialize()
    for p, q in zip(flows[0].parameters(), flows[1].parameters(), strict=True):
        assert torch.equal(p, q)


def by_one_step(flow: Flow) -> Flow:
    """Trained by hand, as short as can be."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    context = (torch.randn(50, 3),) if flow.conditional else ()
    (-flow(*context).log_prob(torch.randn(50, D) + 1)).mean().backward()
    optimizer.step()
    return flow


@torch.no_grad()
def in_one_layer(flow: Flow) -> Flow:
    """One number of one layer moved."""
    moved = list(flow.parts[0].parameters())[-1 if flow.conditional else 1]
    (moved if flow.conditional else moved[0]).add_(0.3)
    return flow


@torch.no_grad()
def in_the_affine_layer(flow: Flow) -> Flow:
    part = flow.parts[1]
    getattr(part, "affine", part).offset += 0.5
    return flow


def beside_a_frozen_affine_layer(flow: Flow) -> Flow:
    flow.parts[1].requires_grad_(False)
    scatter(flow.parts[0], 0.8)
    return flow


def by_an_older_state(flow: Flow) -> Flow:
    """One that has tensors alone."""
    state = wild(copy.deepcopy(flow)).state_dict()
    del state["_extra_state"]
    flow.load_state_dict(state, strict=False)
    return flow


def by_a_state(flow: Flow) -> Flow:
    flow.load_state_dict(wild(copy.deepcopy(flow)).state_dict())
    return flow


MOVES = [
    wild,
    by_one_step,
    in_one_layer,
    in_the_affine_layer,
    beside_a_frozen_affine_layer,
    by_an_older_state,
    by_a_state,
]
FAMILIES: dict[str, Callable[..., Flow]] = {
    "planar": lambda **options: planar_flow(D, 3, **options),
    "leaky": lambda **options: planar_flow(D, 3, nonlinearity="leaky_relu", **options),
    "radial": lambda **options: radial_flow(D, 3, **options),
    "sylvester": lambda **options: sylvester_flow(D, 2, 3, **options),
    "conditional": lambda **options: planar_flow(D, 3, 3, hidden_dims=(4,), **options),
    "conditional sylvester": lambda **options: sylvester_flow(D, 1, 2, 3, **options),
}


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("asked", ["auto", "base_to_data"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("move", MOVES)
def test_a_flow_that_has_moved_goes_on_from_where_it_is(
    move: Callable, family: str, asked: str, with_data: bool
) -> None:
    """However it was moved: the density is the same before and after, in every direction."""
    flow = move(FAMILIES[family](direction=asked))
    y = torch.randn(6, D)
    context = (torch.randn(6, 3),) if flow.conditional else ()
    before = flow(*context).log_prob(y)
    assert not flow.fitted
    flow.initialize(*([5 + 3 * torch.randn(500, D)] if with_data else []))
    assert flow.fitted
    assert torch.allclose(flow(*context).log_prob(y), before, atol=1e-5)
    flow.initialize(50 + 3 * torch.randn(500, D))
    assert torch.allclose(flow(*context).log_prob(y), before, atol=1e-5)


@pytest.mark.parametrize("make", [Flow.double, Flow.float], ids=["double", "float"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("float32")
def test_what_rounding_moves_is_drawn_anew(family: str, make: Callable) -> None:
    """Layers that were drawn in float32 are the identity up to its rounding, in float64 too."""
    flow = make(FAMILIES[family]())
    before = [p.clone() for p in flow.parts[0].parameters()]
    data = (5 + 3 * torch.randn(500, D)).to(before[0])
    flow.initialize(data)
    drawn = [not torch.equal(p, q) for p, q in zip(flow.parts[0].parameters(), before, strict=True)]
    assert any(drawn)
    affine = getattr(flow.parts[1], "affine", flow.parts[1])
    assert torch.allclose(affine.centre, data.mean(0))


def test_frozen_layers_are_not_drawn_anew() -> None:
    flow = planar_flow(D, 3)
    flow.parts[0].requires_grad_(False)
    before = copy.deepcopy(flow.parts[0].state_dict())
    flow.initialize(5 + torch.randn(500, D))
    assert all(torch.equal(flow.parts[0].state_dict()[k], v) for k, v in before.items())
    assert flow.parts[1].centre.min() > 4


def test_moved_layers_beside_transforms_of_others() -> None:
    coupling = pyro_transforms.affine_coupling(D, hidden_dims=[4])
    flow = Flow(StandardNormal(D), [Planar(D, 2), coupling, Affine(D)])
    y, placed = torch.randn(6, D), copy.deepcopy(flow)
    placed.initialize(5 + torch.randn(500, D))
    assert placed.parts[-1].centre.min() > 4
    scatter(flow.parts[0], 0.8)
    before = flow().log_prob(y)
    flow.initialize(5 + torch.randn(500, D))
    assert torch.equal(flow().log_prob(y), before)


# The direction that a flow is given.


@pytest.mark.parametrize("direction", [None, "auto", "base_to_data", "data_to_base"])
def test_the_direction_is_that_of_the_layers_alone(direction: str | None) -> None:
    coupling = pyro_transforms.affine_coupling(D, hidden_dims=[4])
    flow = Flow(StandardNormal(D), [Planar(D, 2), coupling, Radial(D).inv, Affine(D)], direction)
    turned = direction in ("auto", "data_to_base")
    expected = [turned, False, True if direction is None else turned, False]
    assert [inverted for _, inverted in flow.steps] == expected
    assert [t for t, _ in flow.steps] == list(flow.parts)
    flow.initialize()
    later = expected if direction != "auto" else [False] * 4
    assert [inverted for _, inverted in flow.steps] == later


def test_an_unknown_direction_is_refused() -> None:
    with pytest.raises(ValueError, match="direction must be one of 'auto', .* got 'up'"):
        Flow(StandardNormal(D), [Planar(D)], "up")


def test_every_fit_says_that_it_has_fitted() -> None:
    """Of flows, and of the flow of a guide by either way of fitting it."""

    def subsampled(data: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("rows", 3, subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=data[rows])

    options = {"steps": 3, "seed": 0, "progress": False}
    flow = planar_flow(D, 2)
    fit_density(flow, torch.randn(60, D), **options)
    other = planar_flow(D, 2)
    fit_energy(other, energy(1), **options)
    for program, args in ((eight_schools_noncentered, ()), (subsampled, (torch.zeros(3),))):
        guide = AutoPlanarFlow(program, 2)
        guide(*args)
        assert not guide.flow.fitted
        fit_guide(program, guide, args=args, **options)
        assert guide.flow.fitted
    assert flow.fitted
    assert other.fitted
