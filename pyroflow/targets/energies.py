"""The four energies of Rezende & Mohamed 2015, Table 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

_WALL = 4.0


@dataclass(frozen=True)
class Energy:
    r"""One of the paper's test energies; see :func:`energy`.

    Attributes:
        number: Which one, 1 to 4.
        containment: Strength of the wall outside :math:`[-4, 4]^2`, or None.
    """

    number: int
    containment: float | None = 8.0

    def __post_init__(self) -> None:
        if self.number not in _ENERGIES:
            raise ValueError(f"energy expects a number from 1 to 4, got {self.number!r}.")
        if self.containment is not None and not 0 < self.containment < math.inf:
            raise ValueError(
                f"energy: containment expects a positive number, got {self.containment!r};"
                " pass None for the paper's energy without a wall."
            )

    def __call__(self, z: Tensor) -> Tensor:
        r"""Returns U(z), shape :math:`(*,)`, for points ``z`` of shape :math:`(*, 2)`."""
        if z.shape[-1:] != (2,):
            raise ValueError(f"energy: z expects last dimension 2, got shape {tuple(z.shape)}.")
        bare = _ENERGIES[self.number](z)
        if self.containment is None:
            return bare
        return bare + self.containment * (z.abs() - _WALL).relu().square().sum(-1)

    @property
    def log_normalizer(self) -> float:
        """Log of the integral of exp(-U), by quadrature; infinite where U is improper."""
        return _log_normalizer(self)


def energy(k: int, containment: float | None = 8.0) -> Energy:
    r"""The paper's test energy U_k, whose density is p(z) ∝ exp(-U_k(z)) on the plane.

    U2, U3 and U4 are improper as the paper prints them: they do not grow along z1, and the bound
    on them falls without end. So this adds containment · Σ_i max(\|z_i\| - 4, 0)², which is zero on
    the square :math:`(-4, 4)^2` that the paper shows.

    Args:
        k: Number of the energy, 1 to 4.
        containment: Strength of that wall; None for the bare energy.

    Returns:
        A function of points :math:`(*, 2)` to energies :math:`(*,)`, that also knows its
        ``log_normalizer``: KL(q ‖ p) is the free energy of q plus this number.

    Raises:
        ValueError: If ``k`` is not 1, 2, 3 or 4, or ``containment`` is not positive.

    References:
        Variational Inference with Normalizing Flows, Table 1 (Rezende and Mohamed, 2015),
        https://arxiv.org/abs/1505.05770

    Example:
        >>> import torch
        >>> from pyroflow.targets import energy
        >>> energy(1)(torch.zeros(5, 2)).shape
        torch.Size([5])
        >>> round(energy(2).log_normalizer, 4)
        2.1575
    """
    return Energy(k, containment)


def _wave(z: Tensor, width: float, shift: Tensor | float = 0.0) -> Tensor:
    """Log of an unnormalised Gaussian in z2 around the wave w1 - shift."""
    z1, z2 = z.unbind(-1)
    return -0.5 * ((z2 - torch.sin(math.pi * z1 / 2) + shift) / width).square()


def _energy1(z: Tensor) -> Tensor:
    ring = 0.5 * ((torch.linalg.vector_norm(z, dim=-1) - 2) / 0.4).square()
    right, left = (-0.5 * ((z[..., 0] - centre) / 0.6).square() for centre in (2, -2))
    return ring - torch.logaddexp(right, left)


def _energy2(z: Tensor) -> Tensor:
    return -_wave(z, 0.4)


def _energy3(z: Tensor) -> Tensor:
    dent = 3 * torch.exp(-0.5 * ((z[..., 0] - 1) / 0.6).square())
    return -torch.logaddexp(_wave(z, 0.35), _wave(z, 0.35, dent))


def _energy4(z: Tensor) -> Tensor:
    step = 3 * torch.sigmoid((z[..., 0] - 1) / 0.3)
    return -torch.logaddexp(_wave(z, 0.4), _wave(z, 0.35, step))


_ENERGIES = {1: _energy1, 2: _energy2, 3: _energy3, 4: _energy4}


@cache
def _log_normalizer(target: Energy) -> float:
    if target.containment is None and target.number != 1:
        return math.inf
    # exp(-U) is below 1e-17 beyond the wall by this much; along z2 it never reaches past 4 more.
    reach = 4.0 if target.containment is None else math.sqrt(40 / target.containment)
    z1, weight1 = _quadrature(reach)
    z2, weight2 = _quadrature(min(reach, 4.0))
    parts = [
        weight @ torch.exp(-target(torch.cartesian_prod(z, z2).view(-1, len(z2), 2))) @ weight2
        for z, weight in zip(z1.split(512), weight1.split(512), strict=True)
    ]
    return math.log(sum(map(float, parts)))


def _quadrature(reach: float) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights, panel by panel, with edges on the walls."""
    tail = np.linspace(_WALL, _WALL + reach, max(8, math.ceil(2 * reach)) + 1)
    edges = np.concatenate([-tail[:0:-1], np.linspace(-_WALL, _WALL, 17), tail[1:]])
    x, weight = np.polynomial.legendre.leggauss(16)
    half = np.diff(edges)[:, None] / 2
    nodes = (edges[:-1, None] + half * (x + 1)).ravel()
    return torch.from_numpy(nodes), torch.from_numpy((half * weight).ravel())
