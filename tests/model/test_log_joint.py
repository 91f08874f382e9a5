"""The log joint as a function of unconstrained latents, against Pyro's handlers and by hand."""

from collections.abc import Callable
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import StickBreakingTransform

import pyroflow as pf
from pyroflow.model.bound import BoundModel
from pyroflow.model.log_joint import LogJoint
from pyroflow.targets import eight_schools_centered, eight_schools_noncentered

NUM = 6


def log_joint_of(model: Callable, num: int = NUM) -> LogJoint:
    guide = pf.AutoPlanarFlow(model, 0)
    return LogJoint(BoundModel(model, guide), guide, num)


def constrained_sites() -> None:
    """Latents: positive (1), simplex (2), ordered (3) and a plate of four."""
    scale = pyro.sample("scale", dist.Gamma(3.0, 2.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    steps = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
    ordered = dist.TransformedDistribution(steps, [dist.transforms.OrderedTransform()])
    cuts = pyro.sample("cuts", ordered)
    with pyro.plate("rows", 4):
        x = pyro.sample("x", dist.StudentT(5.0, 0.0, scale))
        loc = x * weights[..., 0] + cuts[..., 1]
        pyro.sample("y", dist.Normal(loc, 0.5), obs=torch.tensor([0.3, -1.0, 2.0, 0.7]))


def constrained_by_hand(z: Tensor) -> Tensor:
    sticks = StickBreakingTransform()
    weights = sticks(z[1:3])
    cuts = z[3] + torch.cat([z.new_zeros(1), z[4:6].exp()]).cumsum(0)
    values = {"scale": z[0].exp(), "weights": weights, "cuts": cuts, "x": z[6:]}
    trace = poutine.trace(poutine.condition(constrained_sites, data=values)).get_trace()
    log_det = z[0] + sticks.log_abs_det_jacobian(z[1:3], weights) + z[4:6].sum()
    return trace.log_prob_sum() + log_det


def from_the_left() -> None:
    """Reads its latents from the left, so a plate of draws around it would mix them."""
    z = pyro.sample("z", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
    pyro.sample("y", dist.Normal(z[0] * z[1], z[2].exp()), obs=torch.tensor(0.5))


def left_by_hand(z: Tensor) -> Tensor:
    likelihood = dist.Normal(z[0] * z[1], z[2].exp()).log_prob(torch.tensor(0.5))
    return dist.Normal(0.0, 2.0).log_prob(z).sum() + likelihood


def branching() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    loc = 3 * z if z > 0 else z.square()
    pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))


def branching_by_hand(z: Tensor) -> Tensor:
    loc = 3 * z[0] if z[0] > 0 else z[0].square()
    likelihood = dist.Normal(loc, 1.0).log_prob(torch.tensor(1.0))
    return dist.Normal(0.0, 1.0).log_prob(z[0]) + likelihood


def branching_for_all() -> None:
    """Runs in a plate, but one branch holds for all draws together."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    loc = 3 * z if bool((z > 0.5).any()) else z.square()
    pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))


def rooted() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.factor("root", z.abs().sqrt().sum(-1))


CASES = {
    "plate": (constrained_sites, constrained_by_hand, 10),
    "vmap": (from_the_left, left_by_hand, 3),
    "one by one": (branching, branching_by_hand, 1),
}


@cache
def log_joint_of_case(name: str) -> LogJoint:
    return log_joint_of(CASES[name][0])


def by_hand(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    value = torch.stack([function(point) for point in z])
    (gradient,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), gradient


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_by_hand(name: str) -> None:
    _, function, dim = CASES[name]
    log_joint = log_joint_of_case(name)
    assert log_joint.traced == (name != "one by one")
    for size in (NUM, 1, 2 * NUM + 1):
        z = 1.5 * torch.randn(size, dim)
        value, gradient = log_joint.values_and_gradients(z)
        expected, slope = by_hand(function, z)
        assert torch.allclose(value, expected, rtol=1e-10, atol=1e-10)
        assert torch.allclose(gradient, slope, rtol=1e-9, atol=1e-9)
        assert torch.allclose(log_joint.values(z), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_how_a_model_is_run(name: str) -> None:
    log_joint = log_joint_of_case(name)
    assert log_joint.one_by_one == (name == "one by one")


@pytest.mark.parametrize("model", [eight_schools_centered, eight_schools_noncentered])
def test_eight_schools_is_traced_and_not_run_again(model: Callable) -> None:
    runs = []

    def counted() -> None:
        runs.append(1)
        model()

    log_joint = log_joint_of(counted)
    assert log_joint.traced
    before = len(runs)
    z = torch.randn(3 * NUM, 10)
    value, gradient = log_joint.values_and_gradients(z)
    assert len(runs) == before
    untraced = log_joint._value_and_gradient(z)
    assert len(runs) > before
    assert torch.allclose(value, untraced[0], rtol=1e-12)
    assert torch.allclose(gradient, untraced[1], rtol=1e-10, atol=1e-12)


def test_branch_is_not_baked_into_a_graph() -> None:
    log_joint = log_joint_of(branching_for_all)
    assert not log_joint.traced
    z = torch.randn(NUM, 1)
    loc = torch.where(z > 0.5, 3 * z, z.square())
    likelihood = dist.Normal(loc, 1.0).log_prob(torch.tensor(1.0))
    expected = (dist.Normal(0.0, 1.0).log_prob(z) + likelihood)[:, 0]
    assert torch.allclose(log_joint.values_and_gradients(z)[0], expected)


def test_arguments_reach_the_model() -> None:
    def model(loc: Tensor, *, scale: float) -> None:
        pyro.sample("z", dist.Normal(loc, scale))

    guide = pf.AutoPlanarFlow(model, 0)
    problem = BoundModel(model, guide, (torch.tensor(3.0),), {"scale": 2.0})
    z = torch.tensor([[1.0], [4.0]])
    expected = dist.Normal(3.0, 2.0).log_prob(z[:, 0])
    assert torch.allclose(LogJoint(problem, guide, 2).values_and_gradients(z)[0], expected)


@pytest.mark.parametrize("name", CASES)
def test_derivative_of_a_call_is_the_gradient(name: str) -> None:
    log_joint, dim = log_joint_of_case(name), CASES[name][2]
    z, weight = torch.randn(NUM + 1, dim, requires_grad=True), torch.randn(NUM + 1)
    value, gradient = log_joint.values_and_gradients(z)
    called = log_joint(z)
    (called * weight).sum().backward()
    assert torch.equal(called.detach(), value)
    assert torch.allclose(z.grad, weight.unsqueeze(-1) * gradient, rtol=1e-14)


def test_call_has_no_second_derivative_rather_than_a_wrong_one() -> None:
    z, weight = torch.randn(2, 3, requires_grad=True), torch.ones(2, requires_grad=True)
    value = log_joint_of(from_the_left)(z)
    (gradient,) = torch.autograd.grad(value, z, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_point_without_a_finite_gradient_is_nan_with_gradient_zero() -> None:
    log_joint = log_joint_of(rooted)
    z = torch.tensor([[1.0, 4.0], [0.0, 1.0], [-1.0, 9.0]], requires_grad=True)
    assert log_joint.values(z.detach()).isfinite().all()
    value = log_joint(z)
    value.nansum().backward()
    assert value.isnan().tolist() == [False, True, False]
    expected = dist.Normal(0.0, 1.0).log_prob(z.detach()).sum(1) + torch.tensor([3.0, 1.0, 4.0])
    assert torch.allclose(value[[0, 2]], expected[[0, 2]])
    slopes = torch.tensor([[-0.5, -3.75], [0.0, 0.0], [0.5, -9.0 + 1 / 6]])
    assert torch.allclose(z.grad, slopes)


def test_recording_leaves_the_generator_alone() -> None:
    guide = pf.AutoPlanarFlow(from_the_left, 0)
    problem = BoundModel(from_the_left, guide)
    state = torch.get_rng_state()
    LogJoint(problem, guide, NUM).values_and_gradients(torch.zeros(NUM, 3))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("float32")
def test_float32() -> None:
    log_joint = log_joint_of(constrained_sites)
    z = torch.randn(NUM, 10)
    value, gradient = log_joint.values_and_gradients(z)
    assert log_joint.traced
    assert value.dtype == gradient.dtype == torch.float32
    expected, slope = by_hand(constrained_by_hand, z)
    assert torch.allclose(value, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(gradient, slope, rtol=1e-3, atol=1e-3)
