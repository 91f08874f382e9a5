"""Transforms as modules and as members of chains: copies, state dicts, composition."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from inspect import signature

import pyro.distributions as dist
import pytest
import torch
from cases import CASES, Source, planar, planar_at, saved
from pyro.distributions import transforms as pyro_transforms
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions import transforms as torch_transforms

import pyroflow as pf
from pyroflow import transforms
from pyroflow.transforms import Affine, Planar


@pytest.fixture(params=CASES)
def source(request: pytest.FixtureRequest) -> Source:
    return CASES[request.param]()


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "save": saved,
}


def used(source: Source) -> tuple[Tensor, Tensor]:
    """Leave filled caches behind, with graphs that a backward has been through."""
    x = torch.randn(4, *source.batch, source.dim, requires_grad=True)
    t = source.transform()
    y = t(x)
    (y.sum() + t.log_abs_det_jacobian(x, y).sum()).backward()
    source(y.detach(), inverse=True)[1].sum().backward()
    source.transform().inv(y)
    with torch.no_grad():
        return x.detach(), source(x.detach())[0]


@pytest.mark.parametrize("how", COPIES)
def test_copies_after_use_are_equal_and_independent(source: Source, how: str) -> None:
    x, y = used(source)
    twin = Source(source.dim, COPIES[how](source.parts), source.build, source.batch)
    with torch.no_grad():
        assert torch.equal(twin(x)[0], y)
        for p in source.parameters():
            p += 1.0
        assert torch.equal(twin(x)[0], y)
        assert not torch.allclose(source(x)[0], y)
        before = source(x)[0]
        for p in twin.parameters():
            p.zero_()
        assert torch.equal(source(x)[0], before)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_given_parameters(how: str) -> None:
    """A transform that holds plain tensors is copied with them."""
    x = torch.randn(4, 7, 3)
    for t in (
        planar_at(torch.randn(7, 2, 3), torch.randn(7, 2, 3), torch.randn(7, 2)),
        Affine(3, "diagonal").at(torch.randn(7, 3), torch.randn(7, 3)),
    ):
        y = t(x)
        twin = COPIES[how](t)
        for parameter in t._map_parameters():
            parameter.add_(1.0)
        assert torch.equal(twin(x), y)
        assert not torch.allclose(t(x), y)
        assert torch.allclose(twin.inv(y), x, atol=1e-9)


def test_state_dict_round_trip(source: Source) -> None:
    """Into a module with other values: parameters and buffers all come back."""
    x, y = used(source)
    state = copy.deepcopy(source.state_dict())
    with torch.no_grad():
        for t in (*source.parameters(), *source.buffers()):
            t += 0.5
        assert not torch.allclose(source(x)[0], y)
        source.load_state_dict(state)
        assert torch.equal(source(x)[0], y)


def test_names_and_shapes_of_the_parameters() -> None:
    """The names a checkpoint relies on."""
    shapes = {name: tuple(p.shape) for name, p in Planar(3, 4).named_parameters()}
    assert shapes == {"w": (4, 3), "u": (4, 3), "b": (4,)}
    affine = Affine(3)
    shapes = {name: tuple(p.shape) for name, p in affine.named_parameters()}
    assert shapes == {"offset": (3,), "raw_scale": (3,), "lower": (3, 3)}
    assert {name for name, _ in affine.named_buffers()} == {"centre", "unit"}
    assert {name for name, _ in Affine(3, "diagonal").named_parameters()} == {"offset", "raw_scale"}


@pytest.mark.parametrize("name", ["planar", "radial", "sylvester", "affine"])
def test_names_in_the_state_of_conditional_transforms(name: str) -> None:
    """The start values under the family's name, then the network: files and checkpoints say so."""
    sizes = (3, 2, 2) if name == "sylvester" else (3, 2)
    t = getattr(transforms, f"Conditional{name.title()}")(*sizes, hidden_dims=(4,))
    start = [f"{name}.{key}" for key in t.start.state_dict()]
    network = [f"nn.nn.layers.{i}.{key}" for i in range(2) for key in ("weight", "bias")]
    assert list(t.state_dict()) == [*start, *network]
    assert repr(t.condition(torch.zeros(2))) == f"{name.title()}.at(...)"


