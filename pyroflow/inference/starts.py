"""The Gaussians that the guides of many data sets start from, found side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflow.guides.recording import spread
from pyroflow.inference.ascent import Points, ascend, evaluated
from pyroflow.inference.centring import DRAWS as AROUND
from pyroflow.inference.centring import GAIN, MOVES, Place, read_at, suggested
from pyroflow.inference.centring import ROUNDS as CENTRED
from pyroflow.inference.gaussian_start import (
    ALONG,
    BEST,
    DRAWS,
    LARGEST,
    REACHES,
    ROUNDS,
    SMALLER,
    STEPS,
    TESTED_BY,
    TRIED,
    Gaussian,
    bounds,
    moved_together,
    normal_pairs,
    paths_in,
)
from pyroflow.model.log_joint_of_data import LogJointOfData
from pyroflow.seeds import drawing

Gaussians = tuple[Tensor, Tensor, Tensor]  # locations (M, D), scales (M, D, D), bounds (M,)


@torch.no_grad()
def best_gaussians(log_joint: LogJointOfData, start: Tensor) -> Gaussians:
    """What ``best_gaussian`` finds, of M data sets from (M, D); without one a bound is −∞."""
    num, dim = start.shape
    paths = paths_in(dim)
    starts, whose = _starts(log_joint, start, paths), torch.arange(num, device=start.device)
    points = ascend(log_joint, starts, STEPS, own=whose.repeat_interleave(paths))
    loc, scale, fresh = _along(points)
    own = whose.repeat_interleave(len(loc) // num)
    noise = normal_pairs(DRAWS, start[0])
    bound, lost = bounds(log_joint, loc, scale, noise, own)
    found = [bound.where(fresh, -torch.inf)]
    sizes = (1.0, *SMALLER) if bool(lost.any()) else (1.0,)
    for size in sizes[1:]:
        bound = torch.full_like(bound, -torch.inf)
        bound[lost] = bounds(log_joint, loc[lost], size * scale[lost], noise, own[lost])[0]
        found.append(bound.where(fresh, -torch.inf))
    best = torch.stack(found, 1).reshape(num, -1).topk(BEST).indices
    place = best // len(sizes) + (len(loc) // num * whose).unsqueeze(1)
    shrunk = start.new_tensor(sizes)[best % len(sizes)].reshape(num, BEST, 1, 1) * scale[place]
    test = normal_pairs(TESTED_BY, start[0])
    own = whose.repeat_interleave(BEST)
    given = loc[place].flatten(0, 1), shrunk.flatten(0, 1)
    loc, scale, bound = moved_together(log_joint, *given, ROUNDS[0], test, own=own)
    at = bound.reshape(num, BEST).argmax(1) + BEST * whose
    loc, scale, bound = moved_together(log_joint, loc[at], scale[at], ROUNDS[1], test, own=whose)
    sound = bound.isfinite() & (loc.abs().amax(1) < LARGEST)
    return loc, scale, bound.where(sound, -torch.inf)


def _starts(log_joint: LogJointOfData, start: Tensor, paths: int) -> Tensor:
    """Where the paths of each data set start, (M · paths, D); found ones again if too few are."""
    whose, found, sound = torch.arange(len(start), device=start.device), [], []
    for reach in REACHES:
        with drawing():
            offsets = torch.rand(TRIED, start.shape[1], dtype=start.dtype, device="cpu").to(start)
        offsets[0] = 0.5
        points = start.unsqueeze(1) + reach * (2 * offsets - 1)
        value, gradient = evaluated(log_joint, points, whose)
        found.append(points)
        sound.append(value.isfinite() & gradient.isfinite().all(-1))
        if bool((torch.cat(sound, 1).sum(1) >= paths).all()):
            break
    points, finite = torch.cat(found, 1), torch.cat(sound, 1)
    first = finite.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :paths]
    first = first.where(finite.gather(1, first), first[:, :1])
    return points[whose.unsqueeze(1), first].flatten(0, 1)


def _along(points: Points) -> tuple[Tensor, Tensor, Tensor]:
    """Points spread over each path, one after the other, their scales, and if they are new."""
    steps = torch.arange(len(points.value), device=points.z.device).unsqueeze(1)
    moved = points.value != points.value.roll(1, 0)
    last = (moved * steps).amax(0)  # of step 0 nothing counts
    share = torch.linspace(1, 0, ALONG, device=steps.device)
    at = (last.unsqueeze(1) * share).round().long()
    fresh = torch.cat([torch.ones_like(at[:, :1]), at.diff()], 1) != 0
    path = torch.arange(len(at), device=steps.device).unsqueeze(1)
    return *(t[at, path].flatten(0, 1) for t in (points.z, points.scale)), fresh.flatten()


@torch.no_grad()
def best_starts(log_joint: LogJointOfData, start: Tensor) -> Gaussians:
    """What ``best_coordinates`` finds, of M data sets whose latents start at (M, D).

    The coordinates of each are left in the log joint.
    """
    coordinates = log_joint.guide.coordinates
    if coordinates is None:
        return best_gaussians(log_joint, start)
    free = spread(coordinates, dict.fromkeys(coordinates.centring, 0.0))
    identity = torch.eye(start.shape[1], dtype=start.dtype, device=start.device)
    centred, whose = torch.ones_like(free), list(range(len(start)))
    best = [(Gaussian(z, identity, -math.inf), Place(centred, z, {})) for z in start]
    for c in (centred, free):
        places = [Place(c, z, {}) for z in start]
        x = _put(log_joint, dict(enumerate(places)), start)
        _keep_better(best, whose, best_gaussians(log_joint, x), places)
    going = [i for i in whose if math.isfinite(best[i][0].bound)]
    test, num = normal_pairs(TESTED_BY, start[0]), max(AROUND, 4 * start.shape[1])
    for _ in range(CENTRED):
        before = {i: best[i][0].bound for i in going}
        tried = _suggested(log_joint, best, going, num)
        for way in zip(*tried.values(), strict=True):
            at = {i: each for i, each in zip(going, way, strict=True) if each is not None}
            if not at:
                continue
            gaussians, places = zip(*at.values(), strict=True)
            _put(log_joint, dict(zip(at, places, strict=True)))
            loc, scale = (torch.stack([g[k] for g in gaussians]) for k in (0, 1))
            own = torch.tensor(list(at), device=loc.device)
            moved = moved_together(log_joint, loc, scale, MOVES, test, own=own)
            _keep_better(best, list(at), moved, places)
        going = [i for i in going if best[i][0].bound - before[i] >= GAIN]
    _put(log_joint, {i: place for i, (_, place) in enumerate(best)})
    loc, scale = (torch.stack([gaussian[k] for gaussian, _ in best]) for k in (0, 1))
    return loc, scale, start.new_tensor([gaussian.bound for gaussian, _ in best])


def _put(
    log_joint: LogJointOfData, places: dict[int, Place], latents: Tensor | None = None
) -> Tensor | None:
    """Set the coordinates of some data sets, and return where latents (M, D) are in them."""
    coordinates, x = log_joint.guide.coordinates, []
    for i, place in places.items():
        coordinates.set(*place)
        for kept, tensor in zip(log_joint.moved_by, coordinates.tensors(), strict=True):
            kept[i] = tensor
        x += [] if latents is None else [coordinates.inv(latents[i])]
    return torch.stack(x) if x else None


def _keep_better(
    best: list[tuple[Gaussian, Place]], whose: list[int], found: Gaussians, places: Sequence[Place]
) -> None:
    rows = zip(whose, *found[:2], found[2].tolist(), places, strict=True)
    for i, loc, scale, bound, place in rows:
        if bound > best[i][0].bound:
            best[i] = Gaussian(loc, scale, bound), place


def _suggested(
    log_joint: LogJointOfData, best: list[tuple[Gaussian, Place]], going: list[int], num: int
) -> dict[int, list[tuple[Gaussian, Place] | None]]:
    """Of each data set the two Gaussians that the best one so far suggests, or None."""
    coordinates, read = log_joint.guide.coordinates, {}
    for i in going:
        coordinates.set(*best[i][1])
        read[i] = read_at(coordinates, best[i][0], num)
    _put(log_joint, {i: Place(torch.ones_like(at), at, {}) for i, (at, *_) in read.items()})
    if not going:
        return {}
    z = torch.stack([z for *_, z in read.values()])
    there = evaluated(log_joint, z, torch.tensor(going, device=z.device))
    rows = zip(going, *there, strict=True)
    found = {i: suggested(coordinates, *read[i], *both) for i, *both in rows}
    return {i: (each + [None, None])[:2] for i, each in found.items()}
