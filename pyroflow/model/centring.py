"""Coordinates of latents whose prior has a location and a scale: the mathematics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Size, Tensor

WIDE = 256  # numbers of a site, above which it has no axes but its own, and moves no other
LEAST = 1e-3  # of the prior's curvature: where data have less, their pull is left out


class Downstream(NamedTuple):
    """What follows from a site's numbers z (data, other latents), as one more normal factor.

    The gradient of its log density is taken to be linear, D − H (z − z₀) − B (u − u₀), where u are
    the unconstrained latents of the sites before it that are not wide.

    Attributes:
        gradient: D, at z₀ and u₀, shape of the site.
        curvature: H of vectors, shape (*batch, n, n); of n numbers the orthogonal axes, shape
            (n, n), along which it is diagonal in units of the prior's scales; empty for their own.
        coupling: B, shape (n, length of u), n all numbers of the site.
    """

    gradient: Tensor
    curvature: Tensor
    coupling: Tensor


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

    def forth(
        self, x: Tensor, u: Tensor, c: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers z at coordinates x, log |det ∂z/∂x| by element, and what rounding z costs.

        u are the unconstrained latents before them, (*B, length). The last is by how much it moves
        (z − m)/s: where s is small against m, as at the neck of a funnel, the model cannot know x
        from z.
        """
        if self.matrix:
            return self._vectors(x, u, c, *tensors)
        if len(tensors) > 1:
            return self._numbers(x, u, c, *tensors)
        log_factor = (1 - c) * (self.scale.log() - tensors[0])
        factor = log_factor.exp()
        off = factor * (x - c * self.loc)
        z = factor * x + (1 - c * factor) * self.loc  # x itself where c = 1
        return z, log_factor, ((z - self.loc - off) / self.scale).detach().abs()

    def back(self, z: Tensor, u: Tensor, c: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`forth`, with the same log-determinant."""
        if self.matrix:
            return self._vectors_back(z, u, c, *tensors)
        if len(tensors) > 1:
            return self._numbers_back(z, u, c, *tensors)
        log_factor = (1 - c) * (self.scale.log() - tensors[0])
        factor = log_factor.exp()
        return (z - (1 - c * factor) * self.loc) / factor, log_factor

    def _numbers(
        self, x: Tensor, u: Tensor, c: Tensor, unit: Tensor, *at: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        size, (*pull, centre, axes) = unit.exp(), at
        log_factor, shift = self._along(u, c, unit, *pull, axes)
        white = turned(x / size, axes.mT) - centre
        off = size * turned(log_factor.exp() * white + shift, axes)
        z = self.loc + off
        return z, log_factor, ((z - self.loc - off) / self.scale).detach().abs()

    def _numbers_back(
        self, z: Tensor, u: Tensor, c: Tensor, unit: Tensor, *at: Tensor
    ) -> tuple[Tensor, Tensor]:
        size, (*pull, centre, axes) = unit.exp(), at
        log_factor, shift = self._along(u, c, unit, *pull, axes)
        white = (turned((z - self.loc) / size, axes.mT) - shift) * (-log_factor).exp()
        return size * turned(white + centre, axes), log_factor

    def _along(
        self, u: Tensor, c: Tensor, unit: Tensor, pull: Tensor, coupling: Tensor, axes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Along the axes: log σ/σ₀, and μ − m in units of s₀."""
        log_ratio = self.scale.log() - unit
        largest = log_ratio.amax().detach()
        squares = turned((2 * (log_ratio - largest)).exp(), axes.mT.square())
        log_ratio = largest + squares.log() / 2
        log_factor = -torch.logaddexp(torch.log1p(-c) - 2 * log_ratio, c.log()) / 2
        pulled = pull - coupled(coupling, u, c) - c * turned(self.loc / unit.exp(), axes.mT)
        return log_factor, (2 * log_factor).exp() * pulled

    def _vectors(
        self, x: Tensor, u: Tensor, c: Tensor, unit: Tensor, *at: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        written = _written(c)
        if at:
            C, log_det, mean = self._posterior(u, c, *at)
            white = times(unit, x - at[2])
            off = mean + times(self.scale, solved(C.mT, white, upper=True))
        else:
            factor = self._rows(c, unit)
            log_det = factor.diagonal(dim1=-2, dim2=-1).log()
            off = times(factor, x - c * self.loc)
        z = torch.where(written, x, self.loc + off)
        lost = solved(self.scale, (z - self.loc - off).detach())
        return z, torch.where(written, 0.0, log_det), torch.where(written, 0.0, lost).abs()

    def _vectors_back(
        self, z: Tensor, u: Tensor, c: Tensor, unit: Tensor, *at: Tensor
    ) -> tuple[Tensor, Tensor]:
        written, off = _written(c), z - self.loc
        if at:
            C, log_det, mean = self._posterior(u, c, *at)
            white = times(C.mT, solved(self.scale, off - mean))
            x = torch.linalg.solve(unit, white.unsqueeze(-1)).squeeze(-1) + at[2]
        else:
            factor = self._rows(c, unit)
            log_det = factor.diagonal(dim1=-2, dim2=-1).log()
            x = solved(factor, off) + c * self.loc
        return torch.where(written, z, x), torch.where(written, 0.0, log_det)

    def _rows(self, c: Tensor, unit: Tensor) -> Tensor:
        return (1 - c).unsqueeze(-1) * (self.scale @ unit) + c.diag_embed()

    def _posterior(
        self, u: Tensor, c: Tensor, pull: Tensor, coupling: Tensor, *at: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """C, the parts of log |det ∂z/∂x|, and μ − m, without a product of matrices."""
        _, curvature, log_unit = at
        C, log_det = self._factored(curvature)
        pulled = pull - coupled(coupling, u, c) - times(curvature, self.loc)
        pulled = times(self.scale.mT, pulled)
        mean = times(self.scale, solved(C.mT, solved(C, pulled), upper=True))
        return C, log_det + log_unit, mean

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
    """The product of a matrix (n, n) and all n numbers of a site, in the shape of the site.

    An empty matrix stands for the identity.
    """
    if not matrix.numel():
        return numbers
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


def coupled(coupling: Tensor, u: Tensor, like: Tensor) -> Tensor:
    """B u, of numbers in the shape of ``like``, for B (n, length) and u (*B, length)."""
    return (u @ coupling.mT).reshape(u.shape[:-1] + like.shape)


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


def nothing_downstream(prior: Prior, before: int) -> Downstream:
    """D = B = 0, and H = 0 of a matrix; for numbers the axes are their own."""
    scale, num = prior.scale, prior.loc.numel()
    eye = torch.eye(num if num <= WIDE else 0, dtype=scale.dtype, device=scale.device)
    curvature = torch.zeros_like(scale) if prior.matrix else eye
    return Downstream(torch.zeros_like(prior.loc), curvature, scale.new_zeros(num, before))


def conditionals(
    prior: Prior, c: Tensor, z: Tensor, u: Tensor, downstream: Downstream
) -> list[Tensor]:
    r"""The tensors with which x has the prior's conditional distribution given data, standardised.

    With what follows from z as one more normal factor, z given the other latents is normal with
    precision s⁻² + h and mean m + (D + h (z₀ − m) − B (u − u₀))/(s⁻² + h): these σ and μ make
    z = μ + (σ/σ₀)(x − μ₀), and c = h/(h + s₀⁻²). The same holds of matrices, s² = L Lᵀ, h = H,
    and of numbers along axes on which both are diagonal.

    Args:
        prior: where the other latents are as in u.
        c: shape of the site, along its axes; one with c = 1 stays as it is written.
        z: the site's numbers z₀.
        u: the unconstrained latents before them, u₀, shape (length,).
        downstream: D, H and B.
    """
    if prior.matrix:
        return _of_vectors(prior, z, u, downstream)
    axes, size = downstream.curvature, prior.scale
    here, loc, gradient = (
        turned(t, axes.mT) for t in (z / size, prior.loc / size, size * downstream.gradient)
    )
    # In units of the precision at s₀, which is the information of the prior over 1 − c.
    share = (1 - c) / prior.information.mean() * c / (c + LEAST * (1 - c))
    coupling = size.reshape(-1, 1) * downstream.coupling
    coupling = share.reshape(-1, 1) * (axes.mT @ coupling if axes.numel() else coupling)
    pull = c * here + share * gradient
    centre = (1 - c) * loc + pull
    return [size.log(), pull + coupled(coupling, u, c), coupling, centre, axes]


def _of_vectors(prior: Prior, z: Tensor, u: Tensor, downstream: Downstream) -> list[Tensor]:
    gradient, curvature, coupling = downstream
    kept = _directions(curvature)
    coupling = kept @ coupling.reshape(*gradient.shape, -1)
    coupling = coupling.reshape(gradient.numel(), -1)
    pull = times(curvature, z) + times(kept, gradient)
    factor, log_det = prior.conditional(curvature)
    centre = prior.loc + times(factor, times(factor.mT, pull - times(curvature, prior.loc)))
    pull = pull + coupled(coupling, u, z)
    return [torch.linalg.inv(factor), pull, coupling, centre, curvature, -log_det]


def _directions(curvature: Tensor) -> Tensor:
    """The projections on those in which there is curvature, whatever the units of the numbers."""
    size = curvature.diagonal(dim1=-2, dim2=-1).sqrt()
    size = size.where(size > 0, 1.0)
    values, vectors = torch.linalg.eigh(curvature / size.unsqueeze(-1) / size.unsqueeze(-2))
    kept = vectors * (values > LEAST).to(values).unsqueeze(-2) @ vectors.mT
    return size.unsqueeze(-1) * kept / size.unsqueeze(-2)
