"""NICE's couplings and mixing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pyroflow as pf
from pyroflow.flows import AlongPath, Flow, StandardNormal
from rezende_mohamed_2015 import nice as module
from rezende_mohamed_2015.nice import AdditiveCoupling, nice_layers, volume_preserving_floor


@torch.no_grad()
def scattered(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        p.normal_()
    return module


def nice(dim: int = 5, mixing: str = "orthogonal") -> Flow:
    return scattered(Flow(StandardNormal(dim), nice_layers(dim, 3, mixing, hidden_dim=8)))


def couplings(dim: int, mixing: str | None) -> AdditiveCoupling:
    return scattered(AdditiveCoupling(dim, num_layers=3, mixing=mixing, hidden_dim=8))


@pytest.mark.parametrize("dim", [2, 5])
@pytest.mark.parametrize("batch", [(), (7,), (6, 5)])
@pytest.mark.parametrize("mixing", [None, "permutation", "orthogonal"])
def test_round_trip_and_shapes(mixing: str | None, batch: tuple, dim: int) -> None:
    t = couplings(dim, mixing)
    x = torch.randn(*batch, dim)
    y = t(x)
    assert y.shape == x.shape
    assert t.log_abs_det_jacobian(x, y).equal(torch.zeros(batch))
    assert torch.allclose(t.inv(y.clone()), x, atol=1e-10)
    assert torch.allclose(t(t.inv(x.clone())), x, atol=1e-10)


@pytest.mark.parametrize("dim", [2, 5])
@pytest.mark.parametrize("mixing", [None, "permutation", "orthogonal"])
def test_log_det_is_that_of_the_jacobian(mixing: str | None, dim: int) -> None:
    t = couplings(dim, mixing)
    for x in torch.randn(4, dim):
        jacobian = torch.autograd.functional.jacobian(t, x)
        assert torch.linalg.slogdet(jacobian).logabsdet.abs() < 1e-10
        assert not torch.allclose(jacobian, torch.eye(dim))


def test_coupling_by_hand() -> None:
    t = AdditiveCoupling(3, mixing=None, hidden_dim=2)
    values = {
        "hidden_weight": [[[1.0], [-2.0]]],
        "hidden_bias": [[0.5, 1.0]],
        "weight": [[[1.0, 2.0], [3.0, 4.0]]],
        "bias": [[0.1, 0.2]],
    }
    t.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    x = torch.tensor([[1.0, 10.0, 20.0], [-1.0, 10.0, 20.0]])
    # units relu(x + 0.5), relu(1 - 2 x) are (1.5, 0) and (0, 3)
    expected = torch.tensor([[1.0, 11.6, 24.7], [-1.0, 16.1, 32.2]])
    assert torch.allclose(t(x), expected)


def test_layers_act_in_order_each_after_its_mixing() -> None:
    t = couplings(4, "orthogonal")
    x = value = torch.randn(4)
    for k, Q in enumerate(t.mixed):
        single = AdditiveCoupling(4, mixing=None, hidden_dim=8)
        single.load_state_dict({name: p[k : k + 1] for name, p in t.named_parameters()})
        value = single(Q @ value)
    assert torch.allclose(t(x), value)


def test_starts_as_the_mixing() -> None:
    x = torch.randn(10, 6)
    assert AdditiveCoupling(6, 3, mixing=None)(x).equal(x)
    t = AdditiveCoupling(6, 1, "orthogonal")
    assert torch.allclose(t(x), x @ t.mixed[0].T)
    assert AdditiveCoupling(6, 0)(x).equal(x)


def test_mixing_is_random_and_orthogonal() -> None:
    for mixing in ("permutation", "orthogonal"):
        Q = AdditiveCoupling(40, 5, mixing, 4).mixed
        assert torch.allclose(Q @ Q.mT, torch.eye(40).expand(5, 40, 40), atol=1e-13)
        assert not torch.allclose(Q[0], Q[1])
        assert ((Q == 0) | (Q == 1)).all() == (mixing == "permutation")


def test_mixing_is_drawn_from_the_global_generator_and_not_trained() -> None:
    for mixing in ("permutation", "orthogonal"):
        torch.manual_seed(3)
        t = AdditiveCoupling(7, 2, mixing, 4)
        torch.manual_seed(3)
        assert AdditiveCoupling(7, 2, mixing, 4).mixed.equal(t.mixed)
        assert "mixed" in t.state_dict()
        assert "mixed" not in dict(t.named_parameters())


def test_mixing_is_uniform() -> None:
    """Every permutation as often as any other; of Haar's measure, mean 0 and variance 1/D."""
    permuted = AdditiveCoupling(2, 4000, "permutation", 1).mixed
    assert (permuted[:, 0, 0].mean() - 0.5).abs() < 0.03
    rotated = AdditiveCoupling(3, 4000, "orthogonal", 1).mixed
    assert rotated.mean(0).abs().max() < 0.04
    assert (rotated.square().mean(0) - 1 / 3).abs().max() < 0.025
    assert (rotated.det() > 0).double().mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("mixing", ["permutation", "orthogonal"])
def test_density_is_that_of_the_base_at_the_preimage(mixing: str) -> None:
    flow = nice(mixing=mixing)
    z = flow().sample((6,))
    x = z.clone()
    for t in reversed(flow.transforms()):
        x = t.inv(x.clone())
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1)
    assert torch.allclose(flow().log_prob(z), expected)
    assert torch.allclose(flow().log_prob(z.clone()), expected)


