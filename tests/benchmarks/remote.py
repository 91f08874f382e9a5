"""This side of a process with JAX, which has an environment of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any, TypeVar

TESTS = Path(__file__).resolve().parents[1]
JAX_PYTHON = TESTS.parent / ".venv-jax" / "bin" / "python"

R = TypeVar("R", bound="Remote")


class Remote:
    """A worker: a request goes out, and nothing else runs until it is answered.

    A subclass names the ``library`` that the worker runs and the ``module`` that it is.
    """

    library: str
    module: str

    def __init__(self, python: Path) -> None:
        # absolute, and not resolved: a virtual environment's python is a link
        self._process = subprocess.Popen(
            [python.absolute(), "-m", self.module],
            cwd=TESTS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.versions = self.ask(do="versions")
        except RuntimeError:
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(
                f"the {self.library} process ended at the request {request}: see above"
            )
        return json.loads(line)

    def close(self) -> None:
        """Let the process end."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self: R) -> R:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # it may be at work, as after a timeout
            self._process.kill()
        self.close()


def connect(kind: type[R], python: Path = JAX_PYTHON) -> tuple[R | None, str]:
    """A worker and its versions, or None and why there is none."""
    if not python.exists():
        return None, f"{kind.library} is left out: there is no {python} (make .venv-jax/installed)"
    try:
        remote = kind(python)
    except RuntimeError:
        return None, f"{kind.library} is left out: {python} cannot run it"
    return remote, ", ".join(f"{name} {version}" for name, version in remote.versions.items())
