"""A flow for the latents of one row, its parameters given by what is known of the row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroflow.checks import check_count
from pyroflow.flows import StandardNormal
from pyroflow.transforms import Affine, Planar
from pyroflow.transforms.affine import AffineKind

EMBEDDING = 8  # numbers learned of each row, where its flow also depends on the globals

# How fast the planar parameters learn, beside location and scale. As fast, they would take part
# in the long way from the start to the posterior, and keep what they bent on it.
GAIN = 0.05


class LocalFlow(nn.Module):
    """q(z | row): standard normal base, K planar layers, an affine layer; base to latents.

    The parameters are start values that the rows share, plus what a network and a linear map of
    the features add, plus what a table has for the row. Network, map and table start at zero, so
    the flow starts as one Gaussian for all rows. The linear map goes to the location: where the
    posterior mean is linear in the features, as in Gaussian models, it is found exactly.

    Args:
        init_loc: the location at the start, shape (D,); its dtype and device are the flow's.
        num_layers: K; 0 leaves a Gaussian.
        features: C, numbers that are known of each row.
        shared: G, numbers that all rows depend on.
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
        D, embedded = len(init_loc), EMBEDDING if rows and shared else 0
        self.embedding = nn.Parameter(torch.randn(rows, embedded)) if embedded else None
        self.base = StandardNormal(D)
        planar = Planar(D, num_layers)
        self._planar = (planar,)  # within a tuple, so that it is neither trained nor saved
        for name in ("w", "u", "b"):  # where every row starts; not trained
            self.register_buffer(name, getattr(planar, name).detach())
        self.affine = Affine(D, affine, init_loc=init_loc, init_scale=init_scale)
        shapes, known = [t.shape for t in self._start()], features + embedded + shared
        outputs = sum(shape.numel() for shape in shapes)
        self.net = _network([known, *hidden_dims, outputs]) if known else None
        self.linear = _network([known, D]) if known else None
        tables = [torch.zeros(rows, *shape) for shape in shapes] if rows else []
        self.tables = nn.ParameterList(nn.Parameter(t) for t in tables)
        self.to(init_loc)

    def forward(
        self,
        index: Tensor,
        features: Tensor | None = None,
        shared: Tensor | None = None,
        trailing: int = 0,
    ) -> dist.TransformedDistribution:
        """The distribution over the latents of B rows, batch shape (*S, B, 1, ..., 1).

        Args:
            index: their numbers in the table, shape (B,).
            features: shape (B, C).
            shared: shape (*S, 1, ..., 1, G).
            trailing: how many ones stand at the end.
        """
        ones, start = (1,) * trailing, self._start()
        known = [features] if self.embedding is None else [self.embedding[index]]
        known = [t.reshape(len(index), *ones, t.shape[-1]) for t in known if t is not None]
        known += [] if shared is None else [shared]
        added = [torch.zeros_like(value) for value in start]
        if known:
            batch = torch.broadcast_shapes(*(t.shape[:-1] for t in known))
            inputs = torch.cat([t.expand(*batch, t.shape[-1]) for t in known], -1)
            pieces = self.net(inputs).split([value.numel() for value in start], -1)
            added = [p.reshape(batch + v.shape) for p, v in zip(pieces, start, strict=True)]
            added[3] = added[3] + self.linear(inputs)  # the affine layer's offset
        if len(self.tables):
            index = index.reshape(-1, *ones)
            added = [a + table[index] for a, table in zip(added, self.tables, strict=True)]
        gains = (GAIN, GAIN, GAIN, 1.0, 1.0, 1.0)
        values = [v + gain * a for v, a, gain in zip(start, added, gains, strict=False)]
        planar = self._planar[0].at(*values[:3])
        return dist.TransformedDistribution(self.base(), [planar, self.affine.at(*values[3:])])

    def _start(self) -> list[Tensor]:
        return [self.w, self.u, self.b, *self.affine.trained()]


class _EvenLinear(nn.Linear):
    """A linear layer whose output moves as far in one step of Adam as one of its weights does.

    Adam moves all weights of a sum by the learning rate at once. Weights that are held F
    times too large and divided by their number F make the sum move by that rate on
    average, so one rate suits networks of any width and the flow's parameters beside them.
    """

    def __init__(self, in_features: int, out_features: int, *, zero: bool) -> None:
        super().__init__(in_features, out_features)
        with torch.no_grad():
            self.weight *= 0.0 if zero else in_features
            self.bias *= not zero

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight / self.in_features, self.bias)


def _network(sizes: Sequence[int]) -> nn.Sequential:
    """Layers with SiLU between them, the last of which starts at zero."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [_EvenLinear(before, after, zero=len(layers) == 2 * len(sizes) - 4), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def check_sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of hidden layers, none or some of at least 1, else raise ``ValueError``."""
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        raise ValueError(f"{name} must be a sequence such as (64, 64), got {sizes!r}")
    return tuple(check_count(name, size, 1) for size in sizes)
