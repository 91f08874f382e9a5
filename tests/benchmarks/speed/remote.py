"""This side of the process that runs flowjax."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .problem import Problem, constrained

TESTS = Path(__file__).resolve().parents[2]


class Remote:
    """flowjax's worker: a request goes out, and nothing else runs until it is answered."""

    def __init__(self, python: Path) -> None:
        # absolute, and not resolved: a virtual environment's python is a link
        self._process = subprocess.Popen(
            [python.absolute(), "-m", "benchmarks.speed.flowjax_worker"],
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
            raise RuntimeError(f"the flowjax process ended at the request {request}: see above")
        return json.loads(line)

    def load(self, problem: Problem) -> tuple[dict[str, str], Tensor, Tensor]:
        """Hand a problem over; return the form that is faster by operation, y and log|det|."""
        with tempfile.TemporaryDirectory() as folder:
            given, made = f"{folder}/given.npz", f"{folder}/made.npz"
            np.savez(given, x=problem.x.numpy(), parameters=flowjax_parameters(problem).numpy())
            forms = self.ask(do="load", file=given)
            self.ask(do="save", file=made)
            with np.load(made) as arrays:
                y, log_det = (torch.from_numpy(arrays[name]) for name in ("y", "log_det"))
        return forms, y, log_det

    def timed(self, operation: str) -> RemoteOperation:
        return RemoteOperation(self, operation)

    def close(self) -> None:
        """Let the process end."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class RemoteOperation:
    """One operation of the worker, to be timed like a function of this process."""

    def __init__(self, remote: Remote, operation: str) -> None:
        self.remote, self.operation = remote, operation

    def slice(self, seconds: float) -> float:
        request = {"operation": self.operation, "seconds": seconds}
        return self.remote.ask(do="time", **request)["seconds"]


def flowjax_parameters(problem: Problem) -> Tensor:
    """Rows (w, u', b) of shape (K, 2D + 1) that make flowjax's layers these layers.

    flowjax sets 1 + wᵀû to 1 + ... = ln(1 + softplus(wᵀu')) where the paper has softplus(wᵀu), so
    that another u' gives the same û.
    """
    w, u, b = (p.double() for p in problem.parameters)
    u_hat = constrained(w, u)
    s = 1 + (w * u_hat).sum(-1, keepdim=True)
    v = s.expm1()
    v = v + (-(-v).expm1()).log()  # the inverse of softplus
    u = u_hat + (v - s + 1) * w / w.square().sum(-1, keepdim=True)
    return torch.cat([w, u, b.unsqueeze(-1)], dim=-1).to(problem.x.dtype)


def connect(python: Path) -> tuple[Remote | None, str]:
    """The worker and its versions, or None and why there is none."""
    if not python.exists():
        return None, f"flowjax is left out: there is no {python} (option --jax-python)"
    try:
        remote = Remote(python)
    except RuntimeError:
        return None, f"flowjax is left out: {python} cannot run it"
    return remote, ", ".join(f"{name} {version}" for name, version in remote.versions.items())
