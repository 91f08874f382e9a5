"""The signature of a funnel: a latent scale, and weights that scatter at its ends."""

from __future__ import annotations

import warnings
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyroflow.inference.draws import Draws
from pyroflow.inference.elbo import Problem

PARTS = 5  # fifths of the draws, in the order of the scale
SCATTER = 1.5  # of the log weights, in an outer fifth against the middle one


def find_funnels(problem: Problem, draws: Draws) -> dict[str, list[str]]:
    """Sites whose prior scale is another latent, where the weights scatter with it.

    Such a pair is a funnel where the data say little of the first site: its posterior is
    narrow at one end of the second and wide at the other, a guide that misses it fits the middle
    only, and log p − log q scatters at least 1.5 times as much in an outer fifth of the second
    site's draws as in the middle fifth.

    Returns:
        The first sites of all such pairs, each with its scales.
    """
    pairs = scale_pairs(problem, draws)
    return {
        site: scattering
        for site, scales in pairs.items()
        if (scattering := [s for s in scales if _scatters(draws.log_weights, draws.sites[s])])
    }


def scale_pairs(problem: Problem, draws: Draws) -> dict[str, list[str]]:
    """Latents of a location-scale prior, each with the latents that its scale depends on.

    The dependence is read off the gradient of the scale at one draw.
    """
    best = int(draws.log_weights.nan_to_num(-torch.inf).argmax())
    values = {name: value[best].clone() for name, value in draws.sites.items()}
    leaves = {name: v.requires_grad_() for name, v in values.items() if v.is_floating_point()}
    with torch.enable_grad(), poutine.block(), pyro.validation_enabled(False):
        conditioned = poutine.trace(poutine.condition(problem.model, data=values))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trace = conditioned.get_trace(*problem.args, **problem.kwargs)
    pairs = {}
    for name, site in prune_subsample_sites(trace).nodes.items():
        scale = _scale(site) if name in leaves else None
        if scale is not None and scale.requires_grad:
            grads = torch.autograd.grad(
                scale.sum(), list(leaves.values()), allow_unused=True, retain_graph=True
            )
            used = [
                other
                for other, g in zip(leaves, grads, strict=True)
                if g is not None and bool(g.any())
            ]
            pairs[name] = [other for other in used if other != name]
    return {name: others for name, others in pairs.items() if others}


def _scale(site: dict[str, Any]) -> Tensor | None:
    """The scale of a site's distribution, if it has a location and a scale."""
    fn = site["fn"]
    while hasattr(fn, "base_dist") and not hasattr(fn, "scale"):
        fn = fn.base_dist
    return fn.scale if hasattr(fn, "loc") and isinstance(fn.scale, Tensor) else None


def _scatters(log_weights: Tensor, scale: Tensor) -> bool:
    finite = log_weights.isfinite()
    log_weights, scale = log_weights[finite], scale[finite].reshape(int(finite.sum()), -1)
    for column in scale.unbind(1):
        parts = [log_weights[part].std() for part in column.argsort().chunk(PARTS)]
        if max(parts[0], parts[-1]) >= SCATTER * parts[len(parts) // 2]:
            return True
    return False
