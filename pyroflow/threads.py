"""What Pyro keeps for the whole process, used by one thread at a time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P, R = ParamSpec("P"), TypeVar("R")

_PYRO = threading.RLock()


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function that runs Pyro models wait while another thread is in one.

    Pyro's handlers, parameter store and validation belong to the process: two runs at once would
    record each other's sites. Code of the caller that runs models in threads is not kept out.
    """

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with _PYRO:
            return function(*args, **kwargs)

    return alone
