"""Results of long runs: what is chosen, where it ran, and a JSON file that is added to."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import typer


def choose(given: str, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    """Names that contain one of the parts, in the known order; all of them for no parts."""
    parts = [part.strip() for part in given.split(",")]
    for part in parts:
        if not any(part in name for name in known):
            raise typer.BadParameter(
                f"{option} must name parts of {', '.join(known)}; got {part!r}"
            )
    return tuple(name for name in known if any(part in name for part in parts))


def machine() -> dict[str, Any]:
    """What the times depend on."""
    facts = {"cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    return facts | {name: version(name) for name in ("torch", "pyro-ppl", "arviz")}


def apart(measure: Callable, *given: Any) -> Any:
    """What a function of a module finds in a process of its own, with a memory of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, *given).result()


def peak() -> float:
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read(path: Path) -> dict[str, Any]:
    """What an earlier run has written, or nothing."""
    return json.loads(path.read_text()) if path.exists() else {"results": {}}


def write(found: dict[str, Any], path: Path) -> None:
    """Write through a second file: a run that is killed leaves the one or the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(_rounded(found), indent=1) + "\n")
    draft.replace(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value
