"""One process or several under torchrun: who they are, and what they do together."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pyroflow.checks import differing
from pyroflow.seeds import drawing, fixed_draws, generator_states


@dataclass(frozen=True)
class Processes:
    """This process among ``count`` that do one fit: each makes the same calls in the same order.

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

    def options(
        self, seed: int | None, checkpoint: str | Path | None, progress: bool
    ) -> tuple[int | None, str | Path | None, bool]:
        """Those of this process: all draw by one seed, and rank 0 alone writes and shows progress.

        Without a seed, it is one that rank 0 draws from its global generator.
        """
        if self.count > 1:
            drawn = int(torch.randint(2**63 - 1, (), device="cpu")) if seed is None else None
            drawn = self.agree(drawn)
            seed = drawn if seed is None else seed
        return (seed, checkpoint, progress) if self.writes else (seed, None, False)

    def share(self, num: int, unit: int = 1) -> slice:
        """Which of so many this process takes, in their order; what is in a unit stays together.

        Raises:
            ValueError: If there is not one unit for each process.
        """
        units = num // unit
        if units < self.count:
            raise ValueError(
                f"{self.count} processes cannot share {units} in a step: raise batch_size or "
                "num_particles, or start fewer"
            )
        first, last = (units * rank // self.count * unit for rank in (self.rank, self.rank + 1))
        return slice(first, last)

    def most(self, num: int, unit: int = 1) -> int:
        """How many of so many a process takes at the most."""
        return -(num // unit // -self.count) * unit

    def weighted(self, mean: Tensor, num: int, unit: int = 1) -> Tensor:
        """A mean over this process's share, as it counts in the mean over the processes."""
        if self.count == 1:
            return mean
        part = self.share(num, unit)
        return mean * (self.count * (part.stop - part.start) / num)

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

    def joined(self, part: Tensor) -> Tensor:
        """The parts of all ranks one after the other, on every rank, without a gradient."""
        if self.count == 1:
            return part
        return torch.cat(self.gather(part.detach().cpu())).to(part)

    def total(self, number: Tensor | int) -> Tensor | int:
        """The sum over the ranks, on every rank, without a gradient."""
        if self.count == 1:
            return number
        given = isinstance(number, Tensor)
        own = number.detach().clone() if given else torch.tensor(number, device=self.device)
        distributed.all_reduce(own)
        return own if given else int(own)

    def on_own_device(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rank 0's generator states by device, with this process's GPU in the place of its own."""
        if self.count == 1:
            return states
        return {n if n == "cpu" else str(self.device): state for n, state in states.items()}

    @torch.no_grad()
    def start_alike(self, module: nn.Module) -> None:
        """Give a module the parameters and buffers that it has on rank 0."""
        if self.count > 1:
            for tensor in module.state_dict(keep_vars=True).values():
                if isinstance(tensor, Tensor):
                    value = tensor.clone(memory_format=torch.contiguous_format)
                    distributed.broadcast(value, 0)
                    tensor.copy_(value)

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` on every rank if a fit has other settings on one of them."""
        if self.count == 1:
            return
        first, *others = self.gather(settings)
        for rank, other in enumerate(others, 1):
            if listed := differing(other, first, "0:"):
                raise ValueError(
                    f"process {rank} fits with {listed}, other than process 0: processes of one "
                    "group do one fit, so all must make the same call. For a fit of each one's "
                    "own, start them without torchrun and without a process group"
                )

    def check_draws(self) -> None:
        """Raise ``RuntimeError`` on every rank if what they draw is no longer the same."""
        if self.count == 1:
            return
        first, *others = self.gather([state.cpu() for state in generator_states().values()])
        for rank, other in enumerate(others, 1):
            if len(first) != len(other) or not all(map(torch.equal, first, other)):
                raise RuntimeError(
                    f"the random numbers of process {rank} are no longer those of process 0, "
                    "though they share each batch: the loss draws numbers of its own, such as "
                    "dropout's. Let the number of processes divide batch_size or num_particles, "
                    "or draw none"
                )

    def apart(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function with draws of each process's own; those after it are again the same."""
        if self.count == 1:
            return function
        return fixed_draws(self._own_seed, function)

    def _own_seed(self) -> int:
        with drawing():
            return int(torch.randint(2**31, (self.count,), device="cpu")[self.rank])


ALONE = Processes()
_GROUPS: set[int] = set()  # that fits had; to make one anew on torchrun's store may hang


@contextmanager
def averaged(parameters: list[Tensor], ours: Processes) -> Iterator[Callable[..., Tensor]]:
    """A function that runs a loss and then its gradient, and returns the loss.

    Both are the mean over the processes; the parameters start from rank 0's.
    """
    call = _call if ours.count == 1 else DistributedDataParallel(_Call(parameters))

    def run(loss: Callable[..., Tensor], *args: Any) -> Tensor:
        found = call(loss, *args)
        found.backward()
        return found if ours.count == 1 else ours.total(found) / ours.count

    try:
        yield run
    finally:
        if ours.count > 1:  # DistributedDataParallel is in a cycle, and may not outlive its group
            call = _call
            gc.collect()


class _Call(nn.Module):
    """Calls functions of parameters that need not be an ``nn.Parameter``, as Pyro's are not."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__()
        self.trained = parameters

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Tensor]]:
        """The parameters, by number."""
        return ((str(i), p) for i, p in enumerate(self.trained))

    def forward(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """What the function returns."""
        return function(*args)


def _call(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args)


def processes() -> Processes:
    """The processes of torch's default group; under torchrun they are made one, if they are not.

    They stay one until they end, as under Lightning; a group that a fit has had and that was then
    destroyed is not made again. Tensors on a GPU are sent by nccl, others by gloo.

    Example:
        >>> processes().count
        1
    """
    gpu = torch.cuda.is_available()
    device = torch.device("cuda") if gpu else ALONE.device
    if not distributed.is_available():
        return Processes(device=device)
    if not distributed.is_initialized():
        if _GROUPS or not distributed.is_torchelastic_launched():
            return Processes(device=device)
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
        atexit.register(_leave)
    _GROUPS.add(distributed.get_world_size())
    if gpu:
        device = torch.device("cuda", torch.cuda.current_device())
    return Processes(distributed.get_rank(), distributed.get_world_size(), device)


def _leave() -> None:
    """End the group, without which torch warns."""
    gc.collect()
    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def held(path: str | Path | None) -> Iterator[None]:
    """Keep a checkpoint for one fit at a time; of a process that is killed, the lock goes too.

    Raises:
        ValueError: If another fit, of this process or another, has it.
    """
    if path is None:
        yield
        return
    from filelock import FileLock, Timeout  # here, to keep the import of pyroflow short

    name = Path(f"{os.path.realpath(path)}.lock.partial")
    lock = FileLock(name, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"checkpoint {path} is in use by another fit that is running: name another file, or "
            "wait for it; processes that share one fit need a process group, as torchrun's have"
        ) from error
    except (OSError, NotImplementedError):  # no locks here: what is written is whole all the same
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            name.unlink(missing_ok=True)
        lock.release()
