"""Data to fit: the sine strip, tables from files, and the check every fit makes of its data."""

from __future__ import annotations

import csv
import math
import zipfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["SINE_ENTROPY", "check_data", "read_table", "sine", "sine_log_prob"]

Columns = Sequence[int | str] | int | str | None

_NOISE = 0.1
_HALF_WIDTH = 3.0

SINE_ENTROPY: float = math.log(2 * _HALF_WIDTH) + 0.5 * math.log(2 * math.pi * math.e * _NOISE**2)
"""Differential entropy of :func:`sine`, 0.908113 nats: no model's mean loss can be lower."""


def sine(n: int = 10_000, seed: int = 0) -> Tensor:
    r"""Draws points around a sine curve: x2 ~ U(-3, 3), x1 = sin(x2) + N(0, 0.1²).

    The draws come from a generator of their own, so the global random state stays as it is.

    Args:
        n: Number of points.
        seed: Seed of the generator; equal seeds give equal points.

    Returns:
        Points of shape :math:`(n, 2)`, float32, x1 in column 0.

    Raises:
        ValueError: If ``n`` is not positive.

    Example:
        >>> from pyroflow.datasets import sine
        >>> sine(500, seed=1).shape
        torch.Size([500, 2])
    """
    if n < 1:
        raise ValueError(f"sine: n expects a positive number of points, got {n}.")
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n, generator=generator, dtype=torch.float32)
    noise = torch.randn(n, generator=generator, dtype=torch.float32)
    x2 = _HALF_WIDTH * (2 * uniform - 1)
    return torch.stack([x2.sin() + _NOISE * noise, x2], dim=-1)


def sine_log_prob(y: Tensor) -> Tensor:
    r"""Exact log density of :func:`sine`, log p(y) = -log 6 + log N(y1 | sin y2, 0.1²).

    Args:
        y: Points of shape :math:`(*, 2)`.

    Returns:
        Log densities of shape :math:`(*,)`, minus infinity where :math:`|y_2| > 3`.

    Raises:
        ValueError: If the last dimension of ``y`` is not 2.

    Example:
        >>> from pyroflow.datasets import sine, sine_log_prob
        >>> sine_log_prob(sine(500)).shape
        torch.Size([500])
    """
    if y.shape[-1:] != (2,):
        raise ValueError(f"sine_log_prob: y expects last dimension 2, got shape {tuple(y.shape)}.")
    y1, y2 = y.unbind(-1)
    residual = (y1 - y2.sin()) / _NOISE
    constant = math.log(2 * _HALF_WIDTH * _NOISE) + 0.5 * math.log(2 * math.pi)
    log_prob = -0.5 * residual.square() - constant
    return log_prob.masked_fill(y2.abs() > _HALF_WIDTH, -math.inf)


