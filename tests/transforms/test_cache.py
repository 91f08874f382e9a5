"""The pair cache: a transform's own samples cost no root search, and nothing is ever stale."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from cases import D, layers, log_prob_at, normal, planar_at, scatter
from pyro.distributions import transforms as pyro_transforms
from torch import Tensor, nn
from torch.distributions import transforms as torch_transforms
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pyroflow.flows import Flow, StandardNormal
from pyroflow.transforms import Affine, ConditionalPlanar, Planar
from pyroflow.transforms.kernels.units import LeakyReLU


def step(t: nn.Module, loss: Tensor) -> None:
    optimiser = torch.optim.SGD(t.parameters(), lr=0.05)
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()


# Scores of tensors that the transform has or has not made.


@pytest.mark.parametrize("inverted", [False, True], ids=["layers", "inverse"])
def test_scores_of_tensors_that_it_has_and_has_not_made(inverted: bool) -> None:
    t = layers().inv if inverted else layers()
    q = dist.TransformedDistribution(normal(), [t])
    x = torch.randn(5, D)
    expected = log_prob_at(t, x)
    first = t(x)
    tensors = [first, first.clone(), first.detach(), torch.tensor(first.tolist())]
    second = t(torch.randn(5, D))  # from here on `first` is not the last sample
    assert not torch.allclose(q.log_prob(second), expected)
    for y in (*tensors, *tensors):
        assert torch.allclose(q.log_prob(y), expected, atol=1e-9)
    assert torch.allclose(q.log_prob(first[1]), expected[1], atol=1e-9)
    assert torch.allclose(q.log_prob(first[1:3]), expected[1:3], atol=1e-9)
    assert torch.allclose(t.inv(first[:, None])[:, 0], x, atol=1e-8)


# Samples are scored without a root search.

CHAINS: dict[str, Callable[[], list]] = {
    "planar": lambda: [layers()],
    "two planar": lambda: [layers(), layers(5)],
    "planar, affine": lambda: [layers(), scatter(Affine(D), 1.0)],
    "affine, planar": lambda: [scatter(Affine(D, "diagonal"), 1.0), layers()],
    "planar, torch's": lambda: [
        layers(),
        torch_transforms.AffineTransform(1.0, 2.0, cache_size=1),
        layers(),
        torch_transforms.SigmoidTransform(cache_size=1),
    ],
    "planar, pyro's": lambda: [
        layers(),
        pyro_transforms.affine_coupling(D, hidden_dims=[4]),
        pyro_transforms.Permute(torch.tensor([1, 0]), cache_size=1),
        layers(),
        pyro_transforms.spline(D),
    ],
    "inverse": lambda: [layers().inv],
    "affine, inverse, planar": lambda: [Affine(D), layers().inv, layers(), Affine(D).inv],
}


@pytest.mark.parametrize("mode", ["rsample", "sample", "sample, then gradients"])
@pytest.mark.parametrize("as_flow", [False, True], ids=["distribution", "flow"])
@pytest.mark.parametrize("name", CHAINS)
def test_samples_are_scored_without_a_search(
    name: str, as_flow: bool, mode: str, searches: list[int]
) -> None:
    if mode == "sample, then gradients" and name.endswith("'s"):
        return  # with gradients the others' caches do not know what ours return
    chain = CHAINS[name]()
    q = (
        Flow(StandardNormal(D), chain)()
        if as_flow
        else dist.TransformedDistribution(normal(), chain)
    )
    with torch.set_grad_enabled(mode == "rsample"):
        y = q.rsample((5,))
    if "inverse" in name:
        assert len(searches) == 1  # for sampling
        searches.clear()
    with torch.set_grad_enabled(mode != "sample"):
        log_prob = q.log_prob(y)
    assert searches == []
    assert torch.allclose(q.log_prob(y.clone()), log_prob, atol=1e-9)
    assert "inverse" in name or len(searches) > 0  # the count does see searches


def test_a_conditional_flow_scores_its_samples_without_a_search(searches: list[int]) -> None:
    flow = Flow(StandardNormal(D), [scatter(ConditionalPlanar(D, 3, 2), 0.5)])
    q = flow(torch.randn(4, 3))
    log_prob = q.log_prob(q.rsample())
    assert (searches, log_prob.shape) == ([], (4,))


# Nothing is stale. Each edit follows a sample, whose very tensors are then used again.


@torch.no_grad()
def halve(t: Planar, x: Tensor, y: Tensor) -> None:
    vector_to_parameters(0.5 * parameters_to_vector(t.parameters()), t.parameters())


@torch.no_grad()
def assign_data(t: Planar, x: Tensor, y: Tensor) -> None:
    t.u.data = 0.5 * t.u


EDITS: dict[str, Callable[[Planar, Tensor, Tensor], object]] = {
    "step": lambda t, x, y: step(t, t(torch.randn(5, D)).square().sum()),
    "parameter in place": lambda t, x, y: t.u.detach().mul_(0.5),
    "one bias": lambda t, x, y: t.b.detach()[0].add_(1.0),
    "parameter's data": assign_data,
    "from a vector": halve,
    "another state": lambda t, x, y: t.load_state_dict(layers().state_dict()),
    "another parameter": lambda t, x, y: setattr(t, "w", nn.Parameter(0.5 * t.w.detach())),
    "reset": lambda t, x, y: t.reset_parameters(),
    "sample in place": lambda t, x, y: y.detach().mul_(0.5),
    "one row": lambda t, x, y: y.detach()[0].zero_(),
    "input in place": lambda t, x, y: x.mul_(0.5),
    "new layout": lambda t, x, y: t.float().double(),
}


@pytest.mark.parametrize("recorded", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", EDITS)
def test_edits_leave_nothing_stale(name: str, recorded: bool) -> None:
    t, x = layers(), torch.randn(5, D)
    with torch.set_grad_enabled(recorded):
        y = t(x)
    EDITS[name](t, x, y)
    fresh = copy.deepcopy(t)
    with torch.no_grad():
        expected = fresh(x.clone())
        log_det = fresh.log_abs_det_jacobian(x.clone(), expected)
        assert torch.allclose(t.log_abs_det_jacobian(x, y), log_det)
        assert torch.allclose(t.inv(y), fresh.inv(y.clone()), atol=1e-8)
        assert torch.allclose(t.inv(t(x)), x, atol=1e-8)
        assert torch.allclose(t(x), expected)


@pytest.mark.parametrize("name", ["step", "parameter in place", "sample in place", "from a vector"])
def test_edits_after_scoring_leave_nothing_stale(name: str) -> None:
    """The same for the pair that an inverse call leaves behind."""
    t, y = layers(), torch.randn(5, D)
    x = t.inv(y).detach()
    x = t.inv(y)
    EDITS[name](t, x, y)
    fresh = copy.deepcopy(t)
    with torch.no_grad():
        expected = fresh.log_abs_det_jacobian(x.clone(), y.clone())
        assert torch.allclose(t.log_abs_det_jacobian(x, y), expected)
        assert torch.allclose(t.inv(y), fresh.inv(y.clone()), atol=1e-8)


def test_an_edit_between_two_transforms_of_a_chain() -> None:
    """The second knows the first one's result as its own sample only while it is unchanged."""
    planar, affine = layers(), scatter(Affine(D), 1.0)
    with torch.no_grad():
        y = affine(planar(torch.randn(5, D)))
    between = affine.inv(y)
    between.detach().mul_(0.5)
    assert torch.allclose(planar.inv(between), planar.inv(between.clone()), atol=1e-9)


