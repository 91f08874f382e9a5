"""The latent sites of a guide as plain data, in place of the model and its arguments."""

from __future__ import annotations

from math import prod
from typing import Any

import pyro.distributions as dist
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Size, Tensor
from torch.distributions.constraints import Constraint

from pyroflow.model.supports import bijection
from pyroflow.saving.table import UndescribedError, build, describe

Description = dict[str, Any]

WIDEST_PLATE = 10**8  # rows that a plate may subsample, all of which Pyro shuffles at each call


def describe_sites(guide: AutoContinuous) -> list[Description]:
    """Names, shapes, supports and plates of the latents, in the order of the flow's vector.

    A bound that depends on data is the number that it had when the guide was set up.

    Raises:
        UndescribedError: a support that is not in the table, by site.
    """
    return [
        {
            "name": name,
            "batch_shape": list(site["fn"].batch_shape),
            "event_shape": list(site["fn"].event_shape),
            "unconstrained_shape": list(guide._unconstrained_shapes[name]),
            "support": _describe_support(name, site["fn"].support),
            "plates": [_describe_plate(frame) for frame in site["cond_indep_stack"]],
        }
        for name, site in guide.prototype_trace.iter_stochastic_nodes()
    ]


def _describe_support(site_name: str, support: Constraint) -> Description:
    try:
        return describe(support)
    except UndescribedError as error:
        raise UndescribedError(f"{error}, the support of site {site_name!r}") from error


def _describe_plate(frame: CondIndepStackFrame) -> Description:
    full_size = None if frame.full_size is None else int(frame.full_size)
    return {
        "name": frame.name,
        "dim": frame.dim,
        "size": int(frame.size),
        "full_size": full_size,
    }


def restore_sites(guide: AutoContinuous, sites: list[Description], like: Tensor) -> None:
    """Set what a run of the model would tell the guide.

    Args:
        guide: not set up.
        sites: of :func:`describe_sites`.
        like: has the dtype and device of the latents, and one number for each.

    Raises:
        ValueError: shapes and plates that do not fit these numbers, which the guide would else
            make room for when it is called.
    """
    claimed = sum(prod(site["unconstrained_shape"]) for site in sites)
    if claimed != len(like):
        raise ValueError(f"its sites have {claimed} latents, and its flow {len(like)}")
    guide.prototype_trace = poutine.Trace()
    guide._prototype_frames, guide._unconstrained_shapes, guide._cond_indep_stacks = {}, {}, {}
    for site in sites:
        name, shape = site["name"], Size(site["unconstrained_shape"])
        frames = tuple(CondIndepStackFrame(counter=0, **plate) for plate in site["plates"])
        guide.prototype_trace.add_node(name, **_node(site, shape, frames, like))
        guide._unconstrained_shapes[name], guide._cond_indep_stacks[name] = shape, frames
        guide._prototype_frames.update({frame.name: frame for frame in frames})
    guide.latent_dim = sum(shape.numel() for shape in guide._unconstrained_shapes.values())
    guide._create_plates()


def _node(site: Description, shape: Size, frames: tuple, like: Tensor) -> dict[str, Any]:
    """A node of a trace. Its value is any one inside the support, of the right shape."""
    support = build(site["support"])
    value = bijection(support)(like.new_zeros(shape))
    if value.shape != Size(site["batch_shape"] + site["event_shape"]):
        raise ValueError(f"site {site['name']!r} has values of another shape, {list(value.shape)}")
    for frame in frames:
        if frame.size != site["batch_shape"][frame.dim] or (frame.full_size or 0) > WIDEST_PLATE:
            raise ValueError(f"site {site['name']!r} does not fit its plate {frame.name!r}")
    return {
        "type": "sample",
        "name": site["name"],
        "fn": dist.ImproperUniform(support, Size(site["batch_shape"]), Size(site["event_shape"])),
        "value": value,
        "is_observed": False,
        "cond_indep_stack": frames,
        "args": (),
        "kwargs": {},
        "infer": {},
        "scale": 1.0,
        "mask": None,
    }
