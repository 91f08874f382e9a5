"""The worker's side of ``remote``. Imported where there is JAX: no torch here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any


def versions(*names: str) -> dict[str, str]:
    """Those of installed packages."""
    return {name: version(name) for name in names}


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Read one JSON request a line and answer each with one line, until the pipe is closed."""
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
