"""Transforms that are not pyroflow's: what is hidden in them, and their caches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform

from pyroflow.transforms import Bijection


def modules_within(t: Transform | ConditionalTransform) -> list[nn.Module]:
    """The transform if it is a module, else the modules that it holds, outermost first.

    Torch's ``IndependentTransform`` and the like are no modules: parameters of what they hold
    would neither be trained nor saved.
    """
    return [t] if isinstance(t, nn.Module) else [m for u in _held(t) for m in modules_within(u)]


def clear_caches(transforms: Iterable[Transform | ConditionalTransform]) -> None:
    """Empty the caches of transforms and of those within, where they are not pyroflow's.

    Such a cache outlives an optimiser step (pyro issue #2564): the same tensor would get its old
    value, or a graph that is gone. And tensors with a graph can neither be copied nor pickled.
    """
    for t in transforms:
        if isinstance(t, Bijection):
            continue
        if isinstance(t, Transform):
            t.clear_cache()
        for name, value in list(vars(t).items()):
            if name.startswith("_cache") and isinstance(value, Tensor):
                setattr(t, name, None)
        clear_caches(_held(t))


def _held(t: Transform | ConditionalTransform) -> Iterator[Transform]:
    if isinstance(t, _InverseTransform):
        yield t.inv
        return
    values = [value for name, value in vars(t).items() if name != "_inv"]
    values += t.children() if isinstance(t, nn.Module) else []
    for value in values:
        members = value if isinstance(value, list | tuple) else [value]
        yield from (inner for inner in members if isinstance(inner, Transform))
