"""The annealed bound of a deep latent Gaussian model at the batch of an update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from pyroflow.inference.processes import ALONE, Processes
from pyroflow.seeds import between_draws, drawing, seeded
from rezende_mohamed_2015.dlgm import DLGM

if TYPE_CHECKING:
    from rezende_mohamed_2015.dlgm_training import Schedule


class AnnealedBound:
    """Equation 20, one sample of z for each image, in the two forms that ``Objective`` takes.

    Args:
        dlgm: the model, with its inference network.
        images: shape (N, X); grey values in uint8 if they are ``fresh``.
        schedule: of β and of the batches.
        seed: of the order of the images and of all that is drawn.
        processes: the processes that share each batch.
        fresh: draw each pixel from its grey value, anew in every batch.

    Attributes:
        free_energy: a running mean over training batches, in nats, at β = 1; NaN before the first.
    """

    def __init__(
        self,
        dlgm: DLGM,
        images: Tensor,
        schedule: Schedule,
        seed: int = 0,
        processes: Processes = ALONE,
        fresh: bool = False,
    ) -> None:
        if fresh and images.dtype != torch.uint8:
            raise ValueError(
                f"images must be grey values of 0 to 255 in uint8 for fresh draws, got "
                f"{images.dtype}; pass fresh=False for images that are drawn already"
            )
        self.dlgm, self.images, self.schedule, self.seed = dlgm, images, schedule, seed
        self.processes, self.fresh = processes, fresh
        place = {"dtype": torch.float64, "device": dlgm.centre.device}
        self.free_energy = torch.tensor(math.nan, **place)
        self._after = batches(images, schedule.batch_size, seed, processes)
        self._running: Iterator[Tensor] | None = None  # once it is known which update is first

    def loss(self, t: int) -> Tensor:
        """That of update t, with the noise of its number; call it for one update after the other.

        The batch and the noise depend on the seed, on t and, the noise, on the process.
        """
        if self._running is None:
            self._running = self._after(t)
        x = next(self._running)
        with seeded(noise_seed(self.seed, self.processes.rank, t)), between_draws():
            return self._at(x, self.schedule.beta(t))

    def steady(self, t: Tensor) -> Tensor:
        """That of the same batch, with noise of the generator at hand; the host reads nothing.

        t has shape (). It is in the parameters' dtype, in which all numbers up to 2²⁴ are exact.
        """
        self.free_energy.masked_fill_(t == 0, math.nan)  # all steps before a capture are of t = 0
        beta = (0.01 + t / self.schedule.annealing).clamp(max=1.0)
        images, order = self._resident
        rows = order.index_select(0, t.long().reshape(1)).squeeze(0)
        return self._at(images.index_select(0, rows), beta)

    def _at(self, x: Tensor, beta: float | Tensor) -> Tensor:
        x = x.to(self.dlgm.centre)
        if self.fresh:
            with drawing():
                x = torch.bernoulli(x / 255)
        terms = self.dlgm(x)
        found = terms.bound(beta).mean()
        self._follow(terms.bound().mean().detach().double())
        return found

    def _follow(self, value: Tensor) -> None:
        """Move the running mean, where the value is finite."""
        mean = self.free_energy
        moved = torch.where(mean.isnan(), value, mean + 0.002 * (value - mean))
        mean.copy_(torch.where(value.isfinite(), moved, mean))

    @cached_property
    def _resident(self) -> tuple[Tensor, Tensor]:
        """The images and the indices of all batches, on the device of the model."""
        device, size = self.dlgm.centre.device, self.schedule.batch_size
        order = batch_indices(len(self.images), size, self.seed, self.schedule.updates)
        return self.images.to(device), order.to(device)


def batches(images: Tensor, size: int, seed: int, processes: Processes) -> Any:
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


def batch_indices(count: int, size: int, seed: int, updates: int) -> Tensor:
    """The images of each update's batch, those of :func:`batches` in one process.

    Args:
        count: of the images.
        size: of a batch.
        seed: of the order.
        updates: how many.

    Returns:
        Indices, shape (updates, size), on the CPU.
    """
    each, generator, epochs = count // size, torch.Generator(), []
    for epoch in range(-(updates // -each)):
        order = torch.randperm(count, generator=generator.manual_seed(seed + epoch), device="cpu")
        epochs.append(order[: each * size].view(each, size))
    return torch.cat(epochs)[:updates]


def noise_seed(*parts: int) -> int:
    """Of the 32 bits that torch's generator on the CPU takes in."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
