"""What a fit minimises, its checkpoint, its result, and the options that fits share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyroflow.checks import check_count, check_device, check_positive, differing
from pyroflow.guides import AmortizedPlanarGuide, AutoFlow
from pyroflow.inference.processes import ALONE, Processes
from pyroflow.io import read_data, write_data
from pyroflow.seeds import generator_states, restore_generators
from pyroflow.shown import Shown, missing
from pyroflow.transforms import Bijection

if TYPE_CHECKING:
    from pyroflow.inference.missed import Missed

FORMAT = 6  # of checkpoints; raised when their content means something else: no fit goes on then


@dataclass(repr=False)
class Fit(Shown):
    """The course of a fit.

    Attributes:
        losses: training loss of each step, in nats; NaN where a step was skipped.
        scores: (step, score) at each evaluation, in nats: the mean negative log density of the
            held-out data, or the negative bound on fixed draws. The lower the better.
        best_loss: the lowest score; the fitted module is left in that state.
        steps: steps taken.
        stopped: why the fit stopped, in words.
        seconds: wall-clock time, with that of a guide's start, and of all depths of "auto".
        skipped: steps whose loss or gradient was not finite, and so left no trace.
        rolled_back: how often twenty of those in a row sent it to its best state, at half the rate.
        skipped_particles: draws of all steps whose log weight was not finite.
        missed: modes that the guide does not draw, of those that the warm start's ascents led to.
        missed_share: the part of the posterior that is in them, about, and at least.
        launches: how Adam's steps ran: as one launch each on a GPU, on the CPU as recorded graphs
            where they are many, or why not; else empty.
        gaussian_loss: of a density, the held-out score of the full Gaussian of the training rows,
            linear in the contexts if there are some; None where its covariance is singular.
        training_loss: of a density, the mean of −log q over training rows, at most 20,000.
        num_layers: of a density whose depth was found on held-out rows, the depth.
        depths: those that were tried, with their held-out scores. The best of several is a little
            better than fresh rows will be.
    """

    losses: list[float]
    scores: list[tuple[int, float]]
    best_loss: float
    steps: int
    stopped: str
    seconds: float
    skipped: int = 0
    rolled_back: int = 0
    skipped_particles: int = 0
    missed: list[Missed] = field(default_factory=list)
    missed_share: float = 0.0
    launches: str = ""
    gaussian_loss: float | None = None
    training_loss: float | None = None
    num_layers: int | None = None
    depths: list[tuple[int, float]] = field(default_factory=list)

    def _shown(self) -> tuple[str, dict[str, str]]:
        rows = {
            "best loss": f"{self.best_loss:.6g} nats",
            **self._beside(),
            "steps": f"{self.steps:,} in {self.seconds:.1f} s",
            "stopped": self.stopped,
            "skipped": f"{self.skipped} steps, {self.rolled_back} rollbacks" * bool(self.skipped),
            "particles": f"{self.skipped_particles:,} left out" * bool(self.skipped_particles),
            "launches": self.launches,
            "missed": missing(self.missed, self.missed_share) * bool(self.missed),
        }
        return "Fit", {label: text for label, text in rows.items() if text}

    def _beside(self) -> dict[str, str]:
        rows = {}
        if self.gaussian_loss is not None:
            gain, text = self.gaussian_loss - self.best_loss, f"{self.gaussian_loss:.6g} nats"
            words = f"the flow is {abs(gain):.3g} nats {'better' if gain >= 0 else 'worse'}"
            rows["Gaussian"] = f"{text}, on the same held-out rows: {words}"
        if self.training_loss is not None:
            gap = self.best_loss - self.training_loss
            words = f"{abs(gap):.3g} {'less' if gap >= 0 else 'more'} than held out"
            rows["training"] = f"{self.training_loss:.6g} nats, {words}"
        if self.depths:
            depths = ", ".join(f"{depth}: {loss:.4g}" for depth, loss in self.depths)
            rows["layers"] = f"{self.num_layers}, by the held-out scores {depths}"
        return rows


@dataclass
class Objective:
    """What a fit minimises, and the tensors and objects that it consists of.

    Attributes:
        parameters: the tensors that are trained.
        loss: step ↦ scalar training loss; what it draws itself it draws inside ``drawing``.
        score: () ↦ losses of fixed points or draws, shape (n,), on whose mean states are compared.
            None where the last state is the result.
        buffers: tensors that are not trained, but restored with the fit.
        stateful: what else is restored, by ``state_dict`` and ``load_state_dict``.
        exact_loss: () ↦ the exact training loss, for L-BFGS; the pairwise differences of scores
            then also decide on stopping.
        keep_last: end in the last state scored, for a score that cannot tell the best one.
        groups: torch's parameter groups, each with its highest learning rate as "peak".
        max_norm: a gradient of a larger norm is scaled down to it.
        enough: of the losses of the best state so far, why the fit may end there; empty if not.
        processes: those that share it. Each has the same parameters, ``loss`` and ``exact_loss``
            of its share, whose mean over the processes counts, and all of ``score``.
        steady: ``weight`` of a step as a tensor ↦ its loss, by the same operations of the device
            in every step and without a look at their results; not finite where ``loss`` may differ.
        weight: what ``steady`` takes in a step.
        skips: whether a step whose ``steady`` is not finite is left out.
        recordable: whether a step may be recorded: not where it calls a function of the caller's.
        natural: () ↦ q and z ↦ log p(z), shape (S,), of a bound that natural gradients finish.
    """

    parameters: list[Tensor]
    loss: Callable[[int], Tensor]
    score: Callable[[], Tensor] | None
    buffers: list[Tensor] = field(default_factory=list)
    stateful: Sequence[Any] = ()
    exact_loss: Callable[[], Tensor] | None = None
    keep_last: bool = False
    groups: list[dict[str, Any]] | None = None
    max_norm: float = math.inf
    enough: Callable[[Tensor], str] | None = None
    processes: Processes = ALONE
    steady: Callable[[Tensor], Tensor] | None = None
    weight: Callable[[int], float] = lambda step: 1.0
    skips: bool = False
    recordable: bool = True
    natural: tuple[Callable[[], Distribution], Callable[[Tensor], Tensor]] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Parameters and buffers."""
        return [*self.parameters, *self.buffers]


