"""The tests of devices, where pytest is."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from importlib.util import find_spec

from ..posteriordb.models import ROOT
from .parts import Cases, Record

FILES = ("tests/transforms/test_cuda_kernels.py", "tests/test_devices.py")


def suite(device: str, quick: bool) -> Cases:
    """The tests of devices, under pytest."""
    for file in FILES:
        yield file, partial(of_tests, file, ["-k", "data_sets"] if quick else [])


def of_tests(file: str, chosen: list[str]) -> Record:
    """The last line, and the lines that name what failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-W", "ignore"]
    command += ["-n", "6"] if find_spec("xdist") and not chosen else []
    command += ["-p", "no:cacheprovider", *chosen, file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"end": lines[-1] if lines else "", "failed": failed, "log": "\n".join(lines[-400:])}
