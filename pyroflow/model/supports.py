"""Bijections from unconstrained latents to supports, in a form that does not round to an edge.

They are the maps of ``torch.distributions.biject_to``. Its simplices and Cholesky factors subtract
from one, its half-lines underflow, and so near an edge, from |z| ≈ 16 in float32, log-determinants
and values are those of other points. Here every log-determinant is a function of z, and values are
rounded into the open support.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.distributions import constraints
from pyro.distributions.transforms import CorrMatrixCholeskyTransform
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint, MixtureSameFamilyConstraint
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    CorrCholeskyTransform,
    IndependentTransform,
    StickBreakingTransform,
    Transform,
)
from torch.distributions.utils import tril_matrix_to_vec, vec_to_tril_matrix
from torch.nn.functional import logsigmoid, pad, softplus


def bijection(support: Constraint) -> Transform:
    """The map of ``biject_to(support)``, exact near the edges of the support.

    Example:
        >>> t = bijection(constraints.simplex)
        >>> z = torch.tensor([50.0, 3.0])
        >>> t.log_abs_det_jacobian(z, t(z)).item()
        -101.71...
    """
    if isinstance(support, MixtureSameFamilyConstraint):
        return bijection(support.base_constraint)
    if isinstance(support, constraints.independent):
        base = bijection(support.base_constraint)
        return IndependentTransform(base, support.reinterpreted_batch_ndims)
    if isinstance(support, type(constraints.corr_matrix)):
        return ComposeTransform([CorrCholesky(), CorrMatrixCholeskyTransform().inv])
    transform = plain_bijection(support)
    if isinstance(transform, StickBreakingTransform):
        return StickBreaking()
    if isinstance(transform, CorrCholeskyTransform):
        return CorrCholesky()
    if hasattr(support, "lower_bound") or hasattr(support, "upper_bound"):
        return _Inside(transform, support)
    return transform


def plain_bijection(support: Constraint) -> Transform:
    """``biject_to(support)``, without its shift of positive numbers by zero."""
    transform = biject_to(support)
    *_, shift = [None, *getattr(transform, "parts", [])]
    if not isinstance(shift, AffineTransform) or isinstance(shift.loc + shift.scale, Tensor):
        return transform
    return transform.parts[0] if (shift.loc, shift.scale) == (0, 1) else transform


class StickBreaking(StickBreakingTransform):
    """The same map of z (*B, K − 1) to the simplex (*B, K), by way of the logs of its parts."""

    def log_parts(self, z: Tensor) -> Tensor:
        """Log θ, shape (*B, K)."""
        inside, rest = self._logs(z)
        return pad(inside, (0, 1)) + pad(rest, (1, 0))

    def _logs(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log part of the stick broken off at each break, and log length of what is then left."""
        logits = z - self._log_parts_left(z)
        return logsigmoid(logits), logsigmoid(-logits).cumsum(-1)

    def _log_parts_left(self, z: Tensor) -> Tensor:
        return torch.arange(z.shape[-1], 0, -1, dtype=z.dtype, device=z.device).log()

    def _call(self, x: Tensor) -> Tensor:
        return self.log_parts(x).exp().clamp(min=torch.finfo(x.dtype).tiny)

    def _inverse(self, y: Tensor) -> Tensor:
        left = y.flip(-1).cumsum(-1).flip(-1)[..., 1:]  # a sum: 1 − θ would lose small parts
        return y[..., :-1].log() - left.log() + self._log_parts_left(left)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log |det ∂θ_{1…K−1}/∂z|, shape (*B), of z alone."""
        inside, rest = self._logs(x)
        return (inside + rest).sum(-1)


class CorrCholesky(CorrCholeskyTransform):
    """The same map of z (*B, D(D − 1)/2) to Cholesky factors (*B, D, D) of correlations.

    Row i has unit length: L_ij = tanh(z_ij) Π_{k<j} sech(z_ik), and L_ii = Π_{k<i} sech(z_ik).
    """

    def log_diagonal(self, z: Tensor) -> Tensor:
        """Log L_ii, shape (*B, D)."""
        return self._log_sech(z).sum(-1)

    def _log_sech(self, z: Tensor) -> Tensor:
        """At the places of z below the diagonal, shape (*B, D, D), and zero elsewhere."""
        return vec_to_tril_matrix(math.log(2.0) - z - softplus(-2 * z), diag=-1)

    def _call(self, x: Tensor) -> Tensor:
        log_sech = self._log_sech(x)
        before = log_sech.cumsum(-1) - log_sech
        tanh = vec_to_tril_matrix(x.tanh(), diag=-1)
        diagonal = log_sech.sum(-1).exp().clamp(min=torch.finfo(x.dtype).tiny)
        return tanh * before.exp() + diagonal.diag_embed()

    def _inverse(self, y: Tensor) -> Tensor:
        left = y.square().flip(-1).cumsum(-1).flip(-1)[..., 1:].sqrt()
        lower, left = tril_matrix_to_vec(y, -1), tril_matrix_to_vec(pad(left, (0, 1)), -1)
        return torch.asinh(lower / left)

    def log_abs_det_jacobian(
        self, x: Tensor, y: Tensor, intermediates: Tensor | None = None
    ) -> Tensor:
        """Log |det ∂L/∂z| of the part below the diagonal, shape (*B), of z alone."""
        rows, columns = torch.tril_indices(y.shape[-1], y.shape[-1], -1, device=x.device)
        log_sech = math.log(2.0) - x - softplus(-2 * x)
        return ((1 + rows - columns) * log_sech).sum(-1)


class _Inside(Transform):
    """A map to an interval or half-line whose values are never rounded to its bounds."""

    bijective = True

    def __init__(self, transform: Transform, support: Constraint) -> None:
        super().__init__()
        self.transform, self.codomain, self.domain = transform, support, transform.domain
        self.lower = getattr(support, "lower_bound", -math.inf)
        self.upper = getattr(support, "upper_bound", math.inf)

    def _call(self, x: Tensor) -> Tensor:
        y = self.transform(x)
        lower = _next(self.lower, math.inf, y.dtype)
        return y.clamp(min=lower).clamp(max=_next(self.upper, -math.inf, y.dtype))

    def _inverse(self, y: Tensor) -> Tensor:
        return self.transform.inv(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.transform.log_abs_det_jacobian(x, y)


def _next(bound: Tensor | float, towards: float, dtype: torch.dtype) -> Tensor | float:
    """The number beside a bound; beside zero the smallest one with all its digits."""
    if not isinstance(bound, Tensor):
        return _next_number(float(bound), towards, dtype)
    beside = torch.nextafter(bound, torch.full_like(bound, towards))
    tiny = math.copysign(torch.finfo(dtype).tiny, towards)
    return torch.where(bound == 0, tiny, beside)


_NUMBERS = {torch.float32: np.float32, torch.float64: np.float64}


@lru_cache(maxsize=256)
def _next_number(bound: float, towards: float, dtype: torch.dtype) -> float:
    if bound == 0:
        return math.copysign(torch.finfo(dtype).tiny, towards)
    number = _NUMBERS.get(dtype)
    if number is not None:  # by NumPy, which may be called while torch records a graph
        return float(np.nextafter(number(bound), number(towards)))
    ends = torch.tensor([bound, towards], dtype=dtype, device="cpu")
    return torch.nextafter(ends[0], ends[1]).item()


class Preimage(NamedTuple):
    """The unconstrained latents that a value was mapped from, and the support it was mapped to."""

    latent: Tensor
    support: Constraint


def remember(value: Tensor, latent: Tensor, support: Constraint) -> Tensor:
    """Note at a value of its own where it comes from, for :func:`preimage`."""
    if not is_real(support):
        value._preimage = Preimage(latent, support)
    return value


def preimage(value: Tensor) -> Preimage | None:
    """Where a value comes from, if that was noted; no operation on the value keeps it."""
    return getattr(value, "_preimage", None)


def moved(value: Tensor, move: Callable[[Tensor, int], Tensor], event_dim: int = 0) -> Tensor:
    """A value whose batch dimensions were moved, and with it the latents that it came from.

    Args:
        value: of any shape.
        move: what is done to a tensor with so many event dimensions.
        event_dim: those of the value.
    """
    result, origin = move(value, event_dim), preimage(value)
    if origin is None:
        return result
    latent, support = origin
    inner = event_dim - support.event_dim + bijection(support).domain.event_dim
    return remember(result, move(latent, inner), support)


def concatenated(values: list[Tensor]) -> Tensor:
    """Values one after the other, and so the latents that they came from."""
    result, origins = torch.cat(values), [preimage(value) for value in values]
    if not all(origins):
        return result
    return remember(result, torch.cat([o.latent for o in origins]), origins[0].support)


def is_real(support: Constraint) -> bool:
    """Whether a support has no edges."""
    return isinstance(base_of(support), type(constraints.real))


def same_support(one: Constraint, other: Constraint) -> bool:
    """Whether two supports are of one kind and have the same bounds, up to their rounding."""
    pairs = zip_longest(_numbers(base_of(one)), _numbers(base_of(other)))
    return _kind(one) == _kind(other) and all(
        a is not None and b is not None and a.shape == b.shape and torch.allclose(a, b, 1e-6, 0.0)
        for a, b in pairs
    )


def of_parts(support: Constraint) -> Constraint:
    """The support with that of the parts in place of a mixture's, which torch cannot map."""
    if isinstance(support, MixtureSameFamilyConstraint):
        return of_parts(support.base_constraint)
    if isinstance(support, constraints.independent):
        base = of_parts(support.base_constraint)
        if base is not support.base_constraint:
            return constraints.independent(base, support.reinterpreted_batch_ndims)
    return support


def base_of(support: Constraint) -> Constraint:
    """The support of the numbers or vectors that an independent one repeats, or a mixture has."""
    while isinstance(support, constraints.independent | MixtureSameFamilyConstraint):
        support = support.base_constraint
    return support


def _numbers(held: Any) -> Iterator[Tensor]:
    """The bounds of a support, and whatever else it says in numbers, in float64 on the CPU."""
    if isinstance(held, Tensor | float | int):
        yield torch.as_tensor(held, dtype=torch.float64, device="cpu")
    parts = vars(held).values() if isinstance(held, Constraint) else held
    if not isinstance(held, Tensor | str) and isinstance(parts, Collection):
        for part in parts:
            yield from _numbers(part)


def _kind(support: Constraint) -> str:
    """The type of a support, apart from its bounds and batches."""
    return type(base_of(support)).__name__.strip("_").lower()
