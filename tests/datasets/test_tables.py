"""Tables from files: what is read, and what is refused rather than changed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pyroflow.datasets import read_table


def write(folder: Path, text: str, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    ["a,b\n1,2\n3,4.5\n", "1,2\n3,4.5\n", "\ufeffa, b\n1, 2\n\n3, 4.5\n", "# a,b\n1,2\n3,4.5"],
    ids=["header", "bare", "bom, blanks", "numpy header"],
)
def test_csv(tmp_path: Path, text: str) -> None:
    table = read_table(write(tmp_path, text))
    assert table.dtype == torch.get_default_dtype()
    assert table.tolist() == [[1.0, 2.0], [3.0, 4.5]]


@pytest.mark.parametrize("columns", [["c", "a"], [2, 0], ["c", 0]], ids=str)
def test_csv_columns(tmp_path: Path, columns: list[int | str]) -> None:
    path = write(tmp_path, "a,b,c\n1,2,3\n4,5,6\n")
    assert read_table(path, columns=columns).tolist() == [[3.0, 1.0], [6.0, 4.0]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a;b\n1,5;-2\n,5;3e2\n", [[1.5, -2.0], [0.5, 300.0]]),
        ("1,5;1,234\n2;3\n", [[1.5, 1.234], [2.0, 3.0]]),
        ("a\tb\n1.5\t2\n3\t4\n", [[1.5, 2.0], [3.0, 4.0]]),
        ('"x;y",z\n1,2\n3,4\n', [[1.0, 2.0], [3.0, 4.0]]),
        ("a;b\r\n1;2\r\n\r\n3;4\r\n", [[1.0, 2.0], [3.0, 4.0]]),
        ("a;b\n16777216,0;0,0\n1;2\n", [[16777216.0, 0.0], [1.0, 2.0]]),
    ],
    ids=["decimal comma", "not thousands", "tab", "quoted", "other ends", "exact"],
)
@pytest.mark.usefixtures("float32")
def test_marks_are_found(tmp_path: Path, text: str, expected: list) -> None:
    found = read_table(write(tmp_path, text))
    assert torch.equal(found, torch.tensor(expected))


def test_marks_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, "a;b\n1;2,000\n3;4,000\n")
    assert read_table(path, decimal=",").tolist() == [[1.0, 2.0], [3.0, 4.0]]
    path = write(tmp_path, "1 2\n3  4\n", "table.txt")
    assert read_table(path, delimiter=" ").tolist() == [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(ValueError, match="decimal must be one of None, '.', ','; got ';'"):
        read_table(path, decimal=";")
    with pytest.raises(ValueError, match="expected a number, got '1.234'"):
        read_table(write(tmp_path, "a;b\n1.234;2\n"), decimal=",")


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pd.DataFrame({"id": [7, 8], "x": [1.5, 2.5], "s": ["u", "v"]}).set_index("id")
    monkeypatch.setattr(pd, "read_parquet", lambda path: frame)
    path = write(tmp_path, "", "t.parquet")
    assert read_table(path, columns=["x", "id"]).tolist() == [[1.5, 7.0], [2.5, 8.0]]
    with pytest.raises(ValueError, match=r"t\.parquet expects columns of numbers, got 's'"):
        read_table(path)


def test_csv_one_column(tmp_path: Path) -> None:
    path = write(tmp_path, "age,height\n1,2\n3,4\n")
    assert read_table(path, columns="height").tolist() == [[2.0], [4.0]]
    assert read_table(path, columns=1).tolist() == [[2.0], [4.0]]


def test_csv_keeps_one_row_and_nan(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "nan,1\n"))
    assert table.shape == (1, 2)
    assert table[0, 0].isnan()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"table\.csv is empty"),
        ("\n \n", r"table\.csv is empty"),
        ("a,b\n", r"no rows below its header \['a', 'b'\]"),
        ("a,b\n1,2\n3\n", "line 3: expected 2 cells as in the first line, got 1"),
        ("a,b\n1,2\n3,x\n", r"line 3, column 1 \('b'\): expected a number, got 'x'"),
        ("1,2\n3,\n", "line 2, column 1: expected a number, got ''"),
        ("1,oops\n3,4\n", "line 1, column 1: expected a number, got 'oops'"),
        ("1:2\n3:4\n", "got '3:4'. Cells are separated by ',' here and decimals by '.'"),
        ("a;b\n1;2,000\n3;4,000\n", "the comma in '2,000' may be before decimals or thousands"),
        ("a;b\n1.5;2,5\n", r"line 2, column 1 \('b'\): expected a number, got '2,5'"),
        ("a;b\n1.234,5;2,5\n", "line 2, column 0 .*got '1.234,5'. .*decimals by ','"),
        ("n,a,m\nx,1,y\n", r"got 'x', and likewise in columns \['m'\]"),
        (",a\n0,1\n1,2\n", r"column 0 has no name.*columns=\[\.\.\.\] out of \['', 'a'\]"),
    ],
)
def test_csv_refuses(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_table(write(tmp_path, text))


def test_csv_refuses_other_text(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("größe\n1\n2\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"latin\.csv is not text in UTF-8 with cells separated by ','"
    ):
        read_table(tmp_path / "latin.csv")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["z"], r"column 'z' does not exist; there are \[0, 1, 'a', 'a'\]"),
        ([2], "column 2 does not exist"),
        ([-1], "column -1 does not exist"),
        (["a"], "column 'a' is there more than once"),
    ],
)
def test_columns_refused(tmp_path: Path, columns: list[int | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_table(write(tmp_path, "a,a\n1,2\n3,4\n"), columns=columns)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.csv"):
        read_table(tmp_path / "nowhere.csv")


def test_other_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"table\.xlsx is none of \.csv, .*\.npy, \.npz"):
        read_table(write(tmp_path, "1,2", "table.xlsx"))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int32, ">f8"])
def test_npy(tmp_path: Path, dtype: str | type) -> None:
    np.save(tmp_path / "a.npy", np.array([[1, 2, 3], [4, 5, 6]], dtype=dtype))
    table = read_table(tmp_path / "a.npy", columns=[1])
    assert table.dtype == torch.get_default_dtype()
    assert table.tolist() == [[2.0], [5.0]]


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", y=np.eye(2))
    np.savez(tmp_path / "two.npz", y=np.eye(2), z=np.eye(3))
    assert read_table(tmp_path / "one.npz").tolist() == [[1.0, 0.0], [0.0, 1.0]]
    with pytest.raises(ValueError, match=r"expects a single array, got \['y', 'z'\]"):
        read_table(tmp_path / "two.npz")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1, "a"]], dtype=object), "does not hold a plain array of numbers"),
        (np.array([["a", "b"]]), "expects real numbers, got dtype <U1"),
        (np.zeros(4), r"got shape \(4,\); use data\[:, None\]"),
        (np.zeros((0, 2)), r"got shape \(0, 2\); pass at least 1 row"),
    ],
    ids=["object", "text", "flat", "empty"],
)
def test_npy_refuses(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "a.npy")


def test_npy_refuses_garbage(tmp_path: Path) -> None:
    for name in ("a.npy", "a.npz"):
        with pytest.raises(ValueError, match="does not hold a plain array of numbers"):
            read_table(write(tmp_path, "not an array", name))


# Nothing is dropped or changed without a word.


def test_a_row_of_missing_values_is_a_row(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a,b\n1,2\nNA,nan\n null ,N/A\n3,4\n"))
    assert table.shape == (4, 2)
    assert table[1:3].isnan().all()
    assert table[[0, 3]].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert read_table(write(tmp_path, "NA,NaN\n1,2\n")).shape == (2, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n,\n3,4\n", r"line 3, column 0 \('a'\): expected a number, got ''"),
        ("1\n\n3\n", "line 2: expected 1 cells as in the first line, got 0"),
        ("a,b\n1,2\n3,4,5\n", "Expected 2 fields in line 3, saw 3"),
        ('a,b\n"1,5",2\n', r"line 2, column 0 \('a'\): expected a number, got '1,5'"),
        ('a,b\n1,"1,234"\n', r"column 1 \('b'\): expected a number, got '1,234'"),
        ("a,b\n1,true\n", "expected a number, got 'true'"),
        ("a,b\n1,2026-11-26\n", "expected a number, got '2026-11-26'"),
        ("id,2019\n1,2\n", "column 0: expected a number, got 'id'.*header=True"),
        ("2019,2020,2021\n1,2,3\n", r"\['2019', '2020', '2021'\], may hold names or numbers"),
        ("2019\n7\n", "pass header=True or header=False"),
        ("0,1,2\n.5,.6,.7\n", "pass header=True or header=False"),
        ("a\n1e39\n", r"torch.float32 can hold, got 1e\+39 in row 0, column 0"),
        ("a\n1e-60\n", "can hold, got 1e-60 in row 0, column 0"),
        ("a\n1e400\n", r"line 2, column 0 \('a'\): 1e400 would become inf"),
        ("a\n1e-400\n", "1e-400 would become 0"),
        ("a\n1\n9007199254740993\n", r"line 3, .*9007199254740993 would become 9007199254740992"),
        ("a\n1\n9007199254740993.5\n1\n-16777217\n", "-16777217 would become -16777216"),
        (
            "t\n1700000000\n1700000001\n1731536000\n",
            "line 3, .*: 1700000001 would become 1700000000 in torch.float32",
        ),
        ("t\n1700000000.25\n1700000001.5\n", "different ones of column 0 .*become equal"),
    ],
)
@pytest.mark.usefixtures("float32")
def test_csv_refuses_what_it_would_change(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_table(write(tmp_path, text))


@pytest.mark.usefixtures("float32")
def test_the_ways_out(tmp_path: Path) -> None:
    path = write(tmp_path, "2019,2020\n1,2\n3,4\n")
    assert read_table(path, header=True, columns="2020").tolist() == [[2.0], [4.0]]
    assert read_table(path, header=False).shape == (3, 2)
    path = write(tmp_path, "t,v\n1700000000,1e39\n1700000001.5,1e-60\n9007199254740992,-0\n")
    found = read_table(path, dtype=torch.float64)
    assert found.tolist() == [[1.7e9, 1e39], [1700000001.5, 1e-60], [2.0**53, 0.0]]
    path = write(tmp_path, 'name,"a, b"\nx,"1"\ny, 2 \n')
    assert read_table(path, columns=["a, b"]).tolist() == [[1.0], [2.0]]
    assert read_table(write(tmp_path, "x\ninf\n-inf\n")).tolist() == [[math.inf], [-math.inf]]
    years = read_table(write(tmp_path, "1990,2003\n1985,2010\n"))
    assert years.tolist() == [[1990.0, 2003.0], [1985.0, 2010.0]]
    with pytest.raises(ValueError, match="dtype must be one of torch.float32, torch.float64"):
        read_table(path, dtype=torch.float16)


@pytest.mark.parametrize("seed", range(3))
def test_every_digit_is_kept_in_float64(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(50, 3)) * 10.0 ** rng.integers(-200, 200, size=(50, 3))
    text = "\n".join(",".join(repr(float(v)) for v in row) for row in values)
    assert np.array_equal(read_table(write(tmp_path, text)).numpy(), values)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1.0, 1e39]]), r"got 1e\+39 in row 0, column 1"),
        (np.array([[1e-60, 1.0]]), "got 1e-60 in row 0, column 0"),
        (np.array([[1_700_000_000], [1_700_000_001]]), "different ones of column 0"),
    ],
    ids=["large", "small", "stamps"],
)
@pytest.mark.usefixtures("float32")
def test_npy_refuses_what_it_would_change(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "a.npy")
    assert np.array_equal(read_table(tmp_path / "a.npy", dtype=torch.float64).numpy(), array)
