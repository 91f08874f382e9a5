"""Stacks of units, evaluated and inverted: fast by hand, and in differentiable operations."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

WIDEST = 2048  # an event that fits into the registers of a program


def serving(kernels: ModuleType, z: Tensor) -> ModuleType:
    """``shared`` or ``per_point``, or on a GPU with Triton what does the same in few launches.

    Those take units without s too. They are in no graph of operations that is being recorded.
    """
    served = z.is_cuda and z.dtype in (torch.float32, torch.float64) and 0 < z.shape[-1] <= WIDEST
    if not (served and len(z) and torch._C._len_torch_dispatch_stack() == 0 and _has_triton()):
        return kernels
    name = kernels.__name__.rpartition(".")[2]
    return import_module(f"{__name__}.cuda_{name}")


@cache
def _has_triton() -> bool:
    """Whether Triton is there and finds what it needs, a compiler of C for one."""
    try:
        target = import_module("triton").runtime.driver.active.get_current_target()
        return target.backend == "cuda" and target.arch >= 70
    except Exception:  # whatever it is, torch's own operations are at hand
        return False
