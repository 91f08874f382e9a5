"""The affine layer: a location and a lower-triangular scale."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn

from pyroflow.checks import check_choice, check_count, check_positive
from pyroflow.transforms.bijection import Bijection, Pair, Parameters, precisely
from pyroflow.transforms.kernels.units import softplus

AffineKind = Literal["full", "diagonal"]


class Affine(Bijection, TransformModule):
    """y = loc + L x with a trainable location and lower-triangular scale L; base to data.

    The trainable part is A = diag(softplus(raw)) · (unit lower triangular), as in Pyro's
    ``AutoMultivariateNormal`` (kind "diagonal": ``AutoDiagonalNormal``), so a flow of depth 0
    trains step by step as those guides do. It acts in units that :meth:`standardize` sets
    from data: L = C A and loc = centre + C·offset, with centre 0 and C = I until then. One
    learning rate thus suits data of any magnitude.

    Args:
        input_dim: D.
        kind: "full" or "diagonal".
        init_loc: offset at the start, shape (D,); zeros by default.
        init_scale: the diagonal of A at the start.

    Raises:
        ValueError: If input_dim < 1, the kind is unknown, or init_scale not positive.

    Example:
        >>> import torch
        >>> from pyroflow import Affine
        >>> Affine(3)(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """

    fixed = ("centre", "unit")

    def __init__(
        self,
        input_dim: int,
        kind: AffineKind = "full",
        *,
        init_loc: Tensor | None = None,
        init_scale: float = 1.0,
    ) -> None:
        check_count("input_dim", input_dim, 1)
        check_choice("affine", kind, ("full", "diagonal"))
        offset = torch.zeros(input_dim) if init_loc is None else init_loc.clone()
        scale = torch.full_like(offset, float(check_positive("init_scale", init_scale)))
        Bijection.__init__(self)
        self.diagonal = kind == "diagonal"
        trained = {"offset": 1, "raw_scale": 1} | ({} if self.diagonal else {"lower": 2})
        self.event_dims = trained | {"centre": 1, "unit": 1 if self.diagonal else 2}
        self.offset = nn.Parameter(offset)
        self.raw_scale = nn.Parameter(inverse_softplus(scale))
        if not self.diagonal:
            self.lower = nn.Parameter(offset.new_zeros(input_dim, input_dim))
        ones = torch.ones_like(scale)
        self.register_buffer("centre", torch.zeros_like(scale))
        self.register_buffer("unit", ones if self.diagonal else ones.diag())

    def standardize(self, y: Tensor) -> None:
        """Set location and scale to the mean and covariance of y, shape (N, D).

        Raises:
            ValueError: If the covariance is singular, where L is to be a full triangle.
        """
        y = y.double()
        sd = y.std(0)
        if self.diagonal:
            self.start_from(y.mean(0), sd)
            return
        correlation = torch.corrcoef(y.T).reshape(len(sd), len(sd))
        factor, failed = torch.linalg.cholesky_ex(correlation)
        if failed or factor.diagonal().min() < 1e-6:
            raise ValueError(
                f"data expects columns that are linearly independent, got {len(y)} rows of "
                f"{y.shape[1]} columns with a singular covariance: drop the columns that follow "
                "from others, bring more rows, or use affine='diagonal'"
            )
        self.start_from(y.mean(0), sd.unsqueeze(-1) * factor)

    def recentre(self) -> None:
        """Make the present location and scale the units; the map stays as it is."""
        self.start_from(*(t.clone() for t in self.loc_and_scale()))

    @torch.no_grad()
    def start_from(self, loc: Tensor, scale: Tensor) -> None:
        """Set location (D,) and scale: the lower triangle (D, D), or the diagonal (D,)."""
        self.centre.copy_(loc)
        self.unit.copy_(scale)
        self.offset.zero_()
        self.raw_scale.copy_(inverse_softplus(torch.ones_like(self.raw_scale)))
        if not self.diagonal:
            self.lower.zero_()

    def loc_and_scale(self) -> tuple[Tensor, Tensor]:
        """The location, shape (D,), and L, shape (D, D), or its diagonal (D,)."""
        parameters = self._map_parameters()
        loc, scale = precisely(self._compose, parameters[0], parameters)
        return loc, scale.to(loc.dtype)

    def _compose(self, _: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
        offset, raw_scale, *lower, centre, unit = parameters
        widths = softplus(raw_scale)
        if not lower:
            return centre + unit * offset, unit * widths
        identity = torch.eye(widths.shape[-1], dtype=widths.dtype, device=widths.device)
        A = widths.unsqueeze(-1) * (lower[0].tril(-1) + identity)
        return centre + _times(unit, offset), unit @ A

    def _factors(self, parameters: Parameters, x: Tensor) -> tuple:
        """Location, scale, and the offset, widths and lower of A if it is to act by itself.

        L = C A costs as much as D draws: with fewer of them the factors act in turn.
        """
        if self.diagonal or x.numel() >= parameters[2].numel():
            return *self._compose(x, parameters), None
        offset, raw_scale, lower, centre, unit = parameters
        return centre, unit, (offset, softplus(raw_scale), lower)

    def _forward(self, x: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
        loc, scale, inner = self._factors(parameters, x)
        z = x
        if inner:
            offset, widths, lower = inner
            z = offset + widths * (x + _times(lower.tril(-1), x))
        y = loc + (scale * z if self.diagonal else _times(scale, z))
        return y, self._spread(scale, inner, y)

    def _invert(
        self, y: Tensor, parameters: Parameters, cached: Pair | None
    ) -> tuple[Tensor, Tensor]:
        loc, scale, inner = self._factors(parameters, y)
        x = (y - loc) / scale if self.diagonal else _solve_lower(scale, y - loc)
        if inner:
            offset, widths, lower = inner
            x = _solve_lower(lower, (x - offset) / widths, unitriangular=True)
        return x, self._spread(scale, inner, x)

    def _log_det(self, intermediates: Tensor) -> Tensor:
        return intermediates

    def _spread(self, scale: Tensor, inner: tuple | None, image: Tensor) -> Tensor:
        """The log-determinant, which every row of an image shares."""
        diagonal = scale if self.diagonal else scale.diagonal(dim1=-2, dim2=-1)
        diagonal = diagonal * inner[1] if inner else diagonal
        return diagonal.log().sum(-1).expand(image.shape[:-1])


def inverse_softplus(scale: Tensor) -> Tensor:
    """The v with softplus(v) = scale, for scale > 0, without overflow."""
    return scale + torch.log(-torch.expm1(-scale))


def _times(tril: Tensor, x: Tensor) -> Tensor:
    return x @ tril.mT if tril.dim() == 2 else (tril @ x.unsqueeze(-1)).squeeze(-1)


def _solve_lower(tril: Tensor, y: Tensor, *, unitriangular: bool = False) -> Tensor:
    """The x with tril x = y; what lies above the diagonal is not read."""
    solve = partial(torch.linalg.solve_triangular, unitriangular=unitriangular)
    if tril.dim() > 2:
        return solve(tril, y.unsqueeze(-1), upper=False).squeeze(-1)
    flat = y.reshape(-1, y.shape[-1])
    return solve(tril.mT, flat, upper=True, left=False).view_as(y)
