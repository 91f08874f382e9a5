"""The start of a structured guide: its coordinates, the best Gaussian in them, and its rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyroflow.guides import AutoStructuredFlow
from pyroflow.guides.recording import spread
from pyroflow.inference.arrowhead import ROUNDS, Arrow, Blocks
from pyroflow.inference.centring import GAIN, Place, for_matrix, pull_of
from pyroflow.inference.row_shapes import shape_rows
from pyroflow.model.centring import Downstream, nothing_downstream
from pyroflow.model.log_joint import LogJoint

HASTY = 5  # moves of the first Gaussian, where better coordinates follow
PLACES = 3  # coordinates that are tried one after the other


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
