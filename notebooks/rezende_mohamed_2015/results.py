"""What the experiments share: options, and a JSON file of results that is added to."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from pyroflow.io import write_json

Run = Mapping[str, Any]  # the columns that tell a run from the others, or all of its columns


@dataclass(frozen=True)
class Options:
    """What the command line hands to an experiment.

    Attributes:
        out: folder of NAME.json, of the figures and of ``checkpoints/``.
        quick: a short run, to see that everything works; its numbers mean nothing.
        seeds: how many seeds, 0, 1, ...; None for the experiment's own number.
        data: folder of the data files, for the experiments that read some.
        only: parts of the labels of the runs to do, in their order; all runs if there are none. A
            part that ends in a digit ends a number: "K=1" is no part of "K=10".
        device: where to compute; None for a GPU if there is one.
        draws: of the training images: "fresh" in every batch, or "static", once for all.
        jobs: runs at a time, on a GPU.
        seconds: after which no new run begins; None for no limit.
        progress: show progress bars, or on a GPU a line as a run begins and ends.
    """

    out: Path
    quick: bool = False
    seeds: int | None = None
    data: Path | None = None
    only: tuple[str, ...] = ()
    device: str | None = None
    draws: str = "fresh"
    jobs: int = 1
    seconds: float | None = None
    progress: bool = True

    def selected(self, runs: Iterable[Run]) -> list[Run]:
        """The runs that ``only`` asks for.

        Raises:
            ValueError: If no label has one of the parts.
        """
        labels = {label(run): run for run in runs}
        for part in self.only:
            if not any(_is_part(part, name) for name in labels):
                raise ValueError(f"--only {part!r} is part of no run; there are {list(labels)}")
        parts = self.only or ("",)
        names = [name for part in parts for name in labels if _is_part(part, name)]
        return [labels[name] for name in dict.fromkeys(names)]


def label(run: Run) -> str:
    """A run's columns for people, ``--only`` and the names of checkpoints.

    Example:
        >>> label({"energy": "U1", "kind": "planar", "K": 2, "seed": 0})
        'U1 planar K=2 seed=0'
    """
    return " ".join(v if isinstance(v, str) else f"{column}={v}" for column, v in run.items())


def _is_part(part: str, name: str) -> bool:
    number_ends = r"(?!\d)" if part[-1:].isdigit() else ""
    return re.search(re.escape(part) + number_ends, name) is not None


class Results:
    """The JSON file of an experiment: its settings, and finished runs as records.

    A run is written as soon as it is finished, in one move, so that an interrupted experiment
    keeps what it has and goes on from there. Processes that do different runs may share a file.
    Each run has the machine that it was done on, this one unless it says so.

    Args:
        path: The file; read if it exists.
        settings: What the runs depend on, in terms that JSON has.

    Attributes:
        runs: Finished runs, rows of a data frame; changed through :meth:`add` alone.

    Raises:
        ValueError: If the file is of other settings, or no file of results at all.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp(), "figure.json")
        >>> Results(path, {"quick": True}).add({"K": 2}, {"kl": 0.25})
        >>> Results(path, {"quick": True}).find({"K": 2})["kl"]
        0.25
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.summary: dict[str, Any] = {}
        self.runs: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._read()

    def find(self, run: Run) -> dict[str, Any] | None:
        """The finished run with these columns, if there is one."""
        return next((found for found in self.runs if run.items() <= found.items()), None)

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Those of the runs that are not finished."""
        return [run for run in runs if self.find(run) is None]

    def ordered(self, runs: Iterable[Run]) -> list[dict[str, Any]]:
        """All finished runs, these first and in their order."""
        first = [found for run in runs if (found := self.find(run))]
        return first + [found for found in self.runs if found not in first]

    def add(self, run: Run, found: Mapping[str, Any]) -> None:
        """Keep what a run has found, in place of what it had, and write the file."""
        with FileLock(self.path.with_name(self.path.name + ".lock.partial")):
            self._read()
            record = json.loads(json.dumps({**run, "machine": machine(), **found}))
            old = self.find(run)
            self.runs = [record if kept is old else kept for kept in self.runs]
            self.runs += [record] * (old is None)
            self._write()

    def write(self, **summary: Any) -> None:
        """Write the file, with ``summary`` beside the runs."""
        with FileLock(self.path.with_name(self.path.name + ".lock.partial")):
            self._read()
            self.summary |= json.loads(json.dumps(summary))
            self._write()

    def _write(self) -> None:
        write_json(self.path, {"settings": self.settings, **self.summary, "runs": self.runs})

    def _read(self) -> None:
        if not self.path.exists():
            return
        try:
            report = json.loads(self.path.read_text(encoding="utf-8"))
            saved, self.runs = dict(report["settings"]), [dict(run) for run in report["runs"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} is no file of results: name another --out, or remove it"
            ) from error
        self.summary = {k: v for k, v in report.items() if k not in ("settings", "runs")}
        differing = [k for k in {**saved, **self.settings} if saved.get(k) != self.settings.get(k)]
        if differing:
            listed = ", ".join(
                f"{k}={saved.get(k)!r} (now {self.settings.get(k)!r})" for k in sorted(differing)
            )
            raise ValueError(
                f"{self.path} is of a run with {listed}: name another --out to start anew"
            )


def machine(device: torch.device | None = None) -> str:
    """Where a run is done, for the reader of its seconds."""
    if device is not None and device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}, "
        f"torch {torch.__version__}"
    )


def checkpoint_folder(options: Options, name: str) -> Path:
    """The folder of an experiment's checkpoints, made if need be; not for version control."""
    folder = options.out / "checkpoints" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
