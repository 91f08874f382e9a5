"""A mixture of flows: one fitted at each mode, weighted by the evidence there."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import pyro
import torch

from pyroflow.guides import AutoFlow
from pyroflow.guides.mixture import MixtureGuide
from pyroflow.inference.gaussian_start import Gaussian, initialize
from pyroflow.inference.guide_fit import fit_flow
from pyroflow.inference.objectives import LogJointBound
from pyroflow.model.bound import BoundModel
from pyroflow.seeds import drawing

LEAST_WEIGHT = 0.002  # of a part
DRAWS = 2000  # of each part, behind the weights
ROUNDS = 5  # in which the weights are found


Part = tuple[AutoFlow, LogJointBound]


def fit_part(
    problem: BoundModel, guide: AutoFlow, start: Gaussian, part: AutoFlow, steps: int, seed: int
) -> Part:
    """A new guide fitted to the whole density from a Gaussian at a mode, where it stays.

    The reverse Kullback-Leibler divergence holds a part at its mode.

    Args:
        problem: the model, bound to ``guide``.
        guide: one that was fitted, whose coordinates the part takes.
        start: in those coordinates.
        part: the new guide; trained in place.
        steps: the most steps; 0 leaves it at the Gaussian.
        seed: of the fit.
    """
    part.setup(*problem.args, **problem.kwargs)
    part.coordinates = copy.deepcopy(guide.coordinates)
    initialize(part, start)
    bound = LogJointBound(problem.with_guide(part), "elbo", 1, None, seed=seed)
    if steps:
        fit_flow(bound, steps, seed, progress=False)
    return part, bound


@torch.no_grad()
def mixed(model: Callable, parts: Sequence[Part]) -> MixtureGuide:
    """The parts with the weights that maximise the bound of the mixture.

    π_k is the mean of the part's share of the density, over draws of all parts weighted by p/q.
    Parts below 0.2 % are left out.
    """
    posteriors, log_p, drawn = [part.get_posterior() for part, _ in parts], [], []
    with pyro.validation_enabled(False):
        for part, bound in parts:
            with drawing():
                x = part.flow().sample((DRAWS,))
            z, moved = x, 0.0
            if part.coordinates is not None:
                z, moved = part.coordinates.forward_and_log_det(x)
            log_p.append(bound.log_joint.values_and_gradients(x)[0].double() - moved)
            drawn.append(z)
        z, log_p = torch.cat(drawn), torch.cat(log_p)
        log_q = torch.stack([q.log_prob(z).double() for q in posteriors], -1)
    log_q = log_q.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    # Each part has drawn as many: of these draws the density is the plain mean.
    log_weights = log_p - (log_q.logsumexp(-1) - math.log(len(parts)))
    log_weights = log_weights.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    masses = log_weights.softmax(0).nan_to_num(0.0)
    weights = log_q.new_full((len(parts),), 1 / len(parts))
    for _ in range(ROUNDS):
        shares = (weights.log() + log_q).softmax(-1).nan_to_num(0.0)
        weights = (masses.unsqueeze(-1) * shares).sum(0)
    kept = weights >= min(LEAST_WEIGHT, weights.max().item())
    guides = [part for (part, _), keep in zip(parts, kept.tolist(), strict=True) if keep]
    return MixtureGuide(model, guides, weights[kept])
