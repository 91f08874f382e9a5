"""The way of a score through the package: few files, and each parameter read once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
from cases import D, wild

import pyroflow
from pyroflow import planar_flow, radial_flow
from pyroflow.transforms import Bijection

DIRECTIONS = pytest.mark.parametrize("direction", ["base_to_data", "data_to_base"])
MAKERS = pytest.mark.parametrize("make", [planar_flow, radial_flow])


@DIRECTIONS
@MAKERS
def test_a_score_reads_the_parameters_once(
    make: Callable, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, reads = wild(make(D, 3, direction=direction), 0.5), []
    read = Bijection._map_parameters

    def counted(self: Bijection) -> tuple:
        reads.append(type(self).__name__)
        return read(self)

    monkeypatch.setattr(Bijection, "_map_parameters", counted)
    flow().log_prob(torch.randn(5, D))
    assert sorted(reads) == ["Affine", make.__name__.split("_")[0].title()]


def files_called(call: Callable[[], object]) -> set[str]:
    """The package's files whose functions run in a call."""
    package, found = Path(pyroflow.__file__).parent, set()

    def note(frame: FrameType, event: str, _: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and package in file.parents:
            found.add(str(file.relative_to(package)))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found


@DIRECTIONS
@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
@MAKERS
def test_a_score_passes_at_most_five_files(make: Callable, gradients: bool, direction: str) -> None:
    flow, y = wild(make(D, 3, direction=direction), 0.5), torch.randn(5, D)
    with torch.set_grad_enabled(gradients):
        flow().log_prob(y)  # what is imported at the first call does not count
        files = files_called(lambda: flow().log_prob(y))
    assert "flows/flow.py" in files
    assert len(files) <= 5, sorted(files)
