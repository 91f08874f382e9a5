"""The choice of the coordinates in which a guide fits best: how far its latents are centred."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyroflow.guides import AutoFlow
from pyroflow.guides.coordinates import Coordinates
from pyroflow.guides.recording import spread
from pyroflow.inference.gaussian_start import (
    TESTED_BY,
    Gaussian,
    best_gaussian,
    moved_on,
    normal_pairs,
)
from pyroflow.model.centring import Prior
from pyroflow.model.log_joint import LogJoint

ROUNDS = 3  # of Gaussian → c → Gaussian
MOVES = 20  # of a Gaussian, after each change of c
DRAWS = 256  # behind the mean curvature of the priors
ALIKE = 1e-3  # difference of the logarithms of scales that are one
SMALLEST = 1e-6  # part of the prior in the precision of a vector that is not left as written
GAIN = 0.01  # nats, that another round must have brought


@torch.no_grad()
def best_coordinates(
    log_joint: LogJoint, guide: AutoFlow, bar: tqdm | None = None
) -> tuple[Gaussian | None, list[Tensor]]:
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

    Returns:
        The Gaussian, None if there is no sound one; and where the ascents led, of shape (D,) each,
        in the unconstrained latents.
    """
    coordinates = guide.coordinates
    if coordinates is None or guide.centring_given != "auto":
        best, ends = best_gaussian(log_joint, guide.start(), bar)
        return best, ends if coordinates is None else [coordinates(x) for x in ends]
    z, ends = guide.start(), []
    centred = torch.ones_like(coordinates.c)
    free = spread(coordinates, dict.fromkeys(coordinates.centring, 0.0))
    found = []
    for place in (Place(centred, z, {}), Place(free, z, {})):
        coordinates.set(*place)
        gaussian, there = best_gaussian(log_joint, coordinates.inv(z), bar)
        ends += [coordinates(x) for x in there]
        found += [] if gaussian is None else [(gaussian, place)]
    if not found:
        coordinates.set(centred, z)
        return None, ends
    best = max(found, key=lambda each: each[0].bound)
    test = normal_pairs(TESTED_BY, z)
    for _ in range(ROUNDS):
        tried = _by_formula(log_joint, coordinates, *best, test)
        better = max([best, *tried], key=lambda each: each[0].bound)
        gained, best = better[0].bound - best[0].bound, better
        if gained < GAIN:
            break
    coordinates.set(*best[1])
    return best[0], ends


class Place(NamedTuple):
    """What coordinates are set by: c and z, shape (D,), and curvatures by site."""

    c: Tensor
    z: Tensor
    curvatures: dict[str, Tensor]


def _by_formula(
    log_joint: LogJoint, coordinates: Coordinates, gaussian: Gaussian, place: Place, test: Tensor
) -> list[tuple[Gaussian, Place]]:
    """The Gaussians in the coordinates that the best one so far suggests."""
    coordinates.set(*place)
    c, curvatures = _suggested(coordinates, gaussian)
    at, slopes = coordinates(gaussian.loc), _slopes(coordinates, gaussian.loc)
    means = {name: part.mean() for name, part in coordinates.by_site(c).items()}
    found = []
    for wanted in (c, spread(coordinates, means)):
        place = Place(wanted, at, curvatures)
        coordinates.set(*place)
        loc = coordinates.inv(at)
        scale = torch.linalg.solve(_slopes(coordinates, loc), slopes @ gaussian.scale)
        if bool(scale.isfinite().all() & loc.isfinite().all()):
            start = Gaussian(loc, scale, -torch.inf)
            found.append((moved_on(log_joint, start, MOVES, test), place))
    return found