def test_a_shallow_copy_has_a_cache_of_its_own() -> None:
    t, x = layers(), torch.randn(5, D)
    y = t(x)
    twin = copy.copy(t)
    twin.activation = LeakyReLU(0.5)  # the same parameters, another map
    expected = twin.log_abs_det_jacobian(x.clone(), y)
    assert torch.equal(twin.log_abs_det_jacobian(x, y), expected)
    assert not torch.allclose(t.log_abs_det_jacobian(x, y), expected)


def test_one_input_for_a_batch_of_parameters() -> None:
    """The inverse has the shape of its argument, although one x was enough to make it."""
    t = planar_at(torch.randn(7, 2, D), torch.randn(7, 2, D), torch.randn(7, 2))
    x = torch.randn(D)
    with torch.no_grad():
        y = t(x)
        assert t.inv(y).shape == t.inv(y.clone()).shape == (7, D)
        assert torch.allclose(t.inv(y), x.expand(7, D), atol=1e-9)


def test_temporary_parameters_are_never_confused() -> None:
    """Parameters that are gone must not lend their ids to others of the same version."""

    class Inverse(nn.Module):
        def __init__(self, t: Planar) -> None:
            super().__init__()
            self.t = t

        def forward(self, y: Tensor) -> Tensor:
            return self.t.inv(y)

    t, x, shapes = layers(4), torch.randn(3, D), {"w": (4, D), "u": (4, D), "b": (4,)}
    inverse = Inverse(t)
    for order in itertools.permutations(shapes):
        for _ in range(5):
            with torch.no_grad():
                first = {name: torch.randn(shape) for name, shape in shapes.items()}
                y = functional_call(t, first, x)
                del first
                other = {}
                for name in order:  # in one of the orders Python hands the ids out again
                    other[f"t.{name}"] = torch.randn(shapes[name])
                mine = functional_call(inverse, other, y)
                assert torch.allclose(mine, functional_call(inverse, other, y.clone()), atol=1e-7)
                del other
