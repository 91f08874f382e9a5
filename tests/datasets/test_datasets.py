"""Known values of the sine data, and what the check of data refuses."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pyroflow import fit_density, planar_flow
from pyroflow.checks import check_data
from pyroflow.datasets import SINE_ENTROPY, sine, sine_log_prob


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
