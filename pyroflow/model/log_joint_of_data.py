"""The log joint of a model and many data sets: recorded once, with the data as inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pyroflow.model.log_joint import ROUNDED, LogJoint, _Evaluated, _padded, terms_at, traced
from pyroflow.model.records import Values
from pyroflow.model.runs import Runs


class LogJointOfData(LogJoint):
    """The log joint of a model, where each point has one of M data sets.

    Args:
        bind: the model's runs with data by name, of which each is a tensor of one data set.
        inspected: runs of the first one.
        guide: of the first one; the others have the same latents and form of coordinates.
        data: by name, shape (M, *).
        num: points that one evaluation takes. Others are made to fit.

    Attributes:
        moved_by: the tensors of the guides' coordinates, shape (M, *) each.

    Raises:
        RuntimeError: If it cannot be recorded, as where control flow depends on the data; torch
            and Pyro raise other errors too (:data:`~pyroflow.model.comparison.FAILURES`).
    """

    def __init__(
        self, bind: Callable[[Values], Runs], inspected: Runs, guide: Any, data: Values, num: int
    ) -> None:
        self.bind, self.runs, self.guide, self.data = bind, inspected, guide, data
        self.count, self.num = len(next(iter(data.values()))), inspected.at_once(num)
        tensors = super()._moved_by()
        self.moved_by = [t.repeat(self.count, *[1] * t.dim()) for t in tensors]
        start = guide.start()
        whose = torch.arange(self.num, device=start.device) % self.count
        self._graph = traced(self._at, start.repeat(self.num, 1), *self._given(whose))

    def __call__(self, x: Tensor) -> Tensor:
        """The log joint at x (S, M, D), shape (S, M), with a first derivative."""
        whose = torch.arange(self.count, device=x.device).repeat(len(x))
        at = SimpleNamespace(values_and_gradients=lambda x: self.values_and_gradients(x, whose))
        return _Evaluated.apply(x.flatten(0, 1), at).unflatten(0, x.shape[:2])

    @torch.no_grad()
    def values_and_gradients(self, x: Tensor, whose: Tensor) -> tuple[Tensor, Tensor]:
        """The log joint at x (N, D) and its gradient; of which data sets says ``whose`` (N,)."""
        parts = []
        for part, own in zip(x.detach().split(self.num), whose.split(self.num), strict=True):
            own = _padded(own.unsqueeze(1), self.num).squeeze(1)
            parts.append(self._graph(_padded(part, self.num), *self._given(own)))
        value, gradient = (torch.cat(found)[: len(x)] for found in zip(*parts, strict=True))
        return value, gradient

    def agrees(self, x: Tensor, models: Sequence[Runs]) -> list[bool]:
        """Whether it is what the models themselves say at x (M, D), of each data set."""
        found = self.values_and_gradients(x, torch.arange(len(x), device=x.device))
        kept, same = self.runs, []
        for i, self.runs in enumerate(models):
            moved_by = tuple(t[i] for t in self.moved_by)
            expected = self._value_and_gradient(x[i : i + 1], self.runs.one_by_one, moved_by)
            same.append(self._same((t[i : i + 1] for t in found), expected))
        self.runs = kept
        return same

    def _given(self, whose: Tensor) -> list[Tensor]:
        """Of points, what depends on their data sets."""
        return [t[whose] for t in (*self.moved_by, *self.data.values())]

    def _at(self, x: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient at x (N, D), each with coordinates and data of its own."""

        def alone(x: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
            moved_by, values = given[: len(self.moved_by)], given[len(self.moved_by) :]
            runs = self.bind(dict(zip(self.data, values, strict=True)))
            terms, moves = terms_at(runs, self.guide, x, moved_by)
            value = torch.stack([term.sum() for term in terms.values()]).sum()
            return value, moves.result()[2] if moved_by else torch.zeros_like(value)

        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value, lost = torch.func.vmap(alone)(x, *given)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        return value.detach().where(lost < ROUNDED, torch.nan), gradient
