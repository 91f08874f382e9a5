"""The results as Markdown."""

from __future__ import annotations

from typing import Any

import pandas as pd

from .. import tables

COLUMNS = {
    "Pyro chain / ours": "Pyro chain / ours, {}",
    "normflows / ours": "normflows / ours, {}",
    "flowjax / ours": "flowjax / ours, {}",
    "ours / floor": "ours / floor, {}",
}
BOTH_WAYS = {
    "inverse / forward": "inverse / forward",
    "with gradients": "train inverse / train",
    "sample and score / sample": "sample and score / sample",
    "path / plain gradient": "path gradient / plain",
    "batched / shared": "batched parameters / shared",
}
HEADINGS = {
    "train": "One training evaluation (y, log|det|, gradients of all parameters)",
    "forward": "Without gradients (y, log|det|)",
}


ERRORS = {
    "float32, ours": ("pyroflow, float32", "y, units"),
    "float32, Pyro": ("Pyro chain, float32", "y, units"),
    "float32 inverse": ("pyroflow, float32, inverse", "y, units"),
    "float64, ours": ("pyroflow, float64", "y, units"),
    "float64 inverse": ("pyroflow, float64, inverse", "y, units"),
    "log-det, float32, ours": ("pyroflow, float32", "log_det"),
    "log-det, float32, Pyro": ("Pyro chain, float32", "log_det"),
}
UNITS = "Largest error of y in units of eps·(|x| + Σ|û_k h_k|), and of the log-det in nats"


def number(value: float) -> str:
    """Three digits from 1 on, two below."""
    if value < 1:
        return f"{value:.2g}"
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def cell(found: dict[str, float] | None) -> str:
    """The ratio of the medians with the quartiles of the rounds; a dash where nothing ran."""
    if found is None:
        return "–"
    return f"{number(found['median'])} ({number(found['q25'])}–{number(found['q75'])})"


def markdown(results: dict[str, Any]) -> str:
    """Ratios to the rivals, ours to ours, errors and memory, a table each."""
    parts = []
    for operation, heading in HEADINGS.items():
        columns = {name: ratio.format(operation) for name, ratio in COLUMNS.items()}
        rows = [
            [
                number(found["milliseconds"][operation]["pyroflow"]["median"]),
                *(cell(found["ratios"][ratio]) for ratio in columns.values()),
            ]
            for found in results["shapes"]
        ]
        parts += [f"{heading}:", _table(results, ["ours, ms", *columns], rows)]
    rows = [[cell(found["ratios"][r]) for r in BOTH_WAYS.values()] for found in results["shapes"]]
    parts += ["Other calls:", _table(results, list(BOTH_WAYS), rows)]
    rows = [
        [number(found["errors"][a][b]) for a, b in ERRORS.values()] for found in results["shapes"]
    ]
    parts += [f"{UNITS}:", _table(results, list(ERRORS), rows)]
    return "\n\n".join(parts + _memory(results))


def _memory(results: dict[str, Any]) -> list[str]:
    what = "Peak of forward and backward, in N·K numbers beside input and output"
    return [
        f"{what}, at {shape}: ours {number(found['pyroflow, beside'])}, "
        f"Pyro chain {number(found['Pyro chain, beside'])}."
        for shape, found in results.get("memory", {}).items()
    ]


def _table(results: dict[str, Any], columns: list[str], rows: list[list[str]]) -> str:
    frame = pd.DataFrame(rows, columns=columns)
    sizes = [", ".join(str(size) for size in found["shape"]) for found in results["shapes"]]
    frame.insert(0, "N, D, K", sizes)
    return tables.markdown(frame)
