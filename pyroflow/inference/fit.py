"""What every ``fit_`` function returns, and the options they share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pyroflow.checks import check_count, check_positive


@dataclass
class Fit:
    """The course of a fit.

    Attributes:
        losses: training loss of each step, in nats; NaN where a step was skipped.
        scores: (step, score) at each evaluation, in nats: the mean negative log density of the
            held-out data, or the negative bound on fixed draws. The lower the better.
        best_loss: the lowest score; the fitted module is left in that state.
        steps: steps taken.
        stopped: why the fit stopped, in words.
        seconds: wall-clock time.
        skipped: steps whose loss or gradient was not finite, and so left no trace.
        rolled_back: how often, after twenty of those in a row, the fit went back to its best
            state, to go on at half the rate.
        skipped_particles: draws of all steps whose log weight was not finite.
    """

    losses: list[float] = field(repr=False)
    scores: list[tuple[int, float]] = field(repr=False)
    best_loss: float
    steps: int
    stopped: str
    seconds: float
    skipped: int = 0
    rolled_back: int = 0
    skipped_particles: int = 0


def check_options(**options: Any) -> None:
    """Check the options that the fits share, by name."""
    for name in ("steps", "batch_size", "num_particles"):
        if name in options:
            check_count(name, options[name], 1)
    check_positive("lr", options["lr"])
    seed, checkpoint = options["seed"], options["checkpoint"]
    if seed is not None and check_count("seed", seed, 0) >= 2**63:
        raise ValueError(f"seed must be below 2**63, got {seed}")
    if checkpoint is not None and seed is None:
        raise ValueError(
            "checkpoint needs a seed, got seed=None: a resumed fit must draw the same "
            "numbers again; pass for example seed=0"
        )
    if checkpoint is not None:
        path = Path(checkpoint)
        if path.is_dir() or not path.parent.is_dir():
            raise ValueError(f"checkpoint must be a file in a folder that exists, got {path}")


def trainable(module: nn.Module) -> list[Tensor]:
    """The parameters of a module that are to be trained.

    Raises:
        ValueError: If there are none, or one is in half precision.
    """
    check_precision(module)
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"{type(module).__name__} has no parameters that require a gradient")
    return parameters


def check_precision(module: nn.Module) -> None:
    """Raise ``ValueError`` for parameters in which a step of an optimiser would be rounded away."""
    for name, p in module.named_parameters():
        if p.dtype.itemsize < 4:
            raise ValueError(
                f"{type(module).__name__} must be in float32 or float64 to be fitted, got "
                f"{p.dtype} in {name!r}: fit it as .float() and convert it afterwards"
            )
