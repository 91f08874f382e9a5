"""One process or several under torchrun: who they are, and what they do together."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """This process among ``count`` that train together.

    Attributes:
        rank: 0, ..., count − 1; rank 0 writes.
        count: how many there are.
        device: where this one computes.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def writes(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, with gradients averaged over the processes if there are several."""
        if self.count == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices)

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        values = [value]
        if self.count > 1:
            distributed.broadcast_object_list(values)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank."""
        values = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(values, value)
        return values


ALONE = Processes()


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that torchrun started; alone without torchrun.

    The backend is nccl if there is a GPU, and gloo otherwise.
    """
    gpu = torch.cuda.is_available()
    if not distributed.is_torchelastic_launched():
        yield Processes(device=torch.device("cuda" if gpu else "cpu"))
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if gpu else "gloo")
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), device)
    finally:
        gc.collect()  # DistributedDataParallel is in a cycle, and aborts if it outlives the group
        distributed.destroy_process_group()
