"""How far the values are from the layers one by one in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .contenders import OURS, PYRO, Contender, Ours, contenders
from .problem import Problem, Reference, reference

# Rounding in units of eps (|x| + Σ_k |û_k h_k|), which later layers stretch. Another function,
# such as a norm that is not squared, is off by 1e5 of them and more.
AGREEMENT = 5_000


def errors(y: Tensor, log_det: Tensor, exact: Reference) -> dict[str, float]:
    """Largest and typical error of y in units of its rounding bound, and the log|det|'s error."""
    units = (y.double() - exact.y).abs() / (torch.finfo(y.dtype).eps * exact.scale)
    off = (log_det.double() - exact.log_det).abs()
    return {
        "y, units": units.max().item(),
        "y, units, rms": units.square().mean().sqrt().item(),
        "y": (y.double() - exact.y).abs().max().item(),
        "log_det": off.max().item(),
    }


def check_agreement(name: str, y: Tensor, log_det: Tensor, exact: Reference) -> None:
    """Refuse to time a contender that computes something else."""
    found = errors(y, log_det, exact)
    off = (log_det.double() - exact.log_det).abs() / (1 + exact.log_det.abs())
    if not (found["y, units"] < AGREEMENT and off.median() < 1e-3):
        raise ValueError(f"{name} computes another function: {found}")


def accuracy(problem: Problem, stacks: dict[str, Contender]) -> dict[str, dict[str, float]]:
    """Errors of ours and Pyro's chain at one shape, in the problem's dtype and in float64."""
    found = {}
    wide = Problem(
        problem.shape, *(t.double() for t in (*problem.parameters, problem.x, problem.y))
    )
    for label, given, them in (
        ("float32", problem, stacks),
        ("float64", wide, contenders(wide)),
    ):
        exact = reference(*given.parameters, given.x)
        for name in (OURS, PYRO):
            found[f"{name}, {label}"] = errors(*them[name].forward(given.x), exact)
        found[f"{OURS}, {label}, inverse"] = _inverse_errors(given, them[OURS])
    return found


def _inverse_errors(problem: Problem, ours: Contender) -> dict[str, float]:
    """How far the layers, run in float64 at the x that was found, are from y."""
    assert isinstance(ours, Ours)
    x, log_det = ours.inverse(problem.y)
    back = reference(*problem.parameters, x)
    return errors(problem.y, log_det, back)