def _slopes(coordinates: Coordinates, x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(coordinates, x)


def _suggested(coordinates: Coordinates, gaussian: Gaussian) -> tuple[Tensor, dict[str, Tensor]]:
    """The formula's c, shape (D,), of a Gaussian in the present coordinates, and its curvatures."""
    loc, scale, _ = gaussian
    precision = torch.cholesky_inverse(scale)
    x = loc + normal_pairs(DRAWS, loc) @ scale.mT
    c, curvatures = torch.ones_like(loc), {}
    slopes = _slopes(coordinates, loc)
    around, here = coordinates.read(coordinates(x)), coordinates.read(coordinates(loc))
    for i, (site, priors, prior) in enumerate(zip(coordinates.sites, around, here, strict=True)):
        part = slice(site["start"], site["stop"])
        at, own = coordinates.part(coordinates.c, i), coordinates.own_tensors(i)
        total, back = precision[part, part], torch.linalg.inv(slopes[part, part])
        if site["matrix"]:
            total, back = (_blocks(t, site["shape"]) for t in (total, back))
            prior_own = _of_matrix(priors, at, own)
        else:
            prior_own = _of_numbers(priors, at, own)
        downstream = total - prior_own.nan_to_num(torch.inf).mean(0)
        if not bool(downstream.isfinite().all()):
            c[part] = 0.0
            continue
        found = back.mT @ downstream @ back  # in the latents themselves
        set_by = _for_matrix if site["matrix"] else _for_numbers
        c[part], curvatures[site["name"]] = set_by(found, prior, priors)
    return c.clamp(0, 1), curvatures


def _of_matrix(priors: Prior, c: Tensor, own: list[Tensor]) -> Tensor:
    """A prior's expected curvature in x, where its scale is a matrix, (S, *batch, n, n)."""
    factor = priors.slope(c, *own)
    white = torch.linalg.solve_triangular(priors.scale, factor, upper=False)
    return white.mT @ white * priors.information.mean()


def _of_numbers(priors: Prior, c: Tensor, own: list[Tensor]) -> Tensor:
    """The same of all n numbers of a site together, (S, n, n)."""
    unit, target, _, axes = own
    log_factor, *_ = priors.along(c, unit, target, axes)
    size, num = unit.exp().flatten(), len(log_factor)
    factor = (axes * log_factor.exp().reshape(num, 1, -1)) @ axes.mT
    factor = size.unsqueeze(-1) * factor / size
    curvature = (priors.information / priors.scale.square()).reshape(num, -1, 1)
    return factor.mT @ (curvature * factor)


def _for_matrix(found: Tensor, prior: Prior, priors: Prior) -> tuple[Tensor, Tensor]:
    """C and H of vectors."""
    downstream = _positive(found)
    own = torch.cholesky_inverse(prior.scale).diagonal(dim1=-2, dim2=-1)
    ratio = downstream.diagonal(dim1=-2, dim2=-1) / own
    return (ratio / (1 + ratio)).clamp(max=1 - SMALLEST).flatten(), downstream


def _for_numbers(found: Tensor, prior: Prior, priors: Prior) -> tuple[Tensor, Tensor]:
    """C and axes of numbers: those of the data's curvature, where all have one scale."""
    size, information = prior.scale.flatten(), prior.information.mean()
    white = size.unsqueeze(-1) * (found + found.mT) / 2 * size
    ratios = (priors.scale / prior.scale).log().reshape(len(priors.scale), -1)
    if bool((ratios.amax(1) - ratios.amin(1)).max() < ALIKE):
        values, axes = torch.linalg.eigh(white)
    else:
        values, axes = white.diagonal(), torch.eye(len(size), dtype=size.dtype, device=size.device)
    values = values.clamp(min=0)
    return values / (values + information), axes


def _blocks(matrix: Tensor, shape: list[int]) -> Tensor:
    """The blocks on the diagonal of a matrix of all the numbers of a site, (*batch, n, n)."""
    n = shape[-1]
    blocks = matrix.reshape(len(matrix) // n, n, len(matrix) // n, n)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).reshape(*shape, n)


def _positive(symmetric: Tensor) -> Tensor:
    """The nearest positive semidefinite matrices."""
    values, vectors = torch.linalg.eigh((symmetric + symmetric.mT) / 2)
    return vectors * values.clamp(min=0).unsqueeze(-2) @ vectors.mT
