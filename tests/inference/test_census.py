"""Modes found by ascents, on densities whose modes and evidence are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyroflow as pf
from pyroflow.inference.census import Mode, census, starts_around
from pyroflow.inference.missed import missed_by, shares_missed
from pyroflow.model.bound import BoundModel
from pyroflow.model.log_joint import LogJoint
from pyroflow.targets import eight_schools_centered

CENTRES = torch.tensor([[0.0, 0.0, 0.0], [6.0, -4.0, 2.0], [-5.0, 5.0, 8.0]], dtype=torch.float64)
SCALES = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
WEIGHTS = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)


def of_density(dim: int, log_density: Callable[[Tensor], Tensor]) -> Callable:
    """A model whose posterior is a density, with a wide prior to start from."""

    def model() -> None:
        prior = dist.Normal(torch.zeros(dim), 10.0).to_event(1)
        z = pyro.sample("z", prior)
        pyro.factor("density", log_density(z) - prior.log_prob(z))

    return model


def mixture(z: Tensor) -> Tensor:
    parts = dist.Normal(CENTRES, SCALES.unsqueeze(-1)).log_prob(z.unsqueeze(-2))
    return (parts.sum(-1) + WEIGHTS.log()).logsumexp(-1)


def taken(model: Callable, scale: float = 1.0) -> tuple[list[Mode], LogJoint]:
    """The census around N(0, scale²), and the log joint."""
    guide = pf.AutoPlanarFlow(model, num_layers=0, init_scale=scale).setup()
    bound = BoundModel(model, guide)
    log_joint = LogJoint(bound, guide, 128)
    return census(log_joint, starts_around(bound, guide, log_joint)), log_joint


def test_modes_of_a_mixture() -> None:
    """Places, scales and weights of well separated parts are those of its Gaussians."""
    modes, _ = taken(of_density(3, mixture))
    assert len(modes) == 3
    assert sum(mode.paths for mode in modes) >= 20
    for mode, centre, scale, weight in zip(modes, CENTRES, SCALES, WEIGHTS, strict=True):
        torch.testing.assert_close(mode.loc, centre, atol=0.05, rtol=0)
        torch.testing.assert_close(
            mode.scale @ mode.scale.T, scale**2 * torch.eye(3), atol=0.05 * float(scale**2), rtol=0
        )
        assert mode.bound == pytest.approx(math.log(weight), abs=0.01)


def test_what_a_guide_misses() -> None:
    model = of_density(3, mixture)
    modes, log_joint = taken(model)
    q = dist.Normal(CENTRES[0], SCALES[0]).to_event(1)
    missed = missed_by(modes, log_joint, q, math.log(WEIGHTS[0]))
    assert shares_missed(missed, math.log(WEIGHTS[0])) == pytest.approx([0.3, 0.1], abs=0.005)
    assert all(part.apart for part in missed)
    wide = dist.Normal(torch.zeros(3), 6.0).to_event(1)
    x = wide.sample((200_000,))
    weights = (mixture(x) - wide.log_prob(x)).softmax(0)
    assert missed_by(modes, log_joint, wide, 0.0, (x, weights)) == []


def test_starts_without_a_finite_density_are_left_out() -> None:
    log_joint = taken(of_density(3, mixture))[1]
    starts = torch.tensor([[0.1, 0.2, 0.3], [math.inf, 0.0, 0.0]])
    (mode,) = census(log_joint, starts)
    assert mode.paths == 1
    assert census(log_joint, starts[1:]) == []


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(0.0, (v / 2).exp()).expand([9]).to_event(1))


def banana() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(a**2, 0.3))


def poisson_process() -> None:
    """A latent Gaussian process with counts, as of log-Gaussian Cox processes."""
    t = torch.linspace(0, 1, 12)
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    length = pyro.sample("length", dist.LogNormal(-1.0, 0.5))
    cov = (-((t[:, None] - t) ** 2) / (2 * length[..., None, None] ** 2)).exp()
    root = torch.linalg.cholesky(cov + 1e-4 * torch.eye(12))
    eps = pyro.sample("eps", dist.Normal(torch.zeros(12), 1.0).to_event(1))
    f = scale[..., None] * (root @ eps.unsqueeze(-1)).squeeze(-1)
    counts = torch.tensor([1.0, 0, 2, 4, 7, 9, 6, 3, 2, 0, 1, 0])
    pyro.sample("y", dist.Poisson((1 + f).exp()).to_event(1), obs=counts)


@pytest.mark.parametrize("model", [eight_schools_centered, funnel, banana, poisson_process])
@pytest.mark.parametrize("seed", [0, 1])
def test_one_mode_is_one(model: Callable, seed: int) -> None:
    """Ridges that ascents follow slowly, and necks whose density is high and mass small."""
    pyro.set_rng_seed(seed)
    first, *others = taken(model)[0]
    assert sum(math.exp(mode.bound - first.bound) for mode in others) < 0.01
