"""A function of tensors recorded as a list of plain operations, which can be copied and saved."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from pyroflow.seeds import _arguments

Plain = Any  # numbers, strings, None, tensors, lists and dicts of such

# Operations that are neither pointwise nor of torch's core set, and that models use all the same.
_ALSO = {
    "_unsafe_view", "alias", "alias_copy", "all", "amax", "amin", "any", "bmm", "cat",
    "cholesky_solve", "clone", "convolution", "cumprod", "cumsum", "detach", "diag_embed",
    "diagonal", "diagonal_backward", "diagonal_copy", "diagonal_scatter", "digamma", "dot",
    "expand_copy", "flip", "index", "index_put", "lift_fresh_copy", "linalg_cholesky_ex",
    "linalg_inv_ex", "linalg_solve_triangular", "logcumsumexp", "logsumexp", "matmul", "max",
    "mean", "min", "mm", "mv", "new_zeros", "ones_like", "permute_copy", "polygamma", "prod",
    "roll", "select", "select_backward", "select_copy", "select_scatter", "slice", "slice_backward",
    "slice_copy", "slice_scatter", "softplus_backward", "split", "split_copy", "split_with_sizes",
    "split_with_sizes_copy", "squeeze", "squeeze_copy", "stack", "std", "sum", "t", "t_copy",
    "transpose", "transpose_copy", "triangular_solve", "tril", "triu", "unbind", "unbind_copy",
    "unfold", "unsqueeze_copy", "var", "view_copy", "where", "zeros_like",
}  # fmt: skip


def graph_of(function: Callable, *inputs: Tensor, **options: Any) -> GraphModule:
    """Torch's graph of a function at inputs of the shapes that it takes; options of ``make_fx``."""
    if "tracing_mode" in options:
        return make_fx(function, **options)(*inputs)
    # Torch notes the shape of each result, by a mode that it else makes for each: half of the time.
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        return make_fx(function, **options)(*inputs)


