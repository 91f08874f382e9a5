"""The affine layer: a location and a lower-triangular scale."""

from __future__ import annotations

from typing import Literal

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.torch_transform import TransformModule
from torch import Size, Tensor, nn

from pyroflow.checks import check_choice, check_count, check_positive
from pyroflow.transforms.bijection import Bijection
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

    Example:
        >>> import torch
        >>> from pyroflow.transforms import ConditionedAffine
        >>> t = ConditionedAffine(torch.zeros(3), torch.full((3,), 2.0), diagonal=True)
        >>> t(torch.ones(3))
        tensor([2., 2., 2.])
    """

    def __init__(self, loc: Tensor, scale: Tensor, *, diagonal: bool) -> None:
        super().__init__()
        self._loc, self._scale, self.diagonal = loc, scale, diagonal

    def loc_and_scale(self) -> tuple[Tensor, Tensor]:
        """The location, shape (*P, D), and L, shape (*P, D, D) or (*P, D)."""
        return self._compose(self._map_parameters())

    def _map_parameters(self) -> tuple[Tensor, ...]:
        return self._loc, self._scale

    def _parameter_batch(self) -> Size:
        return self._map_parameters()[0].shape[:-1]

    def _compose(self, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return parameters

    def _forward(self, x: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        loc, scale = self._compose(parameters)
        if self.diagonal:
            moved = scale * x
        else:
            moved = x @ scale.mT if scale.dim() == 2 else (scale @ x.unsqueeze(-1)).squeeze(-1)
        return loc + moved, self._spread_log_det(scale, x)

    def _backward(
        self, y: Tensor, parameters: tuple[Tensor, ...], known: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        loc, scale = self._compose(parameters)
        centred = y - loc
        x = centred / scale if self.diagonal else _solve_lower(scale, centred)
        return x, self._spread_log_det(scale, y)

    def _log_det(self, work: Tensor) -> Tensor:
        return work

    def _spread_log_det(self, scale: Tensor, x: Tensor) -> Tensor:
        diagonal = scale if self.diagonal else scale.diagonal(dim1=-2, dim2=-1)
        return diagonal.log().sum(-1).expand(self.forward_shape(x.shape)[:-1])


def _solve_lower(tril: Tensor, centred: Tensor) -> Tensor:
    if tril.dim() > 2:
        return torch.linalg.solve_triangular(tril, centred.unsqueeze(-1), upper=False).squeeze(-1)
    flat = centred.reshape(-1, centred.shape[-1])
    return torch.linalg.solve_triangular(tril.mT, flat, upper=True, left=False).view_as(centred)


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
        sd = y.double().std(0)
        if self.diagonal:
            self.start_from(y.mean(0), sd)
            return
        correlation = torch.corrcoef(y.double().T).reshape(len(sd), len(sd))
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

    def _compose(self, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        offset, raw_scale, *lower, centre, unit = parameters
        scale = softplus(raw_scale)
        if not lower:
            return centre + unit * offset, unit * scale
        identity = torch.eye(scale.shape[-1], dtype=scale.dtype, device=scale.device)
        A = scale.unsqueeze(-1) * (lower[0].tril(-1) + identity)
        return centre + (unit @ offset.unsqueeze(-1)).squeeze(-1), unit @ A


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
        trained = self.nn(context, self.affine.trained())
        loc, scale = self.affine._compose((*trained, self.affine.centre, self.affine.unit))
        return ConditionedAffine(loc, scale, diagonal=self.affine.diagonal)
