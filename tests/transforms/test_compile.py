"""``torch.compile(fullgraph=True)`` of a user's own training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import given_planar, scatter, slow
from torch import Tensor, nn
from torch.distributions import Distribution

import pyroflow as pf
from pyroflow.transforms.kernels import compiled

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of itself


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    Distribution.set_default_validate_args(False)  # as the compiler does at its first use
    yield
    torch._dynamo.reset()
    Distribution.set_default_validate_args(True)


def assert_compiles(step: Callable, parameters: list[Tensor], *inputs: Tensor) -> None:
    """One graph, with the value and the gradients of the step itself."""
    compiled_step = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, found = step(*inputs), compiled_step(*inputs)
    assert torch.allclose(found, expected, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-10)
    again = [1.5 * t for t in inputs]  # other values, and nothing left from the first call
    assert torch.allclose(compiled_step(*again), step(*again), atol=1e-12)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: pf.Planar(3, 8),
        slow(lambda: pf.Planar(3, 4, nonlinearity="leaky_relu")),
        slow(lambda: pf.Sylvester(3, 2, 2)),
        lambda: pf.Radial(3, 2),
        lambda: pf.SinhArcsinh(3),
    ],
    ids=["planar", "leaky", "sylvester", "radial", "sinh_arcsinh"],
)
def test_a_transform(make: Callable[[], nn.Module], inverse: bool) -> None:
    module = scatter(make(), 0.7)
    t = module.inv if inverse else module

    def step(value: Tensor) -> Tensor:
        image = t(value)
        return (image.square().sum(-1) / 2 - t.log_abs_det_jacobian(value, image)).mean()

    assert_compiles(step, list(module.parameters()), torch.randn(5, 3))


def test_a_flow_that_scores_data() -> None:
    flow = pf.planar_flow(2, 4)
    y = pf.datasets.sine(64, seed=0).double()
    pf.fit_density(flow.double(), y, steps=3, polish=0, seed=0, progress=False)
    assert_compiles(lambda y: -flow().log_prob(y).mean(), list(flow.parameters()), y)


@pytest.mark.slow
def test_a_conditional_flow_that_scores_its_samples() -> None:
    flow = pf.planar_flow(2, 4, context_dim=3, hidden_dims=(4,), direction="base_to_data")
    scatter(flow.parts[0], 0.7)
    noise = torch.randn(6, 2)

    def step(context: Tensor) -> Tensor:
        q = flow(context)
        y = noise
        for t in q.transforms:
            y = t(y)
        return (q.log_prob(y) + y.square().sum(-1)).mean()

    assert_compiles(step, list(flow.parameters()), torch.randn(6, 3))


@pytest.mark.parametrize("batch", [(), (5,)], ids=["shared", "own"])
def test_the_operators_are_what_torch_expects(batch: tuple[int, ...]) -> None:
    parts = given_planar(3, 4, batch).parts
    s = torch.rand(*batch, 4, 1) + 0.5
    tensors = [t.detach().requires_grad_() for t in (parts["w"], parts["u"], parts["b"], s)]
    for inverse in (False, True):
        inputs = (torch.randn(5, 3, requires_grad=True), *tensors, 1, inverse)
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(compiled.stack, inputs, test_utils=checks)
