"""Steps of Adam on a GPU as one launch each: loss, gradient and update in a CUDA graph.

Launching the kernels of a step one by one takes far longer than they run. A graph holds them all;
so nothing in it may be read by the host, and what changes from step to step is in tensors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pyro
import torch
from torch import Tensor

from pyroflow.inference.fit import Objective
from pyroflow.seeds import own_generators, quick

READ = 25  # steps between two looks at their losses
WARM_UP = 3  # steps before the capture, without effect

ONE_LAUNCH = "one launch a step"


class Launches:
    """The steps of an optimiser as launches of one graph, for as long as their losses are finite.

    A step whose loss or gradient is not finite has no effect, as the graph tells Adam, and is the
    last one of this kind: the objective's own loss knows better what to do then, unless it skips.

    Args:
        objective: with a ``steady`` loss.
        optimizer: Adam, fused, with a "peak" for each of its groups.

    Attributes:
        live: whether further steps can be launches.
        said: how steps ran, or why they did not so.
    """

    def __init__(self, objective: Objective, optimizer: torch.optim.Adam) -> None:
        self.objective, self.optimizer = objective, optimizer
        self.parameters, self.loss = objective.parameters, quick(objective.steady)
        like = self.parameters[0]
        self.rates, self.weights, self.losses = like.new_zeros(3, READ).unbind()
        self.at = torch.zeros(1, dtype=torch.long, device=like.device)
        self.lost = like.new_ones((), dtype=torch.float32)  # 1: the optimiser leaves all as it is
        self.idle = like.new_ones((), dtype=torch.bool)
        self.rate = [torch.zeros_like(self.lost) for _ in optimizer.param_groups]
        self.live, self.said = True, ""
        self._replay: Callable[[], None] | None = None

    @classmethod
    def of(
        cls, objective: Objective, optimizer: torch.optim.Adam, checkpoint: object
    ) -> Launches | None:
        """Those of an optimiser, where its steps may be launches."""
        able = objective.steady is not None and checkpoint is None and optimizer.defaults["fused"]
        able = able and objective.processes.count == 1
        devices = {p.device for p in objective.parameters}
        return cls(objective, optimizer) if able and _is_one_gpu(devices) else None

    def take(
        self, rates: Sequence[float], weights: Sequence[float], after: Callable[[int], None]
    ) -> list[float]:
        """Take some steps, at most ``READ``; their losses, or none where there is no graph.

        Args:
            rates: a factor of the learning rate for each step.
            weights: what the steady loss takes in each.
            after: called with the number of each of these steps once it is under way.
        """
        if self._replay is None and not self._captured():
            return []
        for table, values in ((self.rates, rates), (self.weights, weights)):
            table[: len(values)] = torch.tensor(values, dtype=table.dtype, device="cpu")
        self.at.zero_()
        for step in range(len(rates)):
            self._replay()
            after(step)
        losses = self.losses[: len(rates)].tolist()
        self._outdate()  # no launch does
        if not (self.objective.skips or all(map(math.isfinite, losses))):
            self._end("one launch a step, until a loss or gradient was not finite")
        return losses

    def _captured(self) -> bool:
        """Put a step into a graph; False where it cannot be."""
        for group, rate in zip(self.optimizer.param_groups, self.rate, strict=True):
            group["lr"], group["capturable"] = rate, True
        self.optimizer.found_inf = self.lost
        try:
            with pyro.validation_enabled(False), _kept_generators(), warnings.catch_warnings():
                # Adam's of steps outside of a graph, and that not all looks of the host are seen.
                warnings.simplefilter("ignore", UserWarning)
                self._replay = capture(self._step, self.idle)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            self._end(f"a step could not be one launch: {reason}")
            return False
        self.said = ONE_LAUNCH
        return True

    def _step(self) -> None:
        """One step, in which the host reads nothing."""
        self.optimizer.zero_grad()  # so that the graph's gradients are its own
        self._outdate()
        loss = self.loss(self.weights.index_select(0, self.at).squeeze(0))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.objective.max_norm)
        finite = torch.isfinite(loss.detach()) & torch.isfinite(norm)
        self.lost.copy_(~finite | self.idle)
        factor = self.rates.index_select(0, self.at).squeeze(0)
        for group, rate in zip(self.optimizer.param_groups, self.rate, strict=True):
            rate.copy_(factor * group["peak"])
        self.optimizer.step()
        seen = loss.detach().where(finite, torch.nan).to(self.losses.dtype)
        self.losses.index_copy_(0, self.at, seen.unsqueeze(0))
        self.at.copy_((self.at + 1) % READ)

    def _outdate(self) -> None:
        """Let nothing be reused that was computed from the parameters before."""
        for p in self.parameters:
            torch.autograd.graph.increment_version(p)

    def _end(self, said: str) -> None:
        self.live, self.said, self._replay = False, said, None
        self.optimizer.found_inf = None
        for group in self.optimizer.param_groups:
            group["capturable"] = False
        self.optimizer.zero_grad()


def capture(step: Callable[[], None], idle: Tensor) -> Callable[[], None]:
    """A step as a CUDA graph, after some that run as they are with ``idle`` set; its replay.

    Raises:
        RuntimeError: If the host reads what the step computes, or something else cannot be in a
            graph.
    """
    stream = torch.cuda.Stream(idle.device)
    stream.wait_stream(torch.cuda.current_stream(idle.device))
    idle.fill_(True)
    before = torch.cuda.get_sync_debug_mode()
    with torch.cuda.device(idle.device), torch.cuda.stream(stream):
        step()  # makes what is made but once, such as the moments of Adam
        torch.cuda.set_sync_debug_mode("error")  # an error here is harmless, one in a capture not
        try:
            for _ in range(WARM_UP - 1):
                step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    torch.cuda.current_stream(idle.device).wait_stream(stream)
    graph, own = torch.cuda.CUDAGraph(), own_generators()
    if own is not None and own.lent:
        raise RuntimeError("it draws by an operation that takes no generator, such as dropout")
    for generator in [] if own is None else own.on(idle.device):
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, stream=stream):
        step()
    idle.fill_(False)
    return graph.replay


def _is_one_gpu(devices: set[torch.device]) -> bool:
    return len(devices) == 1 and next(iter(devices)).type == "cuda"


@contextmanager
def _kept_generators() -> Iterator[None]:
    """Leave the generators of the innermost ``seeded`` as they are, for what is drawn inside."""
    own = own_generators()
    before = {} if own is None else own.states()
    try:
        yield
    except BaseException:
        if own is not None:
            own.restore(before)  # new ones, as a capture that failed spoils those it drew from
        raise
    if own is not None:
        own.rewind(before)
