"""Steps that are launches of a graph on a GPU, played on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyroflow.inference import launches

LOOKS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}


class Blind(TorchDispatchMode):
    """Where the host may not see a result, as in a graph."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in LOOKS or any(m is not None and m.dtype == torch.bool for m in masks):
            raise RuntimeError(f"{name} in a graph")
        return func(*args, **(kwargs or {}))


def played(step: Callable[[], None], idle: Tensor) -> Callable[[], None]:
    """A step that is run by Python each time, blind."""

    def replay() -> None:
        with pyro.validation_enabled(False), Blind():
            step()

    idle.fill_(True)
    for _ in range(launches.WARM_UP):
        replay()
    idle.fill_(False)
    return replay
