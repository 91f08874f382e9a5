"""How often a model runs: what it costs where one run takes seconds."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import pytest

import pyroflow as pf
from pyroflow.targets import eight_schools_centered, eight_schools_noncentered

MODELS = [eight_schools_noncentered, eight_schools_centered]


class Counted:
    """A model, and how often it ran; a run of many draws side by side counts once."""

    def __init__(self, model: Callable) -> None:
        self.model, self.runs = model, 0
        functools.update_wrapper(self, model)

    def __call__(self) -> None:
        self.runs += 1
        self.model()


@pytest.fixture(params=MODELS, ids=["noncentered", "centered"])
def model(request: pytest.FixtureRequest) -> Counted:
    return Counted(request.param)


class FirstStepError(Exception):
    """Raised in place of the first step of a fit."""


def first_step(*args: object) -> None:
    raise FirstStepError


def test_fit_guide_before_its_first_step(model: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.optim.Adam.step", first_step)
    with pytest.raises(FirstStepError):
        pf.fit_guide(model, pf.AutoPlanarFlow(model), seed=0, progress=False)
    assert model.runs <= 6


def test_to_arviz(model: Counted) -> None:
    guide = pf.AutoPlanarFlow(model).setup()
    model.runs = 0
    pf.to_arviz(model, guide, num_samples=50)
    assert model.runs <= 8


def test_diagnose(model: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    # A guide that is good needs no advice, which takes one run more.
    module = importlib.import_module("pyroflow.diagnostics.diagnose")
    monkeypatch.setattr(module, "find_funnels", lambda *given: {})
    guide = pf.AutoPlanarFlow(model).setup()
    model.runs = 0
    pf.diagnose(model, guide, num_samples=500, max_sets=1)
    assert model.runs <= 5
