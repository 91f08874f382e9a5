"""The choice of the coordinates in which a guide fits best: how far its latents are centred."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyroflow.guides import AutoFlow
from pyroflow.guides.coordinates import Coordinates
from pyroflow.inference.gaussian_start import (
    TESTED_BY,
    Gaussian,
    best_gaussian,
    moved_on,
    normal_pairs,
)
from pyroflow.model.log_joint import LogJoint

ROUNDS = 3  # of Gaussian → c → Gaussian
MOVES = 20  # of a Gaussian, after each change of c
DRAWS = 256  # behind the mean curvature of the priors
GAIN = 0.01  # nats, that another round must have brought


@torch.no_grad()
def best_coordinates(
    log_joint: LogJoint, guide: AutoFlow, bar: tqdm | None = None
) -> Gaussian | None:
    r"""Set c of an untouched guide's coordinates, and return the best Gaussian in them.

    The conditional standard deviation of a latent shall not change with the latents that its
    prior takes its scale from. To first order that is c = h/(h + i/s²), with h the curvature of
    all that follows from the latent (data, other latents) and i/s² that of its prior; h is what
    the Gaussian's precision has beyond the prior's expected curvature. Gaussian and c are found in
    turn, from all latents as written (c = 1) and non-centred (c = 0), and the c with the highest
    bound is kept: the formula's by element, its mean by site, 1 or 0.

    Args:
        log_joint: of the guide's model, in the guide's coordinates.
        guide: where it starts is where the ascents start.
        bar: of a total of ``TICKS`` of :mod:`~pyroflow.inference.gaussian_start`.
    """
    coordinates = guide.coordinates
    if coordinates is None or guide.centring_given != "auto":
        return best_gaussian(log_joint, guide.start(), bar)
    z = guide.start()
    centred = torch.ones_like(coordinates.c)
    free = coordinates.spread(dict.fromkeys(coordinates.centring, 0.0))
    found = []
    for c in (centred, free):
        coordinates.set(c, z)
        gaussian = best_gaussian(log_joint, coordinates.inv(z), bar)
        found += [] if gaussian is None else [(gaussian, c, z)]
    if not found:
        coordinates.set(centred)
        return None
    best = max(found, key=lambda each: each[0].bound)
    test = normal_pairs(TESTED_BY, z)
    for _ in range(ROUNDS):
        tried = _by_formula(log_joint, coordinates, best, test)
        better = max([best, *tried], key=lambda each: each[0].bound)
        gained, best = better[0].bound - best[0].bound, better
        if gained < GAIN:
            break
    gaussian, c, z = best
    coordinates.set(c, z)
    return gaussian


Found = tuple[Gaussian, Tensor, Tensor]  # with the c and the z that the coordinates are set by


def _by_formula(
    log_joint: LogJoint, coordinates: Coordinates, best: Found, test: Tensor
) -> list[Found]:
    """The Gaussians in the coordinates that the best one so far suggests."""
    gaussian, c, z = best
    coordinates.set(c, z)
    wanted, at = _suggested(coordinates, gaussian), coordinates(gaussian.loc)
    means = {name: part.mean() for name, part in _by_site(coordinates, wanted).items()}
    found = []
    for c in (wanted, coordinates.spread(means)):
        coordinates.set(*best[1:])
        scale = torch.autograd.functional.jacobian(coordinates, gaussian.loc) @ gaussian.scale
        coordinates.set(c, at)
        loc = coordinates.inv(at)
        scale = torch.linalg.solve(torch.autograd.functional.jacobian(coordinates, loc), scale)
        if bool(scale.isfinite().all() & loc.isfinite().all()):
            start = Gaussian(loc, scale, -torch.inf)
            found.append((moved_on(log_joint, start, MOVES, test), c, at))
    return found


def _suggested(coordinates: Coordinates, gaussian: Gaussian) -> Tensor:
    """The formula's c, shape (D,), of a Gaussian in the present coordinates."""
    loc, scale, _ = gaussian
    precision = torch.cholesky_inverse(scale).diagonal()
    x = loc + normal_pairs(DRAWS, loc) @ scale.mT
    own = _prior_curvature(coordinates, x).nan_to_num(torch.inf).mean(0)
    here = _prior_curvature(coordinates, loc)
    downstream = (precision - own).clamp(min=0)
    return torch.where(here > 0, downstream / (downstream + here), 1.0).clamp(0, 1)


def _prior_curvature(coordinates: Coordinates, x: Tensor) -> Tensor:
    """Expected negative second derivatives of the priors in each x (*B, D); 0 for other sites."""
    c, *units = coordinates.tensors()
    found, at = torch.zeros_like(x), _by_site(coordinates, c)
    priors = zip(coordinates.sites, coordinates.read(coordinates(x)), units, strict=True)
    for site, prior, unit in priors:
        factor, _ = prior.factor(at[site["name"]], unit)
        if prior.matrix:
            white = torch.linalg.solve_triangular(prior.scale, factor, upper=False)
            curvature = white.square().sum(-2)
        else:
            curvature = (factor / prior.scale).square()
        curvature = (curvature * prior.information).reshape((*x.shape[:-1], -1))
        found[..., site["start"] : site["stop"]] = curvature
    return found


def _by_site(coordinates: Coordinates, numbers: Tensor) -> dict[str, Tensor]:
    """The parts of a vector (D,) that belong to the sites, in their shapes."""
    return {
        site["name"]: numbers[site["start"] : site["stop"]].reshape(site["shape"])
        for site in coordinates.sites
    }
