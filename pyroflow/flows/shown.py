"""What flows show of themselves."""

from __future__ import annotations

from pyroflow.shown import Shown, listed, parameters_of
from pyroflow.transforms import Planar, Radial, SinhArcsinh, Sylvester
from pyroflow.transforms.conditional import Conditional, ConditionalLayers

# They start as the identity and run either way.
LAYERS = (Planar, Radial, SinhArcsinh, Sylvester, ConditionalLayers)


class ShownFlow(Shown):
    """A flow as a table: its layers, their direction, and whether it was fitted."""

    def _shown(self) -> tuple[str, dict[str, str]]:
        ways = {True: "data to base", False: "base to data"}
        ours = {way for t, way in self.steps if isinstance(t, LAYERS)}
        found = " and ".join(ways[way] for way in sorted(ours))
        turns = ", which the first fit may turn" * self._undecided
        names = (f"{t!r}.inv" if way else f"{t!r}" for t, way in self.steps)
        given = [t.nn.context_dim for t, _ in self.steps if isinstance(t, Conditional)]
        rows = {
            "numbers": f"{self.input_dim}" + (f", given a context of {given[0]}" if given else ""),
            "layers": listed(names) or "none",
            "direction": f"{found}, in closed form{turns}" if found else "as given",
            "base": type(self.base).__name__,
            "parameters": parameters_of(self),
            "fitted": "yes" if self.fitted else "by no fit_ function",
        }
        if self.columns is not None:
            rows["columns"] = listed(self.columns)
        return "Flow", rows
