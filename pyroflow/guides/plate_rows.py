"""What a guide has for the rows of plates: their latents, their data and their flows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Transform

from pyroflow.flows import AlongPath, CountedNormal
from pyroflow.flows.flow import FlowDistribution
from pyroflow.guides.base import MARGINAL_DRAWS, ModuleGuide, Values, marginal_quantiles
from pyroflow.guides.local_flow import LocalFlow
from pyroflow.guides.rows import KnownRows, RowContext, Rows
from pyroflow.guides.structure import places_of
from pyroflow.model.at_hand import Rows as AtHand
from pyroflow.model.at_hand import with_rows
from pyroflow.transforms import Leading
from pyroflow.transforms.rowwise import Reordered, RowsGiven

AT_ONCE = 100_000  # draws times rows that quantiles hold in memory


class PlateRows(NamedTuple):
    """The rows of one plate: the table of one row's latents, the rows' data, and their flow."""

    plate: str
    rows: Rows
    context: RowContext | None
    flow: LocalFlow

    def drawn(self, index: Tensor, size: int, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """The data of the rows that a plate of so many drew, None where they have none.

        Raises:
            ValueError: If the context does not fit, or there is none and the plate has other rows
                than those that were learned.
        """
        if self.context is not None:
            return self.context.drawn(index, size, args, kwargs)
        if size != self.rows.size:
            raise ValueError(
                f"plate {self.plate!r} has {size} rows, and with context=None the guide learned "
                f"those of {self.rows.size}: new rows need a context, such as context='name of the "
                "argument with their data'"
            )
        return None

    def at_hand(self, rows: AtHand) -> tuple[Tensor, Tensor]:
        """The numbers of those of its rows that are at hand, and how often each counts."""
        like, size = self.flow.base.loc, self.rows.size
        index = rows.index.get(self.plate, torch.arange(size, device="cpu")).to(like.device)
        return index, rows.weights.get(self.plate, like.new_ones(size)).to(like)

    def given(
        self,
        index: Tensor,
        counts: Tensor,
        num: int,
        args: tuple,
        kwargs: dict[str, Any],
        *,
        start: int | None = None,
        sparse: bool,
    ) -> RowsGiven:
        """The map of some rows given the globals in units of their own posterior.

        Args:
            index: which rows, shape (B,).
            counts: how often each counts in the log-determinant.
            num: G, of the globals' numbers.
            args: the model's.
            kwargs: likewise.
            start: as :class:`~pyroflow.transforms.rowwise.RowsGiven` takes it.
            sparse: whether gradients in a table are sparse tensors.

        Raises:
            ValueError: If the context has not all rows.
        """
        flow, features = self.flow, None
        d, (B,), like = len(flow.base.loc), index.shape, flow.base.loc
        if self.context is not None:
            data = self.context.rows(args, kwargs)
            if len(data) != self.rows.size:
                raise ValueError(
                    f"context must have all {self.rows.size} rows of plate {self.plate!r}, got "
                    f"{len(data)}"
                )
            features = self.context(data[index.to(data.device)], like)
        values = flow.parameters_of(index, features, sparse=sparse)
        if len(values) < len(RowsGiven.event_dims):  # a diagonal layer has no triangle
            values.insert(5, like.new_zeros(B, d, d))
        if values[-1].shape[-1] != num:  # the rows do not depend on the globals
            values[-2:] = [like.new_zeros(B, d, num)] * 2
        return RowsGiven(flow.planar[0], values, counts, start)

    def posterior(
        self, index: Tensor, data: Tensor | None, shared: Tensor | None, trailing: int
    ) -> dist.TransformedDistribution:
        """q(z | data, v) for globals v (*S, 1, ..., 1, G), batch shape (*S, B, 1, ..., 1)."""
        like = self.flow.base.loc
        features = None if data is None else self.context(data, like)
        return self.flow(index.to(like.device), features, shared, trailing)

    def quantiles(
        self, levels: Sequence[float], shared: Tensor | None, args: tuple, kwargs: dict[str, Any]
    ) -> Values:
        """Those of each latent of all rows, at draws of the globals (S, 1, G)."""
        data, found = None if self.context is None else self.context.rows(args, kwargs), []
        numbers = torch.arange(
            self.rows.size if data is None else len(data), device=self.flow.base.loc.device
        )
        for index in numbers.split(max(1, AT_ONCE // MARGINAL_DRAWS)):
            picked = None if data is None else data[index.to(data.device)]
            q = self.posterior(index, picked, shared, trailing=0)
            local = q.sample((MARGINAL_DRAWS,) if shared is None else ())
            found.append(marginal_quantiles(self.rows.constrain(local), levels))
        return {name: torch.cat([f[name] for f in found], 1) for name in found[0]}


class RowsAtGlobals:
    """The rows of plates given the globals, as :class:`~pyroflow.guides.structure.GivenGlobals`.

    Args:
        transforms: of :meth:`RowsOfPlates.at_hand`, with all rows.
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        *_, self.last = transforms
        self.given = [t for t in transforms if isinstance(t, RowsGiven)]
        self.size = self.given[0].start
        self.above = transforms[-2] if self.size else None
        self.leading, *rest = self.last.place.split(
            [self.size, *(t.end - t.start for t in self.given)]
        )
        pairs = zip(rest, self.given, strict=True)
        self.places = [places.reshape(t.offset.shape) for places, t in pairs]
        self._made: tuple[Tensor | None, list[Tensor]] = (None, [])  # by the last call of at

    def base(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The base numbers ε of the rows of x (S, D), and the rows beside the globals' units."""
        inner = self.last.inv(x)
        inner = inner if self.above is None else self.above.inv(inner)
        eps = inner
        for t in reversed(self.given):
            eps = t.inv(eps)
        return torch.cat([torch.zeros_like(eps[:, : self.size]), eps[:, self.size :]], 1), inner

    def at(self, x: Tensor, inner: Tensor, eps: Tensor) -> Tensor:
        """The x with other base numbers of the rows."""
        found, log_dets = torch.cat([inner[:, : self.size], eps[:, self.size :]], 1), []
        for t in self.given:
            found, held = t._forward(found, t._map_parameters())
            log_dets.append(t._by_row(held))
        self._made = eps, log_dets
        found = self.last(found)
        found[:, self.leading] = x[:, self.leading]
        return found

    def log_q(self, eps: Tensor, inner: Tensor) -> Tensor:
        """The log density of each row given the globals, at base numbers (S, D), shape (S, R)."""
        u, found = torch.cat([inner[:, : self.size], eps[:, self.size :]], 1), []
        made, log_dets = self._made
        if made is not eps:
            log_dets = [t.log_dets(u) for t in self.given]
        for t, log_det in zip(self.given, log_dets, strict=True):
            own = u[:, t.start : t.end].unflatten(1, t.offset.shape).double()
            normal = -own.square().sum(-1) / 2 - own.shape[-1] * math.log(2 * math.pi) / 2
            found.append(normal - log_det.double())
        return torch.cat(found, 1)


class RowsOfPlates(KnownRows):
    """A guide of the rows of plates, given the globals, as fits take it.

    Attributes:
        local_plates: their names.
        path_derivative: whether gradients of log q go along the path of the sample only.
    """

    local_plates: tuple[str, ...]
    rows: list[Rows]
    global_guide: ModuleGuide | None
    path_derivative = False
    coordinates = affine = None

    def _knows_rows(self, plate: str) -> bool:
        return plate in self.local_plates

    def _held(self, modules: list[nn.Module | None]) -> nn.Module | None:
        """What is kept of the plates: a list, or that of the only one."""
        return nn.ModuleList(modules) if self._several else modules[0]

    @property
    def parts(self) -> list[PlateRows]:
        """What there is of the rows of each plate.

        Pyro registers the parameters each time: once is enough for a call.
        """
        found = [self.context, self.local_flow]
        pairs = zip(*found, strict=True) if self._several else [found]
        named = zip(self.local_plates, self.rows, pairs, strict=True)
        return [PlateRows(plate, rows, *pair) for plate, rows, pair in named]

    def _shared(self, latent: Tensor) -> Tensor | None:
        """The globals in the units of their own posterior, where rows depend on them."""
        return self.global_guide.affine.inv(latent) if self._conditioned else None

    def at_hand(self, rows: AtHand, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        """The distribution over the unconstrained latents of some rows and the globals.

        Its log density counts each row as often as its weight says. The arguments are the model's.
        """
        parts, above = self.parts, self.global_guide
        dim = num = 0 if above is None else above.latent_dim
        counted, given, sizes = [parts[0].flow.base.loc.new_ones(num)], [], {}
        for part in parts:
            index, counts = part.at_hand(rows)
            options = {"start": dim, "sparse": self.sparse}
            given.append(part.given(index, counts, num, args, kwargs, **options))
            counted.append(counts.repeat_interleave(len(part.flow.base.loc)))
            sizes[part.plate] = len(index)
            dim += len(counted[-1])
        counted = torch.cat(counted)
        layers = [] if above is None else [Leading(t, dim) for t in above.get_transforms()]
        table = with_rows(self.latents, sizes)
        first, places = places_of(table, [frozenset([plate]) for plate in self.local_plates])
        place = torch.cat([first, *(own.flatten() for own in places)]).argsort()
        last = Reordered(place.to(counted.device))
        made = AlongPath if self.path_derivative else FlowDistribution
        base = CountedNormal(counted).to_event(1)
        return made(base, [*layers[:-1], *given, *layers[-1:], last])

    @property
    def untouched(self) -> bool:
        """Whether all rows of a plate still have one Gaussian."""
        return all(part.flow.untouched for part in self.parts)

    def find_coordinates(self, *_: Any) -> None:
        """Nothing: its coordinates are the unconstrained latents."""

    def constrain(self, z: Tensor) -> tuple[Values, Tensor]:
        """Values by site at z (*B, D), and log |det ∂values/∂z|, (*B)."""
        return self.latents.constrain(z)

    def unconstrain(self, values: Values) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`constrain`: z, shape (*B, D), and the same log-determinant."""
        return self.latents.unconstrain(values, like=self.start())

    def over_coordinates(self, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        """The same of all rows."""
        return self.at_hand(AtHand({}, {}), *args, **kwargs)
