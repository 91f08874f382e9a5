"""How functions take a model, its guide and its arguments, and what they say of mistaken ones."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from pyro.infer import ELBO, SVI
from pyro.infer.autoguide import AutoGuide
from pyro.optim import PyroOptim

from pyroflow.checks import check_args, check_option_names
from pyroflow.flows import Flow
from pyroflow.guides.refusals import refuse_no_model
from pyroflow.model.arguments import arrays_at_fault, parameters_of, takes

T = TypeVar("T")
P = ParamSpec("P")


def data_into_args(*positional: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    r"""Let a function of (model, guide, \*data, args, kwargs, ...) find the model's arguments.

    They are given as to Pyro's ``svi.step``. Where the first is a tuple or list, it is ``args``
    itself, the next is ``kwargs``, and what follows are the ``positional`` options. Else all are
    the model's own. The function gets them as ``args``, a tuple, and ``kwargs``, and no data.

    Its model, guide and option names are checked too.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        name, parameters = function.__name__, inspect.signature(function).parameters
        leading = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        known = [p.name for p in parameters.values() if p.kind is not p.VAR_POSITIONAL]

        @functools.wraps(function)
        def call(*given: Any, **options: Any) -> T:
            led, data = given[: len(leading)], given[len(leading) :]
            named = dict(zip(leading, led, strict=False)) | options
            check_option_names(name, options, known, parameters_of(named.get("model")))
            _refuse_misplaced(name, data)
            options = _with_args(name, data, options, ("args", "kwargs", *positional))
            if named.keys() >= set(leading):
                check_kinds(name, named["model"], named.get("guide", _no_guide))
            given = options["args"], options.get("kwargs") or {}
            if data and isinstance(data[0], list) and not takes(named.get("model"), *given):
                raise TypeError(
                    f"{name} takes a list in first place as args, the model's arguments, and the "
                    f"model does not take these {len(data[0])}: give data as a tensor or an array"
                )
            try:
                return function(*led, **options)
            except Exception as error:
                if said := arrays_at_fault(named.get("model"), *given):
                    raise TypeError(said) from error
                raise

        return call

    return decorate


def _with_args(name: str, data: tuple, options: dict, slots: tuple[str, ...]) -> dict[str, Any]:
    """The options, with ``args`` and ``kwargs`` out of what was given by position."""
    if data and "args" in options:
        raise TypeError(f"{name} got args= and arguments by position too: give them once")
    if data and not isinstance(data[0], tuple | list):
        data = (data,)
    way_out = (
        f"({name} takes a tuple or list in first place as args; where it is the model's own "
        "argument, give args=(it, ...))"
    )
    if len(data) > len(slots):
        raise TypeError(
            f"{name} takes {', '.join(slots)} by position, got {len(data)} arguments {way_out}"
        )
    found = dict(zip(slots, data, strict=False))
    if twice := found.keys() & options.keys():
        raise TypeError(f"{name} got {', '.join(sorted(twice))} by position and by keyword too")
    found = {**found, **options}
    args, kwargs = check_args(found.get("args", ())), found.get("kwargs")
    if not isinstance(kwargs, Mapping | None):
        raise TypeError(f"kwargs must be a dict or None, got {type(kwargs).__name__} {way_out}")
    return found | {"args": args}


def _refuse_misplaced(name: str, data: tuple) -> None:
    """For what other functions take where this one takes arguments of the model."""
    for value in data:
        kind = type(value).__name__
        if isinstance(value, PyroOptim | torch.optim.Optimizer | ELBO):
            raise TypeError(
                f"{name} takes the model's arguments here, got {kind}: fit_guide brings optimiser "
                "and objective, see its lr=, steps= and objective=; with your own, take Pyro's "
                "SVI(model, guide, optim, loss)"
            )
        if isinstance(value, AutoGuide):
            raise TypeError(
                f"{name} takes the model's arguments here, got the guide {kind}: posterior makes "
                "its own guide, and the others take one, (model, guide, ...)"
            )


def _no_guide() -> None:
    """Stands for the guide of a function that takes none."""


def check_kinds(name: str, model: object, guide: object) -> None:
    """Raise ``TypeError`` for what cannot be a model, or its guide."""
    if isinstance(model, SVI):
        raise TypeError(
            f"model must be a Pyro model, got SVI: give its model, {name}(svi.model, ...)"
        )
    own = guide is _no_guide
    if isinstance(model, AutoGuide) and not isinstance(guide, AutoGuide) and callable(guide):
        raise TypeError(
            f"model and guide are swapped: the first is the guide {type(model).__name__}; call "
            f"{name}(model, {'...), which makes its own guide' if own else 'guide, ...)'}"
        )
    refuse_no_model(model)
    if isinstance(guide, Flow):
        raise TypeError(
            "guide must sample the model's latents, got a Flow, which is a density alone: take a "
            "guide made from the model, AutoPlanarFlow(model) or AutoFlow(model, transforms)"
        )
    if isinstance(guide, type):
        raise TypeError(
            f"guide must be made from the model, got the class {guide.__name__} itself: give "
            f"{guide.__name__}(model)"
        )
    if not callable(guide):
        raise TypeError(
            f"guide must be a callable made for the model, got {type(guide).__name__}: take "
            "AutoPlanarFlow(model)"
        )
