"""The signature of a funnel: a latent scale, and weights that scatter at its ends."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Independent

from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import Draws

PARTS = 5  # fifths of the draws, in the order of the scale
# Where torch's and Pyro's distributions keep a scale: of numbers, of multivariate normals and
# Student-t, of those of low rank.
SCALES = ("scale", "_unbroadcasted_scale_tril", "cov_factor", "cov_diag")
SCATTER = 1.5  # of the log weights, in an outer fifth against the middle one


class Funnel(NamedTuple):
    """A site of a location-scale prior, by the latents that its scale depends on.

    Attributes:
        scales: their names.
        matrix: whether the scale is a matrix, as that of a multivariate normal.
    """

    scales: list[str]
    matrix: bool


def find_funnels(problem: BoundModel, draws: Draws) -> dict[str, Funnel]:
    """Sites whose prior scale is another latent, where the weights scatter with it.

    Such a pair is a funnel where the data say little of the first site: its posterior is
    narrow at one end of the second and wide at the other, a guide that misses it fits the middle
    only, and log p − log q scatters at least 1.5 times as much in an outer fifth of the second
    site's draws as in the middle fifth.

    Returns:
        The first sites of all such pairs, each with its scales; none where the model cannot be run
        with gradients: what is looked for here is advice, which must not cost the report.
    """
    try:
        pairs = scale_pairs(problem, draws)
    except Exception:
        return {}
    scatters = {
        name: _scatters(draws.log_weights, draws.sites[name])
        for name in {name for pair in pairs.values() for name in pair.scales}
    }
    found = {
        site: pair._replace(scales=[name for name in pair.scales if scatters[name]])
        for site, pair in pairs.items()
    }
    return {site: pair for site, pair in found.items() if pair.scales}


def scale_pairs(problem: BoundModel, draws: Draws) -> dict[str, Funnel]:
    """Latents of a location-scale prior, each with the latents that its scale depends on.

    The dependence is read off the gradient of the scale at one draw.
    """
    best = int(draws.log_weights.nan_to_num(-torch.inf, -torch.inf, -torch.inf).argmax())
    values = {name: value[best].clone() for name, value in draws.sites.items()}
    leaves = {name: v.requires_grad_() for name, v in values.items() if v.is_floating_point()}
    with torch.enable_grad(), poutine.block(), pyro.validation_enabled(False):
        conditioned = poutine.trace(poutine.condition(problem.model, data=values))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trace = conditioned.get_trace(*problem.args, **problem.kwargs)
    pairs = {}
    for name, site in prune_subsample_sites(trace).nodes.items():
        found = _scale(site) if name in leaves else {}
        scale = {key: t for key, t in found.items() if t.requires_grad}
        if scale:
            grads = torch.autograd.grad(
                sum(t.sum() for t in scale.values()),
                list(leaves.values()),
                allow_unused=True,
                retain_graph=True,
            )
            used = [
                other
                for other, g in zip(leaves, grads, strict=True)
                if g is not None and bool(g.any())
            ]
            used = [other for other in used if other != name]
            pairs[name] = Funnel(used, matrix="scale" not in scale)
    return {name: pair for name, pair in pairs.items() if pair.scales}


def _scale(site: dict[str, Any]) -> dict[str, Tensor]:
    """What a site's distribution has for a scale, if it has a location and a scale."""
    fn = site["fn"]
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    held = vars(fn)  # a property may compute, and fail
    return {name: held[name] for name in SCALES if name in held} if "loc" in held else {}


def _scatters(log_weights: Tensor, scale: Tensor) -> bool:
    finite = log_weights.isfinite()
    log_weights, scale = log_weights[finite], scale[finite].reshape(int(finite.sum()), -1)
    for column in scale.unbind(1):
        parts = [log_weights[part].std() for part in column.argsort().chunk(PARTS)]
        if max(parts[0], parts[-1]) >= SCATTER * parts[len(parts) // 2]:
            return True
    return False
