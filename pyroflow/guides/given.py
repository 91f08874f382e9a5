"""The transforms that a guide is given, made into a flow over its latents."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform

from pyroflow.flows import Flow
from pyroflow.seeds import seeded

LARGEST_TRIED = 1000  # of the sizes that are offered to a transform which refuses the latents

Build = Callable[[int], Transform | Iterable[Transform]]


def check_transforms(transforms: Transform | Iterable[Transform] | Build) -> list | Build:
    """Return the function, or the transforms as a list.

    Raises:
        TypeError: something else than a transform, several of them, or a function.
        ValueError: a conditional transform.
    """
    is_build = callable(transforms) and not isinstance(transforms, Transform | nn.Module)
    return transforms if is_build else _checked(transforms)


def transforms_for(latent_dim: int, given: list | Build) -> list[Transform]:
    """The transforms for D latents; raises as :func:`check_transforms`."""
    return list(given) if isinstance(given, list) else _checked(given(latent_dim))


def _checked(transforms: Any) -> list[Transform]:
    if isinstance(transforms, Transform | ConditionalTransform):
        transforms = [transforms]
    if not isinstance(transforms, Iterable):
        raise TypeError(
            "transforms must be a sequence of transforms, or a function from the number of latents "
            f"to one, got {type(transforms).__name__}"
        )
    for t in transforms:
        if isinstance(t, ConditionalTransform):
            raise ValueError(
                f"transforms must not be conditional, got {type(t).__name__}: a guide has no "
                "context to give; pass t.condition(context) or the unconditional transform"
            )
        if not isinstance(t, Transform):
            raise TypeError(f"transforms must hold transforms, got {type(t).__name__}")
    return list(transforms)


@torch.no_grad()
def check_sizes(flow: Flow, latent_dim: int) -> None:
    """Send a draw through the transforms: nothing else tells what size each of them takes.

    Raises:
        ValueError: a transform that does not take it, or a last one that returns another shape.
    """
    with seeded(0):
        value = flow.base().sample()
        for t in flow.transforms():
            value = _image(t, value, latent_dim)
    if value.shape != (latent_dim,):
        raise ValueError(
            f"transforms end in shape {tuple(value.shape)}, and the model has {latent_dim} "
            "unconstrained latents: the last transform must return a vector of them"
        )


def _image(t: Transform, x: Tensor, latent_dim: int) -> Tensor:
    if t.domain.event_dim > x.dim():
        raise ValueError(
            f"transforms: {_name(t)} acts on events of {t.domain.event_dim} dimensions, and the "
            f"model's {latent_dim} unconstrained latents are a vector: put it between two of "
            f"torch's ReshapeTransform, from ({latent_dim},) to the shape it takes and back"
        )
    try:
        return _accepted(t, x)
    except Exception as error:
        size = _size_taken(t, x) if x.dim() == 1 else None
        expected = f"expects a vector of {size}" if size else "does not take them"
        raise ValueError(
            f"transforms: the model has {latent_dim} unconstrained latents, and {_name(t)} "
            f"{expected} ({error}): give transforms as a function of their number, such as "
            "AutoFlow(model, lambda latent_dim: [Planar(latent_dim)])"
        ) from error


def _accepted(t: Transform, x: Tensor) -> Tensor:
    y = t(x)
    log_det = t.log_abs_det_jacobian(x, y)
    batch = x.shape[: x.dim() - t.domain.event_dim]
    # Parameters of another size may broadcast with x, and only the shapes tell.
    if y.shape != t.forward_shape(x.shape) or log_det.shape != batch:
        raise ValueError(f"shape {tuple(x.shape)} became {tuple(y.shape)}")
    if x.dim() == 1 and getattr(t, "input_dim", len(x)) != len(x):
        raise ValueError(f"its input_dim is {t.input_dim}")
    return y


def _size_taken(t: Transform, like: Tensor) -> int | None:
    for size in range(1, LARGEST_TRIED + 1):
        try:
            _accepted(t, like.new_zeros(size))
        except Exception:
            continue
        return size
    return None


def _name(t: Transform) -> str:
    inverted = isinstance(t, _InverseTransform)
    return f"{type(t.inv).__name__}.inv" if inverted else type(t).__name__
