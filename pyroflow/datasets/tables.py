"""Tables of numbers from files: what cannot be read exactly is refused."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from decimal import Decimal
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyroflow.checks import check_choice, check_shape, to_tensor

if TYPE_CHECKING:
    import pandas as pd

Columns = Sequence[int | str] | int | str | None

MISSING = {"nan", "na", "n/a", "null", "none"}
YEARS = range(1800, 2201)


def read_table(
    path: str | PathLike[str],
    *,
    columns: Columns = None,
    header: bool | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Reads a table of numbers from a .csv, .npy or .npz file; no pickle is ever executed.

    A .csv file is comma separated, with decimal points; blank lines are skipped. Missing values,
    written as nan, NA, N/A, null or None, are read as NaN; an empty cell is refused. An .npz file
    must hold a single array.

    Args:
        path: The file.
        columns: Columns to keep, in this order: positions from 0 or names of the header. All of
            them by default.
        header: Whether the first line of a .csv file holds names. By default it does when no cell
            of it is a number; years or 0, 1, 2, ... above other numbers are refused, as they may
            be either.
        dtype: ``torch.float32`` or ``torch.float64``; torch's default dtype by default.

    Returns:
        The table with shape :math:`(n, d)`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is of another kind, empty, ragged or not numeric, if a column does
            not exist, or if ``dtype`` cannot hold the numbers: one is too large or too small, an
            integer is not exact, or values far from 0 become equal.

    Example:
        >>> import tempfile, pathlib
        >>> from pyroflow.datasets import read_table
        >>> path = pathlib.Path(tempfile.mkdtemp(), "heights.csv")
        >>> _ = path.write_text("age,height\n10,1.41\n11,1.44\n12,1.49\n")
        >>> read_table(path, columns=["height"]).shape
        torch.Size([3, 1])
    """
    path, dtype = Path(path), dtype or torch.get_default_dtype()
    check_choice("dtype", dtype, (torch.float32, torch.float64))
    if not path.is_file():
        raise FileNotFoundError(f"read_table: there is no file {path}.")
    kind = path.suffix.lower()
    if kind == ".csv":
        return _read_csv(path, columns, header, dtype)
    if kind not in (".npy", ".npz"):
        raise ValueError(f"read_table: {path} is none of .csv, .npy, .npz; convert it first.")
    table = to_tensor(_load_array(path), str(path), dtype)
    check_shape(table, None, str(path), rows=1)
    return table[:, _positions(columns, None, table.shape[1], path)]


def _load_array(path: Path) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            if len(loaded.files) == 1:
                return loaded[loaded.files[0]]
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} does not hold a plain array of numbers ({error}); save one with numpy.save."
        ) from error
    raise ValueError(
        f"{path} expects a single array, got {loaded.files}; save the one you mean by itself."
    )


def _positions(columns: Columns, names: list[str] | None, width: int, path: Path) -> list[int]:
    """The columns to keep, as positions."""
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


def _read_csv(path: Path, columns: Columns, header: bool | None, dtype: torch.dtype) -> Tensor:
    cells, numbers = _csv_cells(path)
    names = None
    if _starts_with_names(path, cells, numbers) if header is None else header:
        names = [cell.strip().lstrip("# ") for cell in cells.iloc[0]]
        cells, numbers = cells.iloc[1:], numbers.iloc[1:]
    if not len(cells):
        raise ValueError(f"{path} has no rows below its header {names}.")
    kept = _positions(columns, names, cells.shape[1], path)
    cells, numbers = cells.iloc[:, kept], numbers.iloc[:, kept]

    def place(row: int, column: int) -> str:
        label = f" ({names[kept[column]]!r})" if names else ""
        return f"{path}, line {cells.index[row]}, column {kept[column]}{label}"

    missing = cells.apply(lambda column: column.str.strip().str.lower().isin(MISSING))
    wrong = np.argwhere((numbers.isna() & ~missing).to_numpy())
    if len(wrong):
        row, column = wrong[0]
        raise ValueError(
            f"{place(row, column)}: expected a number, got {cells.iat[row, column]!r}. Numbers use"
            " a decimal point, cells are separated by commas, missing values are written nan;"
            " names in the first line need header=True."
        )
    table = to_tensor(numbers.to_numpy(float), str(path), dtype)
    # Of numbers, 0 and infinity may be others that were rounded, and integers this large as well.
    doubtful = (table == 0) | (table.abs() >= 2 / torch.finfo(dtype).eps)
    for row, column in doubtful.nonzero().tolist():
        text, number = cells.iat[row, column].strip(), table[row, column].item()
        exact, whole = Decimal(text), text.lstrip("+-").isdigit()
        if exact != number and (whole or number == 0 or exact.is_finite() > math.isfinite(number)):
            raise ValueError(
                f"{place(row, column)}: {text} would become {number:.17g} in {dtype}; pass"
                " dtype=torch.float64 if that holds it, or subtract an offset or scale the column"
                " before it is written."
            )
    return table


def _csv_cells(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells as text and as numbers, in rows of equal length; the index has their lines."""
    import pandas as pd

    try:
        text = path.read_text(encoding="utf-8-sig").rstrip()
        if not text:
            raise ValueError(f"{path} is empty; expected comma-separated numbers.")
        cells = pd.read_csv(
            io.StringIO(text),
            engine="python",  # the other one fills short rows up
            dtype=str,
            header=None,
            index_col=False,
            keep_default_na=False,
            skip_blank_lines=False,
            skipinitialspace=True,
        )
    except (UnicodeDecodeError, pd.errors.ParserError) as error:
        raise ValueError(f"{path} is not comma-separated text in UTF-8 ({error}).") from error
    cells.index += 1
    absent, width = cells.isna().sum(axis=1), cells.shape[1]
    if width > 1:
        blank = (absent == width) | ((absent == width - 1) & (cells[0] == ""))
        cells, absent = cells[~blank], absent[~blank]
    if absent.any():
        line = absent.index[absent > 0][0]
        raise ValueError(
            f"{path}, line {line}: expected {width} cells as in the first line, got"
            f" {width - absent[line]}."
        )
    return cells, cells.apply(pd.to_numeric, errors="coerce")


def _starts_with_names(path: Path, cells: pd.DataFrame, numbers: pd.DataFrame) -> bool:
    """Whether no cell of the first line is a number."""
    first, values = cells.iloc[0].str.strip(), numbers.iloc[0]
    if values.isna().all():
        return not first.str.lower().isin(MISSING).any()
    years = values.isin(YEARS).all() and values.is_unique
    years = years and not numbers.isin(YEARS).all(axis=None)
    if years or (len(first) > 2 and first.tolist() == [str(i) for i in range(len(first))]):
        raise ValueError(
            f"{path}: the first line, {first.tolist()}, may hold names or numbers; pass"
            " header=True or header=False."
        )
    return False
