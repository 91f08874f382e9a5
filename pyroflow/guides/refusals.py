"""Latents that no guide of ours can treat: refused at set-up by name, with the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Distribution, VonMises
from torch.distributions.constraints import Constraint

from pyroflow.model.latents import Site, base_of, same_support
from pyroflow.model.supports import bijection
from pyroflow.seeds import seeded

# They say that they are on the real line, where each turn of the circle counts once more.
_CIRCULAR = (VonMises, dist.SineBivariateVonMises, dist.SineSkewed)
_CONSTANT = [value for value in vars(constraints).values() if isinstance(value, Constraint)]


def refuse_local_latents(sites: Iterable[Site]) -> None:
    """Raise ``ValueError`` for a latent in a plate that subsamples.

    A vector of all latents has no place for those of rows that were not drawn.
    """
    for site in sites:
        for frame in site["cond_indep_stack"]:
            if frame.full_size is not None and frame.size < frame.full_size:
                raise ValueError(
                    f"site {site['name']!r} is a latent in plate {frame.name!r}, which subsamples "
                    f"{frame.size} of {frame.full_size} rows: the guide would use the same "
                    f"{frame.size} latents for whichever rows are drawn. Use "
                    "pyroflow.AmortizedPlanarGuide, which makes them from the data of the rows "
                    "drawn, run the plate in full, or integrate the site out of the model"
                )


def refuse_unsupported(sites: Iterable[Site], error: NotImplementedError) -> None:
    """Raise ``ValueError`` for the site that Pyro had no guide for, where it can be told."""
    for site in sites:
        for frame in site["cond_indep_stack"]:
            if not frame.vectorized:
                raise ValueError(
                    f"site {site['name']!r} is a latent in the sequential plate {frame.name!r}: "
                    "guides know vectorised plates only; write `with pyro.plate(...)`, or a loop "
                    "over range"
                ) from error
        try:
            bijection(site["fn"].support)
        except NotImplementedError:
            raise ValueError(
                f"site {site['name']!r} has the support {site['fn'].support}, which no bijection "
                "of torch maps from unconstrained numbers: build it from parts that have one, a "
                "covariance from scales and an LKJCholesky"
            ) from error


def refuse_circular(sites: Iterable[Site]) -> None:
    """Raise ``ValueError`` for a latent angle.

    On the real line the evidence has a part for every turn, and on an interval the mass on one
    side of the cut is lost as soon as the posterior lies across it.
    """
    for site in sites:
        if _is_circular(site["fn"]):
            raise ValueError(
                f"site {site['name']!r} is a latent angle: no map without a cut takes the real "
                "line of a guide to the circle. Sample a direction for each angle, and give it the "
                "prior of the angle: "
                "v = pyro.sample('v', dist.Normal(0.0, 1.0).expand([2]).to_event(1)), "
                f"angle = pyro.deterministic({site['name']!r}, torch.atan2(v[..., 1], v[..., 0])), "
                "pyro.factor('prior', prior.log_prob(angle) + math.log(2 * math.pi))"
            )


def _is_circular(fn: Distribution) -> bool:
    """Whether a distribution, or one that it is made of, is of angles."""
    inner = [part for part in vars(fn).values() if isinstance(part, Distribution)]
    return isinstance(fn, _CIRCULAR) or any(map(_is_circular, inner))


def refuse_moving_supports(
    model: Callable, sites: Iterable[Site], args: tuple, kwargs: dict[str, Any]
) -> None:
    """Raise ``ValueError`` for a latent whose support another latent moves, or chance.

    Where a support has bounds, the model runs once more, at values of its latents beside the
    present ones: a bound may come by way of ``.item()``, which leaves no graph.
    """
    sites = {site["name"]: site for site in sites}
    if all(_is_constant(site["fn"].support) for site in sites.values()):
        return
    with seeded(0), torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
        values = {name: _beside(site) for name, site in sites.items()}
        run = poutine.trace(poutine.condition(model, data=values))
        nodes = run.get_trace(*args, **kwargs).nodes
    for name in sites.keys() & nodes.keys():
        if not same_support(sites[name]["fn"].support, nodes[name]["fn"].support):
            raise ValueError(
                f"site {name!r} has a support that another latent moves, or chance: its bounds are "
                "others in a second run of the model. A guide maps to those of the first, and "
                "would cut off the rest. Sample the site on a fixed support and move it in the "
                "model: u = pyro.sample('u', dist.Uniform(0.0, 1.0)), "
                f"x = pyro.deterministic({name!r}, low + (high - low) * u); or low + u, u positive"
            )


def _is_constant(support: Constraint) -> bool:
    return any(base_of(support) is constant for constant in _CONSTANT)


def _beside(site: Site) -> Tensor:
    to_support = bijection(site["fn"].support)
    latent = to_support.inv(site["value"].detach())
    return to_support(latent + 0.01 * (1 + latent.abs()) * torch.randn_like(latent))
