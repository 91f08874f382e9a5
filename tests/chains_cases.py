"""Targets with known answers, and guides that are far from them, for chains."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyroflow as pf
from pyroflow.chains.sampler import _bound
from pyroflow.chains.target import Target
from pyroflow.model.supports import bijection

MEAN = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
FACTOR = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [-0.5, 0.3, 0.8]], dtype=torch.float64)


def gaussian() -> None:
    """Three correlated numbers."""
    like = torch.get_default_dtype()
    pyro.sample("z", dist.MultivariateNormal(MEAN.to(like), scale_tril=FACTOR.to(like)))


def student() -> None:
    """A number with heavy tails, five degrees of freedom, and a positive one."""
    pyro.sample("t", dist.StudentT(torch.tensor(5.0), 1.0, 2.0))
    pyro.sample("s", dist.Gamma(torch.tensor(3.0), 2.0))


def draw_gaussian(num: int) -> Tensor:
    return MEAN + torch.randn(num, 3) @ FACTOR.T


def draw_student(num: int) -> Tensor:
    """Unconstrained, in the order of the model."""
    t = dist.StudentT(5.0, 1.0, 2.0).sample((num,))
    s = dist.Gamma(3.0, 2.0).sample((num,))
    return torch.stack([t, bijection(dist.Gamma(3.0, 2.0).support).inv(s)], 1)


TARGETS = {"gaussian": (gaussian, draw_gaussian), "student": (student, draw_student)}


def poor_guide(model: Callable, scale: float = 1.3) -> pf.AutoPlanarFlow:
    """A diagonal Gaussian that was never trained, with two layers that bend it."""
    guide = pf.AutoPlanarFlow(model, 2, "diagonal", init_scale=scale).setup()
    with torch.no_grad():
        for p in guide.planar.parameters():
            p += 0.3 * torch.randn_like(p)
    return guide


def target_of(model: Callable, guide: pf.AutoFlow, num: int) -> Target:
    return Target(_bound(model, guide, (), None), guide, num)
