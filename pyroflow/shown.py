"""How objects show themselves: one table as text, and the same in notebooks as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from torch import nn

Rows = Mapping[str, str] | Iterable[tuple[str, str]]


class Shown:
    """An object that is shown as a head and a table of labels and texts.

    A subclass implements ``_shown``, which returns the two; one of them may be empty.
    """

    def _shown(self) -> tuple[str, Rows]:
        raise NotImplementedError

    def __repr__(self) -> str:
        head, rows = self._shown()
        rows = _pairs(rows)
        width = 1 + max((len(label) for label, _ in rows), default=0)
        return "\n".join([head] * bool(head) + [f"{label:<{width}} {text}" for label, text in rows])

    __str__ = __repr__

    def _repr_html_(self) -> str:
        head, rows = self._shown()
        cell = '<td style="text-align: left">'
        lines = [
            f"<tr><th>{escape(label)}</th>{cell}{escape(text)}</td></tr>"
            for label, text in _pairs(rows)
        ]
        table = ["<table>", *lines, "</table>"] if lines else []
        return "\n".join([f"<b>{escape(head)}</b>"] * bool(head) + table)


def _pairs(rows: Rows) -> list[tuple[str, str]]:
    return list(rows.items() if isinstance(rows, Mapping) else rows)


def parameters_of(module: nn.Module) -> str:
    """How many numbers of a module are trained, in what and where, in words."""
    trained = [p for p in module.parameters() if p.requires_grad]
    kinds = {f"{str(p.dtype).removeprefix('torch.')} on {p.device}" for p in trained}
    return f"{sum(p.numel() for p in trained):,} {'; '.join(sorted(kinds))}".strip()


def listed(names: Iterable[str], most: int = 6) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join(names[:most] + more)


def missing(missed: Sequence[Any], share: float) -> str:
    """The modes that a guide does not draw, with their part of the posterior, in words."""
    percent, apart = float(f"{100 * share:.2g}"), sum(each.apart for each in missed)
    modes = {0: "a region", 1: "another mode"}.get(apart, f"{apart} other modes")
    mass = f"about {percent:g} % of the mass" + ("" if apart else " or more")
    return f"its draws miss {modes} with {mass}"
