"""The choice of the coordinates in which a guide fits best: how far its latents are centred."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
from pyroflow.model.centring import Downstream, Prior
from pyroflow.model.log_joint import LogJoint
from pyroflow.progress import Bar

ROUNDS = 3  # of Gaussian → c → Gaussian
MOVES = 20  # of a Gaussian, after each change of c
DRAWS = 512  # at which gradients are taken, or four times as many as latents
ALIKE = 1e-3  # difference of the logarithms of scales that are one
SMALLEST = 1e-6  # part of the prior in the precision of a vector that is not left as written
GAIN = 0.01  # nats, that another round must have brought


@torch.no_grad()
def best_coordinates(
    log_joint: LogJoint, guide: AutoFlow, bar: Bar | None = None
) -> tuple[Gaussian | None, list[Tensor]]:
    r"""Set c of an untouched guide's coordinates, and return the best Gaussian in them.

    The conditional standard deviation of a latent shall not change with the latents that its
    prior takes its scale from. To first order that is c = h/(h + i/s²), with h the curvature of
    all that follows from the latent (data, other latents) and i/s² that of its prior; h is the
    mean over the Gaussian, as is how the latents before it move its mean. Gaussian and c are found
    in turn, from all latents as written (c = 1) and non-centred (c = 0), and the c with the highest
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
    test = normal_pairs(log_joint.runs.few(TESTED_BY, 64), z)
    for _ in range(ROUNDS):
        tried = _by_formula(log_joint, coordinates, *best, test)
        better = max([best, *tried], key=lambda each: each[0].bound)
        gained, best = better[0].bound - best[0].bound, better
        if gained < GAIN:
            break
    coordinates.set(*best[1])
    return best[0], ends


class Place(NamedTuple):
    """What coordinates are set by: c and z, shape (D,), and what follows from each site."""

    c: Tensor
    z: Tensor
    downstream: dict[str, Downstream]


def _by_formula(
    log_joint: LogJoint, coordinates: Coordinates, gaussian: Gaussian, place: Place, test: Tensor
) -> list[tuple[Gaussian, Place]]:
    """The Gaussians in the coordinates that the best one so far suggests."""
    coordinates.set(*place)
    num = max(log_joint.runs.few(DRAWS, 128), 4 * len(place.z))
    at, factor, z = read_at(coordinates, gaussian, num)
    coordinates.set(torch.ones_like(at), at)
    tried = suggested(coordinates, at, factor, z, *log_joint.values_and_gradients(z))
    found = []
    for start, place in tried:
        coordinates.set(*place)
        found.append((moved_on(log_joint, start, log_joint.runs.few(MOVES, 6), test), place))
    return found


def read_at(
    coordinates: Coordinates, gaussian: Gaussian, num: int
) -> tuple[Tensor, Tensor, Tensor]:
    """In the latents, of a Gaussian in x: its location, a factor of its covariance, and draws."""
    noise = normal_pairs(num, gaussian.loc)
    at, slopes = coordinates(gaussian.loc), _slopes(coordinates, gaussian.loc)
    z = coordinates(gaussian.loc + noise @ gaussian.scale.mT)
    return at, slopes @ gaussian.scale, z


def suggested(
    coordinates: Coordinates,
    at: Tensor,
    factor: Tensor,
    z: Tensor,
    value: Tensor,
    gradient: Tensor,
) -> list[tuple[Gaussian, Place]]:
    """A Gaussian in the coordinates that it suggests, by the formula and by its mean by site.

    Args:
        coordinates: which this sets.
        at: its location in the latents, (D,).
        factor: of its covariance there, (D, D).
        z: draws of it there, (S, D).
        value: the log joint at z, (S,).
        gradient: its gradient there, (S, D).
    """
    around = _around(coordinates, at, z, value, gradient)
    if around is None:
        return []
    c, downstream = around
    means = {name: part.mean() for name, part in coordinates.by_site(c).items()}
    found = []
    for wanted in (c, spread(coordinates, means)):
        place = Place(wanted, at, downstream)
        coordinates.set(*place)
        loc = coordinates.inv(at)
        scale = torch.linalg.solve(_slopes(coordinates, loc), factor)
        if bool(scale.isfinite().all() & loc.isfinite().all()):
            found.append((Gaussian(loc, scale, -torch.inf), place))
    return found


def _slopes(coordinates: Coordinates, x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(coordinates, x)


def _around(
    coordinates: Coordinates, at: Tensor, z: Tensor, value: Tensor, gradient: Tensor
) -> tuple[Tensor, dict[str, Downstream]] | None:
    """The formula's c, shape (D,), and what follows from each site, around ``at`` (D,).

    The gradient of what follows, the log joint's less that of the prior, is taken at draws of the
    Gaussian, in the latents themselves, and fitted by a linear function: its mean slope, where
    differences of mean curvatures would leave the noise of a prior that is nearly singular.
    None where too few gradients are finite.
    """
    dim = len(at)
    finite = value.isfinite() & gradient.isfinite().all(-1)
    z, gradient = z[finite], gradient[finite]
    if len(z) < 2 * dim:
        return None
    c, downstream = torch.ones_like(at), {}
    around, here = coordinates.read(z), coordinates.read(at)
    for i, (site, priors, prior) in enumerate(zip(coordinates.sites, around, here, strict=True)):
        part = slice(site["start"], site["stop"])
        own = gradient[:, part] + pull_of(priors, coordinates.part(z, i)).reshape(len(z), -1)
        there, slope = _linear(z - at, own)
        if not bool(slope.isfinite().all()):
            c[part] = 0.0
            continue
        found = -slope[:, part]
        if site["matrix"]:
            c[part], curvature = for_matrix(_blocks(found, site["shape"]), prior)
        else:
            c[part], curvature = _for_numbers(found, prior, priors)
        there = there.reshape(site["shape"])
        coupling = torch.cat([slope[:, :0], *(slope[:, a:b] for a, b in site["before"])], 1)
        downstream[site["name"]] = Downstream(there, curvature, -coupling)
    return c.clamp(0, 1), downstream


def pull_of(priors: Prior, z: Tensor) -> Tensor:
    """How a prior pulls numbers z to its location, as far as they are normal: K⁻¹ (z − m)."""
    off = z - priors.loc
    if not priors.matrix:
        return priors.information * off / priors.scale.square()
    return torch.cholesky_solve(off.unsqueeze(-1), priors.scale).squeeze(-1)


def _linear(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Value at x = 0 and slope (n, D) of the linear function nearest to y (S, n) at x (S, D)."""
    size = x.square().mean(0).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
    design = torch.cat([torch.ones_like(x[:, :1]), x / size], 1)
    found = torch.linalg.pinv(design) @ y  # torch's lstsq does not repeat to the last digit
    return found[0], (found[1:] / size.unsqueeze(-1)).mT


def for_matrix(found: Tensor, prior: Prior) -> tuple[Tensor, Tensor]:
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
