"""Whether a model is the one that a guide in a file was trained with."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous, AutoGuide
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pyroflow.guides import AmortizedPlanarGuide, AutoFlow
from pyroflow.guides.mixture import MixtureGuide
from pyroflow.guides.refusals import refuse_circular, refuse_moving_supports
from pyroflow.guides.rows import positions_in
from pyroflow.model.arguments import takes
from pyroflow.model.bound import signature_of
from pyroflow.model.latents import Latents, started_anywhere
from pyroflow.saving.table import Description, build, describe
from pyroflow.seeds import one_at_a_time, seeded


def check_model(guide: AutoFlow | MixtureGuide | AmortizedPlanarGuide) -> None:
    """Compare the guide's model with the sites of the file: now, or at the call that can run it.

    Of an amortised guide the names of the arguments with the rows' data, too, now.

    Raises:
        ValueError: If they differ, now or at that call, with the site and the difference.
    """
    sized = set()  # plates of any number of rows
    for part in guide.parts if isinstance(guide, AmortizedPlanarGuide) else []:
        if part.context is not None:
            part.context.positions = positions_in(guide._model[1], list(part.context.positions))
            sized.add(part.plate)
    sites = guide.drawn(guide.subsampling).describe(describe)
    check = _Check(sites, set(guide.subsampling.plates), sized)
    try:
        alone = not signature_of(guide.model).parameters
    except (TypeError, ValueError):  # no function of Python's
        alone = False
    if alone:
        check.compare(guide.model, (), {})
    else:
        guide.register_forward_pre_hook(check, with_kwargs=True)


OF_ROWS = ("batch_shape", "unconstrained_shape")  # of a site, that count its rows


class _Check:
    """A hook that compares model and file before a call of the guide, once.

    It waits for a call that has the model's arguments and records gradients, as training does:
    ``Predictive`` may leave out the data, which turns observations into latents.
    """

    def __init__(
        self, sites: list[Description], subsampled: Collection[str], sized: Collection[str]
    ) -> None:
        self.sites, self.subsampled, self.sized = sites, set(subsampled), set(sized)

    def __call__(self, guide: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        present = guide._model is not None and torch.is_grad_enabled()  # a pickle has no model
        if present and takes(guide.model, args, kwargs):
            self.compare(guide.model, args, kwargs)
            self._remove_from(guide)

    def compare(self, model: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raise ``ValueError`` with the first difference between file and model."""
        found = _sites_of(model, args, kwargs)
        for saved in self.sites:
            name = saved["name"]
            if name not in found:
                _refuse(f"site {name!r} of the file is no latent of the model")
            for key in self._compared(saved):
                now, then = found[name][key], _comparable(saved[key])
                same = now == then if key != "plates" else self._rows(now) == self._rows(then)
                if not same:
                    _refuse(
                        f"site {name!r} has {key.replace('_', ' ')} {_shown(key, then)} in the "
                        f"file and {_shown(key, now)} now"
                    )
        added = found.keys() - {saved["name"] for saved in self.sites}
        if added:
            _refuse(f"the model has a latent {min(added)!r} that the file has not")

    def _compared(self, saved: Description) -> list[str]:
        """What is to be as in the file: not how many rows are drawn of a plate that subsamples."""
        names = {plate["name"] for plate in saved["plates"]}
        return [
            key
            for key in saved
            if key not in OF_ROWS or not names & (self.subsampled | self.sized)
            if key != "plates" or not names & self.sized
        ]

    def _rows(self, plates: list[Description]) -> list[Description]:
        """The plates, with all rows of those that subsample."""
        return [
            plate | {"size": plate["full_size"] or plate["size"]}
            if plate["name"] in self.subsampled
            else plate
            for plate in plates
        ]

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
