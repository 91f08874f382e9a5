"""Data and a flow that a picture compares: read, named, drawn from, and brought to the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from pyroflow.checks import check_data
from pyroflow.flows.cells import Cells, noise, rounded_down
from pyroflow.flows.columns import OfColumns
from pyroflow.frames import column_names, places
from pyroflow.plots.drawing import Flow

MOST = 12  # columns of a picture
DRAWS_PER_ROW = 200  # where each row has a distribution of its own


class Compared(NamedTuple):
    """A distribution with event shape (D,), of one batch or one for each row, and rows (N, D)."""

    model: Distribution
    data: Tensor
    names: Sequence[str] | None
    cells: Cells | None

    def draw(self, num: int) -> Tensor:
        """At least so many draws (S, D), equally many of each row's distribution."""
        each = -(-num // self.model.batch_shape.numel())
        draws = self.model.sample((each,)).reshape(-1, self.data.shape[1])
        return draws if self.cells is None else rounded_down(draws, self.cells)

    def shown(self, columns: Sequence[int | str] | None) -> list[int]:
        """The positions of the columns of a picture, by default the first.

        Raises:
            ValueError: If there is no such column, or there are too many.
        """
        width = self.data.shape[1]
        if columns is None:
            return list(range(min(width, MOST)))
        found = places("columns", columns, width, self.names)
        if not 0 < len(found) <= MOST:
            raise ValueError(
                f"columns expects 1 to {MOST} columns, got {len(found)}; make several pictures"
            )
        return found

    def labels(self) -> list[str]:
        """The names of all columns as matplotlib shows them."""
        if self.names is None:
            return [f"$x_{{{j + 1}}}$" for j in range(self.data.shape[1])]
        return [name.replace("$", r"\$") for name in self.names]

    def subset(self, shown: Sequence[int]) -> str:
        """Which columns are shown, in words; empty if all are."""
        width, labels = self.data.shape[1], self.labels()
        if len(shown) == width:
            return ""
        names = ", ".join(labels[j] for j in shown)
        return f"{len(shown)} of {width} columns: {names}"

    def base(self) -> Tensor | None:
        """The data as standard normal values (N, D), if the flow is right; None for another base.

        Dequantized columns get the noise of a fit.
        """
        base = getattr(self.model, "base_dist", self.model)
        z = self.data
        if self.cells is not None:
            z = z + noise(z.new_tensor([step for _, step in self.cells]), len(z))
        for t in reversed(getattr(self.model, "transforms", [])):
            z = t.inv(z)
        while isinstance(base, Independent):
            base = base.base_dist
        if not isinstance(base, Normal) or z.shape != self.data.shape:
            return None
        return ((z - base.loc) / base.scale).double().cpu()

    def column_pits(self, num: int) -> tuple[Tensor, float]:
        """Where the data lie among draws, uniform in (0, 1) if the flow is right, (N, D).

        Ties are broken at random. Second, of how many independent values the noise of their ECDF
        is: draws that all rows share have noise of their own.
        """
        x = self.data.double()
        rows = len(x)
        if self.model.batch_shape:
            below, up_to = torch.zeros_like(x), torch.zeros_like(x)
            for _ in range(DRAWS_PER_ROW):
                draws = self.draw(rows)
                below, up_to = below + (draws < x), up_to + (draws <= x)
            num, independent = DRAWS_PER_ROW, float(rows)
        else:
            draws = self.draw(num).double().T.contiguous().sort(1).values
            x = x.T.contiguous()
            below, up_to = (torch.searchsorted(draws, x, right=right).T for right in (False, True))
            independent = rows * num / (rows + num)
        ties = torch.rand(below.shape, dtype=torch.float64, device="cpu")
        below, up_to = below.cpu(), up_to.cpu()
        return (below + ties * (up_to - below + 1)) / (num + 1), independent


def compare(
    flow: Flow, data: Any, context: Any = None, *, width: int | None = None, inside: bool = False
) -> Compared:
    """Read data for a flow, with its names and in its dtype.

    Raises:
        TypeError: If the flow cannot be one, such as data in its place.
        ValueError: If the flow is not one distribution with event shape (D,), D = ``width`` where
            that is given, the data are not rows of D finite numbers, or not ``inside`` its support
            where they must be, or a context is missing or not taken.
    """
    if isinstance(flow, OfColumns):
        names = flow.columns or column_names(data)
        if width not in (None, flow.input_dim):
            raise _other_width(width, (flow.input_dim,))
        data, *context = flow.read(data, context)
        if inside:
            flow.check_support(data, "data", names, flow.cell_steps(flow.cells))
        return Compared(flow(*context), data, names, flow.cells)
    if context is not None:
        raise ValueError(
            f"context is for a conditional pyroflow.Flow, got {type(flow).__name__}; give the "
            "distribution at one context, without context="
        )
    if not isinstance(flow, Distribution) and not callable(flow):
        raise TypeError(
            f"flow must be a Flow, a distribution or a function that returns one, got "
            f"{type(flow).__name__}: the flow comes first, then the data"
        )
    model = flow if isinstance(flow, Distribution) else flow()
    shape = tuple(model.event_shape)
    if len(shape) != 1 or width not in (None, *shape):
        raise _other_width(width, shape)
    if model.batch_shape:
        raise ValueError(
            f"flow expects one distribution, got batch shape {tuple(model.batch_shape)}; for one "
            "of each row, give a conditional pyroflow.Flow and its context"
        )
    return Compared(model, check_data(data, width=shape[0]), column_names(data), None)


def _other_width(width: int | None, shape: tuple[int, ...]) -> ValueError:
    columns = "the columns" if width is None else f"{width} columns"
    return ValueError(
        f"flow expects a distribution with event shape ({width or 'D'},), got {shape}; fit one to "
        f"{columns} of the data."
    )
