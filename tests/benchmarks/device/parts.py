"""Parts of a measurement, each in a process of its own that is stopped when its time is over."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pyro

Record = dict[str, Any]
Cases = Iterator[tuple[str, Callable[[], Record]]]
Part = Callable[[str, bool], Cases]  # device, quick

STOP = 5.0  # seconds, for a process to end by itself


def measured(part: Part, device: str, quick: bool, limit: float) -> Iterator[tuple[str, Record]]:
    """What a process finds of the cases, as it comes; a note where it is stopped or dies."""
    context, end = multiprocessing.get_context("spawn"), time.monotonic() + limit
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(part, device, quick, there))
    process.start()
    there.close()
    try:
        while here.poll(max(0.0, end - time.monotonic())):
            yield here.recv()
        yield "stopped", {"error": f"after {limit:.0f} s"}
    except EOFError:  # it has closed its end
        process.join(STOP)
        if process.exitcode:
            yield "stopped", {"error": f"the process ended with {process.exitcode}"}
    finally:
        process.kill()


def work(part: Part, device: str, quick: bool, say: Connection) -> None:
    """Measure the cases in this process, and say of each what was found or went wrong."""
    with say:  # closed before the process ends, which takes a GPU's some seconds
        try:
            for name, measure in part(device, quick):
                say.send((name, found(measure)))
        except Exception:
            say.send(("stopped", {"error": traceback.format_exc()}))


def found(measure: Callable[[], Record]) -> Record:
    """The record of a case, or the traceback."""
    pyro.clear_param_store()
    start = time.perf_counter()
    try:
        record = measure()
    except Exception:  # whatever it is, the other cases are wanted
        record = {"error": traceback.format_exc()}
    return record | {"took, s": time.perf_counter() - start}
