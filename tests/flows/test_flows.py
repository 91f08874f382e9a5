"""Flows: parts of every kind, contexts, directions, copies, densities."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from cases import D, layers, log_prob_at, normal, scatter, wild
from pyro.distributions import transforms as pyro_transforms
from pyro.distributions.torch_transform import ComposeTransformModule
from torch import nn
from torch.distributions import ComposeTransform
from torch.distributions.transforms import _InverseTransform

from pyroflow import ConditionalPlanar, Flow, Planar, Radial, planar_flow, radial_flow
from pyroflow.flows import StandardNormal
from pyroflow.transforms import Affine, ConditionalRadial

MAKERS = pytest.mark.parametrize("make", [planar_flow, radial_flow])
DIRECTIONS = pytest.mark.parametrize("direction", ["base_to_data", "data_to_base"])


# Parts.


def test_mixed_parts_are_all_trained() -> None:
    """Ours, Pyro's and torch's, some turned round, against the Jacobian of their composition."""
    coupling = pyro_transforms.affine_coupling(D, hidden_dims=[4])
    shift = pyro_transforms.AffineTransform(torch.tensor([1.0, -1.0]), 2.0)
    flow = Flow(
        StandardNormal(D), [layers().inv, coupling, shift, layers(), coupling, Affine(D).inv]
    )
    q, x = flow(), torch.randn(5, D)
    push = ComposeTransform(flow.transforms())
    log_prob = q.log_prob(push(x).detach().clone())
    matrices = torch.stack([torch.autograd.functional.jacobian(push, row) for row in x])
    expected = -0.5 * x.square().sum(-1) - math.log(2 * math.pi)
    assert torch.allclose(log_prob, expected - torch.linalg.slogdet(matrices)[1], atol=1e-8)
    log_prob.sum().backward()
    names = {name for name, p in flow.named_parameters() if p.grad is not None}
    assert names == {name for name, _ in flow.named_parameters()}
    assert len(names) == 3 + 4 + 3 + 3
    assert q.event_shape == (D,)
    assert flow.input_dim == D
    assert not flow.conditional


COMPOSED: dict[str, Callable[[], object]] = {
    "torch's": lambda: ComposeTransform([Planar(D, 2), Affine(D)]),
    "torch's, turned": lambda: ComposeTransform([Planar(D, 2), Affine(D)]).inv,
    "nested": lambda: ComposeTransform([ComposeTransform([Planar(D, 2)]), Affine(D).inv]),
    "pyro's": lambda: ComposeTransformModule([Planar(D, 2), Affine(D)]),
    "pyro's, turned": lambda: ComposeTransformModule([Planar(D, 2), Affine(D)]).inv,
}


@pytest.mark.parametrize("name", COMPOSED)
def test_the_parameters_of_composed_parts_are_found(name: str) -> None:
    flow = Flow(StandardNormal(D), [COMPOSED[name]()])
    assert len(list(flow.parameters())) == 6
    data = torch.randn(5, D)
    assert torch.allclose(copy.deepcopy(flow)().log_prob(data), flow().log_prob(data), atol=1e-9)


def test_a_conditional_part_turned_round() -> None:
    flow = Flow(StandardNormal(D), [ConditionalPlanar(D, 3, 2, hidden_dims=(4,)).inv])
    assert flow.conditional
    assert len(list(flow.parameters())) == 3 + 2 * 2
    assert flow(torch.randn(4, 3)).sample().shape == (4, D)


def test_parts_that_are_no_transforms() -> None:
    with pytest.raises(TypeError, match="transforms must hold transforms, got Linear"):
        Flow(StandardNormal(D), [nn.Linear(D, D)])


def test_a_plain_distribution_as_base() -> None:
    """One with tails: a Student-t base stays one behind an identity."""
    base = dist.StudentT(torch.full((3,), 5.0)).to_event(1)
    flow, y = Flow(base, [Planar(3, 4)]), torch.randn(6, 3)
    assert flow.input_dim == 3
    assert torch.allclose(flow().log_prob(y), base.log_prob(y), atol=1e-10)
    assert flow().sample((4,)).shape == (4, 3)
    assert torch.allclose(copy.deepcopy(flow)().log_prob(y), base.log_prob(y), atol=1e-10)


def test_a_flow_without_transforms() -> None:
    log_prob = Flow(StandardNormal(2), [])().log_prob(torch.tensor([1.0, 2.0]))
    assert log_prob.item() == pytest.approx(-math.log(2 * math.pi) - 2.5)


# Contexts.


def test_context_errors() -> None:
    flow = planar_flow(D, 2, context_dim=3, hidden_dims=(4,))
    with pytest.raises(
        ValueError, match=r"this flow is conditional: call it with .* flow\(context\)"
    ):
        flow()
    with pytest.raises(ValueError, match=r"last dimension 3 \(context_dim\), got shape \(5, 2\)"):
        flow(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"got shape \(\)"):
        flow(torch.zeros(()))
    with pytest.raises(ValueError, match="no conditional transform: call it without a context"):
        planar_flow(D, 2)(torch.zeros(5, 3))


@DIRECTIONS
@pytest.mark.parametrize("batch", [(), (7,), (6, 5)], ids=str)
def test_conditional_flows_have_the_shape_of_the_context(direction: str, batch: tuple) -> None:
    flow = wild(planar_flow(D, 3, context_dim=3, direction=direction, hidden_dims=(4,)), 0.4)
    q = flow(torch.randn(*batch, 3))
    assert (q.batch_shape, q.event_shape) == (batch, (D,))
    assert q.sample().shape == (*batch, D)
    assert q.rsample((4,)).shape == (4, *batch, D)
    assert q.log_prob(torch.zeros(D)).shape == batch
    assert q.log_prob(torch.zeros(4, *batch, D)).shape == (4, *batch)


@DIRECTIONS
def test_rows_of_equal_contexts(direction: str) -> None:
    """One distribution, yet noise of their own; in stock Pyro all rows share one draw."""
    flow = wild(planar_flow(D, 3, context_dim=3, direction=direction, hidden_dims=(4,)), 0.4)
    context = torch.randn(3)
    q, one = flow(context.expand(500, 3)), flow(context)
    y = torch.randn(D)
    assert torch.allclose(q.log_prob(y), one.log_prob(y).expand(500), atol=1e-10)
    rows, draws = q.sample(), one.sample((4000,))
    assert len(rows.unique(dim=0)) == 500
    assert torch.allclose(rows.mean(0), draws.mean(0), atol=6 * draws.std().item() / math.sqrt(500))
    other = flow(context + 1.0)
    assert not torch.allclose(other.log_prob(y), one.log_prob(y))


@DIRECTIONS
def test_rows_of_contexts_are_distributions_of_their_own(direction: str) -> None:
    flow = wild(planar_flow(D, 3, context_dim=3, direction=direction, hidden_dims=(4,)), 0.4)
    context, y = torch.randn(7, 3), torch.randn(7, D)
    together = flow(context).log_prob(y)
    for i in range(7):
        assert torch.allclose(flow(context[i]).log_prob(y[i]), together[i], atol=1e-9)


def test_a_conditional_flow_without_weights_is_unconditional() -> None:
    """At the start the networks give zero: every context has the parts' own parameters."""
    flow = planar_flow(D, 3, context_dim=3, hidden_dims=(4,))
    plain = planar_flow(D, 3)
    with torch.no_grad():
        for own, other in zip(plain.parts, flow.parts, strict=True):
            inner = other.planar if isinstance(other, ConditionalPlanar) else other.affine
            scatter(own, 0.8)
            inner.load_state_dict(own.state_dict())
    y = torch.randn(7, D)
    assert torch.allclose(flow(torch.randn(7, 3)).log_prob(y), plain().log_prob(y), atol=1e-10)


