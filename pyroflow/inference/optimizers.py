"""Adam and L-BFGS as the loop uses them, and the state to go back to where a step is cut off."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyroflow.seeds import generator_states, restore_generators

if TYPE_CHECKING:
    from pyroflow.inference.trainer import Loop

POLISH_ITERATIONS = 20  # of L-BFGS between two scores


class Mark:
    """The state of a loop between two steps of Adam.

    It is noted before every step of a fit with a checkpoint, so it copies all tensors in one call.

    Args:
        loop: the loop, between two steps.
        spare: tensors to copy into, of an older mark.
    """

    @torch.no_grad()
    def __init__(self, loop: Loop, spare: list[Tensor]) -> None:
        self.values = {name: getattr(loop, name) for name in loop.SAVED}
        self.values |= {"losses": len(loop.losses), "scores": len(loop.scores)}  # they only grow
        self.states = [part.state_dict() for part in loop.stateful]
        self.optimizer = loop.optimizer
        moments = [t for state in loop.optimizer.state.values() for t in state.values()]
        self.started = bool(moments)
        self.live = [*loop.parameters, *loop.fixed, *moments]
        self.copies = spare if len(spare) == len(self.live) else [t.clone() for t in self.live]
        torch._foreach_copy_(self.copies, self.live)
        self.rng = generator_states()

    @torch.no_grad()
    def restore(self, loop: Loop) -> None:
        """Put the loop back into that state."""
        for name in self.values.keys() - {"losses", "scores"}:
            setattr(loop, name, self.values[name])
        del loop.losses[self.values["losses"] :], loop.scores[self.values["scores"] :]
        for part, state in zip(loop.stateful, self.states, strict=True):
            part.load_state_dict(state)
        loop.optimizer = self.optimizer
        if not self.started:
            loop.optimizer.state.clear()
        copy(self.copies, self.live)
        restore_generators(self.rng)


@torch.no_grad()
def copy(values: list[Tensor], targets: list[Tensor]) -> None:
    """Set tensors to the values of others."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def adam(parameters: list[Tensor], lr: float) -> torch.optim.Adam:
    """Adam, fused where all parameters allow it: a third of the time."""
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.Adam(parameters, lr=lr, fused=fused)


def lbfgs(parameters: list[Tensor]) -> torch.optim.LBFGS:
    """L-BFGS, some iterations of it a step."""
    for p in parameters:  # it views each gradient as a flat vector
        p.data = p.data.contiguous()
    return torch.optim.LBFGS(
        parameters,
        max_iter=POLISH_ITERATIONS,
        history_size=100,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
