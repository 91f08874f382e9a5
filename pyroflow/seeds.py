"""Random numbers that are reproducible, whatever the global generators and other threads do."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

T = TypeVar("T")
P = ParamSpec("P")

_THREAD = threading.local()  # .own: the generators that the thread draws from
_PYRO = threading.RLock()  # held while models run, see :func:`one_at_a_time`
_GLOBAL = threading.Lock()  # held while the global generator of a device stands in for ours


class Generators(TorchDispatchMode):
    """Lets all that torch draws, ``dropout`` too, come from generators of our own, one a device.

    A mode acts in the thread that enters it. It costs microseconds for every operation, so what
    is often run and draws nothing is kept out by :func:`between_draws`.
    """

    supports_higher_order_operators = True  # which draw by the operations inside them

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.strays = 0  # draws outside of :func:`drawing`
        self.lent = 0  # draws for which a generator stood in for the global one
        self._generators: dict[str, torch.Generator] = {}
        self._states: dict[str, Tensor] = {}  # of those to come, where there is one

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and hand it a generator if it draws and has none."""
        kwargs = kwargs or {}
        if not draws(func) or _has_generator(args, kwargs):
            try:
                return func(*args, **kwargs)
            except RuntimeError:
                tensors = _with_tensors(func, args)
                if all(a is b for a, b in zip(tensors, args, strict=True)):
                    raise
            return func(*tensors, **kwargs)
        device = _device(args, kwargs)
        if device.type == "meta":
            return func(*args, **kwargs)
        _refuse_to_recompute()
        self.strays += 1
        generator, seeded_func = self._generator(device), _with_generator(func)
        if seeded_func is None:
            self.lent += 1
            return _lent(generator, func, args, kwargs)
        return seeded_func(*args, **kwargs, generator=generator)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Else torch notes for the whole process that a mode is on, and may do so for good."""
        return True

    def _generator(self, device: torch.device) -> torch.Generator:
        name = str(device)
        if name not in self._generators:
            generator = torch.Generator(device)
            if name in self._states:
                generator.set_state(self._states[name])
            else:
                generator.manual_seed(self.seed)
            self._generators[name] = generator
        return self._generators[name]

    def states(self) -> dict[str, Tensor]:
        """The state of the generator of each device."""
        return self._states | {name: g.get_state() for name, g in self._generators.items()}

    def on(self, device: torch.device) -> list[torch.Generator]:
        """Those of a device that were drawn from."""
        return [g for g in self._generators.values() if g.device == device]

    def restore(self, states: dict[str, Tensor]) -> None:
        """Go on where the generators that gave these states were."""
        self._states, self._generators = dict(states), {}

    def rewind(self, states: dict[str, Tensor]) -> None:
        """The same, by the same generators, as a CUDA graph holds those that it draws from."""
        for name, generator in self._generators.items():
            if name in states:
                generator.set_state(states[name])
            else:
                generator.manual_seed(self.seed)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from generators of our own inside, in this thread alone; with None as outside.

    Python's and NumPy's generators are left to the caller, as are threads started inside.
    """
    if seed is None:
        yield
        return
    before, _THREAD.own = own_generators(), Generators(seed)
    try:
        with _THREAD.own:
            yield
    finally:
        _THREAD.own = before


def own_generators() -> Generators | None:
    """Those of the innermost ``seeded`` of this thread."""
    return getattr(_THREAD, "own", None)


def generator_states() -> dict[str, Tensor]:
    """By device, the states of the generators of the innermost ``seeded``."""
    own = own_generators()
    return {} if own is None else own.states()


def restore_generators(states: dict[str, Tensor]) -> None:
    """Let them go on where those were that gave these states."""
    if own := own_generators():
        own.restore(states)


@contextmanager
def between_draws() -> Iterator[None]:
    """Run at full speed what draws nothing; what does belongs inside of :func:`drawing`."""
    entered = []
    while isinstance(mode := _get_current_dispatch_mode(), Generators):
        mode.__exit__(None, None, None)
        entered.append(mode)
    try:
        yield
    finally:
        for mode in reversed(entered):
            mode.__enter__()


