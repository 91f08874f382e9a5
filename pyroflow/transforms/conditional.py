"""The conditional transforms: a bijection at parameters that a network makes of a context."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.nn import DenseNN
from torch import Tensor, nn

from pyroflow.checks import check_count
from pyroflow.transforms.affine import Affine, AffineKind
from pyroflow.transforms.bijection import Bijection, Conditioned
from pyroflow.transforms.kernels.units import Nonlinearity
from pyroflow.transforms.planar import Planar
from pyroflow.transforms.radial import Radial
from pyroflow.transforms.sylvester import Orthogonal, Sylvester


class Hypernet(nn.Module):
    """Parameters as a function of a context: start values plus a dense network's output.

    The network's last layer starts at zero. The start values are shared with the
    unconditional transform that owns them, and trained as well.

    Args:
        context_dim: C.
        hidden_dims: sizes of the hidden layers; () for a single linear map.
        shapes: the shapes of the parameters.
    """

    def __init__(
        self, context_dim: int, hidden_dims: Sequence[int], shapes: Sequence[torch.Size]
    ) -> None:
        super().__init__()
        check_count("context_dim", context_dim, 1)
        if not isinstance(hidden_dims, Sequence) or isinstance(hidden_dims, str):
            raise ValueError(
                f"hidden_dims must be a sequence such as (64, 64), got {hidden_dims!r}"
            )
        hidden_dims = [check_count("hidden_dims", size, 1) for size in hidden_dims]
        self.context_dim, self.hidden_dims = context_dim, hidden_dims
        self.shapes = [torch.Size(shape) for shape in shapes]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        with warnings.catch_warnings():  # K = 0 layers need no outputs, and torch warns of none
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            self.nn = _network(context_dim, hidden_dims, sum(self.sizes))
        self.reset_output()

    def reset_output(self) -> None:
        """Set the last layer to zero, so that the parameters are the start values."""
        last = self.nn if isinstance(self.nn, nn.Linear) else self.nn.layers[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, context: Tensor, start: Sequence[Tensor]) -> list[Tensor]:
        """Start values plus the network's output at context (*B, C), shapes (*B, ...)."""
        self._check(context)
        outputs = self.nn(context).split(self.sizes, dim=-1)
        batch = context.shape[:-1]
        return [
            value + output.reshape(batch + shape)
            for value, output, shape in zip(start, outputs, self.shapes, strict=True)
        ]

    def _check(self, context: Tensor) -> None:
        if not isinstance(context, Tensor):
            raise TypeError(f"context must be a tensor, got {type(context).__name__}")
        dtype = next(self.nn.parameters()).dtype
        if context.dtype != dtype:
            raise ValueError(
                f"context must be in the network's {dtype}, got {context.dtype}: convert it, as in "
                f"context.to({dtype})"
            )
        if context.dim() == 0 or context.shape[-1] != self.context_dim:
            raise ValueError(
                f"context must have last dimension {self.context_dim} (context_dim), "
                f"got shape {tuple(context.shape)}"
            )


def _network(context_dim: int, hidden_dims: Sequence[int], outputs: int) -> nn.Module:
    if not hidden_dims:
        return nn.Linear(context_dim, outputs)
    return DenseNN(context_dim, hidden_dims, [outputs], nonlinearity=nn.SiLU())


class Conditional(ConditionalTransformModule):
    """A bijection whose parameters depend on a context, as in amortised inference.

    The parameters are start values, shared by all contexts, plus a network's output, whose last
    layer starts at zero: at first every context has the same map.

    Args:
        start: holds the start values; kept under the name of its class in lower case.
        context_dim: C; ``condition`` takes a context of shape (*B, C).
        hidden_dims: sizes of the network's hidden layers; () for a linear map.

    Raises:
        ValueError: If a size is too small; at a call, if a context's last dimension is not C.
    """

    def __init__(self, start: Bijection, context_dim: int, hidden_dims: Sequence[int]) -> None:
        super().__init__()
        self._start = type(start).__name__.lower()
        self.add_module(self._start, start)
        self.nn = Hypernet(context_dim, hidden_dims, [t.shape for t in start.trained()])

    @property
    def start(self) -> Bijection:
        """The transform that holds the start values."""
        return getattr(self, self._start)

    def condition(self, context: Tensor) -> Conditioned:
        """The map for a context of shape (*B, C); a snapshot of the network's output."""
        return self.start.at(*self.nn(context, self.start.trained()))


