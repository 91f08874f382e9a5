"""Frames of pandas and polars, known by their methods, as columns of numbers with names."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np


def is_frame(data: object) -> bool:
    """Whether it is a data frame, or one column of one, and no tensor or array."""
    return hasattr(type(data), "to_frame") or _is_table(data)


def _is_table(data: object) -> bool:
    return all(hasattr(type(data), name) for name in ("columns", "to_numpy", "__getitem__"))


def column_names(data: object) -> tuple[str, ...] | None:
    """The names of a frame's columns as text; None for what is no frame."""
    return tuple(name for name, _ in _series(data)) if is_frame(data) else None


def named(column: int, columns: Sequence[str] | None) -> str:
    """A column as errors call it."""
    known = columns is not None and column < len(columns)
    return f"column {columns[column]!r}" if known else f"column {column} (from 0)"


def listed(names: Sequence[object]) -> str:
    """Names in a row."""
    return ", ".join(repr(name) for name in names)


def places(
    name: str,
    given: int | str | Sequence[int | str],
    width: int,
    columns: Sequence[str] | None,
    other: str = "",
) -> list[int]:
    """The positions of columns that are given by position or name, each once.

    Raises:
        ValueError: If there is no such column.
    """
    given = [given] if isinstance(given, Integral | str) else list(given)
    known = {**{j: j for j in range(width)}, **{name: j for j, name in enumerate(columns or ())}}
    if wrong := [column for column in given if column not in known]:
        names = f", or {listed(columns)}" if columns else ""
        raise ValueError(
            f"{name} expects {other}positions from 0 to {width - 1}{names}, got {listed(wrong)}"
        )
    return list(dict.fromkeys(known[column] for column in given))


def frame_columns(
    data: object, name: str, columns: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """The columns by name as integers or floats, in the order of ``columns`` where it is given.

    Raises:
        ValueError: If names repeat, are missing or are more than the expected ones, or if columns
            are not numbers or have missing values, by their names.
    """
    pairs = _series(data)
    names = [label for label, _ in pairs]
    if repeated := sorted({label for label in names if names.count(label) > 1}):
        raise ValueError(
            f"{name} expects columns of different names, got {listed(repeated)} more than once; "
            "rename them, or pass the numbers alone, data.to_numpy()"
        )
    if columns is not None:
        pairs = _matched(dict(pairs), name, columns)
    wrong = {label: str(s.dtype) for label, s in pairs if _kind(s.dtype) not in "biuf"}
    if wrong:
        found = ", ".join(f"{label!r} ({dtype})" for label, dtype in wrong.items())
        raise ValueError(
            f"{name} expects columns of numbers, got {found}; leave them out, "
            f"data.drop(columns={list(wrong)}), or encode them: numbers as text by "
            "pandas.to_numeric, categories as the context of a conditional flow by "
            "pandas.get_dummies"
        )
    absent = {label: _absent(s) for label, s in pairs}
    if holes := {label: gaps for label, gaps in absent.items() if gaps.any()}:
        found = ", ".join(
            f"{label!r} ({int(gaps.sum())}, the first in row {int(gaps.argmax())})"
            for label, gaps in holes.items()
        )
        rows = int(np.logical_or.reduce(list(holes.values())).sum())
        raise ValueError(
            f"{name} has missing values in {found}, rows counted from 0; {rows} of "
            f"{len(pairs[0][1])} rows have one. Drop these rows, data.dropna(), leave the columns "
            "out, or fill them in"
        )
    return {label: _numbers(s) for label, s in pairs}


def _series(data: Any) -> list[tuple[str, Any]]:
    """The columns with their names; a nameless one is called by its place."""
    if not _is_table(data):
        return [("0" if data.name in (None, "") else str(data.name), data)]
    if hasattr(data, "iloc"):
        return [(str(label), data.iloc[:, j]) for j, label in enumerate(data.columns)]
    return [(str(label), data[label]) for label in data.columns]


def _matched(found: dict[str, Any], name: str, columns: Sequence[str]) -> list[tuple[str, Any]]:
    missing = [column for column in columns if column not in found]
    extra = [column for column in found if column not in columns]
    if missing or extra:
        problems = [f"without {listed(missing)}"] if missing else []
        problems += [f"with {listed(extra)} beside them"] if extra else []
        raise ValueError(
            f"{name} expects the columns that the flow was fitted to, {listed(columns)}, got a "
            f"frame {' and '.join(problems)}; select or rename them, data[{list(columns)}]"
        )
    return [(column, found[column]) for column in columns]


def _kind(dtype: Any) -> str:
    """NumPy's letter for the kind of a dtype, which polars does not have."""
    if hasattr(dtype, "kind"):
        return dtype.kind
    return "f" if dtype.is_numeric() else "b" if str(dtype) == "Boolean" else "O"


def _absent(column: Any) -> np.ndarray:
    """Where a column has no value, or NaN."""
    if hasattr(column, "isna"):
        gaps = np.asarray(column.isna(), dtype=bool)
    else:
        gaps = np.asarray(column.is_null(), dtype=bool)
    if gaps.any():
        return gaps
    values = np.asarray(column.to_numpy())
    return np.isnan(values) if values.dtype.kind == "f" else gaps


def _numbers(column: Any) -> np.ndarray:
    values = np.asarray(column.to_numpy())
    if values.dtype.kind in "iuf":
        return values
    return values.astype(np.int64 if _kind(column.dtype) in "biu" else np.float64)
