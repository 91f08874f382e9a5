"""Rows that are independent given the numbers before them, each with layers of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor
from torch.autograd import Function

from pyroflow.transforms.arrowhead import Arrowhead, _from, _solve, _times
from pyroflow.transforms.bijection import Bijection, Conditioned, Pair, Parameters
from pyroflow.transforms.kernels.units import softplus
from pyroflow.transforms.planar import Planar


class RowsGiven(Bijection, TransformModule):
    r"""y = (v, y_1, …, y_B) for x = (v, ε_1, …, ε_B): planar layers and an affine one of each row.

    y_j = a_j + E_j v + exp(F_j v) s_j (1 + A_j) planar_j(ε_j), with s_j = softplus of a parameter
    and A_j strictly lower triangular, for G numbers v, which stay as they are.

    Args:
        planar: the formula of the planar layers.
        parameters: of B rows of d numbers, those of K planar layers w, u (B, K, d) and b (B, K);
            a (B, d), s before the softplus, A (B, d, d), E and F (B, d, G).
        counts: how often each row counts in the log-determinant, shape (B,).
        start: where ε_1 begins in x; after v by default. The numbers between, and those after
            ε_B, stay as they are.
    """

    event_dims = {"w": 3, "u": 3, "b": 2, "offset": 2, "raw_scale": 2, "lower": 3}
    event_dims |= {"shift": 3, "stretch": 3}

    def __init__(
        self, planar: Planar, parameters: Parameters, counts: Tensor, start: int | None = None
    ) -> None:
        Bijection.__init__(self)
        self.planar, self.counts = (planar,), counts  # in a tuple, so as not to be registered
        vars(self).update(zip(self.event_dims, parameters, strict=True))
        self.size = self.shift.shape[-1]
        self.start = self.size if start is None else start
        self.end = self.start + self.offset.numel()

    def _check(self, name: str, value: Tensor, parameters: Parameters) -> None:
        """Nothing: what it is given has been made for it."""

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x[..., self.start : self.end].unflatten(-1, self.offset.shape)
        return x[..., : self.size], rows

    def _affine(self, v: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Location and scale of the rows, (*S, B, d) each."""
        offset, raw_scale, _, shift, stretch = parameters
        return offset + _from(shift, v), softplus(raw_scale) * _from(stretch, v).exp()

    def _result(self, x: Tensor, rows: Tensor, held: Any, scale: Tensor) -> tuple[Tensor, Any]:
        parts = [x[..., : self.start], rows.flatten(-2), x[..., self.end :]]
        return torch.cat(parts, -1), (held, scale)

    def _forward(self, x: Tensor, parameters: Parameters) -> tuple[Tensor, Any]:
        (planar,), layers, rest = self.planar, parameters[:3], parameters[3:]
        v, e = self._split(x)
        loc, scale = self._affine(v, rest)
        e, held = planar._forward(e, layers)
        rows = loc + scale * (e + _times(rest[2].tril(-1), e))
        return self._result(x, rows, held, scale)

    def _invert(
        self, y: Tensor, parameters: Parameters, cached: Pair | None
    ) -> tuple[Tensor, Tensor]:
        (planar,), layers, rest = self.planar, parameters[:3], parameters[3:]
        v, rows = self._split(y)
        loc, scale = self._affine(v, rest)
        e = _solve(rest[2], (rows - loc) / scale, unitriangular=True)
        if cached is not None:
            inner = {
                "x": self._split(cached.x)[1],
                "y": e,
                "intermediates": cached.intermediates[0],
            }
            cached = cached._replace(**inner)
        e, held = planar._invert(e, layers, cached)
        return self._result(y, e, held, scale)

    def _log_det(self, intermediates: tuple[Any, Tensor]) -> Tensor:
        return (self._by_row(intermediates) * self.counts).sum(-1)

    def _by_row(self, intermediates: tuple[Any, Tensor]) -> Tensor:
        (planar,), (held, scale) = self.planar, intermediates
        return planar._log_det(held) + scale.log().sum(-1)

    def log_dets(self, x: Tensor) -> Tensor:
        """The log |det ∂y_j/∂ε_j| of each row at x (*S, D), shape (*S, B)."""
        return self._by_row(self._forward(x, self._map_parameters())[1])


class Reordered(Bijection, TransformModule):
    """The numbers of x in another order, y = x[order]."""

    def __init__(self, order: Tensor) -> None:
        Bijection.__init__(self)
        self.order, self.place = order, order.argsort()

    def _check(self, name: str, value: Tensor, parameters: Parameters) -> None:
        """Nothing, as there are no parameters."""

    def _forward(self, x: Tensor, parameters: Parameters) -> tuple[Tensor, Any]:
        return x[..., self.order], x.new_zeros(x.shape[:-1])

    def _invert(self, y: Tensor, parameters: Parameters, cached: Pair | None) -> tuple[Tensor, Any]:
        return y[..., self.place], y.new_zeros(y.shape[:-1])

    def _log_det(self, intermediates: Tensor) -> Tensor:
        return intermediates


def at_rows(
    whole: Arrowhead, rows: Arrowhead, which: Sequence[Tensor], places: Tensor, *, sparse: bool
) -> Conditioned:
    """The map of some rows alone.

    Args:
        whole: the map of all rows.
        rows: a map of so many rows of each plate, in whose place the result is.
        which: of each plate, which rows.
        places: where the numbers of y are among those of all rows.
        sparse: whether gradients in what rows have of their own are sparse.
    """
    base = whole.place[places[rows.order]]
    kept = [
        rows_of(whole.offset, places, sparse),
        rows_of(whole.raw_scale, base, sparse),
        whole.lower,
    ]
    fixed = {"centre": whole.centre[base], "unit": whole.unit}
    for p, index in enumerate(which):
        tables = (getattr(whole, f"{n}_{p}") for n in ("lower", "coupling"))
        kept += [rows_of(table, index, sparse) for table in tables]
        fixed |= {f"{n}_{p}": getattr(whole, f"{n}_{p}")[index] for n in ("unit", "slope")}
    found = rows.at(*kept)
    vars(found).update(fixed)
    return found


class _Picked(Function):
    """Rows of a table; the gradient in the table is a sparse tensor."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = table.shape
        return table[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        options = {"device": grad.device, "check_invariants": False}
        found = torch.sparse_coo_tensor(index[None], grad, ctx.shape, **options)
        return found, None


def rows_of(table: Tensor, index: Tensor, sparse: bool = True) -> Tensor:
    """Some rows of a table, whose gradient in it may be a sparse tensor."""
    return _Picked.apply(table, index) if sparse else table[index]
