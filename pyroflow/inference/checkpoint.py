"""Checkpoints of a running fit: written whole or not at all, read without pickle."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from pyroflow.seeds import generator_states, restore_generators

# Raised when the file has other parts, or the parameters of a transform mean something else: then
# no fit can go on. Format 2 had the state of one generator.
FORMAT = 3


def write_checkpoint(
    path: Path,
    settings: dict[str, Any],
    loop: dict[str, Any],
    optimizer: dict[str, Any],
    rng: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the state of a fit beside ``path``, then move it there.

    ``rng`` has the states of the generators, those at the start of a step that was cut off.
    """
    state = {
        "format": FORMAT,
        "settings": settings,
        "loop": loop,
        "optimizer": optimizer,
        "rng": generator_states() if rng is None else rng,
    }
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


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


def saved_settings(path: str | Path) -> dict[str, Any]:
    """The settings of the fit that wrote a checkpoint.

    Raises:
        ValueError: a file that is no checkpoint.
    """
    return _read(Path(path))["settings"]


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, weights_only=True)
        state["settings"]
    except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"checkpoint {path} is not a checkpoint of a fit: name another file, or remove it"
        ) from error
    if state.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {path} is of another version of pyroflow, whose layers may have other "
            "parameters: name another file to start anew, or remove it"
        )
    return state