class Recorded:
    """A function of tensors of fixed shapes, without state or randomness, as plain data.

    What does not depend on the inputs is computed once, when it is recorded. A run in another
    dtype or on another device needs the constants there: :meth:`to`.

    Args:
        steps: of each operation, its name in torch's ``aten`` and its arguments, in which
            ``{"input": i}``, ``{"constant": i}`` and ``{"step": i}`` are what they say.
        constants: the tensors that it takes beside its inputs.
        outputs: what it returns, described as the arguments are.

    Example:
        >>> f = Recorded.of(lambda x: (x.exp() * torch.arange(3.0).cos(),), torch.zeros(3))
        >>> [step[0] for step in f.steps], f(torch.zeros(3))[0]
        (['exp.default', 'mul.Tensor'], tensor([ 1.0000,  0.5403, -0.4161]))
    """

    def __init__(self, steps: list[list], constants: list[Tensor], outputs: list[Plain]) -> None:
        self.steps, self.constants, self.outputs = steps, constants, outputs

    @classmethod
    def of(
        cls, function: Callable[..., Sequence[Tensor]], *inputs: Tensor, **options: Any
    ) -> Recorded:
        """Record the function at inputs of the shapes that it shall take; options of ``make_fx``.

        Raises:
            ValueError: If it draws random numbers, or uses an operation that is not known to have
                no effect but its result.
            RuntimeError: If its control flow depends on the values of its inputs.
        """
        graph = graph_of(torch.func.functionalize(function), *inputs, **options)
        return cls(*_Reader(graph).read())

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The results, with a graph for autograd; may be called inside ``torch.func.vmap``."""
        found: list[Any] = []

        def value(held: Plain) -> Any:
            if isinstance(held, dict):
                ((kind, at),) = held.items()
                return {"input": inputs, "constant": self.constants, "step": found}[kind][at]
            if isinstance(held, float):
                return _representable(held, like.dtype)
            return [value(part) for part in held] if isinstance(held, list) else held

        like = inputs[0]
        for run, (_, args, kwargs) in zip(self._operations, self.steps, strict=True):
            options = {name: _option(name, value(held), like) for name, held in kwargs.items()}
            found.append(run(*value(args), **options))
        return value(self.outputs)

    def to(self, move: Callable[[Tensor], Tensor]) -> Recorded:
        """With ``move`` applied to the constants."""
        return Recorded(self.steps, [move(t) for t in self.constants], self.outputs)

    def describe(self) -> dict[str, Plain]:
        """Plain data, from which ``Recorded(**data)`` is the same function."""
        return {"steps": self.steps, "constants": self.constants, "outputs": self.outputs}

    def __getstate__(self) -> dict[str, Plain]:
        return self.describe()

    @cached_property
    def _operations(self) -> list[Callable]:
        """The operations by their names; ValueError if a damaged file names another one."""
        return [_operation(name) for name, _, _ in self.steps]


def _operation(name: str) -> Callable:
    if name == "getitem":
        return operator.getitem
    packet, _, overload = name.partition(".")
    found = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    tags = getattr(found, "tags", ())
    safe = packet in _ALSO or torch.Tag.pointwise in tags or torch.Tag.core in tags
    random = torch.Tag.nondeterministic_seeded in tags
    if found is None or not safe or random or found._schema.is_mutable:
        raise ValueError(f"the operation {name!r} is not known to have no effect but its result")
    return found


def _option(name: str, held: Any, like: Tensor) -> Any:
    """A keyword argument; "input" stands for the dtype or device of the input."""
    if held == "input":
        return like.dtype if name == "dtype" else like.device
    if name == "dtype" and isinstance(held, str):
        return getattr(torch, held)
    return held


def _representable(number: float, dtype: torch.dtype) -> float:
    """A bound of another dtype, such as its largest number, as a finite one other than zero."""
    size, info = abs(number), torch.finfo(dtype)
    if not math.isfinite(number) or size == 0 or info.tiny <= size <= info.max:
        return number
    return math.copysign(info.max if size > 1 else info.tiny, number)


class _Reader:
    """Reads torch's graph of a function into the three parts of a :class:`Recorded`."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        self.graph = graph
        self.steps: list[list] = []
        self.constants: list[Tensor] = []
        self.where: dict[Node, Plain] = {}  # what depends on the inputs
        self.known: dict[Node, Any] = {}  # what does not

    def read(self) -> tuple[list[list], list[Tensor], list[Plain]]:
        """Steps, constants and outputs."""
        nodes = list(self.graph.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        self.where = {node: {"input": i} for i, node in enumerate(inputs)}
        (last,) = [node for node in nodes if node.op == "output"]
        wanted = _behind(last)
        for node in nodes:
            if node.op == "get_attr":
                self.known[node] = getattr(self.graph, node.target)
            elif node.op == "call_function" and node in wanted:
                self._step(node)
        outputs = [self._held(node) for node in last.args[0]]
        return self.steps, self.constants, outputs

    def _step(self, node: Node) -> None:
        target = _reshaping(node.target)
        name = "getitem" if target is operator.getitem else str(target).removeprefix("aten.")
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
            raise ValueError(f"the operation {name!r} draws random numbers")
        if not any(parent in self.where for parent in node.all_input_nodes):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self.known.__getitem__)
            self.known[node] = target(*args, **kwargs)
            return
        _operation(name)
        args = [self._held(held) for held in node.args]
        kwargs = {key: _plain_option(held) for key, held in node.kwargs.items()}
        kwargs = {key: self._held(held) for key, held in kwargs.items() if held is not None}
        self.steps.append([name, args, kwargs])
        self.where[node] = {"step": len(self.steps) - 1}

    def _held(self, held: Any) -> Plain:
        """An argument as plain data."""
        if isinstance(held, list | tuple):
            return [self._held(part) for part in held]
        if not isinstance(held, Node):
            return held
        if held not in self.where:
            self.where[held] = {"constant": len(self.constants)}
            # Of a size that was broadcast, only the numbers themselves.
            self.constants.append(self.known[held].detach().clone())
        return self.where[held]


def _reshaping(target: Callable) -> Callable:
    """In place of what changes a tensor's shape in place, as torch's own matmul does, a view."""
    if torch.Tag.inplace_view not in getattr(target, "tags", ()):
        return target
    packet = getattr(torch.ops.aten, target.overloadpacket.__name__.removesuffix("_"))
    views = (getattr(packet, name) for name in packet.overloads())
    return next((f for f in views if _arguments(f) == _arguments(target)), target)


def _plain_option(held: Any) -> Any:
    """Dtypes and devices by name; those of the input follow it."""
    if isinstance(held, torch.dtype):
        return "input" if held.is_floating_point else str(held).removeprefix("torch.")
    if isinstance(held, torch.device):
        return "input"
    return None if isinstance(held, torch.layout | torch.memory_format) else held


def _behind(last: Node) -> set[Node]:
    """The nodes that the outputs need; checks, which have no result, are none of them."""
    found, open_nodes = set(), list(last.all_input_nodes)
    while open_nodes:
        node = open_nodes.pop()
        if node not in found:
            found.add(node)
            open_nodes += node.all_input_nodes
    return found