class _ConditionalLayers(Conditional):
    """Layers that start as the identity."""

    def reset_parameters(self) -> None:
        """Draw the start values anew and make every context's map the identity again."""
        self.start.reset_parameters()
        self.nn.reset_output()


class ConditionalPlanar(_ConditionalLayers):
    """K planar layers whose parameters depend on a context, as in amortised inference.

    The parameters are those of a :class:`Planar` plus a network's output, whose last layer
    starts at zero: at first the map is the identity for every context.

    Args:
        input_dim: D.
        context_dim: C; ``condition`` takes a context of shape (*B, C).
        num_layers: K.
        hidden_dims: sizes of the network's hidden layers; () for a linear map.
        nonlinearity: "tanh" or "leaky_relu".
        negative_slope: of the leaky ReLU, in (0, 1).

    Raises:
        ValueError: a size that is too small, an unknown nonlinearity, or a context whose last
            dimension is not C.

    Example:
        >>> import torch
        >>> from pyroflow import ConditionalPlanar
        >>> t = ConditionalPlanar(2, context_dim=3, num_layers=4)
        >>> import pyro.distributions as dist
        >>> base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> q = dist.TransformedDistribution(base, [t.condition(torch.randn(7, 3))])
        >>> q.batch_shape, q.rsample().shape
        (torch.Size([7]), torch.Size([7, 2]))
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        num_layers: int = 1,
        *,
        hidden_dims: Sequence[int] = (64, 64),
        nonlinearity: Nonlinearity = "tanh",
        negative_slope: float = 0.2,
    ) -> None:
        bend = {"nonlinearity": nonlinearity, "negative_slope": negative_slope}
        super().__init__(Planar(input_dim, num_layers, **bend), context_dim, hidden_dims)


class ConditionalRadial(_ConditionalLayers):
    """K radial layers whose parameters depend on a context; see :class:`ConditionalPlanar`.

    Args:
        input_dim: D.
        context_dim: C; ``condition`` takes a context of shape (*B, C).
        num_layers: K.
        hidden_dims: sizes of the network's hidden layers; () for a linear map.

    Raises:
        ValueError: a size that is too small, or a context whose last dimension is not C.

    Example:
        >>> import torch
        >>> from pyroflow import ConditionalRadial
        >>> t = ConditionalRadial(2, context_dim=3, num_layers=4).condition(torch.randn(7, 3))
        >>> t(torch.zeros(7, 2)).shape
        torch.Size([7, 2])
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        num_layers: int = 1,
        *,
        hidden_dims: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__(Radial(input_dim, num_layers), context_dim, hidden_dims)


class ConditionalSylvester(_ConditionalLayers):
    """L Sylvester layers whose parameters depend on a context; see :class:`ConditionalPlanar`.

    Args:
        input_dim: D.
        context_dim: C; ``condition`` takes a context of shape (*B, C).
        num_units: M, from 1 to D.
        num_layers: L.
        orthogonal: "householder", "qr" or "triangular", as in :class:`Sylvester`.
        hidden_dims: sizes of the network's hidden layers; () for a linear map.

    Raises:
        ValueError: a size out of range, or a context whose last dimension is not C.

    Example:
        >>> import torch
        >>> from pyroflow import ConditionalSylvester
        >>> t = ConditionalSylvester(4, context_dim=3, num_units=2).condition(torch.randn(7, 3))
        >>> t(torch.zeros(7, 4)).shape
        torch.Size([7, 4])
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        num_units: int,
        num_layers: int = 1,
        orthogonal: Orthogonal = "householder",
        *,
        hidden_dims: Sequence[int] = (64, 64),
    ) -> None:
        start = Sylvester(input_dim, num_units, num_layers, orthogonal)
        super().__init__(start, context_dim, hidden_dims)


class ConditionalAffine(Conditional):
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
        hidden_dims: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__(Affine(input_dim, kind), context_dim, hidden_dims)

    def standardize(self, y: Tensor) -> None:
        """Set every context's location and scale to the mean and covariance of y, shape (N, D)."""
        self.start.standardize(y)
        self.nn.reset_output()
