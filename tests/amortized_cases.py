"""Models with latents in a plate, and guides that are their exact posterior."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyroflow as pf

Y = torch.arange(20.0, dtype=torch.float64)
BY_ROW = 0.5 * (Y.square() / 100.25 + math.log(2 * math.pi * 100.25))  # minus log evidence
LOSS = BY_ROW.sum().item()
SHRINK, SD = 100 / 100.25, math.sqrt(25 / 100.25)  # z_n | y_n ~ N(SHRINK y_n, SD²)


def rows_model(y: Tensor, batch: int | None = 5, index: Tensor | None = None) -> None:
    """z_n ~ N(0, 10²), y_n ~ N(z_n, 0.5²): the case in which Pyro's flow guide is wrong."""
    with pyro.plate("rows", 20, subsample_size=batch, subsample=index) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y[rows] if len(y) == 20 else y)


def effects_model(y: Tensor, batch: int | None = None) -> None:
    """Random effects: mu ~ N(0, 2²), z_n ~ N(mu, 1), y_n ~ N(z_n, 0.5²)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y), subsample_size=batch) as rows:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y[rows])


def raw(scale: float) -> float:
    return math.log(math.expm1(scale))


@torch.no_grad()
def set_exact(guide: pf.AmortizedPlanarGuide, y: Tensor = Y) -> None:
    """Give a guide of depth 0 for ``rows_model`` the parameters of the posterior."""
    flow = guide.local_flow
    flow.affine.raw_scale.fill_(raw(SD))
    if guide.context is None:
        flow.tables[3].copy_(SHRINK * y[:, None] - flow.affine.offset)
    else:
        flow.affine.offset.copy_(SHRINK * guide.context.loc)
        flow.linear.nn.weight.copy_(SHRINK * guide.context.scale)


def exact_guide(context: str | None = "y") -> pf.AmortizedPlanarGuide:
    guide = pf.AmortizedPlanarGuide(rows_model, "rows", context, num_layers=0).setup(Y)
    set_exact(guide)
    return guide


@torch.no_grad()
def exact_effects(y: Tensor) -> tuple[pf.AmortizedPlanarGuide, float]:
    """The posterior of ``effects_model`` by linear algebra: in a guide, with the log evidence."""
    n = len(y)
    marginal = dist.MultivariateNormal(torch.zeros(n), 4.0 * torch.ones(n, n) + 1.25 * torch.eye(n))
    precision = 0.25 + n / 1.25
    loc, sd = y.sum().item() / 1.25 / precision, precision**-0.5
    guide = pf.AmortizedPlanarGuide(effects_model, "rows", "y", num_layers=0, global_layers=0)
    guide.setup(y)
    above = guide.global_guide.affine
    above.offset.fill_(loc)
    above.raw_scale.fill_(raw(sd))
    # z_n | y_n, mu ~ N((4 y_n + mu) / 5, 1 / 5), with mu = loc + sd h for the feature h.
    flow = guide.local_flow
    flow.affine.raw_scale.fill_(raw(0.2**0.5))
    flow.affine.offset.copy_((4 * guide.context.loc + loc) / 5)
    flow.linear.nn.weight.copy_(4 * guide.context.scale / 5)
    flow.shift.fill_(sd / 5)
    return guide, marginal.log_prob(y).item()
