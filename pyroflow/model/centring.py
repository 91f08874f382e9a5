"""Coordinates of latents whose prior has a location and a scale: the mathematics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Size, Tensor

LEAST = 0.05  # of the prior's curvature: data of less do not say where they pull to


class Prior(NamedTuple):
    """The prior of a site's unconstrained numbers, as far as a change of coordinates needs it.

    Attributes:
        loc: location, which broadcasts to the unconstrained shape.
        scale: likewise; or the lower-triangular factor of the last dimension's.
        information: expected negative second derivative of the log density in the number, where
            the scale is one.
        matrix: whether the scale is a factor.
    """

    loc: Tensor
    scale: Tensor
    information: Tensor | float = 1.0
    matrix: bool = False

    def expand(self, shape: Size) -> tuple[Tensor, Tensor, Tensor]:
        """Location, scale and information, each of the full shape of the site."""
        like = {"dtype": self.loc.dtype, "device": self.loc.device}
        information = torch.as_tensor(self.information, **like)
        wide = (*shape, shape[-1]) if self.matrix else shape
        return self.loc.expand(shape), self.scale.expand(wide), information.expand(shape)

    def forth(self, x: Tensor, c: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers z at coordinates x, log |det ∂z/∂x| by element, and what rounding z costs.

        The last is by how much it moves (z − m)/s: where s is small against m, as at the neck of
        a funnel, the model cannot know x from z.
        """
        if self.matrix:
            return self._vectors(x, c, *tensors)
        if len(tensors) > 1:
            return self._numbers(x, c, *tensors)
        log_factor = (1 - c) * (self.scale.log() - tensors[0])
        factor = log_factor.exp()
        off = factor * (x - c * self.loc)
        z = factor * x + (1 - c * factor) * self.loc  # x itself where c = 1
        return z, log_factor, ((z - self.loc - off) / self.scale).detach().abs()

    def back(self, z: Tensor, c: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`forth`, with the same log-determinant."""
        if self.matrix:
            return self._vectors_back(z, c, *tensors)
        if len(tensors) > 1:
            return self._numbers_back(z, c, *tensors)
        log_factor = (1 - c) * (self.scale.log() - tensors[0])
        factor = log_factor.exp()
        return (z - (1 - c * factor) * self.loc) / factor, log_factor

    def _numbers(
        self, x: Tensor, c: Tensor, unit: Tensor, target: Tensor, centre: Tensor, axes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = unit.exp()
        log_factor, _, shift = self.along(c, unit, target, axes)
        white = turned(x / size, axes.mT) - centre
        off = size * turned(log_factor.exp() * white + shift, axes)
        z = self.loc + off
        return z, log_factor, ((z - self.loc - off) / self.scale).detach().abs()

    def _numbers_back(
        self, z: Tensor, c: Tensor, unit: Tensor, target: Tensor, centre: Tensor, axes: Tensor
    ) -> tuple[Tensor, Tensor]:
        size = unit.exp()
        log_factor, _, shift = self.along(c, unit, target, axes)
        white = (turned((z - self.loc) / size, axes.mT) - shift) * (-log_factor).exp()
        return size * turned(white + centre, axes), log_factor

    def along(
        self, c: Tensor, unit: Tensor, target: Tensor, axes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Along the axes: log σ/σ₀, the share of the data, and μ − m in units of s₀."""
        log_ratio = self.scale.log() - unit
        largest = log_ratio.amax().detach()
        squares = turned((2 * (log_ratio - largest)).exp(), axes.mT.square())
        log_ratio = largest + squares.log() / 2
        log_factor = -torch.logaddexp(torch.log1p(-c) - 2 * log_ratio, c.log()) / 2
        share = (c.log() + 2 * log_factor).exp()
        return log_factor, share, share * (target - turned(self.loc / unit.exp(), axes.mT))

    def _vectors(
        self, x: Tensor, c: Tensor, unit: Tensor, *at: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        written = _written(c)
        if at:
            C, log_det, mean = self._posterior(*at)
            white = times(unit, x - at[1])
            off = mean + times(self.scale, solved(C.mT, white, upper=True))
        else:
            factor = self._rows(c, unit)
            log_det = factor.diagonal(dim1=-2, dim2=-1).log()
            off = times(factor, x - c * self.loc)
        z = torch.where(written, x, self.loc + off)
        lost = solved(self.scale, (z - self.loc - off).detach())
        return z, torch.where(written, 0.0, log_det), torch.where(written, 0.0, lost).abs()

    def _vectors_back(
        self, z: Tensor, c: Tensor, unit: Tensor, *at: Tensor
    ) -> tuple[Tensor, Tensor]:
        written, off = _written(c), z - self.loc
        if at:
            C, log_det, mean = self._posterior(*at)
            white = times(C.mT, solved(self.scale, off - mean))
            x = torch.linalg.solve(unit, white.unsqueeze(-1)).squeeze(-1) + at[1]
        else:
            factor = self._rows(c, unit)
            log_det = factor.diagonal(dim1=-2, dim2=-1).log()
            x = solved(factor, off) + c * self.loc
        return torch.where(written, z, x), torch.where(written, 0.0, log_det)

    def _rows(self, c: Tensor, unit: Tensor) -> Tensor:
        return (1 - c).unsqueeze(-1) * (self.scale @ unit) + c.diag_embed()

    def _posterior(
        self, pull: Tensor, centre: Tensor, curvature: Tensor, log_unit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """C, the parts of log |det ∂z/∂x|, and μ − m, without a product of matrices."""
        C, log_det = self._factored(curvature)
        pulled = times(self.scale.mT, pull - times(curvature, self.loc))
        mean = times(self.scale, solved(C.mT, solved(C, pulled), upper=True))
        return C, log_det + log_unit, mean

    def slope(self, c: Tensor, unit: Tensor, *at: Tensor) -> Tensor:
        """The matrices ∂z/∂x of a site whose scale is one, where its coordinates were found."""
        factor = self.conditional(at[2])[0] @ unit
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return torch.where(_written(c).unsqueeze(-1), identity, factor)

    def conditional(self, curvature: Tensor) -> tuple[Tensor, Tensor]:
        """R with R Rᵀ = (K⁻¹ + H)⁻¹, for K = L Lᵀ and a curvature H, and the parts of log |det R|.

        R = L C⁻ᵀ with C Cᵀ = I + Lᵀ H L, so that K may be nearly singular.
        """
        C, log_det = self._factored(curvature)
        return torch.linalg.solve_triangular(C, self.scale.mT, upper=False).mT, log_det

    def _factored(self, curvature: Tensor) -> tuple[Tensor, Tensor]:
        L = self.scale
        identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
        C = torch.linalg.cholesky(identity + L.mT @ curvature @ L)
        diagonals = [t.diagonal(dim1=-2, dim2=-1).log() for t in (L, C)]
        return C, diagonals[0] - diagonals[1]


def solved(triangle: Tensor, vector: Tensor, *, upper: bool = False) -> Tensor:
    """The x with T x = v, of triangles (*B, n, n) and vectors (*B, n)."""
    return torch.linalg.solve_triangular(triangle, vector.unsqueeze(-1), upper=upper).squeeze(-1)


def _written(c: Tensor) -> Tensor:
    """Whether vectors are left as they are written, shape (*B, 1)."""
    return (c == 1).all(-1, keepdim=True)


def turned(numbers: Tensor, matrix: Tensor) -> Tensor:
    """The product of a matrix (n, n) and all n numbers of a site, in the shape of the site."""
    batch = numbers.dim() - _site_dim(numbers, matrix)
    flat = numbers.reshape((*numbers.shape[:batch], matrix.shape[-1]))
    return (flat @ matrix.mT).reshape(numbers.shape)


def _site_dim(numbers: Tensor, matrix: Tensor) -> int:
    """How many of the last dimensions hold the numbers of a site."""
    total, dims = 1, 0
    while total < matrix.shape[-1]:
        dims += 1
        total *= numbers.shape[-dims]
    return dims


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """The product of matrices (*B, n, n) and vectors (*B, n)."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def powers(prior: Prior, c: Tensor) -> list[Tensor]:
    """The tensors with which a prior's coordinates are those of Pyro's ``LocScaleReparam(c)``.

    z = m + s^{1 − c} (x − c m). Of a matrix, rows between those of the identity (c = 1) and of L.
    """
    if not prior.matrix:
        return [torch.zeros_like(c)]
    identity = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
    return [identity.expand(*c.shape, c.shape[-1]).contiguous()]


def no_curvature(prior: Prior) -> Tensor:
    """H = 0 for a matrix; for numbers the axes are their own."""
    if prior.matrix:
        return torch.zeros_like(prior.scale)
    return torch.eye(prior.scale.numel(), dtype=prior.scale.dtype, device=prior.scale.device)


def conditionals(prior: Prior, c: Tensor, z: Tensor, curvature: Tensor) -> list[Tensor]:
    r"""The tensors with which x has the prior's conditional distribution given data, standardised.

    As if the data were one more normal factor of curvature h at t, z given the other latents is
    normal with variance σ² = 1/(s⁻² + h) and mean μ = σ² (m/s² + h t), and z = μ + (σ/σ₀)(x − μ₀).
    c = h/(h + s₀⁻²); t makes μ₀ the number z that the other latents were taken with, as far as h
    is not small. The same holds of matrices, s² = L Lᵀ, h = H, and of numbers of one scale along
    the axes of the data's curvature.

    Args:
        prior: where the other latents are as in z.
        c: shape of the site; along its axes.
        z: the site's numbers.
        curvature: H, for matrices; a site with c = 1 stays as it is written. For numbers the
            orthogonal axes, shape (n, n), of z in units of s₀.
    """
    off = z - prior.loc
    if not prior.matrix:
        here, loc = (turned(t / prior.scale, curvature.mT) for t in (z, prior.loc))
        target = here + (here - loc) * (1 - c) / (c + LEAST * (1 - c))
        return [prior.scale.log(), target, (1 - c) * loc + c * target, curvature]
    inverse = torch.cholesky_inverse(prior.scale)
    target = z + times(torch.linalg.pinv(curvature + LEAST * inverse), times(inverse, off))
    factor, log_det = prior.conditional(curvature)
    pull = times(curvature, target)
    centre = prior.loc + times(factor, times(factor.mT, pull - times(curvature, prior.loc)))
    return [torch.linalg.inv(factor), pull, centre, curvature, -log_det]
