"""Files are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from pyroflow.io import write_json, write_whole
from pyroflow.plots.drawing import save_figure


def test_figures_have_their_folder(tmp_path: Path) -> None:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1])
    save_figure(figure, tmp_path / "new" / "figure.png")
    assert (tmp_path / "new" / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize("stage", ["fsync", "replace"])
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, kind: type[BaseException]
) -> None:
    path = tmp_path / "new" / "figure.json"
    write_json(path, {"old": 1})
    before = path.read_bytes()

    def fails(*_: object) -> None:
        raise kind("disk full")

    monkeypatch.setattr(os, stage, fails)
    with pytest.raises(kind, match="disk full"):
        write_json(path, {"new": 2})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["figure.json"]


def test_writers_of_one_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a file of its own until it is whole."""
    path, plain = tmp_path / "file", os.fsync

    def another(file: int) -> None:
        monkeypatch.setattr(os, "fsync", plain)
        write_whole(path, b"another")
        plain(file)

    monkeypatch.setattr(os, "fsync", another)
    write_whole(path, b"first")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