# In chains with the transforms of torch and of Pyro.


def scattered(t: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in t.parameters():
            p += 0.3 * torch.randn_like(p)
    return t


OTHERS: dict[str, Callable[[], Transform]] = {
    "affine": lambda: torch_transforms.AffineTransform(torch.randn(3), torch.rand(3) + 0.5),
    "sigmoid": lambda: torch_transforms.SigmoidTransform(),
    "softplus": lambda: torch_transforms.SoftplusTransform(),
    "composed": lambda: torch_transforms.ComposeTransform([planar(3, 2).parts, Affine(3).inv]),
    "permute": lambda: pyro_transforms.Permute(torch.tensor([2, 0, 1])),
    "coupling": lambda: scattered(pyro_transforms.affine_coupling(3, hidden_dims=[4])),
    "spline": lambda: scattered(pyro_transforms.spline(3)),
    "autoregressive": lambda: scattered(pyro_transforms.affine_autoregressive(3, hidden_dims=[4])),
    "cholesky": lambda: pyro_transforms.LowerCholeskyAffine(
        torch.randn(3), torch.randn(3, 3).tril(-1) + torch.eye(3)
    ),
    "flipped": lambda: scattered(pyro_transforms.affine_coupling(3, hidden_dims=[4])).inv,
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    "kind", [dist.TransformedDistribution, torch.distributions.TransformedDistribution]
)
def test_chains_score_data(name: str, kind: type) -> None:
    """Against the base density at the known preimage and the Jacobian of the whole chain."""
    affine = Affine(3)
    affine.standardize(torch.randn(50, 3))
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    q = kind(base, [planar(3, 2).parts, OTHERS[name](), affine, planar(3, 2, sd=0.7).parts.inv])
    assert q.event_shape == (3,)
    assert q.sample((4,)).shape == (4, 3)
    x = torch.randn(5, 3)

    def push(x: Tensor) -> Tensor:
        for t in q.transforms:
            x = t(x)
        return x

    matrices = torch.stack([torch.autograd.functional.jacobian(push, row) for row in x])
    expected = base.log_prob(x) - torch.linalg.slogdet(matrices)[1]
    data = push(x).detach().clone()
    for _ in range(2):
        assert torch.allclose(q.log_prob(data), expected, rtol=1e-8, atol=1e-8)


def test_chains_of_batched_parameters_have_a_batch_shape() -> None:
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    b = dist.TransformedDistribution(
        base,
        [
            planar_at(torch.randn(7, 3, 2), torch.randn(7, 3, 2), torch.randn(7, 3)),
            Affine(2),
        ],
    )
    assert (b.batch_shape, b.event_shape) == ((7,), (2,))
    assert b.sample((4,)).shape == (4, 7, 2)
    assert b.log_prob(torch.zeros(2)).shape == (7,)
    assert b.expand([5, 7]).log_prob(torch.zeros(2)).shape == (5, 7)


@pytest.mark.parametrize(
    ("conditional", "family"),
    [
        (pf.ConditionalPlanar, pf.Planar),
        (pf.ConditionalRadial, pf.Radial),
        (pf.ConditionalSinhArcsinh, pf.SinhArcsinh),
        (pf.ConditionalSylvester, pf.Sylvester),
        (pf.ConditionalAffine, pf.Affine),
    ],
)
def test_a_conditional_form_shows_the_arguments_of_its_family(
    conditional: type, family: type
) -> None:
    shown, theirs = (signature(made).parameters for made in (conditional, family))
    assert list(shown)[:2] == ["input_dim", "context_dim"]
    assert shown.keys() == theirs.keys() | {"context_dim", "hidden_dims", "bound"}
    assert all(shown[name].default == p.default for name, p in theirs.items())
