"""Flows of tables: columns by name, in fits, densities, draws and files; refusals by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import pyroflow as pf
from pyroflow.frames import column_names, frame_columns

SHORT = {"steps": 3, "polish": 0, "seed": 0, "progress": False}


def table(rows: int = 40) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "bmi": generator.normal(25, 3, rows),
            "age": pd.array(generator.permutation(rows) + 20, dtype="Int64"),
            "dose": generator.exponential(size=rows).astype(np.float32),
        }
    )


def fitted(frame: Any, **options: Any) -> pf.Flow:
    flow = pf.planar_flow(len(frame.columns), 2)
    pf.fit_density(flow, frame, **SHORT, **options)
    return flow


class PolarsType:
    """As polars has it: no ``kind``, and a name as text."""

    def __init__(self, name: str) -> None:
        self.name = name

    def is_numeric(self) -> bool:
        return self.name in ("Int64", "Float64")

    def __str__(self) -> str:
        return self.name


class PolarsSeries:
    """The methods of a polars Series that are used."""

    def __init__(self, name: str, dtype: str, values: list) -> None:
        self.name, self.dtype, self.values = name, PolarsType(dtype), values

    def __len__(self) -> int:
        return len(self.values)

    def is_null(self) -> list[bool]:
        return [value is None for value in self.values]

    def to_frame(self) -> PolarsFrame:
        return PolarsFrame([self])

    def to_numpy(self) -> np.ndarray:
        if self.dtype.is_numeric():  # as polars does, integers with nulls become floats
            return np.array([np.nan if value is None else value for value in self.values])
        return np.array(self.values)


class PolarsFrame:
    """Likewise of a DataFrame."""

    def __init__(self, series: list[PolarsSeries]) -> None:
        self.series = {each.name: each for each in series}

    @property
    def columns(self) -> list[str]:
        return list(self.series)

    def __len__(self) -> int:
        return len(next(iter(self.series.values())))

    def __getitem__(self, name: str) -> PolarsSeries:
        return self.series[name]

    def to_numpy(self) -> np.ndarray:
        raise AssertionError("columns are read one by one")


def polars_stand_in(frame: pd.DataFrame) -> PolarsFrame:
    kinds = {"i": "Int64", "f": "Float64", "b": "Boolean"}
    series = [PolarsSeries(c, kinds[frame[c].dtype.kind], frame[c].to_list()) for c in frame]
    return PolarsFrame(series)


def real_polars(frame: pd.DataFrame) -> Any:
    polars = pytest.importorskip("polars")
    return polars.DataFrame({c: frame[c].to_list() for c in frame})


FRAMES = {"pandas": lambda frame: frame, "stand-in": polars_stand_in, "polars": real_polars}


@pytest.mark.parametrize("kind", FRAMES)
def test_a_frame_is_fitted_as_its_numbers_are(kind: str) -> None:
    frame = FRAMES[kind](table())
    numbers = torch.tensor(table().to_numpy(float))
    flow, plain = fitted(frame), pf.planar_flow(3, 2)
    pf.fit_density(plain, numbers, **SHORT)
    assert flow.columns == ("bmi", "age", "dose")
    assert plain.columns is None
    assert torch.equal(flow.log_prob(frame), plain.log_prob(numbers))
    assert torch.equal(flow.log_prob(numbers), flow().log_prob(numbers).detach())
    with pytest.raises(ValueError, match="got a frame without 'age', 'dose'"):
        flow.log_prob(frame["bmi"])


def test_columns_are_matched_by_name() -> None:
    frame = table()
    flow, turned = fitted(frame), frame[["dose", "bmi", "age"]]
    assert torch.equal(flow.log_prob(turned), flow.log_prob(frame))
    first, second = (copy.deepcopy(flow) for _ in range(2))
    pf.fit_density(first, frame, **SHORT)
    pf.fit_density(second, turned, **SHORT)
    assert torch.equal(first.log_prob(frame), second.log_prob(frame))
    message = "'bmi', 'age', 'dose', got a frame without 'age' and with 'Age' beside them"
    for call in (flow.log_prob, lambda wrong: pf.fit_density(flow, wrong, **SHORT)):
        with pytest.raises(ValueError, match=message):
            call(frame.rename(columns={"age": "Age"}))
        with pytest.raises(ValueError, match=r"with 'more' beside them; select .* data\[\['bmi'"):
            call(frame.assign(more=1.0))


def test_draws_are_a_frame_where_the_data_were_one() -> None:
    flow = fitted(table())
    draws = flow.sample(5, seed=1)
    assert list(draws.columns) == ["bmi", "age", "dose"]
    assert draws.equals(flow.sample(5, seed=1))
    assert not draws.equals(flow.sample(5, seed=2))
    flow.columns = None
    before = torch.get_rng_state()
    tensor = flow.sample(5, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(tensor.numpy(), draws.to_numpy())
    assert not tensor.requires_grad
    assert flow.sample(0).shape == (0, 3)
    with pytest.raises(ValueError, match="num must be an integer"):
        flow.sample(1.5)


def test_contexts_are_frames_too() -> None:
    frame = table()
    contexts = frame[["age", "bmi"]].assign(treated=frame["dose"] > 1)
    flow = pf.planar_flow(1, 2, context_dim=3, hidden_dims=(4,))
    pf.fit_density(flow, frame["dose"], context=contexts, **SHORT)
    assert (flow.columns, flow.context_columns) == (("dose",), ("age", "bmi", "treated"))
    numbers = torch.tensor(contexts.to_numpy(float))
    y = torch.tensor(frame[["dose"]].to_numpy(float))
    found = flow.log_prob(frame["dose"], context=contexts[["treated", "age", "bmi"]])
    assert torch.equal(found, flow(numbers).log_prob(y).detach())
    draws = flow.sample(2, seed=0, context=contexts[:7])
    flow.columns = None
    tensor = flow.sample(2, seed=0, context=numbers[:7])
    assert tensor.shape == (2, 7, 1)
    assert np.array_equal(draws["dose"], tensor.flatten().numpy())
    with pytest.raises(ValueError, match="context expects the columns.* without 'treated'"):
        flow.log_prob(y, context=frame[["age", "bmi"]])
    with pytest.raises(ValueError, match="needed|conditional"):
        flow.log_prob(y)


def test_names_travel_in_files_copies_and_states(tmp_path: Path) -> None:
    frame = table()
    flow = fitted(frame)
    pf.save(flow, tmp_path / "flow.pt")
    state = pf.planar_flow(3, 2)
    state.load_state_dict(flow.state_dict())
    for other in (pf.load(tmp_path / "flow.pt"), copy.deepcopy(flow), state):
        assert other.columns == flow.columns
        assert torch.equal(other.log_prob(frame), flow.log_prob(frame))
    wrong = flow.state_dict()
    wrong["_extra_state"]["columns"] = ["a"]
    with pytest.raises(ValueError, match="has the columns 'a', but the flow has 3 dimensions"):
        pf.planar_flow(3, 2).load_state_dict(wrong)


def test_log_prob_takes_points_of_any_batch_shape() -> None:
    flow = pf.planar_flow(2, 2)
    x = torch.randn(4, 3, 2)
    assert torch.equal(flow.log_prob(x), flow().log_prob(x).detach())
    assert flow.log_prob(x[0, 0]).shape == ()
    assert torch.equal(flow.log_prob(x[0].float().tolist()), flow.log_prob(x[0].float()))
    with pytest.raises(ValueError, match=r"x expects shape \(n, 2\)"):
        flow.log_prob(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="x expects finite numbers, got nan in row 1, column 0"):
        flow.log_prob([[0.0, 0.0], [np.nan, 0.0]])


TWICE = pd.concat([table(), table()[["bmi"]]], axis=1)
TEXT = table().assign(city="Bonn", born=pd.Timestamp("2000-01-01"), kind=pd.Categorical(["a"] * 40))
HOLES = table().assign(age=pd.array([20, None, *range(38)], dtype="Int64"))
HOLES.loc[[1, 7, 9], "bmi"] = np.nan
BAD = {
    "names twice": (TWICE, "got 'bmi' more than once"),
    "no numbers": (TEXT, r"got 'city' \(\w+\), 'born' \(datetime64\[\w+\]\), 'kind' \(category\)"),
    "missing": (HOLES, r"in 'bmi' \(3, .* row 1\), 'age' \(1, .* row 1\), .*; 3 of 40.*dropna"),
    "inf": (table().assign(dose=np.inf), "got inf in row 0, column 'dose'"),
    "constant": (table().assign(dose=1.0), r"constant column\(s\) \['dose'\]"),
    "too large": (
        table().assign(dose=lambda t: 2**60 + t.index),
        "different ones of column 'dose'",
    ),
    "objects": (table().astype({"dose": object}), r"got 'dose' \(object\)"),
    "width": (table()[["bmi", "age"]], r"expects shape \(n, 3\).* got shape \(40, 2\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_frames_are_refused_by_name(case: str) -> None:
    frame, message = BAD[case]
    flow = pf.planar_flow(3, 2)
    with pytest.raises(ValueError, match=message):
        pf.fit_density(flow, frame, **SHORT)
    assert flow.columns is None


def test_numbers_of_all_kinds_of_columns() -> None:
    frame = pd.DataFrame(
        {
            "whole": pd.array([1, 2], dtype="Int16"),
            "real": pd.array([0.5, 1.5], dtype="Float64"),
            "flag": pd.array([True, False], dtype="boolean"),
            "bare": [False, True],
            3: np.array([1, 2], dtype=np.uint8),
        }
    )
    found = {name: values.tolist() for name, values in frame_columns(frame, "data").items()}
    expected = {"whole": [1, 2], "real": [0.5, 1.5], "flag": [1, 0], "bare": [0, 1], "3": [1, 2]}
    assert found == expected
    assert column_names(frame) == tuple(expected)
    assert column_names(frame["real"].rename(None)) == ("0",)
    assert (
        column_names(np.zeros((2, 2))) is column_names(torch.zeros(2)) is column_names([]) is None
    )
