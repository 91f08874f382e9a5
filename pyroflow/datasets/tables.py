"""Tables of numbers from files: what cannot be read exactly is refused."""

from __future__ import annotations

import io
import math
import re
import zipfile
from collections.abc import Callable, Sequence
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
Choose = Callable[[list[str] | None], Columns]  # by the names, which are None where there are none
# A table's numbers, and its columns' names if it has any.
Named = tuple[Tensor, tuple[str, ...] | None]

MISSING = {"nan", "na", "n/a", "null", "none"}
YEARS = range(1800, 2201)
TEXT, ARRAYS = (".csv", ".tsv", ".txt"), (".npy", ".npz")
DELIMITERS = ("\t", ";", "|")  # looked for in this order; else cells are between commas
SWAPPED = str.maketrans(",.", ".,")
EXPONENT = r"(?:[eE][+-]?\d+)?"
COMMA = re.compile(rf"[+-]?\d*,\d+{EXPONENT}")
POINT = re.compile(rf"[+-]?\d*\.\d*{EXPONENT}")
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")


def read_table(
    path: str | PathLike[str],
    *,
    columns: Columns = None,
    header: bool | None = None,
    dtype: torch.dtype | None = None,
    delimiter: str | None = None,
    decimal: str | None = None,
) -> Tensor:
    r"""Reads a table of numbers from text, Parquet, .npy or .npz; no pickle is ever executed.

    In text (.csv, .tsv, .txt) blank lines are skipped. Missing values, written as nan, NA, N/A,
    null or None, are read as NaN; an empty cell is refused. A .parquet file needs an engine of
    pandas, such as pyarrow; its index, if it has names, is read as columns, and missing values are
    refused. An .npz file must hold a single array.

    Args:
        path: The file.
        columns: Columns to keep, in this order: positions from 0 or names of the header. All of
            them by default.
        header: Whether the first line of text holds names. By default it does when no cell
            of it is a number; years or 0, 1, 2, ... above other numbers are refused, as they may
            be either.
        dtype: ``torch.float32`` or ``torch.float64``; torch's default dtype by default.
        delimiter: What is between the cells of text: by default a tab, a semicolon or a bar if the
            first line has one, else a comma.
        decimal: What is before the decimals in text, "." or ",". By default it is a comma where
            cells that are not between commas have it and none has a point; where all of these may
            be thousands as well, as 1,234 may, they are refused.

    Returns:
        The table with shape :math:`(n, d)`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is of another kind, empty, ragged or not numeric, if a column does
            not exist, or if ``dtype`` cannot hold the numbers: one is too large or too small, an
            integer is not exact, or values far from 0 become equal.
        ImportError: If pandas has no engine for Parquet.

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
    return read_named(path, columns, dtype, header, delimiter, decimal)[0]


def read_named(
    path: Path,
    columns: Columns | Choose,
    dtype: torch.dtype,
    header: bool | None = None,
    delimiter: str | None = None,
    decimal: str | None = None,
    content: bytes | None = None,
) -> Named:
    """The table of :func:`read_table` with its names; of text that was read already, if given."""
    kind = path.suffix.lower()
    if content is not None or kind in TEXT:
        check_choice("decimal", decimal, (None, ".", ","))
        text = path.read_bytes() if content is None else content
        return _read_csv(path, text, (delimiter, decimal), columns, header, dtype)
    if kind == ".parquet":
        return _read_parquet(path, columns, dtype)
    if kind not in ARRAYS:
        raise ValueError(
            f"read_table: {path} is none of {', '.join(TEXT)}, .parquet, {', '.join(ARRAYS)}; "
            "convert it first."
        )
    table = to_tensor(_load_array(path), str(path), dtype)
    check_shape(table, None, str(path), rows=1)
    return table[:, _positions(columns, None, table.shape[1], path)], None


def _read_parquet(path: Path, columns: Columns | Choose, dtype: torch.dtype) -> Named:
    import pandas as pd

    frame = pd.read_parquet(path)
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    names = [str(name) for name in frame.columns]
    frame = frame.iloc[:, _positions(columns, names, len(names), path)]
    table = to_tensor(frame, str(path), dtype)
    check_shape(table, None, str(path), rows=1)
    return table, tuple(map(str, frame.columns))


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


def _positions(
    columns: Columns | Choose, names: list[str] | None, width: int, path: Path
) -> list[int]:
    """The columns to keep, as positions."""
    columns = columns(names) if callable(columns) else columns
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


def _read_csv(
    path: Path,
    text: bytes,
    marks: tuple[str | None, str | None],
    columns: Columns | Choose,
    header: bool | None,
    dtype: torch.dtype,
) -> Named:
    cells, numbers, (delimiter, decimal) = _csv_cells(path, text, marks)
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
        others = [names[kept[j]] if names else kept[j] for j in sorted({*wrong[:, 1]} - {column})]
        raise ValueError(
            f"{place(row, column)}: expected a number, got {cells.iat[row, column]!r}"
            f"{' (a missing value)' if not cells.iat[row, column] else ''}"
            f"{f', and likewise in columns {others}' if others else ''}. Cells are separated by"
            f" {delimiter!r} here and decimals by {decimal!r}"
            f"{'' if names else '; names in the first line need header=True'}. Fill the cells in, "
            "drop their rows, or choose other columns."
        )
    table = to_tensor(numbers.to_numpy(float), str(path), dtype)
    # Of numbers, 0 and infinity may be others that were rounded, and integers this large as well.
    doubtful = (table == 0) | (table.abs() >= 2 / torch.finfo(dtype).eps)
    for row, column in doubtful.nonzero().tolist():
        text, number = cells.iat[row, column].strip(), table[row, column].item()
        text = text.translate(SWAPPED) if decimal == "," else text
        exact, whole = Decimal(text), text.lstrip("+-").isdigit()
        if exact != number and (whole or number == 0 or exact.is_finite() > math.isfinite(number)):
            raise ValueError(
                f"{place(row, column)}: {text} would become {number:.17g} in {dtype}; pass"
                " dtype=torch.float64 if that holds it, or subtract an offset or scale the column"
                " before it is written."
            )
    return table, names and tuple(names[column] for column in kept)


def _csv_cells(
    path: Path, content: bytes, marks: tuple[str | None, str | None]
) -> tuple[pd.DataFrame, pd.DataFrame, tuple[str, str]]:
    """Cells as text and numbers, in rows of equal length, indexed by line; delimiter, decimal."""
    import pandas as pd

    delimiter, decimal = marks
    try:
        text = content.decode("utf-8-sig").rstrip()
        if not text:
            raise ValueError(f"{path} is empty; expected numbers.")
        delimiter = delimiter or _delimiter(text)
        cells = pd.read_csv(
            io.StringIO(text, newline=None),
            sep=delimiter,
            engine="python",  # the other one fills short rows up
            dtype=str,
            header=None,
            index_col=False,
            keep_default_na=False,
            skip_blank_lines=False,
            skipinitialspace=True,
        )
    except (UnicodeDecodeError, pd.errors.ParserError) as error:
        raise ValueError(
            f"{path} is not text in UTF-8 with cells separated by {delimiter or ','!r} ({error})."
        ) from error
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
    decimal = decimal or _decimal(path, cells, delimiter)
    plain = cells.apply(lambda c: c.str.translate(SWAPPED)) if decimal == "," else cells
    return cells, plain.apply(pd.to_numeric, errors="coerce"), (delimiter, decimal)


def _delimiter(text: str) -> str:
    """What separates the cells, as far as the first line tells."""
    first = next(line for line in text.splitlines() if line.strip())
    unquoted = re.sub(r'"[^"]*"', "", first)
    return next((mark for mark in DELIMITERS if mark in unquoted), ",")


def _decimal(path: Path, cells: pd.DataFrame, delimiter: str) -> str:
    """A comma where numbers have it and none has a point."""
    texts = [cell.strip() for cell in cells.to_numpy().ravel()] if delimiter != "," else []
    commas = [text for text in texts if "," in text and COMMA.fullmatch(text)]
    if not commas or any(map(POINT.fullmatch, texts)):
        return "."
    if all(map(THOUSANDS.fullmatch, commas)):
        raise ValueError(
            f"{path}: the comma in {commas[0]!r} may be before decimals or thousands; pass "
            "decimal=',' for decimals, else write the numbers without it."
        )
    return ","


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
