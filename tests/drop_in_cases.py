"""The guides and the model that the tests of drop-in use share."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from torch import Tensor
from torch.distributions.transforms import IndependentTransform

import pyroflow as pf

COUNTS = torch.tensor([4.0, 6.0, 5.0, 7.0, 3.0])


def mixed_layers(latent_dim: int) -> list:
    """Layers of pyroflow around one of Pyro."""
    spline = IndependentTransform(T.spline(latent_dim), 1, cache_size=1)
    return [pf.Planar(latent_dim, 2), spline, pf.Radial(latent_dim)]


GUIDES = {
    "planar": lambda model, **options: pf.AutoPlanarFlow(model, 3, **options),
    "sylvester": lambda model, **options: pf.AutoSylvesterFlow(model, num_layers=2, **options),
    "mixed": lambda model, **options: pf.AutoFlow(model, mixed_layers, **options),
}


def readings() -> Tensor:
    """Twenty numbers around 3."""
    return 3.0 + torch.linspace(-1.0, 1.0, 20)


def model(y: Tensor) -> None:
    """A location with posterior N(60/20.25, 1/20.25), and a rate with Gamma(27, 6)."""
    loc = pyro.sample("loc", dist.Normal(torch.tensor(0.0), 2.0))
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
    with pyro.plate("counts", len(COUNTS)):
        pyro.sample("count", dist.Poisson(rate), obs=COUNTS)


def mixture(y: Tensor) -> None:
    """Two clusters, with a discrete side for each row."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("rows", len(y)):
        side = pyro.sample("side", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(torch.where(side > 0, loc[..., 1], loc[..., 0]), 0.3), obs=y)


def train(step: Callable[[], object], steps: int = 60) -> None:
    """Run a training step many times."""
    for _ in range(steps):
        step()


def check_posterior(guide: pf.AutoFlow) -> None:
    """Medians near the exact ones; at the start they are 3 away."""
    median = guide.median()
    assert abs(median["loc"] - 60 / 20.25) < 0.5
    assert abs(median["rate"] - 4.45) < 1.3


def trainable(guide: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters that decide the guide; of one latent no lower triangle does."""
    return {name: p for name, p in guide.named_parameters() if not _idle(name, p)}


def _idle(name: str, p: Tensor) -> bool:
    return name.endswith("lower") and p.numel() == 1


def snapshot(guide: torch.nn.Module) -> dict[str, Tensor]:
    """Their present values."""
    return {name: p.detach().clone() for name, p in trainable(guide).items()}


def check_all_moved(guide: torch.nn.Module, before: dict[str, Tensor]) -> None:
    """Every trained tensor differs from what it was."""
    same = [name for name, p in trainable(guide).items() if torch.equal(p, before[name])]
    assert same == []
