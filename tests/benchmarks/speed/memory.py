"""The most memory that a forward and a backward pass hold at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from .contenders import OURS, PYRO, Contender, Ours, PyroChain
from .problem import Problem, Shape

SHAPES = (Shape(10_000, 40, 32), Shape(4096, 784, 32))


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes of torch's allocator there that the function held at once, beyond those before."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def forward_and_backward(stack: Contender, problem: Problem) -> Callable[[], object]:
    """y, log|det| and the parameters' gradients; those of y and log|det| are given."""
    gradients = torch.randn_like(problem.x), torch.randn_like(problem.x[:, 0])

    def run() -> object:
        outputs = stack(problem.x.detach())
        return torch.autograd.grad(outputs, stack.parameters, gradients)

    return run


def memory(shape: Shape) -> dict[str, float]:
    """Numbers held at the peak, input included; "beside" is what input and output leave, / (N K).

    The gradients of y and log|det|, which the loss makes, and the parameters are not counted.
    """
    problem = Problem.draw(shape)
    N, D, K = shape
    ends = 2 * N * D + N
    found: dict[str, float] = {"input + output": ends, "allowed": ends + 5 * N * K}
    for name, kind in ((OURS, Ours), (PYRO, PyroChain)):
        run = forward_and_backward(kind(problem), problem)
        run()
        found[name] = N * D + peak_bytes(run) / problem.x.element_size()
        found[f"{name}, beside"] = (found[name] - ends) / (N * K)
    return found
