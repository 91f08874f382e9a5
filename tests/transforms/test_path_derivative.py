"""Log densities along the path of a sample: values, gradients, and variance zero at the target."""

from __future__ import annotations

import copy

import pyro.distributions as dist
import pytest
import torch
from cases import D, layers, normal, planar_at, scatter
from torch import Tensor, nn

from pyroflow.flows import AlongPath
from pyroflow.transforms import Affine

CHAINS = {
    "planar": lambda: [layers()],
    "planar, affine": lambda: [layers(), scatter(Affine(D), 1.0)],
    "affine, planar, diagonal": lambda: [
        scatter(Affine(D), 0.5),
        layers(5),
        scatter(Affine(D, "diagonal"), 1.0),
    ],
}


@pytest.fixture(params=CHAINS)
def chain(request: pytest.FixtureRequest) -> list:
    return CHAINS[request.param]()


def parameters(chain: list) -> list[nn.Parameter]:
    return list(nn.ModuleList(chain).parameters())


def score(q: dist.TransformedDistribution, y: Tensor) -> Tensor:
    """∂ log q/∂y at a clone of y."""
    clone = y.detach().clone().requires_grad_()
    return torch.autograd.grad(q.log_prob(clone).sum(), clone)[0]


def test_values_are_those_of_the_distribution(chain: list) -> None:
    q, plain = AlongPath(normal(), chain), dist.TransformedDistribution(normal(), chain)
    for y in (q.rsample((5,)), q.sample((5,)), torch.randn(5, D), torch.randn(3, 4, D)):
        assert torch.allclose(q.log_prob(y), plain.log_prob(y.clone()), atol=1e-9)
    assert q.event_shape == (D,)
    assert q.log_prob(torch.zeros(D)).shape == ()


def test_the_value_by_hand() -> None:
    """y = 1 + 2x in two dimensions, at y = (3, 1): x = (1, 0), log det = 2 ln 2."""
    t = Affine(2, "diagonal", init_loc=torch.ones(2), init_scale=2.0)
    log_prob = AlongPath(normal(), [t]).log_prob(torch.tensor([3.0, 1.0]))
    assert log_prob.item() == pytest.approx(-1.837877066409345 - 0.5 - 1.386294361119891)


def test_no_gradient_in_the_parameters_at_a_fixed_value(chain: list) -> None:
    q = AlongPath(normal(), chain)
    for y in (q.sample((5,)), torch.randn(5, D)):
        assert not q.log_prob(y).requires_grad
        y.requires_grad_()
        gradients = torch.autograd.grad(
            q.log_prob(y).sum(), [y, *parameters(chain)], allow_unused=True
        )
        assert torch.allclose(gradients[0], score(dist.TransformedDistribution(normal(), chain), y))
        assert all(g is None for g in gradients[1:])


def test_the_gradient_of_a_sample_goes_along_its_path(chain: list) -> None:
    """∂ log q/∂y times ∂y/∂θ, and nothing else."""
    q, plain = AlongPath(normal(), chain), dist.TransformedDistribution(normal(), chain)
    y, theta = q.rsample((6,)), parameters(chain)
    options = {"allow_unused": True, "materialize_grads": True}
    own = torch.autograd.grad(q.log_prob(y).sum(), theta, retain_graph=True, **options)
    expected = torch.autograd.grad(y, theta, score(plain, y), **options)
    for gradient, value in zip(own, expected, strict=True):
        assert torch.allclose(gradient, value, rtol=1e-8, atol=1e-9)


def test_own_samples_take_no_search(chain: list, searches: list[int]) -> None:
    q = AlongPath(normal(), chain)
    for draw in (q.rsample, q.sample):
        y = draw((5,))
        for _ in range(2):
            q.log_prob(y)
        with torch.no_grad():
            q.log_prob(y)
    assert searches == []
    q.log_prob(y.clone())
    assert len(searches) > 0


def test_the_variance_is_zero_at_the_target(chain: list) -> None:
    """Where q is p, log q - log p has no gradient, sample by sample; the plain estimator has."""
    q = AlongPath(normal(), chain)
    target = dist.TransformedDistribution(normal(), copy.deepcopy(chain))
    plain = dist.TransformedDistribution(normal(), chain)
    theta = parameters(chain)
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    worst, noise = 0.0, 0.0
    for _ in range(20):
        y = q.rsample()
        along = torch.autograd.grad(q.log_prob(y) - target.log_prob(y), theta, **options)
        whole = torch.autograd.grad(plain.log_prob(y) - target.log_prob(y), theta, **options)
        scale = 1 + score(plain, y).norm()
        worst = max(worst, *(float((g / scale).abs().max()) for g in along))
        noise = max(noise, *(float(g.abs().max()) for g in whole))
    assert worst <= 1e-12
    assert noise > 0.1


def test_nothing_is_stale_after_a_step(chain: list) -> None:
    q, plain = AlongPath(normal(), chain), dist.TransformedDistribution(normal(), chain)
    optimiser = torch.optim.SGD(parameters(chain), lr=0.1)
    y = q.rsample((5,))
    before = q.log_prob(y).detach()
    q.log_prob(y).sum().backward()
    optimiser.step()
    with torch.no_grad():
        assert not torch.allclose(q.log_prob(y), before)
        assert torch.allclose(q.log_prob(y), plain.log_prob(y.clone()), atol=1e-9)


def test_batched_parameters() -> None:
    chain = [
        layers(),
        planar_at(torch.randn(7, 2, D), torch.randn(7, 2, D), torch.randn(7, 2)),
    ]
    q, plain = AlongPath(normal(), chain), dist.TransformedDistribution(normal(), chain)
    y = q.rsample((3,))
    assert (q.batch_shape, y.shape) == ((7,), (3, 7, D))
    assert torch.allclose(q.log_prob(y), plain.log_prob(y.clone()), atol=1e-9)
    y = chain[1](chain[0](torch.randn(D)))  # one input for all seven
    assert torch.allclose(q.log_prob(y), plain.log_prob(y.clone()), atol=1e-9)


def test_expanded_distributions_stay_along_the_path(chain: list) -> None:
    q = AlongPath(normal(), chain).expand([4])
    y = q.rsample()
    assert y.shape == (4, D)
    assert not q.log_prob(y.detach()).requires_grad


def test_transforms_of_others() -> None:
    q = AlongPath(normal(), [layers(), dist.transforms.AffineTransform(0.0, 2.0)])
    with pytest.raises(
        TypeError, match="needs pyroflow's transforms, got AffineTransform: use Tran"
    ):
        q.log_prob(torch.zeros(D))
    with pytest.raises(TypeError, match="got _InverseTransform"):
        AlongPath(normal(), [layers().inv]).log_prob(torch.zeros(D))


def test_values_are_validated() -> None:
    base = dist.Normal(torch.zeros(D), 1.0, validate_args=False).to_event(1)
    q = AlongPath(base, [layers()], validate_args=True)
    with pytest.raises(ValueError, match=r"Expected value argument .* to be within the support"):
        q.log_prob(torch.tensor([0.0, float("nan")]))