# Options and directions of planar_flow and its sisters.


@MAKERS
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_dim": 0}, "input_dim must be an integer of at least 1, got 0"),
        ({"input_dim": 2.0}, "input_dim must be an integer of at least 1, got 2.0"),
        ({"num_layers": -1}, "num_layers must be an integer of at least 0, got -1"),
        ({"num_layers": True}, "num_layers must be an integer of at least 0, got True"),
        ({"context_dim": 0}, "context_dim must be an integer of at least 1, got 0"),
        ({"direction": "up"}, "'auto', 'base_to_data', 'data_to_base'; got 'up'"),
        ({"affine": "banded"}, "affine must be one of 'full', 'diagonal', None; got 'banded'"),
        ({"context_dim": 2, "hidden_dims": (0,)}, "hidden_dims must be an integer of at least 1"),
    ],
)
def test_options(make: Callable, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**{"input_dim": 2} | options)


@MAKERS
@pytest.mark.parametrize("affine", ["full", "diagonal", None])
@pytest.mark.parametrize("num_layers", [0, 5])
@pytest.mark.parametrize("context", [None, 3])
def test_every_flow_starts_as_the_standard_normal(
    make: Callable, affine: str | None, num_layers: int, context: int | None
) -> None:
    flow = make(3, num_layers, context, affine=affine)
    q = flow() if context is None else flow(torch.randn(4, 3))
    y = torch.randn(4, 3)
    expected = -0.5 * y.square().sum(-1) - 1.5 * math.log(2 * math.pi)
    assert torch.allclose(q.log_prob(y), expected, atol=1e-10)


