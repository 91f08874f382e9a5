"""The support of each column: the line, a half-line or an interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyroflow.checks import check_count
from pyroflow.frames import listed, named
from pyroflow.transforms.bijection import Bijection, Pair, Parameters

Bounds = tuple[float, float]
Bound = Bounds | str | None
SupportLike = Mapping[int | str, Bound] | Sequence[Bound]


class _Between(constraints.Constraint):
    """Vectors whose numbers lie strictly between bounds of their own."""

    event_dim = 1

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether each vector does."""
        return ((value > self.low) & (value < self.high)).all(-1)


class Support(Bijection, TransformModule):
    """R^D to the support of each column: exp for a half-line, the sigmoid for an interval.

    On (a, ∞) y = a + eˣ, on (−∞, b) y = b − e⁻ˣ, on (a, b) y = a + (b − a) σ(x), else y = x, as
    torch's ``ExpTransform``, ``SigmoidTransform`` and ``AffineTransform`` give it column by column.
    Images lie strictly inside, whatever is rounded.

    Args:
        input_dim: D.
        support: by column, as a sequence of length D or a mapping from positions or names: None
            for the line, "positive", or the bounds (low, high), of which one may be infinite.
            Names are resolved by
            :func:`~pyroflow.fit_density`, from a frame.

    Attributes:
        bounds: (low, high) of each column.
        named: bounds by name, of columns whose places are not known yet.

    Raises:
        ValueError: If the bounds are in the wrong order or are no numbers, or a position is none.

    Example:
        >>> import torch
        >>> from pyroflow.transforms import Support
        >>> Support(3, {1: "positive", 2: (0.0, 10.0)})(torch.zeros(3))
        tensor([0., 1., 5.])
    """

    event_dims = {"low": 1, "high": 1}
    fixed = ("low", "high")

    def __init__(self, input_dim: int, support: SupportLike) -> None:
        check_count("input_dim", input_dim, 1)
        Bijection.__init__(self)
        if not isinstance(support, Mapping):
            if isinstance(support, str) or len(support) != input_dim:
                raise ValueError(
                    f"support expects an entry for each of {input_dim} columns, or a mapping as in "
                    f"{{1: 'positive'}}, got {support!r}"
                )
            support = dict(enumerate(support))
        given = {column: _bounds(column, bound) for column, bound in support.items()}
        self.named = {name: bounds for name, bounds in given.items() if isinstance(name, str)}
        wrong = [at for at in given if not isinstance(at, str) and at not in range(input_dim)]
        if wrong:
            raise ValueError(
                f"support expects positions from 0 to {input_dim - 1}, or names, "
                f"got {listed(wrong)}"
            )
        self.bounds: list[Bounds] = [given.get(j, _bounds(j, None)) for j in range(input_dim)]
        for side, name in enumerate(self.event_dims):
            self.register_buffer(name, torch.tensor([float(each[side]) for each in self.bounds]))

    @property
    def codomain(self) -> constraints.Constraint:
        """The support."""
        self.placed(None)
        return _Between(self.low, self.high)

    def placed(self, columns: Sequence[str] | None) -> list[Bounds]:
        """The bounds of each column, with those by name in their places among the columns.

        Raises:
            ValueError: If there is no column of a name, or there are no names of columns.
        """
        missing = [name for name in self.named if name not in (columns or ())]
        if missing and columns is None:
            raise ValueError(
                f"support names the columns {listed(missing)}, whose places are not known before "
                "the flow is fitted to a frame: fit it to one, or give positions from 0"
            )
        if missing:
            raise ValueError(
                f"support names the columns {listed(missing)}, which are not among those of the "
                f"data, {listed(columns)}"
            )
        places = {columns.index(name): bounds for name, bounds in self.named.items()}
        return [places.get(j, bounds) for j, bounds in enumerate(self.bounds)]

    def resolve(self, columns: Sequence[str] | None) -> None:
        """Put the bounds by name in their places, for good; errors as of :meth:`placed`."""
        self.bounds, self.named = self.placed(columns), {}
        self._fill()

    def check(self, data: Tensor, name: str, columns: Sequence[str] | None) -> None:
        """Raise ``ValueError`` for data (N, D) outside, with column, row, value and bounds."""
        bounds = self.placed(columns)
        low, high = data.new_tensor(bounds).T
        wrong = (data <= low) | (data >= high)
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{name} expects numbers inside the support, got {data[row, column].item():g} in "
                f"row {row}, {named(column, columns)}, whose support is from {bounds[column][0]:g} "
                f"to {bounds[column][1]:g} without these bounds; {int(wrong.any(1).sum())} of "
                f"{len(data)} rows are outside. Widen the support, or leave these rows out"
            )

    def _apply(self, fn: Callable, recurse: bool = True) -> Support:
        """Move it, with the bounds as exact as the new dtype has them."""
        super()._apply(fn, recurse)
        self._fill()
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        found = [state_dict.get(f"{prefix}{name}", getattr(self, name)) for name in self.event_dims]
        for theirs, own in zip(found, zip(*self.bounds, strict=True), strict=True):
            if theirs.tolist() != theirs.new_tensor(own).tolist() and not self.named:
                args[-1].append(
                    f"{prefix}bounds are {theirs.tolist()}, here {list(own)}: make the flow with "
                    "the same support first"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def _fill(self) -> None:
        if not self.low.is_meta:
            for side, name in enumerate(self.event_dims):
                buffer = getattr(self, name)
                buffer.copy_(buffer.new_tensor([each[side] for each in self.bounds]))

    def _forward(self, x: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
        low, high = parameters
        half, both, sign, edge, floor, ceiling = _kinds(low, high)
        most = 0.999 * math.log(torch.finfo(x.dtype).max)  # its gradient is finite too
        y = x.where(~half, edge + sign * (sign * x.where(half, 0.0)).clamp(max=most).exp())
        inner = x.where(both, 0.0)
        share = (ceiling - floor) * torch.sigmoid(inner.where(inner < 0, -inner))  # of the nearer
        y = torch.where(both, torch.where(inner < 0, floor + share, ceiling - share), y)
        up, down = (torch.full_like(low, inf) for inf in (torch.inf, -torch.inf))
        y = y.maximum(torch.nextafter(low, up)).minimum(torch.nextafter(high, down))
        return y, _log_det_at(x, parameters)

    def _invert(
        self, y: Tensor, parameters: Parameters, cached: Pair | None
    ) -> tuple[Tensor, Tensor]:
        half, both, sign, edge, floor, ceiling = _kinds(*parameters)
        x = y.where(~half, sign * (sign * (y - edge)).where(half, 1.0).log())
        below, above = (t.where(both, 1.0) for t in (y - floor, ceiling - y))
        x = torch.where(both, below.log() - above.log(), x)
        return x, _log_det_at(x, parameters)

    def _log_det(self, intermediates: Tensor) -> Tensor:
        return intermediates


def _bounds(column: int | str, bound: Any) -> Bounds:
    """One entry as (low, high)."""
    known = {None: (-math.inf, math.inf), "positive": (0.0, math.inf)}
    if bound is None or isinstance(bound, str):
        found = known.get(bound)
    else:
        pair = isinstance(bound, Sequence | np.ndarray) and len(bound) == 2
        found = tuple(bound) if pair else None
        whole = found and all(isinstance(b, Real) and not isinstance(b, bool) for b in found)
        found = tuple(map(float, found)) if whole else None
    if found is None or not found[0] < found[1]:
        raise ValueError(
            f"support expects None, 'positive' or (low, high) with low < high for column "
            f"{column!r}, got {bound!r}; write an open end as float('inf')"
        )
    return found


def _kinds(low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
    """Which columns have one bound or two, the side and place of the one, and both or 0 and 1."""
    has_low, has_high = low.isfinite(), high.isfinite()
    half, both = has_low ^ has_high, has_low & has_high
    edge = low.where(has_low, high.where(has_high, 0.0))
    sign = torch.where(has_low, 1.0, -1.0).to(low)
    return half, both, sign, edge, low.where(both, 0.0), high.where(both, 1.0)


def _log_det_at(x: Tensor, parameters: Parameters) -> Tensor:
    half, both, sign, _, floor, ceiling = _kinds(*parameters)
    inner = x.where(both, 0.0)
    interval = (ceiling - floor).log() + logsigmoid(inner) + logsigmoid(-inner)
    return ((sign * x).where(half, 0.0) + interval.where(both, 0.0)).sum(-1)
