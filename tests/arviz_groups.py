"""Reading the groups of an export, whichever container they are in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def rows(idata: Any, group: str, name: str) -> Tensor:
    """The draws of a variable, shape (S, ...)."""
    return torch.as_tensor(np.array(idata[group][name].values[0]))


def variables(idata: Any, group: str) -> dict[str, Any]:
    """The arrays of a group, by name."""
    return {name: idata[group][name] for name in idata[group].data_vars}
