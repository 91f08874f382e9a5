"""What guides show of themselves."""

from __future__ import annotations

from collections.abc import Callable

from pyroflow.model.bound import within
from pyroflow.shown import Shown, listed, parameters_of


class ShownGuide(Shown):
    """A guide as a table: its latents, its layers, and whether it was fitted."""

    def _shown(self) -> tuple[str, dict[str, str]]:
        # A pickle has none, nor has a file.
        model = "" if self._model is None or self.alone else f" of {_name(self._model[-1])}"
        if self.prototype_trace is None:
            return type(self).__name__ + model, {"latents": "not known before setup or a call"}
        latents = zip(self.latents, self.latents.sizes, strict=True)
        sites = listed(f"{s.name} {tuple(s.value.shape)}" for s, _ in latents)
        total = sum(self.latents.sizes)
        rows = {"latents": f"{total:,} number{'s' * (total != 1)}: {sites}"}
        if self.local_plates:
            rows["rows of"] = ", ".join(self.local_plates)
        return type(self).__name__ + model, rows | self._shown_parts()

    def _shown_parts(self) -> dict[str, str]:
        flow = vars(self)["_modules"].get("flow")
        shown = {} if flow is None or not hasattr(flow, "steps") else dict(flow._shown()[1])
        rows = {name: shown[name] for name in ("layers", "base", "fitted") if name in shown}
        if getattr(self, "centring", None):
            found = (f"{name} {c.mean().item():.2f}" for name, c in self.centring.items())
            rows["centring"] = f"{listed(found)} (1 as written, 0 non-centred)"
        if flow is None:
            rows["fitted"] = "no" if self.untouched else "yes"
        return rows | {"parameters": parameters_of(self)}


def _name(model: Callable) -> str:
    model = within(model)
    return getattr(model, "__name__", None) or type(model).__name__
