"""The start of a structured guide: coordinates, the best Gaussian in them, and shapes of rows."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from pyroflow.guides import AutoStructuredFlow
from pyroflow.guides.recording import spread
from pyroflow.inference.arrowhead import ROUNDS, Arrow, Blocks
from pyroflow.inference.centring import GAIN, Place, for_matrix, pull_of
from pyroflow.inference.fit import path_derivative
from pyroflow.inference.gaussian_start import normal_pairs
from pyroflow.model.centring import Downstream, nothing_downstream
from pyroflow.model.log_joint import LogJoint
from pyroflow.transforms import SinhArcsinh
from pyroflow.transforms.affine import inverse_softplus
from pyroflow.transforms.kernels.units import softplus

HASTY = 5  # moves of the first Gaussian, where better coordinates follow
PLACES = 3  # coordinates that are tried one after the other

# Of skews and tails.
DRAWS, FEWEST = 128, 16  # of a step, as antithetic pairs
STEPS = 48
RATE, HALVED = 1 / 3, 9  # of the first step, and how many later it is half of that
LONGEST = 0.5  # of a step, in standard deviations and logarithms
NODES = 64  # of Gauss and Hermite's rule


@torch.no_grad()
def structured_start(log_joint: LogJoint, guide: AutoStructuredFlow) -> bool:
    """Set coordinates and affine layer of an untouched guide to the best Gaussian; whether it is.

    From the non-centred coordinates Newton's steps lead to a mode, and moves to where the expected
    gradient vanishes and the precision is the expected Hessian, the optimum among Gaussians with a
    precision of this form. Then coordinates follow from what the data say of each number, and so
    on, as long as the bound grows. If the guide has skews and tails, they come last.
    """
    coordinates, z = guide.coordinates, guide._init_loc()
    auto = coordinates is not None and guide.centring_given == "auto"
    if auto:
        free = spread(coordinates, dict.fromkeys(coordinates.centring, 0.0))
        place = Place(free, z, {})
        coordinates.set(*place)
    arrow = Arrow(log_joint, guide)
    x, bound = arrow.move(*arrow.ascend(guide.start()), rounds=HASTY if auto else ROUNDS)
    kept = {n: t.clone() for n, t in guide.affine.state_dict().items()}
    for _ in range(PLACES if auto and math.isfinite(bound) else 0):
        before, (x, tried) = place, _placed(arrow, x)
        place, better = tried
        if not better > bound + GAIN:
            if better <= bound:
                coordinates.set(*before)
                guide.affine.load_state_dict(kept)
            break
        bound, kept = better, {n: t.clone() for n, t in guide.affine.state_dict().items()}
    if guide.tails and math.isfinite(bound):
        shape_rows(log_joint, guide)
    return math.isfinite(bound)


def _placed(arrow: Arrow, x: Tensor) -> tuple[Tensor, tuple[Place, float]]:
    """The Gaussian in the coordinates that the present one, around x (D,), suggests."""
    coordinates, affine = arrow.guide.coordinates, arrow.affine
    at, draws = coordinates(x), coordinates(affine(arrow.noise))
    written = torch.ones_like(at)
    coordinates.set(written, at)

    def gradients(z: Tensor) -> tuple[Tensor, Tensor]:
        """Of what follows from each moved site: the log joint's less that of the prior."""
        value, gradient = arrow.log_joint.values_and_gradients(z)
        for i, (site, prior) in enumerate(zip(coordinates.sites, coordinates.read(z), strict=True)):
            pull = pull_of(prior, coordinates.part(z, i)).reshape(len(z), -1)
            gradient[:, site["start"] : site["stop"]] += pull
        return value, gradient

    _, mean, blocks = arrow.curvature(gradients, draws, draws.std(0))
    c, downstream = torch.ones_like(at), {}
    shift = draws.mean(0) - at
    for site, prior in zip(coordinates.sites, coordinates.read(at), strict=True):
        own = torch.arange(site["start"], site["stop"], device=at.device)
        H, coupling = _of_site(arrow, blocks, own, site)
        u = torch.cat([shift[:0], *(shift[a:b] for a, b in site["before"])])
        there = (mean[own] + _times(H, shift[own]) + coupling @ u).reshape(site["shape"])
        if site["matrix"]:
            c[own], curvature = for_matrix(H.reshape(*prior.scale.shape), prior)
        else:
            h = H.clamp(min=0) * prior.scale.flatten().square()
            c[own] = h / (h + prior.information.flatten())
            curvature = nothing_downstream(prior, 0).curvature
        downstream[site["name"]] = Downstream(there, curvature, coupling)
    place = Place(c.clamp(0, 1), at, downstream)
    coordinates.set(*place)
    x = coordinates.inv(at)
    x, bound = arrow.move(*arrow.ascend(x))
    return x, (place, bound)


