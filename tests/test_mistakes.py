"""Ordinary mistakes with densities, and the line that each is answered with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch

import pyroflow as pf
from tests.mistakes import Row, X, by_name, check, density, flow

FRAME = pd.DataFrame({"bmi": X[:, 0].exp().numpy(), "age": X[:, 1].numpy()})
NORMAL = dist.Normal(torch.zeros(2), 1.0).to_event(1)


def fitted(data: Any = X) -> pf.Flow:
    made = flow()
    density(data, made)
    return made


def energy_fit(of: pf.Flow, energy: Any) -> pf.Fit:
    return pf.fit_energy(of, energy, steps=2, seed=0, progress=False)


def with_age(values: Any) -> pd.DataFrame:
    return FRAME.assign(age=values)


def infinite() -> torch.Tensor:
    return torch.where(torch.arange(120).reshape(60, 2) == 3, torch.inf, X)


def saved(name: str = "flow.pt") -> str:
    pf.save(flow(), name)
    return name


DATA: dict[str, Row] = {
    "text": (lambda: density(with_age(["a"] * 60)), ValueError, r"'age' \(.*pandas.get_dummies"),
    "dates": (
        lambda: density(with_age(pd.date_range("2020-01-01", periods=60))),
        ValueError,
        "columns of numbers, got 'age' .datetime64",
    ),
    "categories": (
        lambda: density(with_age(pd.Categorical(["x", "y"] * 30))),
        ValueError,
        "columns of numbers, got 'age' .category",
    ),
    "missing": (
        lambda: density(with_age([np.nan, *np.linspace(0, 1, 59)])),
        ValueError,
        r"missing values in 'age' \(1, the first in row 0\).*data.dropna\(\)",
    ),
    "infinite": (lambda: density(infinite()), ValueError, "got inf in row 1, column 1"),
    "few values": (
        lambda: density(with_age([0, 1] * 30)),
        ValueError,
        r"few or often repeated values in column 'age' .*dequantize=\['age'\]",
    ),
    "constant": (lambda: density(with_age(3.0)), ValueError, "constant column.*'age'"),
    "one row": (lambda: density(X[:1]), ValueError, r"n >= 2, got shape \(1, 2\)"),
    "no rows": (lambda: density(X[:0]), ValueError, r"n >= 2, got shape \(0, 2\)"),
    "a vector": (lambda: density(X[:, 0]), ValueError, r"use data\[:, None\]"),
    "three columns": (lambda: density(torch.randn(9, 3)), ValueError, "or build the flow for 3"),
    "complex": (lambda: density(X.to(torch.complex64)), ValueError, "expects real numbers"),
    "ragged": (lambda: density([[1.0, 2.0], [3.0]]), ValueError, "rows of equal length"),
    "no file": (lambda: pf.datasets.read_table("no.csv"), FileNotFoundError, "no file no.csv"),
    "an unknown column of a support": (
        lambda: density(FRAME, flow(support={"BMI": "positive"})),
        ValueError,
        "support names the columns 'BMI', which are not among",
    ),
    "bounds turned round": (
        lambda: flow(support={"bmi": (1, 0)}),
        ValueError,
        r"low < high for column 'bmi', got \(1, 0\)",
    ),
    "a misspelt support": (lambda: flow(support={"bmi": "postive"}), ValueError, "got 'postive'"),
    "outside of a support": (
        lambda: density(FRAME, flow(support={"age": "positive"})),
        ValueError,
        "numbers inside the support, got .* column 'age'",
    ),
    "a column of another name": (
        lambda: fitted(FRAME).log_prob(FRAME.rename(columns={"bmi": "b"})),
        ValueError,
        "a frame without 'bmi' and with 'b'",
    ),
    "points of another width": (
        lambda: flow().log_prob(torch.randn(4, 3)),
        ValueError,
        r"expects shape \(n, 2\).* got shape \(4, 3\)",
    ),
    "points of another dtype": (
        lambda: flow().double()().log_prob(X),
        ValueError,
        r"got y in torch.float32: convert one of them, as in y.to\(torch.float64\)",
    ),
    "a negative number of draws": (lambda: flow().sample(-1), ValueError, "num must be .* got -1"),
}

FLOWS: dict[str, Row] = {
    "negative layers": (lambda: pf.planar_flow(2, -1), ValueError, "num_layers .* got -1"),
    "half a layer": (lambda: pf.planar_flow(2, 2.5), ValueError, "num_layers .* got 2.5"),
    "a word": (
        lambda: pf.planar_flow(2, "many"),
        ValueError,
        "or 'auto', got 'many'",
    ),
    "no dimensions": (lambda: pf.planar_flow(0), ValueError, "input_dim .* at least 1, got 0"),
    "data as size": (
        lambda: pf.planar_flow(X),
        ValueError,
        r"input_dim must be an integer of at least 1, got a Tensor of shape \(60, 2\)$",
    ),
    "too many units": (
        lambda: pf.sylvester_flow(2, num_units=3),
        ValueError,
        "num_units must be at most input_dim = 2",
    ),
    "no distribution": (lambda: pf.Flow("normal", []), TypeError, "base must be a distribution"),
    "a batch for a base": (
        lambda: pf.Flow(dist.Normal(torch.zeros(2), 1.0), []),
        ValueError,
        r"event shape \(D,\), got \(\): .* \.to_event\(1\)",
    ),
    "names of transforms": (
        lambda: pf.Flow(NORMAL, ["planar"]),
        TypeError,
        "transforms must hold transforms, got str",
    ),
    "a bare transform": (lambda: pf.Flow(NORMAL, pf.Planar(2)), TypeError, r"write \[t\]"),
    "an unknown direction": (
        lambda: pf.Flow(NORMAL, [pf.Planar(2)], direction="forwards"),
        ValueError,
        "direction must be one of .* got 'forwards'",
    ),
    "a forgotten context": (lambda: flow(context_dim=1)(), ValueError, r"flow\(context\)"),
    "a context too many": (lambda: flow()(X), ValueError, "call it without a context"),
    "a misspelt name": (lambda: pf.planer_flow(2), AttributeError, "pyroflow .* planer_flow"),
}

FITS: dict[str, Row] = {
    "data first": (
        lambda: pf.fit_density(X, flow()),
        TypeError,
        r"got Tensor: the flow comes first, fit_density\(flow, \.\.\.\)",
    ),
    "a guide as flow": (
        lambda: density(X, pf.AutoPlanarFlow(print)),
        TypeError,
        "got AutoPlanarFlow: a guide is fitted by fit_guide",
    ),
    "a class": (lambda: density(X, pf.Flow), TypeError, r"got Flow: make one, .*planar_flow\(D\)"),
    "a function": (lambda: density(X, pf.planar_flow), TypeError, "got planar_flow: make one"),
    "a layer": (lambda: density(X, pf.Planar(2)), TypeError, r"make one of it, Flow\("),
    "no steps": (lambda: density(X, steps=0), ValueError, "steps must be .* at least 1, got 0"),
    "steps as 1e3": (lambda: density(X, steps=1e3), ValueError, "steps .* got 1000.0"),
    "a negative rate": (lambda: density(X, lr=-0.1), ValueError, "lr must be .* got -0.1"),
    "an empty batch": (lambda: density(X, batch_size=0), ValueError, "batch_size .* got 0"),
    "a seed of letters": (lambda: density(X, seed="a"), ValueError, "seed must be .* got 'a'"),
    "a GPU's nickname": (lambda: density(X, device="gpu"), ValueError, "such as 'cpu', 'cuda'"),
    "epochs": (
        lambda: density(X, epochs=9),
        TypeError,
        r"did you mean steps\?",
    ),
    "learning_rate": (lambda: density(X, learning_rate=0.1), TypeError, r"did you mean lr\?"),
    "verbose": (lambda: density(X, verbose=True), TypeError, r"did you mean progress\?"),
    "validation rows": (lambda: density(X, validation=X), TypeError, r"did you mean holdout\?"),
    "a slip": (lambda: density(X, step=10), TypeError, r"did you mean steps\?"),
    "no context": (lambda: density(X, flow(context_dim=1)), ValueError, "context is needed"),
    "context for none": (lambda: density(X, context=X), ValueError, "context must be None"),
    "rows of a context": (
        lambda: density(X, flow(context_dim=1), context=X[:7, :1]),
        ValueError,
        "one row for each of the 60 rows of data, got 7",
    ),
    "a folder that is not there": (
        lambda: density(X, checkpoint="no/such.pt"),
        ValueError,
        "checkpoint must be a file in a folder that exists",
    ),
    "another file as checkpoint": (
        lambda: density(X, checkpoint=saved()),
        ValueError,
        "flow.pt is not a checkpoint of a fit",
    ),
    "a number as callback": (
        lambda: density(X, callbacks=3),
        TypeError,
        "callbacks must be",
    ),
    "no energy": (lambda: energy_fit(flow(), 3.0), TypeError, "energy must be a function U"),
    "an energy of each number": (
        lambda: energy_fit(flow(), lambda z: z),
        ValueError,
        r"energy must map \(N, D\) to \(N,\)",
    ),
    "an energy of other dimensions": (
        lambda: energy_fit(pf.planar_flow(3, 2), pf.targets.energy(1)),
        ValueError,
        r"last dimension 2, got shape",
    ),
    "an energy by name": (lambda: pf.targets.energy("U9"), ValueError, "from 1 to 4, got 'U9'"),
}

MISTAKES = by_name(data=DATA, flows=FLOWS, fits=FITS)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_a_line(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check(MISTAKES[mistake])


def test_a_device_that_is_not_there() -> None:
    missing = "cuda:99" if torch.cuda.is_available() else "cuda"
    with pytest.raises(RuntimeError, match=f"device '{missing}' is not there"):
        density(X, device=missing)
