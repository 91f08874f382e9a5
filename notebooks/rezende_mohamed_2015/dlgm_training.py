"""Training a deep latent Gaussian model: Adam, equation 20's annealing, checkpoints, processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm.auto import tqdm

from pyroflow.checks import check_count, check_positive
from pyroflow.inference.fit import Objective
from pyroflow.inference.phases import MAX_SKIPPED
from pyroflow.inference.processes import ALONE, Processes
from pyroflow.inference.schedule import LearningRateSchedule
from pyroflow.inference.trainer import Trainer
from pyroflow.seeds import seeded
from rezende_mohamed_2015.dlgm import DLGM
from rezende_mohamed_2015.dlgm_objective import AnnealedBound, noise_seed


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        updates: of the parameters.
        lr: Adam's learning rate.
        flow_lr: the learning rate of the transforms and of what puts out their parameters.
        warm_up: first updates, over which the rates rise from 0.
        cool_down: last updates, over which they fall to 0.
        annealing: updates over which β rises to 1; 10,000 in equation 20.
        batch_size: images in an update, over all processes.
        max_norm: a gradient of a larger norm is scaled down to it.
    """

    updates: int
    lr: float
    flow_lr: float
    warm_up: int = 500
    cool_down: int = 3000
    annealing: int = 1000
    batch_size: int = 100
    max_norm: float = 200.0

    def __post_init__(self) -> None:
        for name in ("updates", "warm_up", "cool_down", "annealing", "batch_size"):
            check_count(name, getattr(self, name), 1)
        for name in ("lr", "flow_lr", "max_norm"):
            check_positive(name, getattr(self, name))

    def rate(self, t: int) -> float:
        """The share of the learning rates that update t = 0, 1, ... has."""
        return min(1.0, (t + 1) / self.warm_up, (self.updates - t) / self.cool_down)

    def beta(self, t: int) -> float:
        """β_t of equation 20."""
        return min(1.0, 0.01 + t / self.annealing)

    def in_batches_of(self, size: int) -> Schedule:
        """The same images in all, and the same share of them at falling rates, in other batches."""
        updates, cool_down = (n * self.batch_size // size for n in (self.updates, self.cool_down))
        return replace(self, updates=updates, cool_down=cool_down, batch_size=size)


class Progress(NamedTuple):
    """How far a training came: updates, seconds over all sessions, and those left out."""

    updates: int
    seconds: float
    skipped: int
    free_energy: float  # a running mean over training batches, in nats
    launches: str  # whether updates were one launch each, on a GPU, or why not; else empty


def train(
    dlgm: DLGM,
    images: Tensor,
    schedule: Schedule,
    *,
    fresh: bool = False,
    seed: int = 0,
    checkpoint: Path | None = None,
    every: int = 1000,
    processes: Processes = ALONE,
    progress: bool = True,
    name: str = "",
    between: Callable[[], None] = lambda: None,
) -> Progress:
    """Train on the annealed bound of equation 20, one sample of z for each image and update.

    The batches and the noise of an update depend on ``seed``, on its number and, the noise, on
    the process. So a run that goes on from a checkpoint ends where an unbroken run ends.

    On one GPU, without a checkpoint, an update is one launch: the batches are the same ones, and
    the noise is that of one generator for the whole run.

    Args:
        dlgm: the model, with its inference network; trained in place.
        images: shape (N, X), of any dtype that converts to the parameters'; if they are ``fresh``,
            grey values in uint8.
        schedule: how long and how fast.
        fresh: draw each pixel from its grey value, x ~ Bernoulli(grey/255), anew in every batch.
        seed: of the order of the images and of the noise.
        checkpoint: file to go on from, if there is one, and to keep the state in; None for none.
        every: updates between checkpoints.
        processes: the processes that share each batch.
        progress: show a progress bar.
        name: of the run, in the progress bar.
        between: called after every update, or after some that are launches.

    Raises:
        ValueError: If there are fewer images than in a batch, the processes cannot share a batch
            evenly, images for fresh draws are not in uint8, or the checkpoint is damaged, of
            another schedule, seed, number of processes, model or set of images.
        FloatingPointError: If 100 updates in a row have no finite gradient.
    """
    bound = AnnealedBound(dlgm, images, schedule, seed, processes, fresh)
    settings = {
        "schedule": vars(schedule),
        "fresh": fresh,
        "seed": seed,
        "processes": processes.count,
        "images": digest(images),
    }
    objective = Objective(
        list(dlgm.parameters()),
        bound.loss,
        score=None,
        buffers=[*dlgm.buffers(), bound.free_energy],
        groups=_groups(dlgm, schedule),
        max_norm=schedule.max_norm,
        processes=processes,
        steady=bound.steady,
        weight=float,
        skips=True,
        recordable=False,  # so that a run that is broken off ends as an unbroken one, to the bit
    )
    trainer = UnmarkedTrainer(
        objective,
        _Rates(schedule),
        lr=schedule.lr,
        settings=settings,
        label=name or "train",
        progress=progress and processes.writes,
        checkpoint=checkpoint if processes.writes else None,
    )
    trainer.save_every = every
    trainer.free_energy, trainer.between = bound.free_energy, between
    with seeded(noise_seed(seed, processes.rank)):  # of launches; other updates have their own
        done = trainer.run()
    if trainer.state.stopped:
        raise FloatingPointError(
            f"{name or 'training'}: no finite gradient in {MAX_SKIPPED} updates up to "
            f"{done.steps - 1}; lower lr={schedule.lr} or flow_lr={schedule.flow_lr}"
        )
    return Progress(done.steps, done.seconds, done.skipped, bound.free_energy.item(), done.launches)


class UnmarkedTrainer(Trainer):
    """A trainer of a model that is too large to note its state before every update.

    A run that is cut off goes back to the last checkpoint.
    """

    free_energy: Tensor
    between: Callable[[], None]

    def _resume(self) -> None:
        try:
            super()._resume()
        except ValueError as error:
            raise ValueError(f"{error}. Remove it or name another --out to start anew") from error

    def _note(self) -> None:
        pass

    def _show(self, bar: tqdm) -> None:
        self.between()
        bar.mininterval = 5.0
        bar.update(self.state.step - bar.n)
        if self.state.step % self.save_every == 0:
            bar.set_postfix(F=f"{self.free_energy.item():.2f}")


class _Rates(LearningRateSchedule):
    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule.updates)
        self.rate = schedule.rate

    def averages(self, step: int) -> bool:
        return False


def digest(images: Tensor) -> str:
    """Sixteen hexadecimal digits that tell images from others, by their bytes."""
    return hashlib.sha256(images.contiguous().cpu().numpy()).hexdigest()[:16]


def _groups(dlgm: DLGM, schedule: Schedule) -> list[dict[str, Any]]:
    """Adam's parameter groups, each with its highest rate."""
    flow = list(dlgm.parts.parameters())
    ours = {id(p) for p in flow}
    others = [p for p in dlgm.parameters() if id(p) not in ours]
    groups = [{"params": others, "peak": schedule.lr}, {"params": flow, "peak": schedule.flow_lr}]
    return [g for g in groups if g["params"]]