def _of_site(arrow: Arrow, blocks: Blocks, own: Tensor, site: dict) -> tuple[Tensor, Tensor]:
    """H of a site's numbers, its diagonal (n,) or blocks (B, d, d), and B of those before it."""
    dim, leading = len(arrow.affine.centre), arrow.leading
    across = blocks.gg.new_zeros(dim, len(leading))
    across[leading] = blocks.gg
    diagonal = across.new_zeros(dim)
    diagonal[leading] = blocks.gg.diagonal()
    row, column = (torch.zeros(dim, dtype=torch.long, device=own.device) for _ in range(2))
    column[leading] = torch.arange(len(leading), device=own.device)
    matrices = blocks.gg[None]
    for places, jg, jj in zip(arrow.rows, blocks.jg, blocks.jj, strict=True):
        across[places], diagonal[places] = jg, jj.diagonal(dim1=-2, dim2=-1)
        row[places] = torch.arange(len(places), device=own.device).unsqueeze(-1)
        column[places] = torch.arange(places.shape[1], device=own.device)
        matrices = jj if bool(torch.isin(own, places).all()) else matrices
    place = torch.full((dim,), -1, device=own.device)
    place[leading] = torch.arange(len(leading), device=own.device)
    at = torch.cat([place[:0], *(place[a:b] for a, b in site["before"])])
    coupling = torch.nn.functional.pad(across[own], (0, 1))[:, at]  # 0 for what is not global
    if not site["matrix"]:
        return diagonal[own], coupling
    vectors = own.reshape(-1, site["shape"][-1])
    k = column[vectors]
    return matrices[row[vectors][:, :1, None], k.unsqueeze(2), k.unsqueeze(1)], coupling


def _times(H: Tensor, shift: Tensor) -> Tensor:
    """Of the diagonal (n,), or of blocks (B, d, d) with all numbers, (n,)."""
    if H.dim() == 1:
        return H * shift
    return (H @ shift.reshape(len(H), -1, 1)).flatten()


@torch.no_grad()
def shape_rows(log_joint: LogJoint, guide: AutoStructuredFlow) -> None:
    r"""Take natural gradient steps of each number's location, scale, skew and tail.

    Near a standard normal the Fisher information of the four is one matrix F for all numbers, with
    a block for location and skew, which are odd, and one for scale and tail. By F⁻¹ ∇ the numbers
    of all rows come to their optimum together, in as many steps as one of them would take. The
    steps become shorter, and so average over the draws. Where the bound is no better for them, or
    the first says that nothing is to be gained, the guide stays as it is.
    """
    affine, tails = guide.affine, _tails(guide)
    trained = [affine.offset, affine.raw_scale, tails.skew, tails.raw]
    test = normal_pairs(log_joint.runs.few(DRAWS, FEWEST, rows=True), guide.start())
    before, kept = _bound(log_joint, guide, test), [t.clone() for t in trained]
    odd, even = (block.to(affine.offset) for block in _inverse_information())
    for step in range(STEPS):
        rate = RATE / (1 + step / HALVED)
        at, width, skew, tail = _gradients(log_joint, guide, trained, len(test))
        pairs = torch.stack([at[affine.order], skew]), torch.stack([width, tail])
        moves = [F @ pair for F, pair in zip((odd, even), pairs, strict=True)]
        gain = sum((m * pair).sum() for m, pair in zip(moves, pairs, strict=True)) / 2
        if not gain > GAIN:
            break
        (at, skew), (width, tail) = ((rate * m).clamp(-LONGEST, LONGEST) for m in moves)
        affine.offset += at[affine.place]
        tails.skew += skew
        for raw, factor in ((affine.raw_scale, width.exp()), (tails.raw, tail.exp())):
            raw.copy_(inverse_softplus(softplus(raw) * factor))
    if not _bound(log_joint, guide, test) > before:
        for t, old in zip(trained, kept, strict=True):
            t.copy_(old)


def _tails(guide: AutoStructuredFlow) -> SinhArcsinh:
    return next(t for t in guide.flow.parts if isinstance(t, SinhArcsinh))


def _log_weights(log_joint: LogJoint, guide: AutoStructuredFlow, noise: Tensor) -> Tensor:
    q, x = guide.over_coordinates(), noise
    for t in q.transforms:
        x = t(x)
    return log_joint(x).double() - q.log_prob(x)


def _bound(log_joint: LogJoint, guide: AutoStructuredFlow, noise: Tensor) -> Tensor:
    parts = [_log_weights(log_joint, guide, part) for part in noise.split(log_joint.num)]
    return torch.cat(parts).mean()


def _gradients(
    log_joint: LogJoint, guide: AutoStructuredFlow, trained: list[Tensor], num: int
) -> list[Tensor]:
    """Of the bound, along the path of the draws, in the logarithms of what is positive."""
    found = [torch.zeros_like(t) for t in trained]
    with path_derivative(guide, True), torch.enable_grad():
        for noise in normal_pairs(num, guide.start()).split(log_joint.num):
            log_weights = _log_weights(log_joint, guide, noise)
            value = log_weights[log_weights.isfinite()].sum() / num
            for total, part in zip(found, torch.autograd.grad(value, trained), strict=True):
                total += part
    offset, raw_scale, skew, raw = found
    _, scale, _, tail = trained
    return [offset, raw_scale / _slope(scale), skew, raw / _slope(tail)]


def _slope(raw: Tensor) -> Tensor:
    """That of log softplus."""
    return raw.sigmoid() / softplus(raw)


@cache
def _inverse_information() -> tuple[Tensor, Tensor]:
    """Of location and skew, and of log scale and log tail, at a standard normal number x.

    A number that moves by v(x) has the score x v − v′.
    """
    x, weights = np.polynomial.hermite_e.hermegauss(NODES)
    root, angle = np.sqrt(1 + x * x), np.arcsinh(x)
    odd = np.stack([x, x * root - x / root])
    even = np.stack([x * x - 1, x * root * angle - 1 - x * angle / root])
    weights = weights / weights.sum()
    inverse = (np.linalg.inv(weights * s @ s.T) for s in (odd, even))
    return tuple(torch.tensor(t, device="cpu") for t in inverse)
