"""Flows and guides as plain data, with the sites of a guide in place of its model and data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from pyroflow.flows import Flow
from pyroflow.guides import AutoFlow, AutoPlanarFlow, AutoSylvesterFlow
from pyroflow.model.latents import Latents
from pyroflow.saving.table import Description, build, describe, stored
from pyroflow.seeds import seeded

# The constructor's arguments, and the guide's attributes that hold them.
_COMMON = {"affine": "affine_kind", "init_scale": "init_scale", "base_df": "base_df"}
_LAYERED = _COMMON | {"num_layers": "num_layers"}
_OPTIONS: dict[type[AutoFlow], dict[str, str]] = {
    AutoFlow: _COMMON,
    AutoPlanarFlow: _LAYERED,
    AutoSylvesterFlow: _LAYERED | {"num_units": "num_units", "orthogonal": "orthogonal"},
}
_CLASSES = {made.__name__: made for made in _OPTIONS}
_SWITCHES = ("path_derivative", "grows")  # attributes that are set later, or by another argument

GUIDES = tuple(_OPTIONS)


def describe_flow(flow: Flow) -> Description:
    """What a flow is made of, and its state.

    Raises:
        UndescribedError: If a base or a transform is not in the table.
    """
    return {
        "parts": describe(flow),
        "state": tree_map_only(Tensor, stored, dict(flow.state_dict())),
        "frozen": [name for name, p in flow.named_parameters() if not p.requires_grad],
        "training": flow.training,
    }


def restore_flow(description: Description) -> Flow:
    """The flow of the file, with the tensors of the file: their dtype and device are kept."""
    with seeded(0):  # the start values are drawn and then replaced
        flow = build(description["parts"])
    flow.load_state_dict(description["state"], assign=True)
    for name, p in flow.named_parameters():
        p.requires_grad_(name not in description["frozen"])
    return flow.train(description["training"])


def describe_guide(guide: AutoFlow) -> Description:
    """Its options, its flow and its latents.

    Raises:
        ValueError: If the guide was never set up, so that its latents are not known.
        UndescribedError: If a transform or a support is not in the table.
    """
    if guide.prototype_trace is None:
        raise ValueError(
            "obj is a guide that was never set up, so its latents are not known: call it once with "
            "the model's arguments first, guide(*args, **kwargs)"
        )
    options = _OPTIONS[type(guide)].items()
    return {
        "class": type(guide).__name__,
        "options": {name: getattr(guide, at) for name, at in options},
        "switches": {name: getattr(guide, name) for name in _SWITCHES if hasattr(guide, name)},
        "sites": guide.latents.describe(describe),
        "flow": describe_flow(guide.flow),
    }


def restore_guide(description: Description, model: Callable | None) -> AutoFlow:
    """The guide of the file; without a model it samples, with one it can be trained on."""
    made, options = _CLASSES[description["class"]], description["options"]
    if made is AutoFlow:
        options = options | {"transforms": ()}  # they are in the flow
    guide = made(_absent if model is None else model, **options)
    for name in description["switches"].keys() & set(_SWITCHES):
        setattr(guide, name, bool(description["switches"][name]))
    guide.flow = restore_flow(description["flow"])
    layers = len(next(guide.flow.parts[0].parameters())) if options.get("num_layers") else 0
    if layers != options.get("num_layers", 0):
        raise ValueError(f"it claims {options['num_layers']} layers and holds {layers}")
    like = guide.flow.base.loc
    guide.set_latents(Latents.restore(description["sites"], build, like))
    return guide


def _absent(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        "this guide was loaded without its model: load it with pyroflow.load(path, model=model)"
    )
