"""Training a deep latent Gaussian model: Adam, equation 20's annealing, checkpoints, processes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset
from tqdm.auto import tqdm

from pyroflow.checks import check_count, check_positive
from pyroflow.inference.fit import Objective
from pyroflow.inference.processes import ALONE, Processes
from pyroflow.inference.schedule import LearningRateSchedule
from pyroflow.inference.trainer import MAX_SKIPPED, Trainer
from pyroflow.seeds import between_draws, seeded
from rezende_mohamed_2015.dlgm import DLGM


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


class Progress(NamedTuple):
    """How far a training came: updates, seconds over all sessions, and those left out."""

    updates: int
    seconds: float
    skipped: int
    free_energy: float  # a running mean over training batches, in nats


def train(
    dlgm: DLGM,
    images: Tensor,
    schedule: Schedule,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    every: int = 1000,
    processes: Processes = ALONE,
    progress: bool = True,
    name: str = "",
) -> Progress:
    """Train on the annealed bound of equation 20, one sample of z for each image and update.

    The batches and the noise of an update depend on ``seed``, on its number and, the noise, on
    the process. So a run that goes on from a checkpoint ends where an unbroken run ends.

    Args:
        dlgm: the model, with its inference network; trained in place.
        images: shape (N, X), of any dtype that converts to the parameters'.
        schedule: how long and how fast.
        seed: of the order of the images and of the noise.
        checkpoint: file to go on from, if there is one, and to keep the state in; None for none.
        every: updates between checkpoints.
        processes: the processes that share each batch.
        progress: show a progress bar.
        name: of the run, in the progress bar.

    Raises:
        ValueError: If there are fewer images than in a batch, the processes cannot share a batch
            evenly, or the checkpoint is damaged, of another schedule, seed, number of processes,
            model or set of images.
        FloatingPointError: If 100 updates in a row have no finite gradient.
    """
    batches = _batches(images, schedule.batch_size, seed, processes)
    free_energy = torch.tensor(math.nan, dtype=torch.float64, device="cpu")
    running: list[Iterator[Tensor]] = []  # from the first update on, once it is known which that is

    def loss(t: int) -> Tensor:
        if not running:
            running.append(batches(t))
        x = next(running[0]).to(dlgm.centre)
        with seeded(_noise_seed(seed, processes.rank, t)), between_draws():
            terms = dlgm(x)
        found = terms.bound(schedule.beta(t)).mean()
        free_energy.fill_(_running_mean(free_energy.item(), terms.bound().mean().item()))
        return found

    settings = {
        "schedule": vars(schedule),
        "seed": seed,
        "processes": processes.count,
        "images": digest(images),
    }
    objective = Objective(
        list(dlgm.parameters()),
        loss,
        score=None,
        buffers=[*dlgm.buffers(), free_energy],
        groups=_groups(dlgm, schedule),
        max_norm=schedule.max_norm,
        processes=processes,
    )
    trainer = UnmarkedTrainer(
        objective,
        _Rates(schedule),
        lr=schedule.lr,
        settings=settings,
        label=name or "train",
        progress=progress and processes.writes,
        checkpoint=checkpoint if processes.writes else None,
        save_every=every,
    )
    trainer.free_energy = free_energy
    done = trainer.run()
    if trainer.state.stopped:
        raise FloatingPointError(
            f"{name or 'training'}: no finite gradient in {MAX_SKIPPED} updates up to "
            f"{done.steps - 1}; lower lr={schedule.lr} or flow_lr={schedule.flow_lr}"
        )
    return Progress(done.steps, done.seconds, done.skipped, free_energy.item())


class UnmarkedTrainer(Trainer):
    """A trainer of a model that is too large to note its state before every update.

    A run that is cut off goes back to the last checkpoint.
    """

    free_energy: Tensor

    def _resume(self) -> None:
        try:
            super()._resume()
        except ValueError as error:
            raise ValueError(f"{error}. Remove it or name another --out to start anew") from error

    def _note(self) -> None:
        pass

    def _show(self, bar: tqdm) -> None:
        bar.mininterval = 5.0
        bar.update()
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


def _batches(images: Tensor, size: int, seed: int, processes: Processes) -> Any:
    """A function from the number of updates done to this process's share of the batches to come."""
    if size % processes.count:
        raise ValueError(f"batch_size {size} cannot be shared by {processes.count} processes")
    if len(images) < size:
        raise ValueError(f"images must be at least batch_size {size}, got {len(images)}")
    sampler = DistributedSampler(
        range(len(images)), processes.count, processes.rank, seed=seed, drop_last=True
    )
    shares = BatchSampler(sampler, size // processes.count, drop_last=True)
    options = {"batch_size": None, "generator": torch.Generator()}  # else it draws a seed
    loader = DataLoader(TensorDataset(images), sampler=shares, **options)

    def after(updates: int) -> Iterator[Tensor]:
        epoch, done = divmod(updates, len(shares))
        while True:
            sampler.set_epoch(epoch)
            for (x,) in islice(loader, done, None):
                yield x
            epoch, done = epoch + 1, 0

    return after


def _noise_seed(*parts: int) -> int:
    """Of the 32 bits that torch's generator on the CPU takes in."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _running_mean(mean: float, value: float) -> float:
    if not math.isfinite(value):
        return mean
    return value if math.isnan(mean) else mean + 0.002 * (value - mean)
