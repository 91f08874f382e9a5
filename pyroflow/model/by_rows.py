"""A recorded function of data with many rows, computed some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyroflow.model.recorded import Recorded, _operation, _option, graph_of

POINTS, AT_ONCE = 16, 2**18  # inputs, and numbers of a tensor by rows, which fit into a cache
_ROWS = 1_000_003  # how many there are in the shapes of what is not computed, as no other size

# Operations beside pointwise ones that leave rows apart as long as there are as many afterwards,
# that may sum over them, and of which only the shape of the value counts.
_KEEP = {
    "_to_copy", "_unsafe_view", "amax", "any", "bmm", "cat", "detach", "expand", "index",
    "logsumexp", "mm", "permute", "select", "slice", "squeeze", "stack", "sum", "t", "transpose",
    "unsqueeze", "view",
}  # fmt: skip
_SUM = {"bmm", "index_put", "mm", "sum"}
_NEW = {"full_like", "new_full", "new_ones", "new_zeros", "ones_like", "zeros_like"}


class _Held(NamedTuple):
    """A value: its number, one of its shape, and the part of the steps that it is of.

    0 where it has no rows or one for all of them, 1 with all rows, 2 after sums over them.
    """

    at: int
    like: Any
    part: int = 0

    @property
    def rows(self) -> list[int]:
        """The dimensions of rows, one at most."""
        return [dim for dim, n in enumerate(getattr(self.like, "shape", ())) if n == _ROWS]


class ByRows:
    """A recorded function in which data enter by sums over N rows, taken some rows at a time.

    So memory does not grow with the rows, what is done to some of them stays in a cache, and what
    is alike for all is computed once. N is the largest size of the constants, and ``inputs`` are
    of the shapes that it takes, the first (S, D). ValueError: If it does something else with rows
    than to map each and to sum over them.
    """

    def __init__(self, recorded: Recorded, inputs: Sequence[Tensor]) -> None:
        self.size = max(n for t in recorded.constants for n in t.shape)
        self.like, self.length = inputs[0], max(1, AT_ONCE // len(inputs[0]))
        self.known: dict[int, Tensor] = {}
        self.sliced: dict[int, int] = {}  # by constant, the dimension of its rows
        self.steps: list[tuple[_Held, Callable, list, dict[str, Any]]] = []
        self.given = len(inputs)  # the numbers of the inputs come first
        held = {"input": [self._take(x) for x in inputs], "step": []}
        held["constant"] = [self._take(t) for t in recorded.constants]

        def found(at: Any) -> Any:
            return next(held[kind][i] for kind, i in at.items()) if isinstance(at, dict) else at

        for name, args, kwargs in recorded.steps:
            held["step"].append(self._read(name, _mapped(args, found), kwargs))
        self.outputs = _mapped(recorded.outputs, found)
        if any(h.rows for h in (*held["input"], *self.outputs)):
            raise ValueError("there are as many latents or results as rows")

    @classmethod
    def of(cls, function: Callable, *inputs: Tensor) -> ByRows:
        """From a function, which is recorded without computing what it gives."""
        options = {"tracing_mode": "fake", "_allow_non_fake_inputs": True}
        graph = graph_of(function, *inputs, **options)
        return cls(Recorded.of(graph, *inputs, **options), inputs)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The results."""
        known, totals = self.known | dict(enumerate(inputs)), {}
        self._run(0, known)
        for start in range(0, self.size, self.length):
            num = min(self.length, self.size - start)
            cut = {at: self.known[at].narrow(dim, start, num) for at, dim in self.sliced.items()}
            for at, part in self._run(1, known | cut).items():
                totals[at] = totals.get(at, 0.0) + part.double()
        known |= {at: total.to(self.like) for at, total in totals.items()}
        self._run(2, known)
        return [known[h.at] for h in self.outputs]

    def _run(self, part: int, known: dict[int, Any]) -> dict[int, Tensor]:
        """Take the steps of a part; the sums over rows."""

        def value(held: Any) -> Any:
            return known[held.at] if isinstance(held, _Held) else held

        sums = {}
        for held, run, args, options in self.steps:
            if held.part == part:
                known[held.at] = run(*_mapped(args, value), **options)
                if part == 1 and not held.rows:
                    sums[held.at] = known[held.at]
        return sums

    def _take(self, t: Tensor) -> _Held:
        """A tensor that is known; of rows that are alike, one is kept."""
        at = len(self.known) + len(self.steps)
        shape = [_ROWS if n == self.size else n for n in t.shape]
        held = _Held(at, torch.empty(shape, dtype=t.dtype, device="meta"))
        if dims := held.rows:
            first = t.narrow(dims[0], 0, 1)
            if bool((t == first).all()):
                t = first
            else:
                self.sliced[at], held = dims[0], held._replace(part=1)
        self.known[at] = t
        return held

    def _read(self, name: str, args: list, kwargs: dict[str, Any]) -> _Held:
        """Take in a step."""
        packet = name.partition(".")[0]
        if packet == "masked_fill":
            x, mask, fill = args
            shape = torch.broadcast_shapes(x.like.shape, mask.like.shape)
            if x.like.shape == shape and mask.at in self.known and not self.known[mask.at].any():
                return x
            fill = self._take(torch.tensor(fill, dtype=x.like.dtype, device=self.like.device))
            name, args = "where.self", [mask, fill, x]  # which keeps the order of the memory
        if packet == "softplus_backward" and args[2] == 1:  # by what is five times as fast
            slope = self._read("sigmoid.default", args[1:2], {})
            name, args = "mul.Tensor", [args[0], slope]
        run = _operation(name)
        options = {key: _option(key, value, self.like) for key, value in kwargs.items()}
        args, used = _resized(args, self.size, _ROWS), []
        if packet in _NEW:  # whatever the value
            shape = [1 if n == _ROWS else n for n in args[0].like.shape]
            x = torch.empty(shape, dtype=args[0].like.dtype, device=self.like.device)
            like = run(args[0].like, *args[1:], **options).to("meta")
            t = run(x, *_resized(args[1:], _ROWS, 1), **options)
            return self._take(t)._replace(like=like)

        def like(held: Any) -> Any:
            used.extend([held] * isinstance(held, _Held))
            return held.like if isinstance(held, _Held) else held

        found = run(*_mapped(args, like), **options)
        at, part = len(self.known) + len(self.steps), max((h.part for h in used), default=0)
        held = _Held(at, found, part)
        _check(name, used, held)
        if packet == "index_put":
            constant = used[0].at >= self.given and used[0].at in self.known
            if args[3:] != [True] or not constant or self.known[used[0].at].any():
                raise ValueError("values at indices are not added to zeros")
        args = _resized(args, _ROWS, -1 if part == 1 else 1)
        self.steps.append((held, run, args, options))
        return held._replace(part=2) if part == 1 and not held.rows else held


