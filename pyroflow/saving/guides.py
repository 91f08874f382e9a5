"""Flows and guides as plain data, with the sites of a guide in place of its model and data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous, AutoGuide
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pyroflow.flows import Flow
from pyroflow.guides import AutoFlow, AutoPlanarFlow, AutoStructuredFlow, AutoSylvesterFlow
from pyroflow.guides.coordinates import Coordinates
from pyroflow.guides.mixture import MixtureGuide
from pyroflow.guides.refusals import refuse_circular, refuse_moving_supports
from pyroflow.guides.structure import kinds_of
from pyroflow.model.bound import signature_of
from pyroflow.model.latents import Latents, started_anywhere
from pyroflow.saving.table import Description, UndescribedError, build, describe, stored
from pyroflow.seeds import one_at_a_time, seeded

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

GUIDES = (*_OPTIONS, MixtureGuide)


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


def describe_guide(guide: AutoFlow | MixtureGuide) -> Description:
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


def restore_guide(description: Description, model: Callable | None) -> AutoFlow | MixtureGuide:
    """The guide of the file; without a model it samples, with one it can be trained on."""
    if description["class"] == MixtureGuide.__name__:
        parts = [restore_guide(part, model) for part in description["guides"]]
        made = MixtureGuide(_absent if model is None else model, parts, description["weights"])
        made.alone = model is None
        return made
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


def _absent(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        "this guide was loaded without its model: load it with pyroflow.load(path, model=model)"
    )


def check_model(guide: AutoFlow | MixtureGuide) -> None:
    """Compare the guide's model with the sites of the file: now, or at the call that can run it.

    Raises:
        ValueError: If they differ, now or at that call, with the site and the difference.
    """
    check = _Check(guide.drawn(guide.subsampling).describe(describe))
    try:
        alone = not signature_of(guide.model).parameters
    except (TypeError, ValueError):  # no function of Python's
        alone = False
    if alone:
        check.compare(guide.model, (), {})
    else:
        guide.register_forward_pre_hook(check, with_kwargs=True)


class _Check:
    """A hook that compares model and file before a call of the guide, once.

    It waits for a call that has the model's arguments and records gradients, as training does:
    ``Predictive`` may leave out the data, which turns observations into latents.
    """

    def __init__(self, sites: list[Description]) -> None:
        self.sites = sites

    def __call__(self, guide: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        present = guide._model is not None and torch.is_grad_enabled()  # a pickle has no model
        if present and _takes(guide.model, args, kwargs):
            self.compare(guide.model, args, kwargs)
            self._remove_from(guide)

    def compare(self, model: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raise ``ValueError`` with the first difference between file and model."""
        found = _sites_of(model, args, kwargs)
        for saved in self.sites:
            name = saved["name"]
            if name not in found:
                _refuse(f"site {name!r} of the file is no latent of the model")
            for key in saved:
                now, then = found[name][key], _comparable(saved[key])
                if now != then:
                    _refuse(
                        f"site {name!r} has {key.replace('_', ' ')} {_shown(key, then)} in the "
                        f"file and {_shown(key, now)} now"
                    )
        added = found.keys() - {saved["name"] for saved in self.sites}
        if added:
            _refuse(f"the model has a latent {min(added)!r} that the file has not")

    def _remove_from(self, guide: nn.Module) -> None:
        hooks = guide._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is self]:
            del hooks[key], guide._forward_pre_hooks_with_kwargs[key]


def _refuse(difference: str) -> None:
    raise ValueError(
        f"model does not fit the guide in the file: {difference}. Give the model and the arguments "
        "that the guide was trained with, or load it without a model to sample only"
    )


@one_at_a_time
def _sites_of(model: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Description]:
    """The latents of a run of the model, as a file would describe them.

    Raises:
        ValueError: If a guide is refused for a latent: an older file may have one.
    """
    probe = AutoContinuous(model, init_loc_fn=started_anywhere(init_to_median))
    with seeded(0), torch.no_grad():
        AutoGuide._setup_prototype(probe, *args, **kwargs)
    latents = Latents.of(probe.prototype_trace)
    refuse_circular(probe.prototype_trace)
    refuse_moving_supports(model, latents, args, kwargs)
    sites = latents.describe(describe)
    return {site["name"]: _comparable(site) for site in sites}


def _comparable(value: Any) -> Any:
    """Plain data without tensors, which have no truth value when compared."""
    return tree_map_only(Tensor, Tensor.tolist, value)


def _shown(key: str, value: Any) -> str:
    if key == "support":
        return str(build(value))
    if key == "plates":
        shown = [f"{plate['name']}(size={plate['size']}, dim={plate['dim']})" for plate in value]
        return ", ".join(shown) or "none"
    return str(value)


def _takes(model: Callable, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the model can be called so, as far as can be told."""
    try:
        signature_of(model).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # no function of Python's
        pass
    return True
