"""Known values of the sine data, and what each reader and check refuses."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pyroflow.data_checks import check_data
from pyroflow.datasets import SINE_ENTROPY, read_table, sine, sine_log_prob


def varied(rows: int = 5, columns: int = 3) -> Tensor:
    return torch.arange(rows * columns, dtype=torch.float64).reshape(rows, columns).sin()


def test_sine_entropy_value() -> None:
    # ln 6 = 1.791759, and half the log of 2 pi e / 100 is -0.883646.
    assert pytest.approx(0.908113, abs=1e-6) == SINE_ENTROPY


def test_sine_shape_and_moments() -> None:
    y = sine(200_000, seed=3)
    assert y.shape == (200_000, 2)
    assert y.dtype == torch.float32
    assert y[:, 1].abs().max() <= 3
    # 5 standard errors: U(-3, 3) has variance 3, the noise 0.01.
    assert y[:, 1].mean().item() == pytest.approx(0.0, abs=5 * math.sqrt(3 / 200_000))
    assert y[:, 1].var().item() == pytest.approx(3.0, abs=5 * 3 * math.sqrt(0.8 / 200_000))
    noise = y[:, 0] - y[:, 1].sin()
    assert noise.std().item() == pytest.approx(0.1, abs=5 * 0.1 / math.sqrt(400_000))
    assert noise.mean().item() == pytest.approx(0.0, abs=5 * 0.1 / math.sqrt(200_000))


def test_sine_arguments() -> None:
    assert torch.equal(sine(50), sine(50, seed=0))
    assert not torch.equal(sine(50), sine(50, seed=1))
    with pytest.raises(ValueError, match="n expects a positive number of points, got 0"):
        sine(0)


def test_sine_leaves_the_global_state() -> None:
    before = torch.get_rng_state()
    sine(100)
    assert torch.equal(torch.get_rng_state(), before)


def test_sine_entropy_by_monte_carlo() -> None:
    losses = -sine_log_prob(sine(400_000, seed=1).double())
    # Deviation of a point sqrt(1/2): standard error 0.0011, tolerance four of them.
    assert losses.mean().item() == pytest.approx(SINE_ENTROPY, abs=0.0045)


def test_sine_log_prob_known_values() -> None:
    y = torch.tensor([[0.0, 0.0], [1.2, math.pi / 2], [0.0, 3.01]], dtype=torch.float64)
    # On the curve -ln 6 - ln(0.1 sqrt(2 pi)) = -0.408113; two deviations away 2 less.
    expected = torch.tensor([-0.408113, -2.408113, -math.inf], dtype=torch.float64)
    assert torch.allclose(sine_log_prob(y), expected, atol=1e-6)


def test_sine_density_integrates_to_one() -> None:
    y1 = torch.linspace(-2, 2, 1001, dtype=torch.float64)
    y2 = (torch.arange(600, dtype=torch.float64) + 0.5) / 100 - 3
    density = sine_log_prob(torch.cartesian_prod(y1, y2)).exp()
    assert (density.sum() * 0.004 * 0.01).item() == pytest.approx(1.0, abs=1e-9)


def test_sine_log_prob_shapes() -> None:
    assert sine_log_prob(torch.zeros(2)).shape == ()
    assert sine_log_prob(torch.zeros(6, 5, 2)).shape == (6, 5)
    with pytest.raises(ValueError, match=r"last dimension 2, got shape \(5, 3\)"):
        sine_log_prob(torch.zeros(5, 3))


def test_sine_log_prob_keeps_nan() -> None:
    assert sine_log_prob(torch.tensor([[0.0, math.nan]])).isnan().all()


# Reading tables.


def write(folder: Path, text: str, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
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
        ("1;2\n3;4\n", "got '3;4'. Numbers use a decimal point, cells are separated by commas"),
        (",a\n0,1\n1,2\n", r"column 0 has no name.*columns=\[\.\.\.\] out of \['', 'a'\]"),
    ],
)
def test_csv_refuses(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_table(write(tmp_path, text))


def test_csv_refuses_other_text(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("größe\n1\n2\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.csv is not comma-separated text in UTF-8"):
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
    with pytest.raises(ValueError, match=r"table\.xlsx is none of \.csv, \.npy, \.npz"):
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


# Checking data.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_check_keeps_floats(dtype: torch.dtype) -> None:
    data = varied().to(dtype)
    assert check_data(data, width=3) is data
    array = check_data(data.numpy())
    assert array.dtype == dtype
    assert torch.equal(array, data)


@pytest.mark.parametrize(
    "data",
    [
        [[0, 1], [1, 3]],
        [[0.0, 1.0], [1.0, 3.0]],
        np.array([[0, 1], [1, 3]], dtype=np.uint16),
        np.array([[0, 1], [1, 3]], dtype=np.float16),
        torch.tensor([[0, 1], [1, 3]]),
        torch.tensor([[0, 1], [1, 3]], dtype=torch.bfloat16),
    ],
    ids=["ints", "floats", "uint16", "float16", "long", "bfloat16"],
)
def test_check_converts(data: object) -> None:
    tensor = check_data(data)
    assert tensor.dtype == torch.get_default_dtype()
    assert tensor.tolist() == [[0.0, 1.0], [1.0, 3.0]]


def test_check_takes_awkward_memory() -> None:
    array = varied().numpy()
    array.setflags(write=False)
    for awkward in (array, array[::-1], array.astype(">f8")):
        tensor = check_data(awkward)
        assert tensor.dtype == torch.float64
        assert np.array_equal(tensor.numpy(), awkward)


def test_check_copies_arrays() -> None:
    array = varied().numpy()
    tensor = check_data(array)
    array[:] = 0
    assert torch.equal(tensor, varied())


def spoiled(*places: tuple[int, int], value: float = math.nan) -> Tensor:
    data = varied()
    for place in places:
        data[place] = value
    return data


BAD = {
    "nan": (spoiled((1, 2), (3, 0)), r"y expects finite.* nan in row 1, column 2 .*2 of 5 rows"),
    "inf": (spoiled((4, 0), value=-math.inf), "got -inf in row 4, column 0 .*1 of 5 rows.*Drop"),
    "one dimension": (torch.arange(4.0), r"y expects shape \(n, 3\).*\(4,\); use data\[:, None\]"),
    "scalar": (torch.tensor(1.0), r"got shape \(\); reshape"),
    "three dimensions": (torch.zeros(4, 2, 3), r"got shape \(4, 2, 3\); reshape"),
    "width": (varied(5, 2), r"expects shape \(n, 3\).*got shape \(5, 2\); select 3 columns"),
    "no rows": (torch.zeros(0, 3), r"n >= 2, got shape \(0, 3\); pass at least 2"),
    "one row": (varied(1), r"n >= 2, got shape \(1, 3\); pass at least 2"),
    "no columns": (torch.zeros(3, 0), r"got shape \(3, 0\)"),
    "empty list": ([], r"got shape \(0,\); pass at least 2"),
    "object": (np.array([[None, 1.0]]), "expects real numbers, got dtype object; encode"),
    "text": ([["a", "b"]], "expects real numbers, got dtype <U1"),
    "complex": (torch.zeros(3, 3, dtype=torch.complex64), "got dtype torch.complex64"),
    "bool": (torch.eye(3, dtype=torch.bool), "got dtype torch.bool"),
    "bool array": (np.eye(3, dtype=bool), "got dtype bool"),
    "ragged": ([[1.0, 2.0], [3.0]], "expects rows of equal length.*ragged list"),
    "constant": (varied().index_fill(1, torch.tensor(1), 3.0), r"column\(s\) \[1\] .*value 3\)"),
    "constant zero": (varied().index_fill(1, torch.tensor([0, 2]), 0.0), r"\[0, 2\].*Drop"),
    "rounding": (1e9 + 1e-7 * varied(), r"constant column\(s\) \[0, 1, 2\].*subtract it"),
}


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
def test_check_refuses(case: str) -> None:
    data, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        check_data(data, width=3, name="y")


def test_check_refuses_masked_entries() -> None:
    masked = np.ma.masked_invalid(spoiled((2, 1)).numpy())
    with pytest.raises(ValueError, match="nan in row 2, column 1"):
        check_data(masked)


def test_check_allows_small_but_real_changes() -> None:
    data = 1000 + 1e-9 * varied()
    assert check_data(data) is data
