"""Pyro's own transforms together with ours, in flows and in guides, on the sine data."""

import copy
import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from cases import slow
from torch import Tensor
from torch.distributions import ComposeTransform, Transform
from torch.distributions.transforms import ReshapeTransform

import pyroflow as pf
from pyroflow.flows import StandardNormal
from pyroflow.guides import AutoFlow
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw


def channel_permute(dim: int) -> Transform:
    """A 1x1 convolution of an image whose one pixel has the vector as its channels."""
    to_image = ReshapeTransform((dim,), (dim, 1, 1))
    to_vector = ReshapeTransform((dim, 1, 1), (dim,))
    return ComposeTransform([to_image, T.GeneralizedChannelPermute(dim), to_vector])


FOREIGN: dict[str, Callable[[int], Transform]] = {
    "affine_coupling": lambda dim: T.affine_coupling(dim, hidden_dims=[16]),
    "affine_autoregressive": lambda dim: T.affine_autoregressive(dim, hidden_dims=[16]),
    "affine_autoregressive-stable": lambda dim: T.affine_autoregressive(
        dim, hidden_dims=[16], stable=True
    ),
    "spline": lambda dim: T.spline(dim),
    "spline_coupling": lambda dim: T.spline_coupling(dim, hidden_dims=[16]),
    "channel_permute": channel_permute,
}
NAMES = list(FOREIGN)
QUICK = ("spline", "affine_autoregressive-stable")  # coordinate by coordinate, and by a network

DATA = pf.datasets.sine(2000).double()
FRESH = pf.datasets.sine(2000, seed=1).double()
# Of the normal distribution with the mean and covariance of FRESH, which no other beats there.
GAUSSIAN_LOSS = 1 + math.log(2 * math.pi) + 0.5 * torch.logdet(torch.cov(FRESH.T)).item()


def make(name: str, seed: int = 0) -> pf.Flow:
    pyro.set_rng_seed(seed)
    return pf.Flow(StandardNormal(2), [FOREIGN[name](2), pf.Planar(2, 8).inv, pf.Affine(2)])


@pytest.fixture(scope="module")
def fitted() -> dict[str, pf.Flow]:
    """One short fit of each mixture."""
    torch.set_default_dtype(torch.float64)
    flows = {name: make(name) for name in NAMES}
    for flow in flows.values():
        pf.fit_density(flow, DATA, steps=60, polish=30, seed=0, progress=False)
    return flows


@torch.no_grad()
def log_prob(flow: pf.Flow, y: Tensor) -> Tensor:
    return flow().log_prob(y)


@pytest.mark.parametrize("name", [n if n in QUICK else slow(n) for n in NAMES])
def test_mixture_fits_the_sine_better_than_a_gaussian(fitted: dict, name: str) -> None:
    loss = -log_prob(fitted[name], FRESH).mean()
    print(
        f"{name}: {loss:.3f}, Gaussian {GAUSSIAN_LOSS:.3f}, entropy {pf.datasets.SINE_ENTROPY:.3f}"
    )
    assert pf.datasets.SINE_ENTROPY - 0.05 < loss < GAUSSIAN_LOSS - 0.5