@torch.no_grad()
def copy_tensors(values: list[Tensor], targets: list[Tensor]) -> None:
    """Set tensors to the values of others."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


class Checkpoint:
    """The file of one part of a fit.

    Args:
        path: of the file; None for none.
        settings: what a fit must agree on to go on from it.
        processes: those that do the fit; rank 0 alone has a path.
    """

    def __init__(
        self, path: str | Path | None, settings: dict[str, Any], processes: Processes
    ) -> None:
        self.path, self.settings = None if path is None else Path(path), settings
        self.processes = processes
        processes.check_same(settings)
        self._warned = False

    def write(self, **parts: Any) -> None:
        """Write the parts of a state, and that of the generators; where it fails, warn once."""
        content = {"format": FORMAT, "settings": self.settings, "rng": generator_states(), **parts}
        try:
            write_data(self.path, content)
        except OSError as error:  # the fit is worth more than the file
            if not self._warned:
                warnings.warn(
                    f"checkpoint {self.path} cannot be written ({error}): the fit goes on, tries "
                    "again later, and leaves an older checkpoint as it is. Make room for it, or "
                    "name another file",
                    stacklevel=2,
                )
            self._warned = True

    def read(self) -> dict[str, Any]:
        """Restore the generators, and return all that was written; empty where there is no file.

        Raises:
            ValueError: If it is no checkpoint, or of a fit with other settings.
        """
        content = self.processes.agree(read_checkpoint(self.path))
        if content:
            check_settings(self.path, content["settings"], self.settings)
            restore_generators(self.processes.on_own_device(content["rng"]))
        return content


def check_settings(path: str | Path, saved: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise ``ValueError`` where settings differ from those of a checkpoint."""
    if listed := differing(saved, settings, "now"):
        raise ValueError(
            f"checkpoint {path} is of a fit with {listed}: repeat those settings to resume it, or "
            "name another file to start anew"
        )


def read_checkpoint(path: str | Path | None) -> dict[str, Any]:
    """The content of a checkpoint; empty where there is no file.

    Raises:
        ValueError: If the file is no checkpoint of this version.
    """
    if path is None or not Path(path).exists():
        return {}
    try:
        content = read_data(path)
        content["settings"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"checkpoint {path} is not a checkpoint of a fit ({error}): name another file, or "
            "remove it"
        ) from error
    if content.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {path} is of another version of pyroflow, whose layers may have other "
            "parameters: name another file to start anew, or remove it"
        )
    return content


def check_options(**options: Any) -> None:
    """Check the options that the fits share, by name."""
    for name in ("steps", "batch_size", "num_particles"):
        if name in options:
            check_count(name, options[name], 1)
    check_positive("lr", options["lr"])
    check_device(options["device"])
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


def has_path(guide: Callable) -> bool:
    """Whether all transforms of a guide know the gradient along the path of a sample."""
    if not isinstance(guide, AutoFlow):
        return isinstance(guide, AmortizedPlanarGuide)
    return all(isinstance(t, Bijection) for t in guide.get_transforms())


@contextmanager
def path_derivative(guide: Callable, wanted: bool) -> Iterator[None]:
    """Train with path derivatives or without, where all of the guide's transforms have them."""
    if not has_path(guide):
        yield
        return
    before, guide.path_derivative = guide.path_derivative, wanted
    try:
        yield
    finally:
        guide.path_derivative = before
