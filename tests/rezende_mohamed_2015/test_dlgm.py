"""The deep latent Gaussian model: its networks, its bound by hand, its flows, its start."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.distributions import Transform

from pyroflow.transforms import ConditionalPlanar, ConditionalSylvester
from rezende_mohamed_2015.dlgm import DLGM, Maxout, Terms
from rezende_mohamed_2015.mnist import layers
from rezende_mohamed_2015.nice import nice_layers

D, H, X = 3, 8, 6
LN_2PI = math.log(2 * math.pi)


def planar() -> list[Transform]:
    return [ConditionalPlanar(D, H, 4, hidden_dims=())]


def sylvester() -> list[Transform]:
    return [ConditionalSylvester(D, H, 2, 3, "qr", hidden_dims=())]


FLOWS = {
    "none": list,
    "planar": planar,
    "Sylvester": sylvester,
    "NICE": lambda: nice_layers(D, 4, hidden_dim=5),
}


def wild(transforms: Sequence[Transform], latent_dim: int = D, data_dim: int = X) -> DLGM:
    """With parameters of sd 1, far from where training starts, but for the scales of q_0."""
    dlgm = DLGM(data_dim, transforms, latent_dim=latent_dim, hidden_dim=H, centre=None)
    with torch.no_grad():
        for p in dlgm.parameters():
            p.normal_()
        dlgm.q_0.weight[latent_dim:] *= 0.1
    return dlgm


def images(count: int, data_dim: int = X) -> Tensor:
    return torch.rand(count, data_dim).bernoulli()


def maxout_by_loop(layer: Maxout, x: Tensor, units: int, window: int) -> Tensor:
    weight, bias = layer.linear.weight, layer.linear.bias
    rows = [
        max((weight[k * units + j] @ x + bias[k * units + j]).item() for k in range(window))
        for j in range(units)
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("window", [1, 4])
def test_maxout_by_loop(window: int) -> None:
    layer, x = Maxout(5, 7, window), torch.randn(2, 3, 5)
    assert layer.linear.weight.shape == (7 * window, 5)
    found = layer(x)
    assert found.shape == (2, 3, 7)
    torch.testing.assert_close(found[1, 2], maxout_by_loop(layer, x[1, 2], 7, window))


def test_networks_have_the_papers_sizes() -> None:
    """784 to 400 units, the largest of 4; the same on the way back."""
    dlgm = DLGM(784)
    sizes = {name: tuple(p.shape) for name, p in dlgm.named_parameters() if "weight" in name}
    assert sizes == {
        "encoder.linear.weight": (1600, 784),
        "q_0.weight": (80, 400),
        "decoder.linear.weight": (1600, 40),
        "outputs.weight": (784, 400),
    }


def test_the_bound_by_hand() -> None:
    """F = E[ln q_0(z_0) − Σ ln |1 + u_kᵀψ_k| − ln p(x|z_K) − ln p(z_K)], and β on the joint."""
    flow = planar()[0]
    dlgm, x = wild([flow]), images(5)
    with torch.no_grad():
        hidden = dlgm.encoder(x)
        mean, log_scale = dlgm.q_0(hidden).chunk(2, -1)
        pyro.set_rng_seed(7)
        noise = torch.randn(2, 5, D)
        z = mean + log_scale.exp() * noise
        log_q = (-noise.square() / 2 - LN_2PI / 2 - log_scale).sum(-1)
        layers = flow.condition(hidden / H**0.5)
        w, b, dot = layers.w, layers.b, (layers.w * layers.u).sum(-1)
        stretch = (-1 + dot.exp().log1p() - dot) / w.square().sum(-1)
        u = layers.u + stretch[..., None] * w  # û, appendix A.1
        for k in range(4):
            h = torch.tanh((z * w[:, k]).sum(-1, keepdim=True) + b[:, k, None])
            log_q = log_q - (1 + (1 - h**2).squeeze(-1) * (w * u)[:, k].sum(-1)).log()
            z = z + u[:, k] * h
        signs = (2 * x - 1) * dlgm.outputs(dlgm.decoder(z))
        likelihood = -(-signs).exp().log1p().sum(-1)
        prior = -z.square().sum(-1) / 2 - D / 2 * LN_2PI
        pyro.set_rng_seed(7)
        terms = dlgm(x, 2)
    torch.testing.assert_close(terms.log_joint, likelihood + prior)
    torch.testing.assert_close(terms.log_q, log_q)
    for beta in (0.01, 0.5, 1.0):
        right = (log_q - beta * (likelihood + prior)).mean(0)
        torch.testing.assert_close(terms.bound(beta), right)


def test_beta_leaves_the_entropy_alone() -> None:
    terms = Terms(torch.tensor([[-8.0], [-4.0]]), torch.tensor([[1.0], [2.0]]))
    assert terms.bound(0.5).item() == 1.5 + 0.5 * 6
    assert terms.bound().item() == 1.5 + 6


@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
def test_log_q_is_the_density_of_its_own_samples(make: Callable) -> None:
    """Through the Jacobian of z_0 ↦ z_K, image by image; with no cache to help."""
    dlgm, x = wild(make()), images(3)
    q = dlgm.posterior(x)
    z = q.sample((2,))
    fresh = dlgm.posterior(x).log_prob(z.clone())
    for n in range(3):
        one = dlgm.posterior(x[n : n + 1])
        for s in range(2):
            z_0 = z[s, n : n + 1].clone()
            for t in reversed(one.transforms):
                z_0 = t.inv(z_0)

            def forward(z: Tensor, parts: Sequence[Transform] = one.transforms) -> Tensor:
                for t in parts:
                    z = t(z)
                return z

            jacobian = torch.autograd.functional.jacobian(forward, z_0).reshape(D, D)
            right = one.base_dist.log_prob(z_0).item() - jacobian.slogdet().logabsdet.item()
            assert fresh[s, n].item() == pytest.approx(right, abs=1e-8)


def test_the_parameters_of_a_flow_are_the_images_own() -> None:
    """Amortised (section 4.2): another image has another flow, NICE the same for all."""
    x = images(2)
    x[1] = 1 - x[0]
    own = wild(planar()).posterior(x).transforms[0]
    assert (own.w[0] - own.w[1]).abs().min() > 1e-3
    shared = wild(FLOWS["NICE"]()).posterior(x).transforms
    z = torch.randn(D).expand(2, D)
    for t in shared:
        z = t(z)
    assert torch.equal(z[0], z[1])


@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
def test_pyro_agrees(make: Callable) -> None:
    """As a model and a guide of Pyro, with its own ELBO and the same noise."""
    dlgm, x = wild(make()), images(50)
    pyro.set_rng_seed(3)
    by_pyro = Trace_ELBO().loss(dlgm.model, dlgm.guide, x)
    pyro.set_rng_seed(3)
    assert by_pyro == pytest.approx(dlgm(x).bound().sum().item(), rel=1e-9)


def test_the_centre_is_taken_off_before_the_inference_network() -> None:
    dlgm, x, centre = wild(planar()), images(5), torch.rand(X)
    shifted = copy.deepcopy(dlgm)
    shifted.centre.copy_(centre)
    z = torch.randn(5, D)
    assert not torch.allclose(shifted.posterior(x).log_prob(z), dlgm.posterior(x).log_prob(z))
    expected = dlgm.posterior(x - centre).log_prob(z)
    assert torch.allclose(shifted.posterior(x).log_prob(z), expected)
    assert torch.equal(shifted.log_joint(x, z[None]), dlgm.log_joint(x, z[None]))


def test_pyro_trains_it() -> None:
    dlgm, x = DLGM(X, planar(), latent_dim=D, hidden_dim=H), images(50)
    svi = SVI(dlgm.model, dlgm.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(200)]
    assert sum(losses[-20:]) < 0.95 * sum(losses[:20])
    assert all(p.grad is not None for p in dlgm.parameters())


@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
def test_a_copy_is_its_own(make: Callable) -> None:
    dlgm, x = wild(make()), images(4)
    dlgm(x).bound().sum().backward()
    twin = copy.deepcopy(dlgm)
    pyro.set_rng_seed(1)
    before = dlgm(x).bound()
    with torch.no_grad():
        for p in dlgm.parameters():
            p.mul_(1.1)
    pyro.set_rng_seed(1)
    assert torch.equal(twin(x).bound(), before)
    pyro.set_rng_seed(1)
    assert (dlgm(x).bound() - before).abs().min() > 1e-6


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
def test_float32_follows_float64(make: Callable) -> None:
    dlgm = wild(make())
    x, z = images(20), torch.randn(20, D)
    single = dlgm(x)
    assert single.log_q.dtype == torch.float32
    found = dlgm.log_joint(x, z[None])
    exact = copy.deepcopy(dlgm).double().log_joint(x.double(), z[None].double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    double = copy.deepcopy(dlgm).double()
    at = dlgm.posterior(x).sample()
    q, q_exact = dlgm.posterior(x).log_prob(at.clone()), double.posterior(x.double())
    torch.testing.assert_close(q.double(), q_exact.log_prob(at.double()), rtol=1e-3, atol=1e-2)


def test_sizes_below_one_are_refused() -> None:
    for name in ("latent_dim", "hidden_dim"):
        with pytest.raises(ValueError, match=name):
            DLGM(X, **{name: 0})


# where training starts


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("K", [10, 80])
def test_planar_layers_start_near_the_identity(K: int) -> None:
    """80 layers start no worse than none: nothing is to be unlearnt first."""
    flow = ConditionalPlanar(40, 400, K, hidden_dims=())
    z = torch.randn(100, 40)
    layers = flow.condition(torch.randn(100, 400) / 20)
    assert (layers(z) - z).norm(dim=-1).max() < 0.5 * z.norm(dim=-1).mean()
    assert layers.log_abs_det_jacobian(z, layers(z)).abs().max() < 2


@pytest.mark.usefixtures("float32")
def test_nice_starts_at_the_identity_but_for_the_order() -> None:
    z = torch.randn(100, 40)
    y = z
    for t in layers("NICE", 10):
        y = t(y)
    torch.testing.assert_close(y.sort(-1).values, z.sort(-1).values)
