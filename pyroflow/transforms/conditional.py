"""The conditional transforms: a bijection at parameters that a network makes of a context."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from inspect import Signature, signature
from operator import attrgetter
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.nn import DenseNN
from torch import Tensor, nn

from pyroflow.checks import check_count, check_positive
from pyroflow.shown import Shown
from pyroflow.transforms.affine import Affine
from pyroflow.transforms.bijection import Bijection, Conditioned
from pyroflow.transforms.planar import Planar
from pyroflow.transforms.radial import Radial
from pyroflow.transforms.sinh_arcsinh import SinhArcsinh
from pyroflow.transforms.sylvester import Sylvester


class Hypernet(nn.Module):
    """Parameters as a function of a context: start values plus a dense network's output.

    The network's last layer starts at zero. The start values, of the given shapes, belong to the
    unconditional transform, and are trained as well. With a bound c, an output o becomes
    o / √(1 + ‖o‖²/c²): each row of a matrix, and each number of a vector, is shorter than c.
    """

    def __init__(
        self,
        context_dim: int,
        hidden_dims: Sequence[int],
        shapes: Sequence[torch.Size],
        bound: float | None = None,
    ) -> None:
        super().__init__()
        self.bound = None if bound is None else float(check_positive("bound", bound))
        check_count("context_dim", context_dim, 1)
        if not isinstance(hidden_dims, Sequence) or isinstance(hidden_dims, str):
            raise ValueError(
                f"hidden_dims must be a sequence such as (64, 64), got {hidden_dims!r}"
            )
        hidden_dims = [check_count("hidden_dims", size, 1) for size in hidden_dims]
        self.context_dim, self.hidden_dims, self.shapes = context_dim, hidden_dims, list(shapes)
        self.sizes = [math.prod(shape) for shape in shapes]
        with warnings.catch_warnings():  # K = 0 layers need no outputs, and torch warns of none
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            self.nn = (
                DenseNN(context_dim, hidden_dims, [sum(self.sizes)], nonlinearity=nn.SiLU())
                if hidden_dims
                else nn.Linear(context_dim, sum(self.sizes))
            )
        self.reset_output()

    def reset_output(self) -> None:
        """Set the last layer to zero, so that the parameters are the start values."""
        last = self.nn if isinstance(self.nn, nn.Linear) else self.nn.layers[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, context: Tensor, start: Sequence[Tensor]) -> list[Tensor]:
        """Start values plus the network's output at context (*B, C), shapes (*B, ...)."""
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
        outputs = self.nn(context).split(self.sizes, dim=-1)
        return [
            value + self._bounded(output.reshape(context.shape[:-1] + shape), len(shape))
            for value, output, shape in zip(start, outputs, self.shapes, strict=True)
        ]

    def _bounded(self, output: Tensor, dims: int) -> Tensor:
        if self.bound is None:
            return output
        scaled = output / self.bound
        length = scaled.square() if dims < 2 else scaled.square().sum(-1, keepdim=True)
        return output * (1 + length).rsqrt()


