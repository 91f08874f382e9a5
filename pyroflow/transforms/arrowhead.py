"""The affine layer of a hierarchy: global numbers, and rows that are independent given them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Size, Tensor, nn

from pyroflow.checks import check_positive
from pyroflow.transforms.affine import inverse_softplus
from pyroflow.transforms.bijection import Bijection, Pair, Parameters
from pyroflow.transforms.kernels.units import softplus


class Leading(Bijection, TransformModule):
    """A bijection of the first G numbers of a vector, which leaves the others as they are.

    Args:
        inner: the bijection, of R^G.
        input_dim: D ≥ G.

    Raises:
        ValueError: If input_dim is smaller than G.

    Example:
        >>> import torch
        >>> from pyroflow import Planar
        >>> Leading(Planar(2, num_layers=4), 5)(torch.zeros(3, 5)).shape
        torch.Size([3, 5])
    """

    def __init__(self, inner: Bijection, input_dim: int) -> None:
        Bijection.__init__(self)
        self.inner, self.input_dim = inner, input_dim
        self.event_dims, self.fixed = inner.event_dims, inner.fixed
        self.size = getattr(inner, next(iter(inner.event_dims))).shape[-1]
        if input_dim < self.size:
            raise ValueError(f"input_dim must be at least {self.size}, got {input_dim}")

    def _shown(self) -> tuple[str, dict[str, str]]:
        return f"Leading({self.inner!r}, {self.input_dim})", {}

    def trained(self) -> Parameters:
        """Those of the inner bijection."""
        return self.inner.trained()

    def _map_parameters(self) -> Parameters:
        return self.inner._map_parameters()

    def _check(self, name: str, value: Tensor, parameters: Parameters) -> None:
        if value.dim() == 0 or value.shape[-1] != self.input_dim:
            raise ValueError(
                f"Leading expects {name} with last dimension {self.input_dim}, got shape "
                f"{tuple(value.shape)}"
            )
        self.inner._check(name, value[..., : self.size], parameters)

    def _forward(self, x: Tensor, parameters: Parameters) -> tuple[Tensor, Any]:
        first, inner = self.inner._forward(x[..., : self.size], parameters)
        return torch.cat([first, x[..., self.size :]], -1), inner

    def _invert(self, y: Tensor, parameters: Parameters, cached: Pair | None) -> tuple[Tensor, Any]:
        size = self.size
        if cached is not None:
            cached = cached._replace(x=cached.x[..., :size], y=cached.y[..., :size])
        first, inner = self.inner._invert(y[..., :size], parameters, cached)
        return torch.cat([first, y[..., size:]], -1), inner

    def _log_det(self, intermediates: Any) -> Tensor:
        return self.inner._log_det(intermediates)


class Arrowhead(Bijection, TransformModule):
    r"""y = loc + L x for global numbers g, and for each row j of a plate, given them.

    With base numbers x = (u, ε_1, …, ε_J) and an offset in the order of y, v = offset + A u and
    w_j = offset_j + A_j ε_j + E_j v, A and A_j lower triangular:

    y_g = centre_g + C v,   y_j = centre_j + C_j w_j + K_j v.

    The precision of y has the shape of an arrowhead. C, C_j, K_j and the centre are units that
    :meth:`start_from` sets; until then C = I and K = 0. There are O(J (d² + d G)) parameters for
    rows of d numbers.

    Args:
        leading: the places of the G global numbers in y, shape (G,).
        rows: of each plate the places of its rows' numbers, shape (J, d).
        init_loc: offset at the start, shape (D,); zeros by default.
        init_scale: the diagonals of A and A_j at the start.

    Raises:
        ValueError: If the places are not those of D numbers, each once.

    Example:
        >>> import torch
        >>> places = torch.arange(1, 7).reshape(3, 2)
        >>> Arrowhead(torch.tensor([0]), [places])(torch.zeros(5, 7)).shape
        torch.Size([5, 7])
    """

    diagonal = False
    counts: Tensor | None = None  # of the base numbers, in log-determinants, where not all are 1

    def __init__(
        self,
        leading: Tensor,
        rows: Sequence[Tensor],
        *,
        init_loc: Tensor | None = None,
        init_scale: float = 1.0,
    ) -> None:
        Bijection.__init__(self)
        order = torch.cat([leading, *(places.flatten() for places in rows)])
        dim, G = len(order), len(leading)
        if not torch.equal(order.sort().values, torch.arange(dim, device=order.device)):
            raise ValueError("leading and rows must have the places of all numbers, each once")
        loc = torch.zeros(dim) if init_loc is None else init_loc.detach()
        scale = torch.full_like(loc, float(check_positive("init_scale", init_scale)))
        self.register_buffer("order", order.to(loc.device), persistent=False)
        self.register_buffer("place", self.order.argsort(), persistent=False)
        self.shapes = [tuple(places.shape) for places in rows]
        self.offset = nn.Parameter(loc.clone())
        self.raw_scale = nn.Parameter(inverse_softplus(scale))
        self.lower = nn.Parameter(loc.new_zeros(G, G))
        self.register_buffer("centre", torch.zeros_like(loc))
        self.register_buffer("unit", torch.eye(G, dtype=loc.dtype, device=loc.device))
        self.event_dims = {"offset": 1, "raw_scale": 1, "lower": 2, "centre": 1, "unit": 2}
        for p, (J, d) in enumerate(self.shapes):
            setattr(self, f"lower_{p}", nn.Parameter(loc.new_zeros(J, d, d)))
            setattr(self, f"coupling_{p}", nn.Parameter(loc.new_zeros(J, d, G)))
            eye = torch.eye(d, dtype=loc.dtype, device=loc.device).expand(J, d, d)
            self.register_buffer(f"unit_{p}", eye.clone())
            self.register_buffer(f"slope_{p}", loc.new_zeros(J, d, G))
            names = {f"{n}_{p}": 3 for n in ("lower", "coupling", "unit", "slope")}
            self.event_dims = self.event_dims | names
        self.fixed = tuple(n for n in self.event_dims if n.startswith(("centre", "unit", "slope")))

    @torch.no_grad()
    def start_from(
        self, loc: Tensor, unit: Tensor, units: Sequence[Tensor], slopes: Sequence[Tensor]
    ) -> None:
        """Set loc (D,), C (G, G), and of each plate C_j (J, d, d) and K_j (J, d, G)."""
        self.centre.copy_(loc[self.order])
        self.unit.copy_(unit)
        for p, (C, K) in enumerate(zip(units, slopes, strict=True)):
            getattr(self, f"unit_{p}").copy_(C)
            getattr(self, f"slope_{p}").copy_(K)
            getattr(self, f"lower_{p}").zero_()
            getattr(self, f"coupling_{p}").zero_()
        self.lower.zero_()
        self.offset.zero_()
        self.raw_scale.copy_(inverse_softplus(torch.ones_like(self.raw_scale)))

    @torch.no_grad()
    def recentre(self) -> None:
        """Make the present location and scale the units; the map stays as it is."""
        offset, raw_scale, lower, _, unit, *rest = parameters = self._map_parameters()
        loc = self._forward(torch.zeros_like(offset), parameters)[0]
        width, *each = self._split(softplus(raw_scale))
        A, units, slopes = _triangle(width, lower), [], []
        for p, s in enumerate(each):
            inner, coupling, C, K = rest[4 * p : 4 * p + 4]
            units.append(C @ _triangle(s, inner))
            slopes.append((C @ coupling + K) @ A)
        self.start_from(loc, unit @ A, units, slopes)

    def leading(self) -> Tensor:
        """The places of the global numbers."""
        return self.order[: len(self.lower)]

    def rows(self) -> list[Tensor]:
        """The places of the rows' numbers, (J, d) of each plate."""
        sizes = [len(self.lower), *(J * d for J, d in self.shapes)]
        parts = self.order.split(sizes)[1:]
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def _split(self, x: Tensor) -> list[Tensor]:
        """The global numbers (*B, G), and (*B, J, d) of each plate."""
        first, *rest = x.split([len(self.lower), *(J * d for J, d in self.shapes)], -1)
        pairs = zip(rest, self.shapes, strict=True)
        return [first, *(part.reshape(part.shape[:-1] + shape) for part, shape in pairs)]

    def _log_scales(self, parameters: Parameters, batch: Size) -> Tensor:
        """The log-determinant, to which each base number adds as often as it counts."""
        _, raw_scale, _, _, unit, *rest = parameters
        units = [C.diagonal(dim1=-2, dim2=-1).flatten() for C in (unit, *rest[2::4])]
        scales = torch.cat(units).abs().log() + softplus(raw_scale).log()
        return (scales if self.counts is None else self.counts * scales).sum(-1).expand(batch)

    def _forward(self, x: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
        offset, raw_scale, lower, centre, unit, *rest = parameters
        u, *eps = self._split(x)
        at, *ats = self._split(offset[self.order])
        width, *each = self._split(softplus(raw_scale))
        v = at + width * (u + u @ lower.tril(-1).mT)
        parts = [v @ unit.mT]
        for p, (e, a, s) in enumerate(zip(eps, ats, each, strict=True)):
            inner, coupling, C, K = rest[4 * p : 4 * p + 4]
            w = a + s * (e + _times(inner.tril(-1), e)) + _from(coupling, v)
            parts.append((_times(C, w) + _from(K, v)).flatten(-2))
        y = (centre + torch.cat(parts, -1))[..., self.place]
        return y, self._log_scales(parameters, y.shape[:-1])

    def _invert(
        self, y: Tensor, parameters: Parameters, cached: Pair | None
    ) -> tuple[Tensor, Tensor]:
        offset, raw_scale, lower, centre, unit, *rest = parameters
        first, *rows = self._split(y[..., self.order] - centre)
        at, *ats = self._split(offset[self.order])
        width, *each = self._split(softplus(raw_scale))
        v = _solve(unit, first)
        parts = [_solve(lower, (v - at) / width, unitriangular=True)]
        for p, (r, a, s) in enumerate(zip(rows, ats, each, strict=True)):
            inner, coupling, C, K = rest[4 * p : 4 * p + 4]
            w = _solve(C, r - _from(K, v)) - _from(coupling, v)
            e = _solve(inner, (w - a) / s, unitriangular=True)
            parts.append(e.flatten(-2))
        x = torch.cat(parts, -1)
        return x, self._log_scales(parameters, x.shape[:-1])

    def _log_det(self, intermediates: Tensor) -> Tensor:
        return intermediates


def _triangle(width: Tensor, lower: Tensor) -> Tensor:
    """Diag(width) times the unit lower triangle."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return width.unsqueeze(-1) * (lower.tril(-1) + eye)


def _times(matrices: Tensor, rows: Tensor) -> Tensor:
    """The products of matrices (J, d, d) and rows (*B, J, d)."""
    if rows.shape[-1] == 1:
        return matrices.squeeze(-1) * rows
    return torch.einsum("jkl,...jl->...jk", matrices, rows)


def _from(matrices: Tensor, v: Tensor) -> Tensor:
    """The products of matrices (J, d, G) and numbers (*B, G), shape (*B, J, d)."""
    J, d, G = matrices.shape
    return (v @ matrices.reshape(J * d, G).mT).reshape(v.shape[:-1] + Size((J, d)))


def _solve(triangles: Tensor, rows: Tensor, *, unitriangular: bool = False) -> Tensor:
    """The x with T x = rows, T (d, d) with rows (*B, d), or T (J, d, d) with rows (*B, J, d)."""
    if not triangles.numel():
        return rows
    if triangles.shape[-1] == 1:
        return rows if unitriangular else rows / triangles.squeeze(-1)
    flat = rows.reshape(-1, *rows.shape[-triangles.dim() + 1 :])  # (N, d) or (N, J, d)
    flat = flat.movedim(0, -1)  # (d, N) or (J, d, N)
    found = torch.linalg.solve_triangular(triangles, flat, upper=False, unitriangular=unitriangular)
    return found.movedim(-1, 0).reshape(rows.shape)
