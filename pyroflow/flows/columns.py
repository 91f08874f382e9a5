"""A flow in the terms of the table that it was fitted to: its columns, density and draws."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyroflow.checks import check_count, check_data
from pyroflow.frames import column_names, listed
from pyroflow.seeds import seeded
from pyroflow.transforms import Support

if TYPE_CHECKING:
    import pandas as pd

Names = tuple[str, ...] | None


class OfColumns(nn.Module):
    """What a flow knows of its table, and calls that speak of it; without gradients.

    Attributes:
        columns: the names of the columns, if it was fitted to a frame; else None.
        context_columns: those of the contexts, likewise.
    """

    columns: Names = None
    context_columns: Names = None

    def log_prob(self, x: Any, context: Any = None) -> Tensor:
        """Log density of rows, without a gradient: for one, ``flow().log_prob(x)``.

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
        if self.outer_support is not None:
            self.outer_support.check(x.reshape(-1, x.shape[-1]), "x", self.columns)
        with torch.no_grad():
            return self(*self._given(context)).log_prob(x)

    def sample(
        self, num: int, seed: int | None = None, *, context: Any = None
    ) -> Tensor | pd.DataFrame:
        """Draws without a gradient: a pandas frame if the flow was fitted to a frame.

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
        if self.columns is None:
            return draws
        import pandas as pd

        values = draws.reshape(-1, draws.shape[-1]).cpu().numpy()
        return pd.DataFrame(values, columns=list(self.columns))

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

    def read(self, data: Any, context: Any) -> list[Tensor]:
        """The data for a fit, and the context if there is one, in the flow's dtype and place."""
        like = self._like()
        own = {"width": self.input_dim, "columns": self.columns}
        rows = [check_data(data, dtype=like.dtype, **own).to(like)]
        if self.outer_support is not None:
            self.outer_support.check(rows[0], "data", self.columns or column_names(data))
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

    def name_columns(self, data: Any, context: Any) -> None:
        """Take the names of columns from frames that the flow is fitted to.

        Raises:
            ValueError: If a support is by names that are not there.
        """
        self.columns = self.columns or column_names(data)
        self.context_columns = self.context_columns or column_names(context)
        if self.outer_support is not None:
            self.outer_support.resolve(self.columns)

    def column_state(self) -> dict[str, Any]:
        """The part of the extra state that is about columns; empty without names."""
        found = {name: getattr(self, name) for name in ("columns", "context_columns")}
        return {name: list(names) for name, names in found.items() if names is not None}

    def set_column_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`column_state` gave.

        Raises:
            ValueError: If there are not as many names as columns.
        """
        for name in ("columns", "context_columns"):
            names = state.get(name)
            setattr(self, name, None if names is None else tuple(map(str, names)))
        if self.columns is not None and len(self.columns) != self.input_dim:
            raise ValueError(
                f"state_dict has the columns {listed(self.columns)}, but the flow has "
                f"{self.input_dim} dimensions"
            )
        if self.outer_support is not None and self.columns is not None:
            self.outer_support.resolve(self.columns)

    def _given(self, context: Any) -> tuple[Tensor, ...]:
        if context is None:
            return ()
        return (_numbers("context", context, self.context_columns, None, self._like()),)

    def _like(self) -> Tensor:
        """A tensor of the flow's dtype and device."""
        tensors = chain(self.parameters(), self.buffers())
        return next((t for t in tensors if t.is_floating_point()), torch.zeros((), device="cpu"))


def _numbers(name: str, values: Any, columns: Names, width: int | None, like: Tensor) -> Tensor:
    """Values of shape (*, D) as finite numbers in the dtype and place of a tensor."""
    shape = values.shape[:-1] if isinstance(values, Tensor) else None
    if shape is not None and len(shape) != 1:
        values = values.reshape(-1, values.shape[-1]) if values.dim() else values
    options = {"name": name, "varying": False, "dtype": like.dtype, "rows": 1}
    found = check_data(values, width=width, columns=columns, **options).to(like)
    return found if shape is None else found.reshape(*shape, found.shape[-1])
