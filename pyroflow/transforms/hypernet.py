"""The network behind every conditional transform: context in, parameters out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from pyro.nn import DenseNN
from torch import Tensor, nn

from pyroflow.checks import check_count


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
