"""What a guide knows of the rows of a plate: their data, and which of them are drawn."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn

Context = Callable[..., Any] | str | Sequence[str]


class Draw(NamedTuple):
    """The rows that a model is about to use: as ``pyro.plate`` takes them."""

    size: int
    subsample_size: int | None
    subsample: Tensor | None


class _Found(Exception):  # noqa: N818, not an error
    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.draw = draw


class _StopAtPlate(Messenger):
    """Ends a model's run where it opens the plate; latents before it have stored values."""

    def __init__(self, plate: str, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.plate, self.values = plate, values

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name, fn = msg["name"], msg["fn"]
        if name == self.plate and isinstance(fn, _Subsample):
            raise _Found(Draw(fn.size, fn.subsample_size, msg["value"]))
        if name in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[name], True


@torch.no_grad()
def draw_of(
    model: Callable, plate: str, values: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]
) -> Draw:
    """How a model's plate draws its rows for these arguments; the model runs up to there.

    Only the model knows the size that new data give its plate, and the indices that it may
    pick itself (``subsample=``), which a guide that drew its own would override.

    Args:
        model: the model.
        plate: the name of the plate.
        values: latents by site name, so that none has to be drawn.
        args: of the model.
        kwargs: likewise.

    Raises:
        ValueError: a run that opens no such plate, or one without a size.
    """
    try:
        with poutine.block(), _StopAtPlate(plate, values):
            model(*args, **kwargs)
    except _Found as found:
        return found.draw
    raise ValueError(
        f"plate {plate!r} was not opened with a size in this run of the model: the guide needs "
        f"pyro.plate({plate!r}, size) in every run"
    )


class RowContext:
    """The data of the rows of a plate, out of a model's arguments.

    Args:
        given: names of the model's arguments, or a function of all of them. The first
            dimension of what they hold counts the rows.
        model: the model that has the arguments.

    Raises:
        TypeError: something else than names or a function.
        ValueError: a name that is no argument of the model.

    Example:
        >>> def model(x, y=None): ...
        >>> RowContext(["x", "y"], model).rows((torch.zeros(5, 3), torch.ones(5)), {}).shape
        torch.Size([5, 4])
    """

    def __init__(self, given: Context, model: Callable) -> None:
        names = [given] if isinstance(given, str) else given
        if not callable(given) and not _are_names(names):
            raise TypeError(
                "context must be the name of one of the model's arguments, several names, a "
                f"function of the arguments, or None, got {given!r}"
            )
        self.function = given if callable(given) else None
        self.names = [] if callable(given) else list(names)
        self.positions = _positions(model, self.names) if self.names else {}

    def rows(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """All rows that the arguments hold, shape (M, ...); several are joined to (M, C).

        Raises:
            ValueError: an argument that is missing or has no rows, or several of other lengths.
        """
        if self.function is not None:
            return _with_rows("context(...)", self.function(*args, **kwargs))
        found = [_with_rows(repr(n), self._argument(n, args, kwargs)) for n in self.names]
        if len(found) == 1:
            return found[0]
        if len({len(value) for value in found}) > 1:
            lengths = ", ".join(f"{n!r}: {len(v)}" for n, v in zip(self.names, found, strict=True))
            raise ValueError(f"context must have as many rows in each argument, got {lengths}")
        return torch.cat([value.reshape(len(value), -1) for value in found], -1)

    def _argument(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        position = self.positions.get(name)
        given = position is not None and position < len(args)
        value = args[position] if given else kwargs.get(name)
        if value is None:
            raise ValueError(
                f"context needs the model's argument {name!r}, which this call does not give: the "
                "guide reads the rows' data from it, so pass it to the guide as well"
            )
        return value


def pick_rows(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """The rows at the indices that a plate drew, out of all rows or a minibatch of just those.

    Args:
        rows: shape (M, ...).
        index: the rows drawn, shape (B,).
        size: N, the size of the plate.

    Raises:
        ValueError: M is neither N nor B.

    Example:
        >>> data = torch.arange(4.0)
        >>> pick_rows(data, torch.tensor([2, 0]), 4), pick_rows(data[:2], torch.tensor([2, 0]), 4)
        (tensor([2., 0.]), tensor([0., 1.]))
    """
    if len(rows) == size:
        return rows.index_select(0, index.to(rows.device))
    if len(rows) == len(index):
        return rows
    drawn = "" if len(index) == size else f", or the {len(index)} drawn ones"
    raise ValueError(
        f"context must have all {size} rows of the plate{drawn}, got {len(rows)} rows: its "
        "first dimension must count the plate's rows"
    )


def _with_rows(label: str, value: Any) -> Tensor:
    try:
        value = value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"context: {label} must be a tensor or array, got {type(value).__name__}"
        ) from error
    if value.dim() == 0:
        raise ValueError(f"context: {label} must have rows, got a single number")
    return value


def _are_names(names: Any) -> bool:
    several = isinstance(names, Sequence) and len(names) > 0
    return several and all(isinstance(name, str) for name in names)


def _positions(model: Callable, names: list[str]) -> dict[str, int]:
    """Where the named arguments stand in the model's list of positional ones."""
    target = model.forward if isinstance(model, nn.Module) else model
    parameters = list(inspect.signature(target).parameters.values())
    keywords = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    for name in names:
        if name not in known and not keywords:
            listed = ", ".join(map(repr, known)) or "none"
            raise ValueError(
                f"context must name arguments of the model, got {name!r}; it has {listed}"
            )
    placed = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return {name: placed.index(name) for name in names if name in placed}
