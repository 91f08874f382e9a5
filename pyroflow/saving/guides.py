"""Flows and guides as plain data, with the sites of a guide in place of its model and data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pyroflow.flows import Flow
from pyroflow.guides import (
    AmortizedPlanarGuide,
    AutoFlow,
    AutoPlanarFlow,
    AutoStructuredFlow,
    AutoSylvesterFlow,
)
from pyroflow.guides.coordinates import Coordinates
from pyroflow.guides.local_flow import LocalFlow
from pyroflow.guides.mixture import MixtureGuide
from pyroflow.guides.rows import RowContext, Rows
from pyroflow.guides.structure import kinds_of
from pyroflow.model.latents import Latents
from pyroflow.saving.table import Description, UndescribedError, build, describe, stored
from pyroflow.seeds import seeded

# The constructor's arguments, and the guide's attributes that hold them.
_COMMON = {"affine": "affine_kind", "init_scale": "init_scale", "base_df": "base_df"}
_COMMON |= {"centring": "centring_given"}
_LAYERED = _COMMON | {"num_layers": "num_layers", "tails": "tails"}
_OPTIONS: dict[type[AutoFlow], dict[str, str]] = {
    AutoFlow: _COMMON,
    AutoPlanarFlow: _LAYERED,
    AutoSylvesterFlow: _LAYERED | {"num_units": "num_units", "orthogonal": "orthogonal"},
    AutoStructuredFlow: {"init_scale": "init_scale", "centring": "centring_given"}
    | {name: name for name in ("num_layers", "num_units", "tails")},
}
_CLASSES = {made.__name__: made for made in _OPTIONS}
_SWITCHES = ("path_derivative", "grows")  # attributes that are set later, or by another argument

SavedGuide = AutoFlow | MixtureGuide | AmortizedPlanarGuide
GUIDES = (*_OPTIONS, MixtureGuide, AmortizedPlanarGuide)


def describe_flow(flow: Flow) -> Description:
    """What a flow is made of, and its state.

    Raises:
        UndescribedError: If a base or a transform is not in the table, or the depth is still open.
    """
    if flow.deepen is not None:
        raise UndescribedError("a depth of layers, 'auto', that fit_density has not found yet")
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


def describe_guide(guide: SavedGuide) -> Description:
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
    if isinstance(guide, MixtureGuide):
        return {
            "class": MixtureGuide.__name__,
            "sites": guide.latents.describe(describe),
            "guides": [describe_guide(part) for part in guide.guides],
            "weights": stored(guide.weights),
        }
    if isinstance(guide, AmortizedPlanarGuide):
        return _describe_amortized(guide)
    options = _OPTIONS[type(guide)].items()
    return {
        "class": type(guide).__name__,
        "options": {name: getattr(guide, at) for name, at in options},
        "switches": {name: getattr(guide, name) for name in _SWITCHES if hasattr(guide, name)},
        "sites": guide.latents.describe(describe),
        "subsampling": {name: list(sizes) for name, sizes in guide.subsampling.plates.items()},
        "flow": describe_flow(guide.flow),
        "coordinates": guide.coordinates and guide.coordinates.describe(stored),
    }


def _describe_amortized(guide: AmortizedPlanarGuide) -> Description:
    state = guide.state_dict().items()
    return {
        "class": AmortizedPlanarGuide.__name__,
        "plates": list(guide.local_plates) if guide._several else guide.local_plates[0],
        "options": guide._local
        | guide._both
        | {"global_layers": guide._global["num_layers"]}
        | {"condition_on_globals": guide.condition_on_globals},
        "rows": [
            {
                "context": part.context and _describe_context(part.context),
                "features": 0 if part.context is None else part.flow.net.context_dim,
                "shared": part.flow.shift.shape[-1],
            }
            for part in guide.parts
        ],
        "sites": guide.latents.describe(describe),
        "subsampling": {name: list(sizes) for name, sizes in guide.subsampling.plates.items()},
        "globals": guide.global_guide and describe_guide(guide.global_guide),
        "state": {n: stored(t) for n, t in state if not n.startswith("global_guide.")},
    }


def _describe_context(context: RowContext) -> Description:
    if context.function:
        raise UndescribedError(
            "a function as context (name the model's arguments in its place, and let encoder= do "
            "the rest)"
        )
    return {"positions": dict(context.positions), "encoder": describe(context.encoder)}


def restore_guide(description: Description, model: Callable | None) -> SavedGuide:
    """The guide of the file; without a model it samples, with one it can be trained on."""
    if description["class"] == MixtureGuide.__name__:
        parts = [restore_guide(part, model) for part in description["guides"]]
        made = MixtureGuide(_absent if model is None else model, parts, description["weights"])
        made.alone = model is None
        return made
    if description["class"] == AmortizedPlanarGuide.__name__:
        return _restore_amortized(description, model)
    made, options = _CLASSES[description["class"]], description["options"]
    if made is AutoFlow:
        options = options | {"transforms": ()}  # they are in the flow
    guide = made(_absent if model is None else model, **options)
    guide.alone = model is None
    for name in description["switches"].keys() & set(_SWITCHES):
        setattr(guide, name, bool(description["switches"][name]))
    guide.flow = restore_flow(description["flow"])
    layers = len(next(guide.flow.parts[0].parameters())) if options.get("num_layers") else 0
    if layers != options.get("num_layers", 0):
        raise ValueError(f"it claims {options['num_layers']} layers and holds {layers}")
    like = guide.flow.base.loc
    latents = Latents.restore(description["sites"], build, like)
    guide.set_latents(guide.restore_rows(latents, description.get("subsampling", {})))
    if made is AutoStructuredFlow:
        guide.kinds = kinds_of(latents, guide.affine.rows())
    coordinates = description.get("coordinates")
    guide.coordinates = coordinates and Coordinates.restore(coordinates)
    return guide


def _restore_amortized(description: Description, model: Callable | None) -> AmortizedPlanarGuide:
    made = _absent if model is None else model
    guide = AmortizedPlanarGuide(made, description["plates"], **description["options"])
    guide.alone, state = model is None, description["state"]
    like = next(value for name, value in state.items() if name.endswith("affine.offset"))
    sizes = sum(math.prod(site["unconstrained_shape"]) for site in description["sites"])
    latents = Latents.restore(description["sites"], build, like.new_empty(sizes))
    guide.set_latents(guide.restore_rows(latents, description["subsampling"]))
    names = [name for rows in guide.rows for name in rows.latents.sites]
    if description["globals"]:
        above = None if model is None else poutine.block(guide._model[1], hide=names)
        guide.global_guide = restore_guide(description["globals"], above)
        names += guide.global_guide.latents.sites
    if sorted(names) != sorted(latents.sites):
        raise ValueError(f"it has the sites {list(latents.sites)}, and flows of {names}")
    guide._conditioned = guide.condition_on_globals and guide.global_guide is not None
    known = list(zip(guide.rows, description["rows"], strict=True))
    guide.context = guide._held([_restore_context(one["context"], one, like) for _, one in known])
    guide.local_flow = guide._held([_restore_flow_of_rows(guide, *pair) for pair in known])
    left = guide.load_state_dict(state, strict=False, assign=True)
    missing = [name for name in left.missing_keys if not name.startswith("global_guide.")]
    if missing or left.unexpected_keys:
        raise ValueError(f"it lacks {missing} and has {left.unexpected_keys}")
    return guide


def _restore_context(
    description: Description | None, rows: Description, like: Tensor
) -> RowContext | None:
    if description is None:
        return None
    positions = description["positions"]
    context = RowContext(list(positions), _absent, build(description["encoder"]))
    context.positions = {str(n): None if at is None else int(at) for n, at in positions.items()}
    if context.encoder is None:
        for name in ("loc", "scale"):
            context.register_buffer(name, like.new_zeros(rows["features"]))
    return context


def _restore_flow_of_rows(
    guide: AmortizedPlanarGuide, rows: Rows, description: Description
) -> LocalFlow:
    sizes = {name: description[name] for name in ("features", "shared")}
    if description["context"] is None:
        sizes["rows"] = rows.size
    return LocalFlow(rows.init_loc, **sizes, **guide._local, **guide._both)


def _absent(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        "this guide was loaded without its model: load it with pyroflow.load(path, model=model)"
    )