def test_affine_that_runs_backwards_is_not_set_to_the_data() -> None:
    data = 5 + 0.1 * torch.randn(500, 2)
    flow = Flow(StandardNormal(2), [Planar(2, 3), Affine(2).inv])
    before = flow().log_prob(data)
    flow.initialize(data)
    assert torch.allclose(flow().log_prob(data), before)


@pytest.mark.parametrize("context", [None, 3])
def test_radial_flows_hold_radial_layers(context: int | None) -> None:
    flow = radial_flow(D, 5, context, affine="diagonal")
    layers, affine = flow.parts
    assert type(layers) is (Radial if context is None else ConditionalRadial)
    assert getattr(layers, "radial", layers).x0.shape == (5, D)
    assert getattr(affine, "affine", affine).diagonal
    assert len(radial_flow(D, 5, context, affine=None).parts) == 1
    assert flow.conditional == (context is not None)


@MAKERS
@DIRECTIONS
@pytest.mark.parametrize("context", [None, 3])
def test_initialize_draws_and_turns_layers_of_every_kind(
    make: Callable, direction: str, context: int | None
) -> None:
    flow, y = make(D, 3, context, affine=None), torch.randn(4, D)
    contexts = () if context is None else (torch.randn(4, context),)
    before = next(flow.parameters()).clone()
    flow.initialize(*([torch.randn(50, D)] if direction == "data_to_base" else []))
    assert not torch.equal(next(flow.parameters()), before)
    assert torch.allclose(flow(*contexts).log_prob(y), normal().log_prob(y), atol=1e-10)
    (layer,) = flow.transforms(*contexts)
    assert isinstance(layer, _InverseTransform) == (direction == "data_to_base")


def test_a_radial_flow_is_one_density_in_either_direction() -> None:
    """The same layers turned round: samples of one are scored as the formula says."""
    for direction in ("base_to_data", "data_to_base"):
        flow = wild(radial_flow(D, 4, direction=direction, affine=None), 0.7)
        t, x = flow.parts[0], torch.randn(6, D)
        push = t if direction == "base_to_data" else t.inv
        y = push(x).detach().clone()
        assert torch.allclose(flow().log_prob(y), log_prob_at(push, x), atol=1e-9)


# The distribution of a flow.


def chain_of_all() -> list:
    """Layers both ways, an affine layer, and others' transforms with and without an event."""
    coupling = pyro_transforms.affine_coupling(D, hidden_dims=[4])
    return [
        layers(),
        torch.distributions.AffineTransform(1.0, 2.0),
        Radial(D, 2).inv,
        coupling,
        scatter(Affine(D), 0.5).inv,
        layers().inv,
    ]


@pytest.mark.parametrize("seed", range(3))
def test_scores_and_gradients_are_those_of_torchs_distribution(seed: int) -> None:
    """To the last bit, for data and for samples."""
    torch.manual_seed(seed)
    flow = Flow(StandardNormal(D), chain_of_all())
    plain = dist.TransformedDistribution(flow.base(), flow.transforms())
    for y in (torch.randn(5, D), torch.randn(3, 4, D), flow().rsample((5,)), torch.zeros(D)):
        found, expected = flow().log_prob(y), plain.log_prob(y.clone())
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    y = torch.randn(5, D)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    results = [torch.autograd.grad(q.log_prob(y).sum(), parameters) for q in (flow(), plain)]
    assert all(torch.allclose(p, q, rtol=1e-11, atol=1e-11) for p, q in zip(*results, strict=True))


def test_a_flow_is_expanded_and_validates_like_any_distribution() -> None:
    q = wild(planar_flow(D, 3), 0.5)()
    y = torch.randn(4, D)
    assert torch.equal(q.expand([4]).log_prob(y), q.log_prob(y))
    with pytest.raises(ValueError, match="Expected value argument"):
        q.log_prob(torch.full((4, D), torch.nan))