class Conditional(Shown, ConditionalTransformModule):
    """A bijection whose parameters depend on a context, as in amortised inference.

    The parameters are start values, shared by all contexts and kept in the unconditional
    transform ``start``, plus a network's output. Its last layer starts at zero: at first every
    context has the same map, and layers are the identity. All of it is trained.

    Args:
        input_dim: D.
        context_dim: C; ``condition`` takes a context of shape (*B, C).
        *sizes: further sizes of the unconditional transform.
        hidden_dims: sizes of the network's hidden layers; () for a linear map.
        bound: how far a context may move the parameters: c, above the norm of what the network
            adds to each row of a matrix, such as w, and to each number of a vector, such as b.
            None for no limit: one context among thousands may then have a map far from all others.
        **options: further arguments of the unconditional transform.

    Raises:
        ValueError: If a size is out of range or an option unknown; at a call, if a context's last
            dimension is not C or its dtype not the network's.
    """

    family: type[Bijection]

    def __init_subclass__(cls) -> None:
        """Show the family's arguments where ``help`` and editors look for them."""
        super().__init_subclass__()
        if hasattr(cls, "family"):
            own = signature(Conditional.__init__).parameters
            first, *theirs = signature(cls.family).parameters.values()
            found = [first, own["context_dim"], *theirs, own["hidden_dims"], own["bound"]]
            cls.__signature__ = Signature(sorted(found, key=attrgetter("kind")))

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        *sizes: Any,
        hidden_dims: Sequence[int] = (64, 64),
        bound: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        start = self.family(input_dim, *sizes, **options)
        self.add_module(self.family.__name__.lower(), start)
        shapes = [t.shape for t in start.trained()]
        self.nn = Hypernet(context_dim, hidden_dims, shapes, bound)

    @property
    def start(self) -> Bijection:
        """The unconditional transform that holds the start values."""
        return getattr(self, self.family.__name__.lower())

    def _shown(self) -> tuple[str, dict[str, str]]:
        dim, *sizes = self.start._shown()[0].partition("(")[2][:-1].split(", ")
        given = ", ".join([dim, f"context_dim={self.nn.context_dim}", *sizes])
        return f"{type(self).__name__}({given})", {}

    def condition(self, context: Tensor) -> Conditioned:
        """The map for a context of shape (*B, C); a snapshot of the network's output."""
        return self.start.at(*self.nn(context, self.start.trained()))


class ConditionalLayers(Conditional):
    """Layers, which start as the identity."""

    def reset_parameters(self) -> None:
        """Draw the start values anew, and make every context's map the identity again."""
        self.start.reset_parameters()
        self.nn.reset_output()


class ConditionalPlanar(ConditionalLayers):
    """A :class:`Conditional` of :class:`Planar` layers, whose further arguments it takes.

    Example:
        >>> import torch
        >>> import pyro.distributions as dist
        >>> from pyroflow import ConditionalPlanar
        >>> t = ConditionalPlanar(2, context_dim=3, num_layers=4)
        >>> base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> q = dist.TransformedDistribution(base, [t.condition(torch.randn(7, 3))])
        >>> q.batch_shape, q.rsample().shape
        (torch.Size([7]), torch.Size([7, 2]))
    """

    family = Planar


class ConditionalRadial(ConditionalLayers):
    """A :class:`Conditional` of :class:`Radial` layers, whose further arguments it takes.

    Example:
        >>> import torch
        >>> from pyroflow import ConditionalRadial
        >>> t = ConditionalRadial(2, context_dim=3, num_layers=4).condition(torch.randn(7, 3))
        >>> t(torch.zeros(7, 2)).shape
        torch.Size([7, 2])
    """

    family = Radial


class ConditionalSinhArcsinh(ConditionalLayers):
    """A :class:`Conditional` of a :class:`SinhArcsinh` layer, whose further arguments it takes.

    Example:
        >>> import torch
        >>> from pyroflow import ConditionalSinhArcsinh
        >>> t = ConditionalSinhArcsinh(2, context_dim=3).condition(torch.randn(7, 3))
        >>> t(torch.zeros(7, 2)).shape
        torch.Size([7, 2])
    """

    family = SinhArcsinh


class ConditionalSylvester(ConditionalLayers):
    """A :class:`Conditional` of :class:`Sylvester` layers, whose further arguments it takes.

    Example:
        >>> import torch
        >>> from pyroflow import ConditionalSylvester
        >>> t = ConditionalSylvester(4, context_dim=3, num_units=2).condition(torch.randn(7, 3))
        >>> t(torch.zeros(7, 4)).shape
        torch.Size([7, 4])
    """

    family = Sylvester


class ConditionalAffine(Conditional):
    """A :class:`Conditional` of an :class:`Affine` layer, whose further arguments it takes.

    Example:
        >>> import torch
        >>> from pyroflow import ConditionalAffine
        >>> t = ConditionalAffine(2, context_dim=3).condition(torch.randn(7, 3))
        >>> t(torch.zeros(7, 2)).shape
        torch.Size([7, 2])
    """

    family = Affine

    def standardize(self, y: Tensor) -> None:
        """Set every context's location and scale to the mean and covariance of y, shape (N, D)."""
        self.start.standardize(y)
        self.nn.reset_output()