@pytest.mark.parametrize("name", NAMES)
def test_density_is_the_base_density_over_the_jacobian(fitted: dict, name: str) -> None:
    """The Jacobian by autograd, of the composed map from base to data."""
    flow = fitted[name]
    whole = ComposeTransform(flow.transforms())
    x = torch.randn(20, 2)
    y = whole(x).detach()
    rows = [torch.autograd.functional.jacobian(whole, row) for row in x]
    expected = flow.base().log_prob(x) - torch.stack(rows).det().abs().log()
    assert torch.allclose(log_prob(flow, y), expected, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_density_integrates_to_one(fitted: dict, name: str) -> None:
    grid = [torch.linspace(-half, half, 300) for half in (5.0, 9.0)]
    points = torch.cartesian_prod(*grid)
    cell = math.prod((axis[1] - axis[0]).item() for axis in grid)
    total = log_prob(fitted[name], points).exp().sum() * cell
    assert total.item() == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_samples(fitted: dict, name: str) -> None:
    q = fitted[name]()
    assert (q.batch_shape, q.event_shape) == ((), (2,))
    for shape in [(), (7,), (3, 4)]:
        y = q.rsample(shape)
        assert y.shape == (*shape, 2)
        own = q.log_prob(y)  # through the caches
        assert own.shape == shape
        assert torch.allclose(own, log_prob(fitted[name], y.detach().clone()), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_state_dict_hold_every_parameter(fitted: dict, name: str) -> None:
    flow = fitted[name]
    flow().log_prob(DATA[:10]).mean().backward()  # tensors with a graph, in Pyro's caches
    flow.zero_grad()
    other = make(name, seed=1)
    assert not torch.allclose(log_prob(other, FRESH), log_prob(flow, FRESH))
    other.load_state_dict(flow.state_dict())
    for same in (copy.deepcopy(flow), other):
        assert torch.equal(log_prob(same, FRESH), log_prob(flow, FRESH))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_gradient(name: str) -> None:
    flow = make(name)
    flow().log_prob(DATA[:10]).mean().backward()
    assert not [n for n, p in flow.named_parameters() if p.grad is None]


@pytest.mark.parametrize("name", NAMES)
def test_same_tensor_is_scored_anew_after_a_step(name: str) -> None:
    """Pyro's caches outlive the step (pyro issue 2564); here Pyro's transform sees the data."""
    pyro.set_rng_seed(0)
    flow = pf.Flow(StandardNormal(2), [pf.Planar(2, 2), FOREIGN[name](2)])
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.1)
    for _ in range(2):  # without an error about a graph that was freed
        optimizer.zero_grad()
        (-flow().log_prob(DATA).mean()).backward()
        optimizer.step()
        again = log_prob(flow, DATA)
    assert torch.equal(again, log_prob(flow, DATA.clone()))
    assert torch.equal(again, log_prob(copy.deepcopy(flow), DATA))


def test_parameters_inside_a_plain_container_are_registered() -> None:
    """Torch's containers are no modules."""
    spline = T.spline(2)
    held = torch.distributions.transforms.IndependentTransform(spline, 1, cache_size=1)
    flow = pf.Flow(StandardNormal(2), [held.inv, pf.Affine(2)])
    assert {id(p) for p in spline.parameters()} < {id(p) for p in flow.parameters()}
    plain = pf.Flow(StandardNormal(2), [spline.inv, flow.parts[-1]])
    assert torch.allclose(log_prob(flow, DATA), log_prob(plain, DATA))


GUIDE_OPTIONS = {"steps": 300, "lr": 0.05, "num_particles": 64, "seed": 0, "progress": False}


def sine_model() -> None:
    """The sine density as a model: its evidence is 1."""
    x2 = pyro.sample("x2", dist.Uniform(-3.0, 3.0))
    pyro.sample("x1", dist.Normal(x2.sin(), 0.1))


def elbo(guide: Callable) -> float:
    with torch.no_grad(), pyro.poutine.block():
        return draw(BoundModel(sine_model, guide), 5000).log_weights.mean().item()


@pytest.fixture(scope="module")
def gaussian_elbo() -> float:
    torch.set_default_dtype(torch.float64)
    guide = pf.AutoPlanarFlow(sine_model, num_layers=0, centring=None)
    pf.fit_guide(sine_model, guide, **GUIDE_OPTIONS)
    return elbo(guide)


@pytest.mark.parametrize("name", [n if n in QUICK else slow(n) for n in NAMES])
def test_guide_of_a_mixture_beats_the_gaussian_guide(gaussian_elbo: float, name: str) -> None:
    guide = AutoFlow(sine_model, lambda dim: [FOREIGN[name](dim), pf.Planar(dim, 8)], centring=None)
    pyro.set_rng_seed(0)
    guide()
    start = elbo(guide)
    pf.fit_guide(sine_model, guide, **GUIDE_OPTIONS)
    end = elbo(guide)
    print(f"{name}: {start:.2f} -> {end:.3f}, Gaussian {gaussian_elbo:.3f}, posterior 0")
    assert gaussian_elbo + 0.2 < end < 0.01
