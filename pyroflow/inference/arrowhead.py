"""The best Gaussian with an arrowhead precision, in given coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflow.guides.structured import AutoStructuredFlow
from pyroflow.inference.ascent import LENGTHS
from pyroflow.inference.centring import GAIN
from pyroflow.inference.gaussian_start import normal_pairs
from pyroflow.model.log_joint import LogJoint
from pyroflow.transforms import Arrowhead

DRAWS, FEWEST = 128, 8  # behind mean gradients and curvatures, as antithetic pairs
STEPS = 30  # of Newton's method, from the guide's start
FLAT = 1e-3  # nats, that a step must gain
PATIENCE = 4  # steps without a better Gaussian
ROUNDS = 20  # of moves towards the optimum among Gaussians
TRIES = 3  # of shorter ones, where the bound falls
LONGEST = 3.0  # standard deviations that a row moves in one step, and globals of few rows
FEW_ROWS = 100  # above which globals may move by more of their own, which are so much smaller
FLATTEST = 1e-8  # part of the largest curvature

Gradients = Callable[[Tensor], tuple[Tensor, Tensor]]


class Blocks(NamedTuple):
    """A symmetric matrix of the form of an arrowhead.

    Attributes:
        gg: of the globals, shape (G, G).
        jg: of each plate's rows and the globals, shape (J, d, G).
        jj: of each plate's rows, shape (J, d, d).
    """

    gg: Tensor
    jg: list[Tensor]
    jj: list[Tensor]

    def mixed(self, other: Blocks, rate: float) -> Blocks:
        """Nearer to another one by a rate."""
        pairs = zip(self.jg, other.jg, strict=True), zip(self.jj, other.jj, strict=True)
        both = [[torch.lerp(*pair, rate) for pair in each] for each in pairs]
        return Blocks(torch.lerp(self.gg, other.gg, rate), *both)


class Factors(NamedTuple):
    """Of the inverse of a precision: C (G, G), of each plate C_j (J, d, d) and K_j (J, d, G)."""

    unit: Tensor
    units: list[Tensor]
    slopes: list[Tensor]

    @classmethod
    def of(cls, precision: Blocks) -> Factors:
        """Of |P|, in which curvatures of the wrong sign count by their size."""
        schur, inner = precision.gg, []
        for jg, jj in zip(precision.jg, precision.jj, strict=True):
            inverse = _inverse(jj)
            inner.append(inverse)
            schur = schur - torch.einsum("jkg,jkl,jlh->gh", jg, inverse, jg)
        unit = torch.linalg.cholesky(_inverse(schur))
        units = [torch.linalg.cholesky(inverse) for inverse in inner]
        slopes = [-(i @ jg) @ unit for i, jg in zip(inner, precision.jg, strict=True)]
        return cls(unit, units, slopes)


class Arrow:
    """The search for the Gaussian, in the present coordinates of a guide."""

    def __init__(
        self, log_joint: LogJoint, guide: AutoStructuredFlow, affine: Arrowhead | None = None
    ) -> None:
        self.log_joint, self.guide, self.affine = log_joint, guide, affine or guide.affine
        self.leading, self.rows = self.affine.leading(), self.affine.rows()
        self.noise = normal_pairs(log_joint.runs.few(DRAWS, FEWEST, rows=True), guide.start())

    def curvature(
        self, gradients: Gradients, x: Tensor, size: Tensor
    ) -> tuple[Tensor, Tensor, Blocks]:
        """Values at x (S, D), mean gradient (D,), and mean negative Hessian, by differences.

        Rows do not interact, so all of a plate are moved at once. ``size`` is the scale (D,) of the
        numbers, in units of which they are moved.
        """
        value, gradient = gradients(x)
        inside = value.isfinite() & gradient.isfinite().all(-1)
        x, gradient = x[inside], gradient[inside]
        step = torch.finfo(x.dtype).eps ** (1 / 4) * size

        widest = max((places.shape[1] for places in self.rows), default=0)
        moved = [self.leading[i : i + 1] for i in range(len(self.leading))]
        moved += [
            torch.cat([places[:, k] for places in self.rows if places.shape[1] > k])
            for k in range(widest)
        ]
        found = self._slopes(gradients, x, gradient, step, moved)
        across = (found[: len(self.leading)] / step[self.leading].unsqueeze(-1)).mT
        jj = []
        for places in self.rows:
            columns = found[len(self.leading) :, places][: places.shape[1]]  # (k, J, d)
            jj.append(columns.permute(1, 2, 0) / step[places].unsqueeze(-2))
        gg = across[self.leading]
        jj = [(block + block.mT) / 2 for block in jj]
        blocks = Blocks((gg + gg.mT) / 2, [across[places] for places in self.rows], jj)
        return value, gradient.mean(0), blocks

    def _slopes(
        self, gradients: Gradients, x: Tensor, at: Tensor, step: Tensor, moved: list[Tensor]
    ) -> Tensor:
        """By how much mean gradients fall where some of the numbers are moved, (moves, D)."""
        found, together = [], max(1, self.log_joint.num // len(x))
        for some in (moved[i : i + together] for i in range(0, len(moved), together)):
            there = x.repeat(len(some), 1, 1)
            for k, index in enumerate(some):
                there[k, :, index] += step[index]
            gradient = gradients(there.flatten(0, 1))[1].reshape(there.shape)
            found.append((at - gradient).nanmean(1))
        return torch.cat(found) if found else x.new_zeros(0, x.shape[1])

    def step(self, factors: Factors, gradient: Tensor) -> Tensor:
        """Σ ∇, shape (D,), each row and the globals by at most some standard deviations."""
        unit, units, slopes = factors
        first = unit.mT @ gradient[self.leading]
        for places, K in zip(self.rows, slopes, strict=True):
            first = first + torch.einsum("jkg,jk->g", K, gradient[places])
        longest = LONGEST * max(1.0, max(map(len, self.rows), default=0) / FEW_ROWS) ** 0.5
        first = _short(first, longest)
        found = torch.zeros_like(gradient)
        found[self.leading] = unit @ first
        for places, C, K in zip(self.rows, units, slopes, strict=True):
            own = _short((C.mT @ gradient[places].unsqueeze(-1)).squeeze(-1))
            found[places] = (C @ own.unsqueeze(-1)).squeeze(-1) + K @ first
        return found

    def ascend(self, x: Tensor) -> tuple[Tensor, Blocks]:
        """Of Newton's steps from x (D,) the point with the best Gaussian, and its precision.

        The affine layer is set to it, too. A density need not have a mode, nor its mode most of
        the mass.
        """
        gradients, lengths = self.log_joint.values_and_gradients, x.new_tensor(LENGTHS)
        size, found = torch.ones_like(x), []
        for _ in range(STEPS):
            value, gradient, blocks = self.curvature(gradients, x[None], size)
            factors = Factors.of(blocks)
            size = self.sizes(factors)
            self.affine.start_from(x, *factors)
            found.append((self.bound(), len(found), x, blocks))
            if len(found) - max(found)[1] > PATIENCE:
                break
            trials = x + lengths.unsqueeze(1) * self.step(factors, gradient)
            best, index = gradients(trials)[0].nan_to_num(-torch.inf).max(0)
            if not best > value[0] + FLAT:
                break
            x = trials[index]
        x, blocks = max(found)[2:]
        self.affine.start_from(x, *Factors.of(blocks))
        return x, blocks

    def sizes(self, factors: Factors) -> Tensor:
        """Conditional standard deviations of all numbers, shape (D,)."""
        found = torch.ones_like(self.affine.centre)
        found[self.leading] = torch.linalg.vector_norm(factors.unit, dim=-1)
        for places, C in zip(self.rows, factors.units, strict=True):
            found[places] = torch.linalg.vector_norm(C, dim=-1)
        return found

    def move(self, x: Tensor, precision: Blocks, rounds: int = ROUNDS) -> tuple[Tensor, float]:
        """Move N(x, P⁻¹) to the optimum among such Gaussians; its location, and its bound."""
        gradients, rate, best = self.log_joint.values_and_gradients, 1.0, -math.inf
        for _ in range(rounds):
            factors = Factors.of(precision)
            self.affine.start_from(x, *factors)
            bound = self.bound()
            if bound > best:
                gained, best, kept, failed = bound - best, bound, (x, precision), 0
                if gained < GAIN:
                    break
                draws = self.affine(normal_pairs(len(self.noise), x))
                sizes = self.sizes(factors)
                _, gradient, blocks = self.curvature(gradients, draws, sizes)
            elif not math.isfinite(best) or failed == TRIES:
                break
            else:
                failed, rate = failed + 1, rate / 2
            x, precision = kept[0], kept[1].mixed(blocks, rate)
            x = x + rate * self.step(Factors.of(precision), gradient)
        if math.isfinite(best):
            x, precision = kept
            self.affine.start_from(x, *Factors.of(precision))
        return x, best

    def bound(self) -> float:
        """That of the affine layer alone, on fixed draws."""
        x, log_det = self.affine.forward_and_log_det(self.noise)
        log_q = -self.noise.square().sum(-1) / 2 - log_det
        log_q = log_q - len(self.noise[0]) / 2 * math.log(2 * math.pi)
        found = (self.log_joint.values_and_gradients(x)[0].double() - log_q).mean().item()
        return found if math.isfinite(found) else -math.inf


def _inverse(matrix: Tensor) -> Tensor:
    """|M|⁻¹ of symmetric matrices."""
    if not matrix.numel():
        return matrix
    values, vectors = torch.linalg.eigh(matrix)
    values = values.abs()
    values = torch.maximum(values, FLATTEST * values.amax(-1, keepdim=True)).clamp(min=1e-12)
    return vectors / values.unsqueeze(-2) @ vectors.mT


def _short(x: Tensor, longest: float = LONGEST) -> Tensor:
    """A step (*, n) of at most some standard deviations."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (longest / length.clamp(min=longest))
