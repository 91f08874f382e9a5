"""Training a deep latent Gaussian model: Adam, equation 20's annealing, checkpoints, processes."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset
from tqdm.auto import tqdm

from pyroflow.checks import check_count, check_positive
from pyroflow.io import read_data, write_data
from pyroflow.seeds import between_draws, seeded
from rezende_mohamed_2015.dlgm import DLGM, Terms
from rezende_mohamed_2015.processes import ALONE, Processes

MAX_SKIPPED = 100  # updates in a row without a finite gradient


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


@dataclass
class Progress:
    """What a checkpoint keeps beside the parameters and Adam's moments."""

    updates: int = 0
    seconds: float = 0.0
    skipped: int = 0  # updates without a finite gradient
    free_energy: float = math.nan  # a running mean over training batches, in nats


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

    Returns:
        Updates, seconds of training over all sessions, skipped updates, and a running mean of F.

    Raises:
        ValueError: fewer images than in a batch, a batch that the processes cannot share evenly,
            or a checkpoint that is damaged or of another schedule, seed, number of processes,
            model or set of images, or that not all processes see.
        FloatingPointError: no finite gradient in 100 updates in a row.
    """
    batches = _batches(images, schedule.batch_size, seed, processes)
    optimiser = _adam(dlgm, schedule)
    settings = {
        "schedule": vars(schedule),
        "seed": seed,
        "processes": processes.count,
        "images": digest(images),
    }
    state = _resumed(checkpoint, dlgm, optimiser, settings) or Progress()
    if state.updates != (first := processes.agree(state.updates)):
        raise ValueError(
            f"{checkpoint} must be in a folder that all processes share: it is at update "
            f"{state.updates} for process {processes.rank}, and at {first} for process 0"
        )
    shared = processes.wrap(dlgm)
    bar = tqdm(
        total=schedule.updates,
        initial=state.updates,
        desc=name or "train",
        disable=not (progress and processes.writes),
        mininterval=5.0,
    )
    began, before, failed = time.perf_counter(), state.seconds, 0
    with bar:
        for x in islice(batches(state.updates), schedule.updates - state.updates):
            t = state.updates
            _set_rates(optimiser, schedule, t)
            with seeded(_noise_seed(seed, processes.rank, t)), between_draws():
                terms = shared(x.to(dlgm.centre))
            loss, bound = _update(shared, terms, optimiser, schedule, t)
            failed = 0 if loss else failed + 1
            state.skipped += not loss
            if failed == MAX_SKIPPED:
                raise FloatingPointError(
                    f"{name or 'training'}: no finite gradient in {MAX_SKIPPED} updates up to "
                    f"{t}; lower lr={schedule.lr} or flow_lr={schedule.flow_lr}"
                )
            state.free_energy = _running_mean(state.free_energy, bound)
            state.updates, state.seconds = t + 1, before + time.perf_counter() - began
            bar.update()
            if state.updates % every == 0 or state.updates == schedule.updates:
                bar.set_postfix(F=f"{state.free_energy:.2f}")
                if checkpoint is not None and processes.writes:
                    _save(checkpoint, dlgm, optimiser, settings, state)
    processes.agree(None)  # no process goes on before the checkpoint is there
    return state


def digest(images: Tensor) -> str:
    """Sixteen hexadecimal digits that tell images from others, by their bytes."""
    return hashlib.sha256(images.contiguous().cpu().numpy()).hexdigest()[:16]


def _update(
    shared: torch.nn.Module,
    terms: Terms,
    optimiser: torch.optim.Optimizer,
    schedule: Schedule,
    t: int,
) -> tuple[bool, float]:
    """One update; whether its gradient was finite, and the mean of F over the batch."""
    optimiser.zero_grad()
    terms.bound(schedule.beta(t)).mean().backward()
    parameters = list(shared.parameters())
    finite = clip_grad_norm_(parameters, schedule.max_norm).isfinite().item()
    if finite:
        optimiser.step()
        # a fused step leaves the counts as they are by which transforms know that w has changed
        for p in parameters:
            torch.autograd.graph.increment_version(p)
    return finite, terms.bound().mean().item()


def _adam(dlgm: DLGM, schedule: Schedule) -> torch.optim.Optimizer:
    flow = list(dlgm.parts.parameters())
    ours = {id(p) for p in flow}
    others = [p for p in dlgm.parameters() if id(p) not in ours]
    groups = [{"params": others, "peak": schedule.lr}, {"params": flow, "peak": schedule.flow_lr}]
    return torch.optim.Adam([g for g in groups if g["params"]], lr=schedule.lr, fused=True)


def _set_rates(optimiser: torch.optim.Optimizer, schedule: Schedule, t: int) -> None:
    for group in optimiser.param_groups:
        group["lr"] = schedule.rate(t) * group["peak"]


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


def _save(
    path: Path,
    dlgm: DLGM,
    optimiser: torch.optim.Optimizer,
    settings: dict[str, Any],
    state: Progress,
) -> None:
    kept = {"dlgm": dlgm.state_dict(), "optimiser": optimiser.state_dict()}
    kept |= {"settings": settings, "state": vars(state)}
    write_data(path, kept)


def _resumed(
    path: Path | None,
    dlgm: DLGM,
    optimiser: torch.optim.Optimizer,
    settings: dict[str, Any],
) -> Progress | None:
    if path is None or not path.exists():
        return None
    remedy = "remove it or name another --out to start anew"
    try:
        kept = read_data(path, dlgm.centre.device)
        state, saved = Progress(**kept["state"]), kept["settings"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is no whole checkpoint: {remedy}") from error
    if saved != settings:
        raise ValueError(f"{path} is a checkpoint of {saved}, not of {settings}: {remedy}")
    try:
        dlgm.load_state_dict(kept["dlgm"])
        optimiser.load_state_dict(kept["optimiser"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is a checkpoint of another model: {remedy}") from error
    return state
