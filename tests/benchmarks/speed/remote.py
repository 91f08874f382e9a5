"""This side of the process that runs flowjax."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from torch import Tensor

from ..remote import Remote
from .problem import Problem, constrained


class Flowjax(Remote):
    """flowjax's worker."""

    library = "flowjax"
    module = "benchmarks.speed.flowjax_worker"

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


class RemoteOperation:
    """One operation of the worker, to be timed like a function of this process."""

    def __init__(self, remote: Flowjax, operation: str) -> None:
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
