"""The pair cache under differentiation: a sample's gradients are those of its clone."""

from __future__ import annotations

import copy
import itertools

import pyro.distributions as dist
import pytest
import torch
from cases import D, layers, log_prob_at, normal, planar, scatter
from torch import Tensor, nn

from pyroflow.flows import Flow, StandardNormal, planar_flow
from pyroflow.transforms import Affine


def gradients(value: Tensor, module: nn.Module) -> list[Tensor]:
    """With zeros where a parameter plays no part."""
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return list(torch.autograd.grad(value, list(module.parameters()), **options))


def close(left: list[Tensor], right: list[Tensor]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.allclose(a, b, rtol=1e-8, atol=1e-9) for a, b in pairs)


CHAINS = {
    "planar": lambda: [layers()],
    "inverse": lambda: [layers().inv],
    "planar, affine": lambda: [layers(), scatter(Affine(D), 1.0)],
    "two planar": lambda: [layers(2), layers(4)],
    "inverse, affine, planar": lambda: [layers().inv, scatter(Affine(D), 1.0), layers()],
}


@pytest.fixture(params=CHAINS)
def flow(request: pytest.FixtureRequest) -> Flow:
    return Flow(StandardNormal(D), CHAINS[request.param]())


def test_a_sample_has_the_parameter_gradient_of_its_clone(flow: Flow, searches: list[int]) -> None:
    """The score: y is a constant, although the parameters made it."""
    q = flow()
    y = q.sample((6,))
    searches.clear()
    own = q.log_prob(y).sum()
    assert searches == []
    assert close(gradients(own, flow), gradients(q.log_prob(y.clone()).sum(), flow))


def test_the_score_by_hand() -> None:
    """y = loc + L x alone: ∂/∂offset of log q(y) is L⁻ᵀ L⁻¹ (y - loc), as C = I here."""
    t = scatter(Affine(D), 1.0)
    q = dist.TransformedDistribution(normal(), [t])
    y = q.sample((6,))
    q.log_prob(y).sum().backward()
    loc, scale = t.loc_and_scale()
    precision = torch.linalg.inv(scale @ scale.T)
    assert torch.allclose(t.offset.grad, ((y - loc) @ precision).sum(0), atol=1e-9)


def test_a_reparametrised_sample_has_the_gradient_along_its_path(flow: Flow) -> None:
    """log q(y(θ, ε)) = log N(ε) - log |det|: only the determinant depends on θ."""
    q = flow()
    y = q.rsample((6,))
    own = gradients(q.log_prob(y).sum(), flow)
    assert close(own, gradients(q.log_prob(y.clone()).sum(), flow))
    with torch.no_grad():
        origin = y
        for t in reversed(q.transforms):
            origin = t.inv(origin)
    x, log_det = origin.clone(), 0.0
    for t in q.transforms:
        image = t(x)
        log_det = log_det + t.log_abs_det_jacobian(x.clone(), image.clone())
        x = image
    assert close(own, gradients(-log_det.sum(), flow))


def test_gradients_in_a_sample(flow: Flow, searches: list[int]) -> None:
    """requires_grad_() after sample(): ∂ log q/∂y, as at a clone, and no search."""
    q = flow()
    y = q.sample((6,)).requires_grad_()
    searches.clear()
    own = torch.autograd.grad(q.log_prob(y).sum(), y)[0]
    assert searches == []
    clone = y.detach().clone().requires_grad_()
    expected = torch.autograd.grad(q.log_prob(clone).sum(), clone)[0]
    assert torch.allclose(own, expected, rtol=1e-8, atol=1e-9)


def test_gradients_in_a_sample_of_frozen_transforms(flow: Flow) -> None:
    """Made while gradients were on, but needing none."""
    flow.requires_grad_(False)
    q = flow()
    y = q.rsample((6,)).requires_grad_()
    own = torch.autograd.grad(q.log_prob(y).sum(), y)[0]
    clone = y.detach().clone().requires_grad_()
    assert torch.allclose(own, torch.autograd.grad(q.log_prob(clone).sum(), clone)[0], atol=1e-9)
    flow.requires_grad_(True)
    assert close(gradients(q.log_prob(y).sum(), flow), gradients(q.log_prob(clone).sum(), flow))


def test_gradients_in_an_input_that_needs_them_later() -> None:
    """x.requires_grad_() after t(x): the kept pair has no graph to x."""
    t, x = layers().requires_grad_(False), torch.randn(4, D)
    y = t(x)
    x.requires_grad_()
    log_det = t.log_abs_det_jacobian(x, y).sum()
    own = torch.autograd.grad(log_det, x)[0]
    clone = x.detach().clone().requires_grad_()
    expected = torch.autograd.grad(t.log_abs_det_jacobian(clone, t(clone)).sum(), clone)[0]
    assert torch.allclose(own, expected, atol=1e-12)


