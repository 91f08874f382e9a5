"""A flow as plain data: what it is made of, and its state."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyroflow.flows import Flow
from pyroflow.saving.description import stored
from pyroflow.saving.recipes import DESCRIPTIONS
from pyroflow.seeds import seeded


def describe_flow(flow: Flow) -> dict[str, Any]:
    """All that :func:`restore_flow` needs.

    Raises:
        UndescribedError: a base or a transform that is not in the table.
    """
    state = {
        name: stored(value) if isinstance(value, Tensor) else value
        for name, value in flow.state_dict().items()
    }
    return {
        "parts": DESCRIPTIONS.describe(flow),
        "state": state,
        "frozen": [name for name, p in flow.named_parameters() if not p.requires_grad],
        "training": flow.training,
    }


def restore_flow(description: dict[str, Any]) -> Flow:
    """The flow of the file, with the tensors of the file: their dtype and device are kept."""
    with seeded(0):  # the start values are drawn and then replaced
        flow = DESCRIPTIONS.build(description["parts"])
    flow.load_state_dict(description["state"], assign=True)
    for name, p in flow.named_parameters():
        p.requires_grad_(name not in description["frozen"])
    return flow.train(description["training"])
