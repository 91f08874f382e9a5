"""A guide as plain data: its options, its flow, and its sites in place of model and data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyroflow.guides import AutoFlow, AutoPlanarFlow, AutoSylvesterFlow
from pyroflow.model.latents import Latents
from pyroflow.saving.flows import describe_flow, restore_flow
from pyroflow.saving.recipes import DESCRIPTIONS

Description = dict[str, Any]

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


def describe_guide(guide: AutoFlow) -> Description:
    """All that :func:`restore_guide` needs.

    Raises:
        ValueError: a guide that was never set up, so that its latents are not known.
        UndescribedError: a transform or a support that is not in the table.
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
        "sites": guide.latents.describe(DESCRIPTIONS.describe),
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
    guide.set_latents(Latents.restore(description["sites"], DESCRIPTIONS.build, like))
    return guide


def _absent(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        "this guide was loaded without its model: load it with pyroflow.load(path, model=model)"
    )
