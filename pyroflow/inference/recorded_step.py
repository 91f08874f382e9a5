"""Steps of Adam on the CPU as recorded graphs of plain operations.

Dispatching a thousand small operations by Python and autograd takes longer than they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyroflow.inference.fit import Objective
from pyroflow.inference.launches import kept_generators
from pyroflow.inference.state import State
from pyroflow.model.comparison import FAILURES, agree
from pyroflow.model.log_joint import traced
from pyroflow.seeds import draws, one_at_a_time, own_generators, quick

# Steps after which one is recorded, and that must then be left: recording takes as long as 250.
FROM, LEFT = 100, 400
MOST_TAKEN_AGAIN = 20  # of these, of which a record is worth it
RECORDED = "recorded"


class RecordedSteps:
    """The later steps of a fit of many as recorded ones, for as long as their losses are finite.

    Args:
        objective: of the fit.
        steps: of the fit, in all.
    """

    def __init__(self, objective: Objective, steps: int) -> None:
        self.objective, self._step = objective, None
        self.able = steps >= FROM + LEFT and objective.processes.count == 1
        self.able = self.able and objective.steady is not None
        own = {(p.device.type, p.is_floating_point()) for p in objective.parameters}
        self.able = self.able and own == {("cpu", True)}

    def take(self, state: State, plain: Callable[[], Tensor]) -> Tensor:
        """The loss of the next step, with its gradients in the parameters.

        Args:
            state: of the fit, in which it says how steps run.
            plain: the step as it comes.
        """
        if not self.able or state.step < FROM or state.launches not in ("", RECORDED):
            return plain()
        try:
            self._step = self._step or RecordedStep(self.objective)
        except RuntimeError as error:
            state.launches = f"as they come: {error}"
            return plain()
        state.launches = RECORDED
        own = own_generators()
        before = torch.get_rng_state() if own is None else own.states()
        loss = self._step.take(self.objective.weight(state.step))
        if loss is None:  # as where draws are lost: with these, the step as it comes
            (torch.set_rng_state if own is None else own.rewind)(before)
            loss, state.taken_again = plain(), state.taken_again + 1
            if state.taken_again == MOST_TAKEN_AGAIN:
                state.launches = f"{RECORDED}, until {MOST_TAKEN_AGAIN} losses were not finite"
        return loss


class RecordedStep:
    """Loss and gradient of a step on the CPU as one graph of plain operations.

    What a step draws is drawn before it, by the same calls, so that the random numbers are those
    of steps as they come.

    Args:
        objective: with a ``steady`` loss, of which the graph is compared with a step as it comes.

    Raises:
        RuntimeError: If the step cannot be recorded, or says something else when it is.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective, self.parameters = objective, objective.parameters
        like = self.parameters[0]
        self.weight = torch.ones((), dtype=like.dtype, device=like.device)
        with pyro.validation_enabled(False), kept_generators():
            self._record()

    @one_at_a_time
    def _record(self) -> None:
        lent, versions = _lent(), [t._version for t in self.objective.buffers]
        with _Draws() as noted:
            self._differentiated()
        if _lent() != lent or versions != [t._version for t in self.objective.buffers]:
            raise RuntimeError("it has effects beside its result")
        self.calls = noted.calls
        drawn = [call() for call in self.calls]
        try:
            self._graph = traced(self._at, *self.parameters, self.weight, *drawn)
        except FAILURES as error:
            raise RuntimeError(str(error).partition("\n")[0]) from error
        drawn = [call() for call in self.calls]
        with _Draws(drawn):
            expected = self._differentiated()
        if not all(map(agree, self._evaluated(drawn), expected)):
            raise RuntimeError("it says something else when it is recorded")

    def take(self, weight: float) -> Tensor | None:
        """The loss, with its gradients in the parameters; None where it is not finite."""
        self.weight.fill_(weight)
        loss, *gradients = self._evaluated([call() for call in self.calls])
        if not bool(loss.isfinite()):
            return None
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient
            torch.autograd.graph.increment_version(p)  # what was cached of it is out of date
        return loss

    @torch.no_grad()
    def _evaluated(self, drawn: list[Tensor]) -> tuple[Tensor, ...]:
        return self._graph(*(p.detach() for p in self.parameters), self.weight, *drawn)

    def _at(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The step of the parameters themselves, which stand first among the inputs."""
        with _Draws(inputs[len(self.parameters) + 1 :]):
            return tuple(self._differentiated())

    def _differentiated(self) -> list[Tensor]:
        for p in self.parameters:
            torch.autograd.graph.increment_version(p)
        with torch.enable_grad():
            loss = quick(self.objective.steady)(self.weight)
            gradients = torch.autograd.grad(loss, self.parameters)
        return [loss.detach(), *(g.clone(memory_format=torch.contiguous_format) for g in gradients)]


class _Draw(NamedTuple):
    """A call that draws random numbers."""

    function: Any
    args: tuple
    kwargs: dict[str, Any]
    filled: tuple[torch.Size, torch.dtype] | None  # of the tensor that it fills

    def __call__(self) -> Tensor:
        args, kwargs, own = self.args, dict(self.kwargs), own_generators()
        if own is not None:
            kwargs["generator"] = own._generator(torch.device("cpu"))
        if self.filled is not None:
            size, dtype = self.filled
            args = (torch.empty(size, dtype=dtype, device="cpu"), *args)
        return self.function(*args, **kwargs)


class _Draws(TorchDispatchMode):
    """Notes the calls that draw random numbers, after given numbers were put in their places."""

    def __init__(self, given: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.calls: list[_Draw] = []
        self.given = iter(given)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, unless it draws and its numbers are given."""
        kwargs = kwargs or {}
        if not draws(func):
            return func(*args, **kwargs)
        fills = func._schema.is_mutable
        if (found := next(self.given, None)) is not None:
            return args[0].copy_(found) if fills else found
        filled, rest = ((args[0].shape, args[0].dtype), args[1:]) if fills else (None, args)
        if any(isinstance(a, Tensor) for a in (*rest, *kwargs.values())):
            raise RuntimeError(f"{func} draws by numbers that are in tensors")
        known = {name: value for name, value in kwargs.items() if name != "generator"}
        self.calls.append(_Draw(func, rest, known, filled))
        return func(*args, **kwargs)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """As for the generators' own mode."""
        return True


def _lent() -> int:
    own = own_generators()
    return 0 if own is None else own.lent
