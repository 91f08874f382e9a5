"""Checks of arguments and of data, and seeds that leave the global generator alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pyroflow import fit_density, planar_flow
from pyroflow.checks import check_choice, check_count, check_data, check_fraction, check_positive
from pyroflow.seeds import seeded


def test_good_values_are_returned() -> None:
    assert check_count("n", 3, 3) == 3
    assert check_positive("rate", 2) == 2
    assert check_positive("rate", 1e-30) == 1e-30
    assert check_fraction("share", 0.5) == 0.5
    assert check_choice("kind", None, ("full", None)) is None


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (lambda v: check_count("n", v, 1), 0, "n must be an integer of at least 1, got 0"),
        (lambda v: check_count("n", v, 1), 2.0, "n must be an integer of at least 1, got 2.0"),
        (lambda v: check_count("n", v, 0), True, "n must be an integer of at least 0, got True"),
        (lambda v: check_count("n", v, 0), "3", "n must be an integer of at least 0, got '3'"),
        (lambda v: check_positive("rate", v), 0, "rate must be a finite number above 0, got 0"),
        (lambda v: check_positive("rate", v), float("inf"), "above 0, got inf"),
        (lambda v: check_positive("rate", v), float("nan"), "above 0, got nan"),
        (lambda v: check_positive("rate", v), None, "above 0, got None"),
        (lambda v: check_positive("rate", v), True, "above 0, got True"),
        (
            lambda v: check_choice("kind", v, ("a", None)),
            "b",
            "kind must be one of 'a', None; got 'b'",
        ),
        (
            lambda v: check_fraction("share", v),
            1.0,
            "share must be a fraction between 0 and 1, got 1.0",
        ),
        (
            lambda v: check_fraction("share", v),
            0,
            "share must be a fraction between 0 and 1, got 0",
        ),
        (lambda v: check_fraction("share", v), float("nan"), "between 0 and 1, got nan"),
    ],
)
def test_messages(check: Callable, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check(value)


def varied(rows: int = 5, columns: int = 3) -> Tensor:
    return torch.arange(rows * columns, dtype=torch.float64).reshape(rows, columns).sin()


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


NARROWED = {
    "too large": ([[1.0, 2.0], [3.0, -1e39]], r"got -1e\+39 in row 1, column 1 .*flow.double\(\)"),
    "too small": ([[1.0, 2.0], [1e-60, 3.0]], "got 1e-60 in row 1, column 0"),
    "offset": ([[1.7e9 + 0.25, 2.0], [1.7e9 + 1.5, 3.0]], "different ones of column 0 .*equal"),
    "time stamps over a year": (
        np.array([[1_700_000_000, 0], [1_700_000_001, 1], [1_731_536_000, 2]]),
        "different ones of column 0 .*subtract an offset",
    ),
}


@pytest.mark.parametrize("case", NARROWED)
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor], ids=["array", "tensor"])
def test_check_refuses_what_the_dtype_cannot_hold(case: str, kind: Callable) -> None:
    data, message = NARROWED[case]
    wide = check_data(kind(data), dtype=torch.float64)
    assert wide.tolist() == np.asarray(data, dtype=float).tolist()
    with pytest.raises(ValueError, match=message):
        check_data(kind(data), dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        fit_density(planar_flow(2, 2).float(), kind(data), seed=0, progress=False)
    conditional = planar_flow(2, 2, 2).float()
    with pytest.raises(ValueError, match="context expects"):
        fit_density(conditional, np.eye(3)[:, :2][: len(data)], context=data, progress=False)


@pytest.mark.parametrize("loc", [0.0, 5.0, -40.0])
def test_check_rounds_ordinary_data(loc: float) -> None:
    """Some of 20,000 normal draws meet in float32, at 1e-7 of their spread."""
    data = loc + torch.randn(20_000, 2)
    found = check_data(data, dtype=torch.float32)
    assert torch.equal(found, data.float())
    assert len(found[:, 0].unique()) < len(data)


def test_seeded_draws_are_reproducible_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.randn(4)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(3):
        assert torch.equal(torch.randn(4), first)
    with seeded(4):
        assert not torch.equal(torch.randn(4), first)


def test_without_a_seed_the_global_generator_is_used() -> None:
    torch.manual_seed(5)
    expected = torch.randn(4)
    torch.manual_seed(5)
    with seeded(None):
        assert torch.equal(torch.randn(4), expected)
    assert not torch.equal(torch.randn(4), expected)


def test_the_generator_is_restored_after_an_error() -> None:
    before = torch.get_rng_state()

    def fail() -> None:
        with seeded(1):
            torch.randn(3)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(torch.get_rng_state(), before)
