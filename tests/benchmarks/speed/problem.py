"""What every contender computes: the same layers at the same points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import pyroflow as pf

# From the identity start, u moves by about MOVE in norm up to this depth, and above it by
# MOVE·sqrt(DEPTH / K). 300 steps on the sine data (D = 2) give at K = 32, over three seeds and
# both directions, a median ‖û‖ of 0.33 to 0.41, rows of the strict upper triangle of G = WÛᵀ with
# norms of 1.5 to 3.3 (median) and 7 to 14 (largest), and a smallest s of 0.21 to 0.35; this gives
# 0.30, 2.5, 6.7 and 0.15. At K = 128 a fit gives 0.11, 1.7, 9.4 and 0.43, and this 0.20, 2.6, 14
# and 0.11.
DEPTH, MOVE = 32, 0.35**0.5


class Shape(NamedTuple):
    """Batch, event size and number of layers."""

    N: int
    D: int
    K: int


SHAPES = tuple(
    Shape(*sizes)
    for sizes in (
        (1, 50, 16),
        (16, 50, 16),
        (100, 2, 32),
        (1000, 2, 32),
        (256, 2, 128),
        (100, 40, 80),
        (10_000, 40, 32),
        (1000, 1000, 64),
        (4096, 784, 32),
    )
)


@dataclass(frozen=True)
class Problem:
    """Parameters w, u (K, D) and b (K,), noise x (N, D) and foreign data y (N, D)."""

    shape: Shape
    w: Tensor
    u: Tensor
    b: Tensor
    x: Tensor
    y: Tensor

    @classmethod
    def draw(cls, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
        """The start of ``Planar`` with u moved, so that the layers are those of a trained flow.

        The data are what these layers make of other noise: points such as a fitted flow scores.
        """
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            t = pf.Planar(shape.D, shape.K).to(dtype)
            size = MOVE * min(1, DEPTH / shape.K) ** 0.5
            t.u.add_(size / shape.D**0.5 * torch.randn_like(t.u))
            x, other = torch.randn(2, shape.N, shape.D, dtype=dtype)
        w, u, b = (p.detach() for p in (t.w, t.u, t.b))
        return cls(shape, w, u, b, x, reference(w, u, b, other).y.to(dtype))

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.w, self.u, self.b


class Reference(NamedTuple):
    """y (N, D), log|det| (N,) and, by number of y, the size that its rounding error goes with."""

    y: Tensor
    log_det: Tensor
    scale: Tensor


def constrained(w: Tensor, u: Tensor) -> Tensor:
    """The paper's û, by the formula of appendix A.1."""
    v = (w * u).sum(-1, keepdim=True)
    return u + (F.softplus(v, threshold=40) - 1 - v) * w / w.square().sum(-1, keepdim=True)


def reference(w: Tensor, u: Tensor, b: Tensor, x: Tensor) -> Reference:
    """The K layers one by one in float64: equations 10 to 13, and |x| + Σ_k |û_k h_k|."""
    w, u, b, y = (t.double() for t in (w, u, b, x))
    log_det, scale = y.new_zeros(len(y)), y.abs()
    for w_k, u_k, b_k in zip(w, constrained(w, u), b, strict=True):
        h = (y @ w_k + b_k).tanh()
        log_det = log_det + (1 + (w_k @ u_k) * (1 - h.square())).log()
        y = torch.addcmul(y, h.unsqueeze(-1), u_k)
        scale = torch.addcmul(scale, h.abs().unsqueeze(-1), u_k.abs())
    return Reference(y, log_det, scale)