@contextmanager
def drawing() -> Iterator[None]:
    """Draw from the generators of the innermost ``seeded``, between its draws."""
    own = own_generators()
    if own is None:
        yield
        return
    before = own.strays
    with own:
        yield
    own.strays = before


def quick(function: Callable[..., T]) -> Callable[..., T]:
    """A function to call between draws; its first call shows whether it draws outside `drawing`.

    If so, as an energy of the caller's or dropout may, all calls draw from the generators of
    the innermost ``seeded``.
    """
    strays: bool | None = None

    @functools.wraps(function)
    def call(*args: Any) -> T:
        nonlocal strays
        own = own_generators()
        if own is None or strays is False:
            return function(*args)
        before = own.strays
        with own:
            result = function(*args)
        strays = strays or own.strays > before
        return result

    return call


def fixed_draws(seed: int | Tensor | Callable[[], int], function: Callable[..., T]) -> Callable:
    """The function with the random numbers of a seed, the same in every call unless it changes."""
    drawn = quick(function)

    def call(*args: Any) -> T:
        with seeded(int(seed() if callable(seed) else seed)), between_draws():
            return drawn(*args)

    return call


def one_at_a_time(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function that runs Pyro models wait while another thread is in one.

    Pyro's handlers, parameter store and validation belong to the process: two runs at once would
    record each other's sites. Code of the caller that runs models in threads is not kept out.
    """

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        with _PYRO:
            return function(*args, **kwargs)

    return alone


@functools.cache
def draws(func: Any) -> bool:
    """Whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())


@functools.cache
def _with_generator(func: Any) -> Callable | None:
    """The overload that takes a generator and else the same arguments, if there is one."""
    packet = func.overloadpacket
    overloads = [func, *(getattr(packet, name) for name in packet.overloads())]
    wanted = _arguments(func)
    return next((f for f in overloads if _arguments(f) == wanted and _takes_generator(f)), None)


def _arguments(func: Any) -> list[tuple[str, str]]:
    found = [(a.name, str(a.type)) for a in func._schema.arguments]
    return [argument for argument in found if argument[0] != "generator"]


def _takes_generator(func: Any) -> bool:
    return any(a.name == "generator" for a in func._schema.arguments)


def _has_generator(args: tuple, kwargs: dict[str, Any]) -> bool:
    return any(isinstance(a, torch.Generator) for a in (*args, kwargs.get("generator")))


def _with_tensors(func: Any, args: tuple) -> tuple:
    """The arguments with tensors for numbers, which TorchScript hands a mode as constants."""
    dtypes = {float: torch.float64, int: torch.int64, bool: torch.bool}
    given = zip(func._schema.arguments, args, strict=False)
    return tuple(
        torch.tensor(a, dtype=dtypes[type(a)], device="cpu")
        if type(a) in dtypes and str(expected.type) == "Tensor"
        else a
        for expected, a in given
    )


def _device(args: tuple, kwargs: dict[str, Any]) -> torch.device:
    """Where an operation draws; with its number, as a generator serves one GPU alone."""
    tensors = (a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
    device = torch.device(kwargs.get("device") or next(tensors, "cpu"))
    numbered = device.index is not None or device.type in ("cpu", "meta")
    return device if numbered else torch.empty(0, device=device).device


def _lent(generator: torch.Generator, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run what draws from the global generator of a device and takes no other."""
    device = generator.device
    source = torch.random if device.type == "cpu" else getattr(torch, device.type)
    where = [device] if device.type in ("cuda", "xpu") else []
    with _GLOBAL:
        before = source.get_rng_state(*where)
        source.set_rng_state(generator.get_state(), *where)
        try:
            return func(*args, **kwargs)
        finally:
            generator.set_state(source.get_rng_state(*where))
            source.set_rng_state(before, *where)


def _refuse_to_recompute() -> None:
    """``torch.utils.checkpoint`` puts back the global generators, and not those drawn from."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__:
            raise RuntimeError(
                "random numbers were drawn inside of torch.utils.checkpoint, which draws others "
                "when it computes anew: draw them before (dropout: call the checkpointed module's "
                "eval()), do without checkpoint, or pass seed=None"
            )
        frame = frame.f_back
