"""Location, scale, skew and tail of each number of a structured guide, all of them at once."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from pyroflow.guides import AutoStructuredFlow
from pyroflow.inference.centring import GAIN
from pyroflow.inference.fit import path_derivative
from pyroflow.inference.gaussian_start import normal_pairs
from pyroflow.model.log_joint import LogJoint
from pyroflow.transforms import SinhArcsinh
from pyroflow.transforms.affine import inverse_softplus
from pyroflow.transforms.kernels.units import softplus

DRAWS, FEWEST = 128, 16  # of a step, as antithetic pairs
STEPS = 48
RATE, HALVED = 1 / 3, 9  # of the first step, and how many later it is half of that
LONGEST = 0.5  # of a step, in standard deviations and logarithms
NODES = 64  # of Gauss and Hermite's rule


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
