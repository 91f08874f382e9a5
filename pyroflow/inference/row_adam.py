"""Adam for tables of which a step has some rows at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RowAdam(torch.optim.Adam):
    """Adam, which of a parameter with a sparse gradient moves the rows at hand alone.

    Each row has moments and a count of steps of its own, so that one that comes late starts like
    the first ones. The rows at hand must differ.

    Example:
        >>> table, index = torch.zeros(5, 2, requires_grad=True), torch.tensor([3, 1])
        >>> adam = RowAdam([table], lr=0.1)
        >>> torch.nn.functional.embedding(index, table, sparse=True).sum().backward()
        >>> adam.step()
        >>> table[:, 0].tolist()
        [0.0, -0.1..., 0.0, -0.1..., 0.0]
    """

    def clip(self, max_norm: float) -> Tensor:
        """Scale gradients down to a norm; return the norm that they had."""
        return torch.nn.utils.clip_grad_norm_([_dense(p) for _, p in self._pairs()], max_norm)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step."""
        sparse = [(group, p, p.grad) for group, p in self._pairs() if _is_sparse(p)]
        for _, p, _ in sparse:
            p.grad = None
        super().step(closure)
        for group, p, grad in sparse:
            self._move(group, p, grad._indices()[0], grad._values())
        for _, p in self._pairs():
            torch.autograd.graph.increment_version(p)  # fused Adam does not

    def _pairs(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [(group, p) for group in self.param_groups for p in group["params"]]

    def _move(self, group: dict[str, Any], p: Tensor, index: Tensor, grad: Tensor) -> None:
        state, (first, second) = self.state[p], group["betas"]
        if not state:
            state["step"] = p.new_zeros(len(p), *(1,) * (p.dim() - 1), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        count = state["step"][index] + 1.0
        mean = state["exp_avg"][index].lerp(grad, 1 - first)
        square = state["exp_avg_sq"][index].lerp(grad.square(), 1 - second)
        for name, rows in (("step", count), ("exp_avg", mean), ("exp_avg_sq", square)):
            state[name][index] = rows
        taken = count.double()
        mean, square = mean / (1 - first**taken), square / (1 - second**taken)
        p.index_add_(0, index, (mean / (square.sqrt() + group["eps"])).to(p), alpha=-group["lr"])


def _is_sparse(p: Tensor) -> bool:
    return p.grad is not None and p.grad.is_sparse


def _dense(p: Tensor) -> Tensor:
    """A parameter, or a tensor that has the rows of its sparse gradient as gradient."""
    if not _is_sparse(p):
        return p
    values = p.grad._values()
    held = torch.empty_like(values)
    held.grad = values
    return held
