"""A flow in the terms of the table that it was fitted to: its columns, density and draws."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyroflow.checks import check_count, check_data
from pyroflow.flows.cells import MARGIN, Cells, cell_log_prob, rounded_down
from pyroflow.frames import column_names, listed
from pyroflow.seeds import seeded
from pyroflow.transforms import Support

if TYPE_CHECKING:
    import pandas as pd

Names = tuple[str, ...] | None


class OfColumns(nn.Module):
    """What a flow knows of its table.

    Attributes:
        columns: the names of the columns, if it was fitted to a frame; else None.
        context_columns: those of the contexts, likewise.
        cells: of each column (lowest, step), if some were dequantized, with step 0 for the others.
        deepen: makes the flow anew with so many layers, if its first fit is to find how many.
    """

    columns: Names = None
    context_columns: Names = None
    cells: Cells | None = None
    deepen: Callable[[int], OfColumns] | None = None

    @property
    def outer_support(self) -> Support | None:
        """The support of the data, if the flow ends in one."""
        last, inverted = self.steps[-1] if self.steps else (None, False)
        return last if isinstance(last, Support) and not inverted else None

    def unconstrained(self, data: Tensor | None) -> tuple[Tensor | None, tuple]:
        """Data (N, D) where the support has not bent them yet, and the steps up to there."""
        support = self.outer_support
        if support is None:
            return data, self.steps
        return None if data is None else support.inv(data), self.steps[:-1]

    def check_support(self, data: Tensor, name: str, columns: Names, steps: Tensor | None) -> None:
        """Raise ``ValueError`` for data (N, D) outside the support, or whose cells are."""
        shifts = [0.0] if steps is None else [steps * MARGIN, steps * (1 - MARGIN)]
        for shift in shifts if self.outer_support is not None else ():
            self.outer_support.check(data + shift, name, columns)

    def cell_steps(self, cells: Cells | None) -> Tensor | None:
        """The steps of columns (D,) in the flow's dtype and place, if some have cells."""
        return None if cells is None else self._like().new_tensor([step for _, step in cells])

    def read(self, data: Any, context: Any) -> list[Tensor]:
        """The data for a fit, and the context if there is one, in the flow's dtype and place."""
        like = self._like()
        own = {"width": self.input_dim, "columns": self.columns}
        rows = [check_data(data, dtype=like.dtype, **own).to(like)]
        if self.conditional != (context is not None):
            raise ValueError(
                "context is needed by a conditional flow, got None"
                if self.conditional
                else "context must be None for a flow without conditional transforms"
            )
        if context is not None:
            options = {"name": "context", "varying": False, "columns": self.context_columns}
            rows.append(check_data(context, dtype=like.dtype, **options).to(like))
            if len(rows[1]) != len(rows[0]):
                raise ValueError(
                    f"context must have one row for each of the {len(rows[0])} rows of data, "
                    f"got {len(rows[1])}"
                )
        return rows

    def name_columns(self, data: Any, context: Any, cells: Cells | None) -> None:
        """Take cells, and the names of columns from frames, that the flow is fitted to.

        Raises:
            ValueError: If a support is by names that are not there.
        """
        self.cells, self.columns = cells, self.columns or column_names(data)
        self.context_columns = self.context_columns or column_names(context)
        if self.outer_support is not None:
            self.outer_support.resolve(self.columns)

    def column_state(self) -> dict[str, Any]:
        """The part of the extra state that is about columns; empty without names and cells."""
        found = {name: getattr(self, name) for name in ("columns", "context_columns", "cells")}
        return {name: list(values) for name, values in found.items() if values is not None}

    def set_column_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`column_state` gave.

        Raises:
            ValueError: If there are not as many names or cells as columns.
        """
        cells = state.get("cells")
        self.cells = None if cells is None else tuple((float(a), float(b)) for a, b in cells)
        for name in ("columns", "context_columns"):
            names = state.get(name)
            setattr(self, name, None if names is None else tuple(map(str, names)))
        for found in (self.columns, self.cells):
            if found is not None and len(found) != self.input_dim:
                raise ValueError(
                    f"state_dict has the columns {listed(found)}, but the flow has "
                    f"{self.input_dim} dimensions"
                )
        if self.outer_support is not None and self.columns is not None:
            self.outer_support.resolve(self.columns)

    def _like(self) -> Tensor:
        """A tensor of the flow's dtype and device."""
        tensors = chain(self.parameters(), self.buffers())
        return next((t for t in tensors if t.is_floating_point()), torch.zeros((), device="cpu"))


class ByColumns(OfColumns):
    """The density and the draws of a flow, in the terms of its table; without gradients."""

    def log_prob(self, x: Any, context: Any = None) -> Tensor:
        """Log density of rows, without a gradient: for one, ``flow().log_prob(x)``.

        Of dequantized columns it is the log probability of their values, by the mean density over
        64 fixed points of each cell.

        Args:
            x: shape (*, D): a tensor, an array or a list; or a frame, whose columns are matched by
                name if the flow was fitted to one.
            context: shape (*B, C), of a conditional flow, likewise.

        Returns:
            Shape (*), in nats.

        Raises:
            ValueError: If x or the context has other columns or another width, holds what is no
                number, or x lies outside the support.

        Example:
            >>> from pyroflow import planar_flow
            >>> planar_flow(2).log_prob([[0.0, 0.0], [1.0, 2.0]]).shape
            torch.Size([2])
        """
        x = _numbers("x", x, self.columns, self.input_dim, self._like())
        flat, steps = x.reshape(-1, x.shape[-1]), self.cell_steps(self.cells)
        self.check_support(flat, "x", self.columns, steps)
        with torch.no_grad():
            q = self(*self._given(context))
            return q.log_prob(x) if steps is None else cell_log_prob(q, x, steps)

    def sample(
        self, num: int, seed: int | None = None, *, context: Any = None
    ) -> Tensor | pd.DataFrame:
        """Draws without a gradient: a pandas frame if the flow was fitted to a frame.

        Dequantized columns are rounded down to values of their grid.

        Args:
            num: how many, for each context.
            seed: makes them reproducible, without touching the global generator; None draws from
                that one.
            context: shape (*B, C), or a frame, of a conditional flow.

        Returns:
            A tensor (num, *B, D), or a frame of num · B rows, in that order.

        Example:
            >>> from pyroflow import planar_flow
            >>> planar_flow(2).sample(5, seed=0).shape
            torch.Size([5, 2])
        """
        check_count("num", num, 0)
        with torch.no_grad(), seeded(seed):
            draws = self(*self._given(context)).sample((num,))
        draws = draws if self.cells is None else rounded_down(draws, self.cells)
        if self.columns is None:
            return draws
        import pandas as pd

        values = draws.reshape(-1, draws.shape[-1]).cpu().numpy()
        return pd.DataFrame(values, columns=list(self.columns))

    def _given(self, context: Any) -> tuple[Tensor, ...]:
        if context is None:
            return ()
        return (_numbers("context", context, self.context_columns, None, self._like()),)


def _numbers(name: str, values: Any, columns: Names, width: int | None, like: Tensor) -> Tensor:
    """Values of shape (*, D) as finite numbers in the dtype and place of a tensor."""
    shape = values.shape[:-1] if isinstance(values, Tensor) else None
    if shape is not None and len(shape) != 1:
        values = values.reshape(-1, values.shape[-1]) if values.dim() else values
    options = {"name": name, "varying": False, "dtype": like.dtype, "rows": 1}
    found = check_data(values, width=width, columns=columns, **options).to(like)
    return found if shape is None else found.reshape(*shape, found.shape[-1])
