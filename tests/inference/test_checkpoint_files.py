"""Checkpoints that cannot be written, and those that two fits want at once."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import slow

import pyroflow as pf
from pyroflow.inference.processes import held
from pyroflow.inference.trainer import Trainer
from pyroflow.io import read_data

DATA = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)).tanh()
SHORT = {"steps": 20, "polish": 60, "seed": 0, "progress": False}


def fitted(**options: Any) -> tuple[pf.Fit, list[torch.Tensor]]:
    torch.manual_seed(1)
    flow = pf.planar_flow(2, 2)
    fit = pf.fit_density(flow, DATA, **(SHORT | options))
    return fit, [p.detach() for p in flow.parameters()]


def at_step(step: int, act: Callable[[], object]) -> Callable:
    """In place of ``Trainer._show``: act once a fit has taken so many steps."""

    def show(trainer: Trainer, bar: object) -> None:
        if trainer.state.step == step:
            act()

    return show


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def denied(*_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


FAILURES: dict[str, Callable[[pytest.MonkeyPatch, Path], object]] = {
    "full": lambda patch, path: patch.setattr(os, "fsync", full),
    "denied": lambda patch, path: patch.setattr(Path, "open", denied),
    "no folder": lambda patch, path: shutil.rmtree(path.parent),
    "no move": lambda patch, path: patch.setattr(os, "replace", full),
}


@pytest.mark.parametrize("step", [0, slow(11)])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_checkpoint_that_cannot_be_written_does_not_end_the_fit(
    tmp_path: Path, failure: str, step: int
) -> None:
    whole, expected = fitted()
    path = tmp_path / "folder" / "fit.pt"
    path.parent.mkdir()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if step:
            patch.setattr(Trainer, "_show", at_step(step, lambda: FAILURES[failure](patch, path)))
        else:
            plain = Trainer._take_steps

            def take_steps(trainer: Trainer, bar: object) -> None:
                FAILURES[failure](patch, path)
                plain(trainer, bar)

            patch.setattr(Trainer, "_take_steps", take_steps)
        fit, found = fitted(checkpoint=path)
    (warning,) = caught
    assert str(path) in str(warning.message)
    assert "cannot be written" in str(warning.message)
    assert (fit.losses, fit.best_loss) == (whole.losses, whole.best_loss)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if failure != "no folder":
        assert [file.name for file in path.parent.iterdir()] == ([path.name] if step else [])
    if failure != "no folder" and step:
        assert read_data(path)["state"]["step"] == 10
        resumed, found = fitted(checkpoint=path)
        assert resumed.losses == whole.losses
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_disk_that_takes_half_a_checkpoint(tmp_path: Path) -> None:
    """The limit is the system's own, so that the file is really cut off."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with pytest.warns(UserWarning, match=r"fit.pt cannot be written .*File too large"):
            fit, _ = fitted(checkpoint=tmp_path / "fit.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert fit.steps >= 60
    assert not list(tmp_path.iterdir())


def test_room_that_is_made_is_used(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        full_until = at_step(7, lambda: patch.setattr(os, "fsync", lambda _: None))
        patch.setattr(Trainer, "_show", full_until)
        with pytest.warns(UserWarning, match="cannot be written"):
            fit, _ = fitted(checkpoint=path)
    assert fitted(checkpoint=path)[0].losses == fit.losses
    assert [file.name for file in tmp_path.iterdir()] == ["fit.pt"]


def test_a_checkpoint_is_of_one_fit_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    (tmp_path / "link.pt").symlink_to(path)
    with held(path):
        for name in ("fit.pt", "link.pt"):
            with pytest.raises(ValueError, match=rf"{name} is in use by another fit .*group"):
                fitted(checkpoint=tmp_path / name)
        fitted(checkpoint=tmp_path / "other.pt")
    fitted(checkpoint=path)
    assert {file.name for file in tmp_path.iterdir()} == {"fit.pt", "link.pt", "other.pt"}


HOLDER = """
import sys, time
from pyroflow.inference.processes import held
with held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_gives_its_checkpoint_back(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="in use by another fit"):
            fitted(checkpoint=path)
        process.send_signal(signal.SIGKILL)
    fitted(checkpoint=path)
    assert [file.name for file in tmp_path.iterdir()] == ["fit.pt"]


def test_where_there_are_no_locks_there_is_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import filelock

    def none(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", none)
    fit, _ = fitted(checkpoint=tmp_path / "fit.pt")
    assert fitted(checkpoint=tmp_path / "fit.pt")[0].losses == fit.losses
