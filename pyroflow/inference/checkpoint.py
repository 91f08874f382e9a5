"""Checkpoints of a running fit: written whole or not at all, read without pickle."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyroflow.io import read_data, write_data
from pyroflow.seeds import generator_states, restore_generators

# Raised when the parameters of a transform, or the settings, mean something else: then no fit can
# go on. Format 2 did not say which part of a fit it was of, and had the state of one generator.
FORMAT = 3


@contextmanager
def held(path: str | Path | None) -> Iterator[None]:
    """Keep a checkpoint for one fit at a time; of a process that is killed, the lock goes too.

    Args:
        path: of the checkpoint, if there is one.

    Raises:
        ValueError: If another fit, of this process or another, has it.
    """
    if path is None:
        yield
        return
    from filelock import FileLock, Timeout

    name = Path(f"{os.path.realpath(path)}.lock.partial")
    lock = FileLock(name, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"checkpoint {path} is in use by another fit that is running: name another file, or "
            "wait for it; where several processes do one fit, as under torchrun, pass checkpoint "
            "in the one of rank 0 alone"
        ) from error
    except (OSError, NotImplementedError):  # no locks here: what is written is whole all the same
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            name.unlink(missing_ok=True)
        lock.release()


def write_checkpoint(
    path: Path,
    settings: dict[str, Any],
    loop: dict[str, Any],
    optimizer: dict[str, Any],
) -> None:
    """Write the state of a fit between two steps.

    Args:
        path: of the file.
        settings: what a fit must agree on to go on from it.
        loop: state of the loop.
        optimizer: state of the optimiser.

    Raises:
        OSError: the file cannot be written; an older one stays.
    """
    state = {
        "format": FORMAT,
        "settings": settings,
        "loop": loop,
        "optimizer": optimizer,
        "rng": generator_states(),
    }
    write_data(path, state)


def read_checkpoint(path: Path, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Restore the random generators, and return the states of loop and optimiser.

    Raises:
        ValueError: a file that is no checkpoint, or one of a fit with other settings.
    """
    state = _read(path)
    saved = state["settings"]
    check_settings(path, saved, settings)
    restore_generators(state["rng"])
    return state["loop"], state["optimizer"]


def check_settings(path: str | Path, saved: dict[str, Any], settings: dict[str, Any]) -> None:
    """Compare the settings of a fit with those that a checkpoint has.

    Raises:
        ValueError: they differ.
    """
    differing = [name for name in settings if saved.get(name) != settings[name]]
    if differing:
        listed = ", ".join(f"{n}={saved.get(n)!r} (now {settings[n]!r})" for n in differing)
        raise ValueError(
            f"checkpoint {path} is of a fit with {listed}: repeat those settings to resume it, or "
            "name another file to start anew"
        )


def saved_settings(path: str | Path | None) -> dict[str, Any]:
    """The settings of the fit that wrote a checkpoint; none where there is no file yet.

    Raises:
        ValueError: a file that is no checkpoint.
    """
    there = path is not None and Path(path).exists()
    return _read(Path(path))["settings"] if there else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        state = read_data(path)
        state["settings"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"checkpoint {path} is not a checkpoint of a fit ({error}): name another file, or "
            "remove it"
        ) from error
    if state.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {path} is of another version of pyroflow, whose layers may have other "
            "parameters: name another file to start anew, or remove it"
        )
    return state
