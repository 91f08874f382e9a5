"""Data to fit: tables, MNIST and CIFAR-10 from files, and :mod:`pyroflow.synthetic`'s sets."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyroflow.cifar_files import Cifar10, cifar10
from pyroflow.data_checks import check_shape, to_tensor
from pyroflow.image_files import Mnist, binarize, mnist, patches, scale_to_open_interval
from pyroflow.synthetic import (
    SINE_ENTROPY,
    ring,
    ring_log_prob,
    sine,
    sine_log_prob,
    two_moons,
    two_moons_log_prob,
)

__all__ = [
    "SINE_ENTROPY",
    "Cifar10",
    "Mnist",
    "binarize",
    "cifar10",
    "mnist",
    "patches",
    "read_table",
    "ring",
    "ring_log_prob",
    "scale_to_open_interval",
    "sine",
    "sine_log_prob",
    "two_moons",
    "two_moons_log_prob",
]

Columns = Sequence[int | str] | int | str | None


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
    table = to_tensor(values, str(path)).to(torch.get_default_dtype())
    check_shape(table, None, str(path), rows=1)
    return table[:, _positions(columns, names, table.shape[1], path)]


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
