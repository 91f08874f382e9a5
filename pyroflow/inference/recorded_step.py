"""Steps of Adam on the CPU as recorded graphs of plain operations.

Dispatching a thousand small operations by Python and autograd takes longer than they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyroflow.inference.fit import Objective, copy_tensors
from pyroflow.inference.state import State
from pyroflow.model.comparison import FAILURES, agree
from pyroflow.model.log_joint import traced
from pyroflow.seeds import draws, one_at_a_time, own_generators, quick

CHECKED_EVERY = 50  # steps, one as it comes
# Relative to 1 + |loss|, by which a record may differ: rounding, and no state of Python's.
OFF = {torch.float32: 1e-5, torch.float64: 1e-12}

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
        self.able = self.able and objective.steady is not None and objective.recordable
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
        back = _rewinding()
        try:
            self._step = self._step or RecordedStep(self.objective)
            loss = self._step.take(self.objective.weight(state.step))
        except FAILURES as error:
            back()
            state.launches = f"as they come: {' '.join(str(error).split())[:100]}"
            return plain()
        state.launches = RECORDED
        found = bool(loss.isfinite())
        if found and (state.step + 1) % CHECKED_EVERY:
            return loss
        back()  # with the same draws as it comes, to compare, or where draws are lost
        for p in self.objective.parameters:
            p.grad = None
        expected = plain()
        if found and not _agree(loss, expected):
            state.launches = f"{RECORDED}, until a step was another as it came"
        if not found:
            state.taken_again += 1
            if state.taken_again == MOST_TAKEN_AGAIN:
                state.launches = f"{RECORDED}, until {MOST_TAKEN_AGAIN} losses were not finite"
        return expected


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
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self.parameters):
            raise RuntimeError("a parameter has hooks")
        like = self.parameters[0]
        self.weight = torch.ones((), dtype=like.dtype, device=like.device)
        back, kept = _rewinding(), [t.clone() for t in objective.buffers]
        versions = [t._version for t in objective.buffers]
        try:
            with pyro.validation_enabled(False):
                self._record()
        finally:
            back()
            if changed := versions != [t._version for t in objective.buffers]:
                copy_tensors(kept, objective.buffers)
        if changed:
            raise RuntimeError("it has effects beside its result")

    @one_at_a_time
    def _record(self) -> None:
        lent = _lent()
        with _Draws() as noted:
            self._differentiated()
        if _lent() != lent:
            raise RuntimeError("it draws by an operation that takes no generator")
        self.calls = noted.calls
        drawn = [call() for call in self.calls]
        self._graph = traced(self._at, *self.parameters, self.weight, *drawn)
        drawn = [call() for call in self.calls]
        with _Draws(drawn):
            loss, *gradients = self._differentiated()
        found = self._evaluated(drawn)
        if not (_agree(found[0], loss) and all(map(agree, found[1:], gradients))):
            raise RuntimeError("it says something else when it is recorded")

    def take(self, weight: float) -> Tensor:
        """The loss, with its gradients in the parameters."""
        self.weight.fill_(weight)
        loss, *gradients = self._evaluated([call() for call in self.calls])
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
        # Fused Adam reads parameter and gradient in the order of their memory.
        pairs = zip(self.parameters, gradients, strict=True)
        return [loss.detach(), *(torch.empty_like(p).copy_(g) for p, g in pairs)]


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
            _refuse_other_shapes(func, args)
            return func(*args, **kwargs)
        fills = func._schema.is_mutable
        if (found := next(self.given, None)) is not None:
            return args[0].copy_(found) if fills else found
        self.calls.append(_drawn(func, args, kwargs, fills))
        return func(*args, **kwargs)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """As for the generators' own mode."""
        return True


def _drawn(func: Any, args: tuple, kwargs: dict[str, Any], fills: bool) -> _Draw:
    """A call as it can be made again; RuntimeError if it cannot."""
    own, generator = own_generators(), kwargs.get("generator")
    ours = [] if own is None else own.on(torch.device("cpu"))
    if generator is not None and all(generator._cdata != g._cdata for g in ours):
        raise RuntimeError("it draws from a generator of its own")
    filled, rest = (args[:1], args[1:]) if fills else ((), args)
    known = {name: value for name, value in kwargs.items() if name != "generator"}
    if any(isinstance(a, Tensor) for a in (*rest, *known.values())):
        raise RuntimeError(f"{func} draws by numbers that are in tensors")
    if not all(isinstance(t, Tensor) and t.is_contiguous() for t in filled):
        raise RuntimeError(f"{func} fills a tensor that is not contiguous")
    return _Draw(func, rest, known, (filled[0].shape, filled[0].dtype) if filled else None)


def _refuse_other_shapes(func: Any, args: tuple) -> None:
    """RuntimeError if the shape of a result depends on numbers: a graph holds that of one call."""
    if func.overloadpacket.__name__ in ("index", "index_put", "index_put_"):
        refused = any(at is not None and at.dtype == torch.bool for at in args[1])
    else:
        refused = torch.Tag.dynamic_output_shape in func.tags
    if refused:
        raise RuntimeError(f"{func} has results of a shape that depends on numbers")


def _agree(loss: Tensor, expected: Tensor) -> bool:
    off = OFF[loss.dtype]
    return bool(torch.isclose(loss, expected, rtol=off, atol=off, equal_nan=True))


def _rewinding() -> Callable[[], None]:
    """What lets the generators go on from where they are now."""
    own = own_generators()
    if own is None:
        return partial(torch.set_rng_state, torch.get_rng_state())
    return partial(own.rewind, own.states())


def _lent() -> int:
    own = own_generators()
    return 0 if own is None else own.lent
