"""The flow of each row, at parameters from a network of its data or from a table."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroflow.flows import StandardNormal
from pyroflow.transforms import Affine, Planar
from pyroflow.transforms.affine import AffineKind, inverse_softplus
from pyroflow.transforms.conditional import Hypernet
from pyroflow.transforms.kernels.units import softplus
from pyroflow.transforms.rowwise import rows_of

# How fast the planar parameters learn, beside location and scale. As fast, they would take part
# in the long way from the start to the posterior, and keep what they bent on it.
GAIN = 0.05


class LocalFlow(nn.Module):
    """q(z | row, v): standard normal base, K planar layers, an affine layer; base to latents.

    Location and the logarithm of the scale are linear in G numbers v that all rows depend on. The
    parameters are start values that the rows share, plus what a network of the row's features
    adds, plus what a table has for the row. Network and table start at zero, so the flow starts
    as one Gaussian for all rows. A linear map of the features goes to the location: where the
    posterior mean is linear in them, as in Gaussian models, it is found exactly.

    Args:
        init_loc: the location at the start, shape (D,); its dtype and device are the flow's.
        num_layers: K; 0 leaves a Gaussian.
        features: C, numbers that are known of each row.
        shared: G.
        rows: N, rows whose parameters are learned in a table; 0 for no table.
        affine: "full" or "diagonal".
        init_scale: standard deviation of each latent at the start.
        hidden_dims: sizes of the network's hidden layers.
    """

    def __init__(
        self,
        init_loc: Tensor,
        num_layers: int,
        *,
        features: int = 0,
        shared: int = 0,
        rows: int = 0,
        affine: AffineKind = "full",
        init_scale: float = 0.1,
        hidden_dims: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__()
        D = len(init_loc)
        self.base = StandardNormal(D)
        planar = Planar(D, num_layers)
        self.planar = (planar,)  # within a tuple, so that it is neither trained nor saved
        for name in ("w", "u", "b"):  # where every row starts; not trained
            self.register_buffer(name, getattr(planar, name).detach())
        self.affine = Affine(D, affine, init_loc=init_loc, init_scale=init_scale)
        self.shift, self.stretch = (nn.Parameter(torch.zeros(D, shared)) for _ in range(2))
        shapes = [t.shape for t in self._start()]
        self.net = Hypernet(features, hidden_dims, shapes) if features else None
        self.linear = Hypernet(features, (), [init_loc.shape]) if features else None
        tables = [torch.zeros(rows, *shape) for shape in shapes] if rows else []
        self.tables = nn.ParameterList(nn.Parameter(t) for t in tables)
        self.to(init_loc)

    def parameters_of(
        self, index: Tensor, features: Tensor | None = None, *, sparse: bool = False
    ) -> list[Tensor]:
        """Those of B rows: of the planar layers, the affine layer, and what v adds.

        Args:
            index: their numbers in the table, shape (B,).
            features: shape (B, C).
            sparse: whether gradients in the table are sparse tensors.
        """
        start = self._start()
        added = [torch.zeros_like(value).expand(len(index), *value.shape) for value in start]
        if features is not None:
            # Adam moves all weights of a sum by its rate at once. Divided by their number, the sum
            # moves by that rate too, so one rate suits networks of any width.
            width = self.net.hidden_dims[-1] if self.net.hidden_dims else features.shape[-1]
            added = [t / width for t in self.net(features, [torch.zeros_like(t) for t in start])]
            (shift,) = self.linear(features, [torch.zeros_like(start[3])])
            added[3] = added[3] + shift / features.shape[-1]  # the affine layer's offset
        if len(self.tables):
            rows = [rows_of(t, index, sparse) for t in self.tables]
            added = [a + row for a, row in zip(added, rows, strict=True)]
        gains = [GAIN] * 3 + [1.0] * (len(start) - 3)
        return [v + gain * a for v, a, gain in zip(start, added, gains, strict=True)]

    def forward(
        self,
        index: Tensor,
        features: Tensor | None = None,
        shared: Tensor | None = None,
        trailing: int = 0,
    ) -> dist.TransformedDistribution:
        """The distribution over the latents of B rows, batch shape (*S, B, 1, ..., 1).

        Args:
            index: as in :meth:`parameters_of`.
            features: likewise.
            shared: v, shape (*S, 1, ..., 1, G).
            trailing: how many ones stand at the end.
        """
        ones = (1,) * trailing
        values = self.parameters_of(index, features)
        values = [t.reshape(len(index), *ones, *t.shape[1:]) for t in values]
        *values, shift, stretch = values
        if shared is not None:
            offset, raw_scale = values[3:5]
            by_v = ((t @ shared.unsqueeze(-1)).squeeze(-1) for t in (shift, stretch))
            values[3], log_factor = offset + next(by_v), next(by_v)
            values[4] = inverse_softplus(softplus(raw_scale) * log_factor.exp())
        planar = self.planar[0].at(*values[:3])
        return dist.TransformedDistribution(self.base(), [planar, self.affine.at(*values[3:])])

    @property
    def untouched(self) -> bool:
        """Whether all rows still have one Gaussian."""
        last = [] if self.linear is None else [self.linear.nn.weight]
        return not any(bool(t.any()) for t in (self.shift, self.stretch, *self.tables, *last))

    def _start(self) -> list[Tensor]:
        return [self.w, self.u, self.b, *self.affine.trained(), self.shift, self.stretch]
