"""What transforms show of themselves."""

from __future__ import annotations

from inspect import signature

from pyroflow.shown import Shown


class ShownTransform(Shown):
    """A transform as the call that makes one of its size."""

    def _shown(self) -> tuple[str, dict[str, str]]:
        first, taken = next(iter(self.event_dims)), signature(type(self)).parameters
        shape, sizes = tuple(getattr(self, first).shape), {}
        if self.event_dims[first] == 3:
            sizes["num_units"] = shape[1]
        if self.event_dims[first] > 1:
            sizes["num_layers"] = shape[0]
        named = [f"{name}={size}" for name, size in sizes.items() if name in taken]
        return f"{self._name()}({', '.join([str(shape[-1]), *named])})", {}