def _check(name: str, used: list[_Held], held: _Held) -> None:
    """Raise ``ValueError`` unless a step leaves rows apart, or sums over all of them."""
    rows, parts = [h for h in used if h.rows], {h.part for h in used}
    if not rows and not held.rows:
        return
    packet = name.partition(".")[0]
    pointwise = torch.Tag.pointwise in getattr(_operation(name), "tags", ())
    known = pointwise or packet in ({"expand"} if not rows else _KEEP if held.rows else _SUM)
    # One row stands for all only where it is broadcast.
    even = pointwise or held.rows and 1 not in parts or all(h.part == 1 for h in rows)
    before = {h.like.shape[: h.rows[0]].numel() for h in (*rows, held) if h.rows}
    moved = used[0].rows if "index" in packet else "view" in packet and len(before) > 1
    if held.rows[1:] or parts >= {1, 2} or moved or not (known and even):
        raise ValueError(f"{name} is not known to keep rows apart")


def _resized(args: list, size: int, other: int) -> list:
    """Arguments with another size in the shapes among them."""

    def change(n: Any) -> Any:
        return other if n == size else n

    return [_mapped(a, change) if isinstance(a, list) else a for a in args]


def _mapped(held: Any, change: Callable[[Any], Any]) -> Any:
    return [_mapped(part, change) for part in held] if isinstance(held, list) else change(held)