def test_scoring_a_sample_runs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    shift = module._shift
    monkeypatch.setattr(module, "_shift", lambda *args: (calls.append(0), shift(*args))[1])
    q = nice()()
    q.log_prob(q.rsample((4,)))
    assert len(calls) == 3


def test_an_optimiser_step_leaves_no_stale_answer() -> None:
    flow = nice()
    q, z = flow(), torch.randn(6, 5)
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.1)
    before = q.log_prob(z)
    before.mean().backward()
    optimizer.step()
    assert not torch.allclose(q.log_prob(z), before)
    assert torch.allclose(q.log_prob(z), copy.deepcopy(flow)().log_prob(z))


def test_every_parameter_has_a_gradient() -> None:
    flow = nice()
    q = flow()
    q.log_prob(torch.randn(50, 5)).mean().backward()
    assert all(p.grad.abs().max() > 0 for p in flow.parameters())


def test_gradient_along_the_path_is_that_of_a_fixed_density() -> None:
    flow = nice()
    q = AlongPath(flow.base(), flow.transforms())
    z = q.rsample((6,))
    (gradient,) = torch.autograd.grad(q.log_prob(z).sum(), z, retain_graph=True)
    apart = z.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(copy.deepcopy(flow)().log_prob(apart).sum(), apart)
    assert torch.allclose(gradient, expected)


def through_state_dict(flow: Flow) -> Flow:
    other = nice()
    other.load_state_dict(flow.state_dict())
    return other


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_state_dict])
def test_copies_are_equal(duplicate: Callable) -> None:
    flow, z = nice(), torch.randn(6, 5)
    expected = flow().log_prob(z)
    assert duplicate(flow)().log_prob(z).equal(expected)


def test_float32(float32: None) -> None:
    flow = nice(40)
    z = flow().sample((6,))
    assert z.dtype == torch.float32
    assert torch.allclose(flow().log_prob(z.clone()), flow().log_prob(z), rtol=1e-4)
    assert flow.double()().sample().dtype == torch.float64


def test_reaches_a_curved_target() -> None:
    """A shear of N(0, I) is within reach: z2 − z1² is standard normal."""

    def energy(z: Tensor) -> Tensor:
        return 0.5 * (z[:, 0].square() + (z[:, 1] - z[:, 0].square()).square())

    flow = Flow(StandardNormal(2), [AdditiveCoupling(2, 1, None, 32)])
    fit = pf.fit_energy(flow, energy, steps=600, seed=0, progress=False)
    kl = fit.best_loss + torch.tensor(2 * torch.pi).log().item()
    assert 0 <= kl < 0.02
    assert fit.scores[0][1] > fit.best_loss + 0.5


BAD = {
    "too few coordinates": (lambda: AdditiveCoupling(1), "input_dim must be"),
    "no hidden unit": (lambda: nice_layers(2, 1, hidden_dim=0), "hidden_dim must be"),
    "unknown mixing": (lambda: nice_layers(3, 1, "shuffle"), "mixing must be one of"),
    "negative depth": (lambda: nice_layers(3, -1), "num_layers must be"),
    "wrong width": (lambda: AdditiveCoupling(3)(torch.zeros(5, 2)), r"last dimension 3, got shape"),
    "wrong dtype": (lambda: AdditiveCoupling(3)(torch.zeros(5, 3).float()), "convert one of them"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_floors_of_the_energies() -> None:
    floors = [volume_preserving_floor(pf.targets.energy(k)) for k in (1, 2, 3, 4)]
    assert floors == pytest.approx([0.009, 0.053, 0.039, 0.030], abs=6e-4)


class ShearedGaussian:
    """U of N(0, I) after the shear z1 − z2²/2."""

    log_normalizer = math.log(2 * math.pi)

    def __call__(self, z: Tensor) -> Tensor:
        return 0.5 * ((z[..., 0] + 0.5 * z[..., 1].square()).square() + z[..., 1].square())


def test_floor_is_zero_for_a_sheared_gaussian() -> None:
    """A map of volume one takes N(0, I) there."""
    assert volume_preserving_floor(ShearedGaussian()) == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize("sd", [0.1, 5.0])
def test_floor_of_what_the_grid_cannot_tell_is_refused(sd: float) -> None:
    target = ShearedGaussian()
    target.log_normalizer = math.log(2 * math.pi * sd**2)
    with pytest.raises(ValueError, match="target must have its best Gaussian .* scale z"):
        volume_preserving_floor(Scaled(target, sd))


class Scaled:
    """U(z / sd), for the standard deviation sd."""

    def __init__(self, target: ShearedGaussian, sd: float) -> None:
        self.target, self.sd, self.log_normalizer = target, sd, target.log_normalizer

    def __call__(self, z: Tensor) -> Tensor:
        return self.target(z / self.sd)


def test_floor_by_an_independent_route() -> None:
    """U at points that fill a square evenly, in order, is U* at equal steps of the area."""
    target = pf.targets.energy(1)
    z = 12 * torch.quasirandom.SobolEngine(2).draw(2**17, dtype=torch.float64) - 6
    levels, step = target(z).sort().values, 144 / 2**17
    area = (torch.arange(2**17) + 0.5) * step
    found = []
    for scale in torch.linspace(0.9, 2.0, 50):
        m = 2 * torch.pi * scale**2
        q = (-area / m).exp() / m
        found.append((q * (q.log() + levels)).sum() * step + target.log_normalizer)
    assert volume_preserving_floor(target) == pytest.approx(min(found).item(), abs=5e-4)
