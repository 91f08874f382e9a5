"""What the tests of saved guides share: a model, a guide for it, seeded draws, a round trip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyroflow as pf

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


def schools(y: Tensor | None = None) -> None:
    """Eight schools, with a site in a plate and two outside."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


def moved(guide: pf.AutoFlow, sd: float = 0.2) -> pf.AutoFlow:
    """The guide away from its start."""
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(sd * torch.randn_like(p))
    return guide


def made(model: Callable = schools, args: tuple = (Y,), **options: object) -> pf.AutoPlanarFlow:
    guide = pf.AutoPlanarFlow(model, **({"num_layers": 3} | options))
    guide(*args)
    return moved(guide)


def draws(guide: Callable, *args: object) -> dict[str, Tensor]:
    """Five draws at once with a fixed seed."""
    pyro.set_rng_seed(5)
    with torch.no_grad(), pyro.plate("draws", 5, dim=-2):
        return {name: value.clone() for name, value in guide(*args).items()}


def assert_same(there: dict[str, Tensor], here: dict[str, Tensor]) -> None:
    assert there.keys() == here.keys()
    for name, value in there.items():
        assert value.dtype == here[name].dtype, name
        assert torch.equal(value, here[name]), name


def returned(guide: pf.AutoFlow, tmp_path: Path, **options: object) -> pf.AutoFlow:
    pf.save(guide, tmp_path / "guide.pt")
    return pf.load(tmp_path / "guide.pt", **options)
