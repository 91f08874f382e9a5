"""The affine layer: a location and a lower-triangular scale."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.torch_transform import TransformModule
from torch import Size, Tensor, nn

from pyroflow.checks import check_choice, check_count, check_positive
from pyroflow.transforms.bijection import Bijection, precisely
from pyroflow.transforms.constraint import softplus
from pyroflow.transforms.hypernet import Hypernet

AffineKind = Literal["full", "diagonal"]


def inverse_softplus(scale: Tensor) -> Tensor:
    """The v with softplus(v) = scale, for scale > 0, without overflow."""
    return scale + torch.log(-torch.expm1(-scale))


class ConditionedAffine(Bijection):
    """y = loc + L x with given parameters; base to data.

    Args:
        loc: shape (*P, D).
        scale: L with positive diagonal, lower triangular (*P, D, D), or its diagonal
            (*P, D) alone where ``diagonal``.
        diagonal: whether ``scale`` is a diagonal.
        trained: the offset, raw scale and, where not diagonal, lower of an :class:`Affine` that
            acts first, each with batch dimensions of its own; none by default.

    Example:
        >>> import torch
        >>> from pyroflow.transforms import ConditionedAffine
        >>> t = ConditionedAffine(torch.zeros(3), torch.full((3,), 2.0), diagonal=True)
        >>> t(torch.ones(3))
        tensor([2., 2., 2.])
    """

    def __init__(
        self, loc: Tensor, scale: Tensor, *, diagonal: bool, trained: Sequence[Tensor] = ()
    ) -> None:
        super().__init__()
        self._given, self.diagonal = (*trained, loc, scale), diagonal

    def loc_and_scale(self) -> tuple[Tensor, Tensor]:
        """The location, shape (*P, D), and L, shape (*P, D, D) or (*P, D)."""
        parameters = self._map_parameters()
        loc, scale = precisely(self._compose, parameters[0], parameters)
        return loc, scale.to(loc.dtype)

    def _map_parameters(self) -> tuple[Tensor, ...]:
        return self._given

    def _parameter_batch(self) -> Size:
        return self._map_parameters()[0].shape[:-1]

    def _compose(self, _: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        *trained, loc, scale = parameters
        if not trained:
            return loc, scale
        offset, raw_scale, *lower = trained
        widths = softplus(raw_scale)
        if not lower:
            return loc + scale * offset, scale * widths
        identity = torch.eye(widths.shape[-1], dtype=widths.dtype, device=widths.device)
        A = widths.unsqueeze(-1) * (lower[0].tril(-1) + identity)
        return loc + _times(scale, offset), scale @ A

    def _factors(self, parameters: tuple[Tensor, ...], x: Tensor) -> tuple:
        """Location, scale, and the offset, widths and lower of A if it is to act by itself.

        L = C A costs as much as D draws: with fewer of them the factors act in turn.
        """
        if len(parameters) < 5 or x.numel() >= parameters[2].numel():
            return *self._compose(x, parameters), None
        offset, raw_scale, lower, centre, unit = parameters
        return centre, unit, (offset, softplus(raw_scale), lower)

    def _forward(self, x: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        loc, scale, inner = self._factors(parameters, x)
        work = self._spread(scale, inner, x)
        if self.diagonal:
            return loc + scale * x, work
        if inner:
            offset, widths, lower = inner
            x = offset + widths * (x + _times(lower.tril(-1), x))
        return loc + _times(scale, x), work

    def _backward(
        self, y: Tensor, parameters: tuple[Tensor, ...], known: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        loc, scale, inner = self._factors(parameters, y)
        x = (y - loc) / scale if self.diagonal else _solve_lower(scale, y - loc)
        if inner:
            offset, widths, lower = inner
            x = _solve_lower(lower, (x - offset) / widths, unitriangular=True)
        return x, self._spread(scale, inner, y)

    def _log_det(self, work: Tensor) -> Tensor:
        return work

    def _spread(self, scale: Tensor, inner: tuple | None, x: Tensor) -> Tensor:
        """The log-determinant, the same for each x."""
        diagonal = scale if self.diagonal else scale.diagonal(dim1=-2, dim2=-1)
        diagonal = diagonal * inner[1] if inner else diagonal
        return diagonal.log().sum(-1).expand(self.forward_shape(x.shape)[:-1])


def _times(tril: Tensor, x: Tensor) -> Tensor:
    return x @ tril.mT if tril.dim() == 2 else (tril @ x.unsqueeze(-1)).squeeze(-1)


def _solve_lower(tril: Tensor, y: Tensor, *, unitriangular: bool = False) -> Tensor:
    """The x with tril x = y; what lies above the diagonal is not read."""
    solve = partial(torch.linalg.solve_triangular, unitriangular=unitriangular)
    if tril.dim() > 2:
        return solve(tril, y.unsqueeze(-1), upper=False).squeeze(-1)
    flat = y.reshape(-1, y.shape[-1])
    return solve(tril.mT, flat, upper=True, left=False).view_as(y)


class Affine(ConditionedAffine, TransformModule):
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
        ValueError: input_dim < 1, an unknown kind, init_scale not positive.

    Example:
        >>> import torch
        >>> from pyroflow import Affine
        >>> t = Affine(3)
        >>> t(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """

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
            ValueError: a covariance that is singular, where L is to be a full triangle.
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

    def absorb(self) -> None:
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

    def _map_parameters(self) -> tuple[Tensor, ...]:
        return (*self.trained(), self.centre, self.unit)

    def trained(self) -> tuple[Tensor, ...]:
        """The trainable parameters: offset (D,), raw scale (D,) and, if full, lower (D, D)."""
        return (self.offset, self.raw_scale) + (() if self.diagonal else (self.lower,))

    def at(self, *trained: Tensor) -> ConditionedAffine:
        """The layer with other tensors, of any batch shape, in place of the trained ones."""
        return ConditionedAffine(self.centre, self.unit, diagonal=self.diagonal, trained=trained)


class ConditionalAffine(ConditionalTransformModule):
    """An :class:`Affine` whose parameters depend on a context: theirs plus a network's output.

    The network's last layer starts at zero, so at first every context has the same map.

    Args:
        input_dim: D.
        context_dim: C; ``condition`` takes a context of shape (*B, C).
        kind: "full" or "diagonal".
        hidden_dims: sizes of the network's hidden layers; () for a linear map.

    Raises:
        ValueError: a size below 1, or an unknown kind.

    Example:
        >>> import torch
        >>> from pyroflow import ConditionalAffine
        >>> t = ConditionalAffine(2, context_dim=3).condition(torch.randn(7, 3))
        >>> t(torch.zeros(7, 2)).shape
        torch.Size([7, 2])
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        kind: AffineKind = "full",
        *,
        hidden_dims: tuple[int, ...] = (64, 64),
    ) -> None:
        super().__init__()
        self.affine = Affine(input_dim, kind)
        self.nn = Hypernet(context_dim, hidden_dims, [t.shape for t in self.affine.trained()])

    def standardize(self, y: Tensor) -> None:
        """Set every context's location and scale to the mean and covariance of y, shape (N, D)."""
        self.affine.standardize(y)
        self.nn.reset_output()

    def condition(self, context: Tensor) -> ConditionedAffine:
        """The affine map for a context of shape (*B, C); a snapshot of the parameters."""
        return self.affine.at(*self.nn(context, self.affine.trained()))