def test_a_log_det_kept_without_gradients_is_not_used_for_them() -> None:
    """log_abs_det_jacobian of a pair made under no_grad, asked for with gradients."""
    t, x = layers(), torch.randn(4, D)
    with torch.no_grad():
        y = t(x)
    own = gradients(t.log_abs_det_jacobian(x, y).sum(), t)
    assert close(own, gradients(t.log_abs_det_jacobian(x.clone(), y.clone()).sum(), t))
    assert all((g != 0).any() for g in own)


def train(flow: Flow, batches: list[Tensor]) -> list[float]:
    optimiser = torch.optim.Adam(flow.parameters(), lr=0.05)
    losses = []
    for y in batches:
        optimiser.zero_grad()
        loss = -flow().log_prob(y).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("own", [False, True], ids=["data", "own samples"])
def test_the_same_tensor_in_every_step_of_a_training(flow: Flow, own: bool) -> None:
    """Pyro's cache returned the first step's values here, or failed (pyro issue 2564)."""
    twin = copy.deepcopy(flow)
    data = flow().sample((20,)) if own else torch.randn(20, D)
    losses = train(flow, [data] * 5)
    assert losses == pytest.approx(train(twin, [data.clone() for _ in range(5)]), rel=1e-9)
    assert len(set(losses)) == 5
    assert close([p.detach() for p in flow.parameters()], [p.detach() for p in twin.parameters()])


def test_two_losses_on_one_sample_in_one_step() -> None:
    """The same graph serves twice, with retain_graph as for any torch graph."""
    flow = planar_flow(D, 3, direction="base_to_data", affine=None)
    y = flow().rsample((5,))
    flow().log_prob(y).sum().backward(retain_graph=True)
    first = [p.grad.clone() for p in flow.parameters()]
    flow().log_prob(y).sum().backward()
    assert close([p.grad for p in flow.parameters()], [2 * g for g in first])


def test_inference_mode(flow: Flow) -> None:
    """Samples and scores inside; what was made inside is scored outside."""
    with torch.inference_mode():
        q = flow()
        y = q.sample((6,))
        inside = q.log_prob(y)
        assert torch.allclose(q.log_prob(y.clone()), inside, atol=1e-9)
    with torch.no_grad():
        assert torch.allclose(flow().log_prob(y), inside, atol=1e-9)
    data = torch.tensor(y.tolist())
    assert torch.allclose(flow().log_prob(data), inside, atol=1e-9)
    outside = flow().sample((6,))
    with torch.inference_mode():
        assert torch.allclose(flow().log_prob(outside), flow().log_prob(outside.clone()), atol=1e-9)
    assert torch.allclose(flow().log_prob(outside), flow().log_prob(outside.clone()), atol=1e-9)


def test_parameters_made_in_inference_mode() -> None:
    flow = planar_flow(D, 3, context_dim=2, direction="base_to_data", hidden_dims=(4,))
    with torch.inference_mode():
        q = flow(torch.randn(4, 2))
    with torch.no_grad():
        y = q.sample()
        assert torch.allclose(q.log_prob(y), q.log_prob(y.clone()), atol=1e-12)


def test_second_derivatives_of_a_cached_sample() -> None:
    """The Hessian of log q in x along the path, twice through the kept pair."""
    t = planar(D, 3, sd=0.8).parts
    x = torch.randn(1, D, requires_grad=True)
    y = t(x)
    kept = t.log_abs_det_jacobian(t.inv(y), y).sum()
    rebuilt = torch.linalg.slogdet(torch.func.jacrev(lambda v: t(v))(x[0]))[1]
    for value in (kept, rebuilt):
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        second = [torch.autograd.grad(g, x, retain_graph=True)[0] for g in first[0]]
        if value is kept:
            expected = (first, *second)
    assert all(
        torch.allclose(a, b, atol=1e-9) for a, b in zip((first, *second), expected, strict=True)
    )


def test_values_by_definition_for_gradient_modes() -> None:
    """Whatever was recorded, the value is base density minus log-determinant."""
    for recorded, scored in itertools.product([False, True], repeat=2):
        t, x = layers(), torch.randn(4, D)
        with torch.set_grad_enabled(recorded):
            y = t(x)
        with torch.set_grad_enabled(scored):
            value = dist.TransformedDistribution(normal(), [t]).log_prob(y)
        assert torch.allclose(value, log_prob_at(t, x), atol=1e-10)
        assert value.requires_grad == scored