def read_table(path: str | PathLike[str], *, columns: Columns = None) -> Tensor:
    r"""Reads a table of numbers from a .csv, .npy or .npz file; no pickle is ever executed.

    A .csv file is comma separated. Its first line is a header when no cell of it is a number. An
    .npz file must hold a single array. Missing values that are written as ``nan`` are read as such:
    :func:`check_data` reports them.

    Args:
        path: The file.
        columns: Columns to keep, in this order: positions from 0 or names of the header. All of
            them by default.

    Returns:
        The table with shape :math:`(n, d)` in torch's default dtype.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is of another kind, empty, ragged or not numeric, or if a column
            does not exist.

    Example:
        >>> import tempfile, pathlib
        >>> from pyroflow.datasets import read_table
        >>> path = pathlib.Path(tempfile.mkdtemp(), "heights.csv")
        >>> _ = path.write_text("age,height\n10,1.41\n11,1.44\n12,1.49\n")
        >>> read_table(path, columns=["height"]).shape
        torch.Size([3, 1])
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_table: there is no file {path}.")
    readers = {".csv": _read_csv, ".npy": _read_numpy, ".npz": _read_numpy}
    if path.suffix.lower() not in readers:
        raise ValueError(f"read_table: {path} is none of {', '.join(readers)}; convert it first.")
    names, values = readers[path.suffix.lower()](path)
    table = _to_tensor(values, str(path)).to(torch.get_default_dtype())
    _check_shape(table, None, str(path), rows=1)
    return table[:, _positions(columns, names, table.shape[1], path)]


def check_data(data: object, *, width: int | None = None, name: str = "data") -> Tensor:
    r"""Turns data into a float tensor, or says why no density can be fitted to it.

    Args:
        data: Tensor, array or nested list with shape :math:`(n, d)`, at least two rows.
        width: The :math:`d` that is wanted; any if None.
        name: What the messages call the data.

    Returns:
        A tensor with shape :math:`(n, d)`. float32 and float64 are kept; integers, other floats
        and lists become torch's default dtype.

    Raises:
        ValueError: If the data are not numbers, have another shape, hold NaN or inf, or if a
            column is constant up to the rounding of its values.

    Example:
        >>> from pyroflow.datasets import check_data
        >>> check_data([[0, 1], [1, 3], [2, 2]]).shape
        torch.Size([3, 2])
    """
    tensor = _to_tensor(data, name)
    _check_shape(tensor, width, name)
    _check_finite(tensor, name)
    _check_varies(tensor, name)
    return tensor


def _to_tensor(data: object, name: str) -> Tensor:
    if not isinstance(data, Tensor):
        return _array_to_tensor(data, name)
    if data.is_complex() or data.dtype == torch.bool:
        raise _not_numeric(name, str(data.dtype))
    kept = data.dtype in (torch.float32, torch.float64)
    return data if kept else data.to(torch.get_default_dtype())


def _array_to_tensor(data: object, name: str) -> Tensor:
    try:
        array = np.asanyarray(data)
    except ValueError as error:
        raise ValueError(
            f"{name} expects rows of equal length, shape (n, d), got a ragged {type(data).__name__}"
            f" ({error}); give every row the same number of values."
        ) from error
    if array.dtype.kind not in "iuf":
        raise _not_numeric(name, str(array.dtype))
    if np.ma.isMaskedArray(array):
        array = array.astype(np.float64).filled(np.nan)
    native = array.dtype.newbyteorder("=")
    kept = hasattr(data, "__array__") and native in (np.float32, np.float64)
    # A copy: torch takes neither read-only, nor reversed, nor byte-swapped memory.
    tensor = torch.from_numpy(np.array(array, dtype=native if kept else np.float64, order="C"))
    return tensor if kept else tensor.to(torch.get_default_dtype())


def _not_numeric(name: str, dtype: str) -> ValueError:
    return ValueError(
        f"{name} expects real numbers, got dtype {dtype}; encode it as numbers and convert it,"
        " e.g. with data.astype(float) or data.float()."
    )


def _check_shape(data: Tensor, width: int | None, name: str, rows: int = 2) -> None:
    expected = f"{name} expects shape (n, {width or 'd'}) with n >= {rows}"
    got = f"got shape {tuple(data.shape)}"
    if data.numel() == 0 or (data.ndim == 2 and len(data) < rows):
        raise ValueError(f"{expected}, {got}; pass at least {rows} row(s) of numbers.")
    if data.ndim == 1:
        raise ValueError(f"{expected}, {got}; use data[:, None] for n values of one quantity.")
    if data.ndim != 2:
        raise ValueError(f"{expected}, {got}; reshape it to one row per observation.")
    if width is not None and data.shape[1] != width:
        raise ValueError(
            f"{expected}, {got}; select {width} columns, or build the flow for {data.shape[1]}."
        )


def _check_finite(data: Tensor, name: str) -> None:
    wrong = ~data.isfinite()
    if not wrong.any():
        return
    row, column = wrong.nonzero()[0].tolist()
    affected = int(wrong.any(dim=1).sum())
    raise ValueError(
        f"{name} expects finite numbers, got {data[row, column].item()} in row {row}, column"
        f" {column} (from 0); {affected} of {len(data)} rows hold NaN or inf. Drop them with"
        " data[data.isfinite().all(1)] or fill them in."
    )


def _check_varies(data: Tensor, name: str) -> None:
    spread = data.amax(dim=0) - data.amin(dim=0)
    rounding = 8 * torch.finfo(data.dtype).eps * data.abs().amax(dim=0)
    constant = (spread <= rounding).nonzero().flatten().tolist()
    if constant:
        raise ValueError(
            f"{name} expects columns that vary, got constant column(s) {constant} (from 0, first"
            f" value {data[0, constant[0]].item():g}), where no density exists. Drop the column,"
            " or add noise to it. A large offset hides small changes: subtract it, in float64."
        )


def _read_csv(path: Path) -> tuple[list[str] | None, object]:
    rows = _csv_rows(path)
    if not rows:
        raise ValueError(f"{path} is empty; expected comma-separated numbers.")
    header = None if any(_is_number(cell) for cell in rows[0][1]) else rows.pop(0)[1]
    names = header and [cell.strip().lstrip("# ") for cell in header]
    if not rows:
        raise ValueError(f"{path} has no rows below its header {names}.")
    width = len(names or rows[0][1])
    return names, [_parse_row(row, width, names, f"{path}, line {line}") for line, row in rows]


def _csv_rows(path: Path) -> list[tuple[int, list[str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, skipinitialspace=True)
            return [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not comma-separated text in UTF-8 ({error}).") from error


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _parse_row(row: list[str], width: int, names: list[str] | None, where: str) -> list[float]:
    if len(row) != width:
        raise ValueError(f"{where}: expected {width} cells as in the first line, got {len(row)}.")
    try:
        return [float(cell) for cell in row]
    except ValueError:
        column = [_is_number(cell) for cell in row].index(False)
        label = f" ({names[column]!r})" if names else ""
        raise ValueError(
            f"{where}, column {column}{label}: expected a number, got {row[column]!r}. Numbers use"
            " a decimal point, cells are separated by commas, missing values are written nan."
        ) from None


def _read_numpy(path: Path) -> tuple[None, object]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return None, loaded
        with loaded:
            if len(loaded.files) == 1:
                return None, loaded[loaded.files[0]]
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} does not hold a plain array of numbers ({error}); save one with numpy.save."
        ) from error
    raise ValueError(
        f"{path} expects a single array, got {loaded.files}; save the one you mean by itself."
    )


def _positions(columns: Columns, names: list[str] | None, width: int, path: Path) -> list[int]:
    if columns is None:
        if names and "" in names:
            raise ValueError(
                f"{path}: column {names.index('')} has no name, as a row index often has none;"
                f" say which columns to read: columns=[...] out of {names}."
            )
        return list(range(width))
    columns = [columns] if isinstance(columns, (int, str)) else columns
    known = [*range(width), *(names or [])]
    for column in columns:
        if known.count(column) != 1:
            problem = "is there more than once" if column in known else "does not exist"
            raise ValueError(f"{path}: column {column!r} {problem}; there are {known}.")
    return [column if isinstance(column, int) else names.index(column) for column in columns]
