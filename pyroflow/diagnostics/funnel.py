"""The signature of a funnel: a latent scale, and weights that scatter at its ends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pyro.distributions import Distribution, ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import Independent

from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import Draws
from pyroflow.model.program import Program

PARTS = 5  # fifths of the draws, in the order of the scale
SCATTER = 1.5  # of the log weights, in an outer fifth against the middle one
# Where torch's and Pyro's distributions keep a scale: of numbers, of multivariate normals and
# Student-t, of those of low rank.
SCALES = ("scale", "_unbroadcasted_scale_tril", "cov_factor", "cov_diag")


class Funnel(NamedTuple):
    """A site of a location-scale prior, by the latents that its scale depends on."""

    scales: list[str]
    matrix: bool  # whether the scale is one, as that of a multivariate normal


def find_funnels(bound: BoundModel, draws: Draws) -> dict[str, Funnel]:
    """Sites whose prior scale is another latent, where the weights scatter with it.

    Such a pair is a funnel where the data say little of the first site: its posterior is
    narrow at one end of the second and wide at the other, a guide that misses it fits the middle
    only, and log p − log q scatters more in an outer fifth of the second site's draws than in the
    middle fifth. None are found where the model cannot be run with gradients: what is looked for
    here is advice, which must not cost the report.
    """
    try:
        pairs = scale_pairs(bound, draws)
    except Exception:
        return {}
    scales = {name for pair in pairs.values() for name in pair.scales}
    scattered = {name for name in scales if _scatters(draws.log_weights, draws.sites[name])}
    found = {site: [n for n in pair.scales if n in scattered] for site, pair in pairs.items()}
    return {site: Funnel(names, pairs[site].matrix) for site, names in found.items() if names}


def scale_pairs(bound: BoundModel, draws: Draws) -> dict[str, Funnel]:
    """Latents of a location-scale prior, each with the latents that its scale depends on.

    The dependence is read off the gradient of the scale at the draw with the largest weight.
    """
    best = int(draws.log_weights.nan_to_num(-torch.inf, -torch.inf, -torch.inf).argmax())
    values = {name: value[best : best + 1].clone() for name, value in draws.sites.items()}
    leaves = {name: v.requires_grad_() for name, v in values.items() if v.is_floating_point()}
    program = Program(bound.model, bound.args, bound.kwargs)
    with torch.enable_grad():
        program.keep_records(values)
    pairs = {}
    for name in leaves:
        scale = _scale(program.records[name]["fn"])
        if scale:
            total, inputs = sum(t.sum() for t in scale.values()), list(leaves.values())
            grads = torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=True)
            used = [n for n, g in zip(leaves, grads, strict=True) if g is not None and g.any()]
            pairs[name] = Funnel([n for n in used if n != name], matrix="scale" not in scale)
    return {name: pair for name, pair in pairs.items() if pair.scales}


def _scale(fn: Distribution) -> dict[str, Tensor]:
    """What a distribution with a location has for a scale, as far as that depends on latents."""
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    held = vars(fn)  # a property may compute, and fail
    scale = {name: held[name] for name in SCALES if name in held} if "loc" in held else {}
    return {name: t for name, t in scale.items() if t.requires_grad}


def _scatters(log_weights: Tensor, scale: Tensor) -> bool:
    finite = log_weights.isfinite()
    log_weights, scale = log_weights[finite], scale[finite].reshape(int(finite.sum()), -1)
    for column in scale.unbind(1):
        parts = [log_weights[part].std() for part in column.argsort().chunk(PARTS)]
        if max(parts[0], parts[-1]) >= SCATTER * parts[len(parts) // 2]:
            return True
    return False
