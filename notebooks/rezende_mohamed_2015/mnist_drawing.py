"""Figure 4 as a picture and as text, with the paper's curves beside ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

LENGTHS = (0, 10, 20, 40, 80)
NAMES = {"free_energy": "$-$ELBO", "kl": "KL(q ‖ p(z|x))", "nll": "$-$ln p(x)"}
PLAIN = {"free_energy": "−ELBO", "kl": "KL", "nll": "−ln p(x)"}

# Rezende & Mohamed 2015: −ln p of Table 2, the others read off Figure 4 to some 0.05 nats
PAPER = {
    "planar": {
        "free_energy": (96.75, 93.55, 91.95, 90.65, 89.60),
        "kl": (6.83, 6.04, 5.43, 4.86, 4.43),
        "nll": (89.9, 87.5, 86.5, 85.7, 85.1),
    },
    "NICE": {
        "free_energy": (96.75, 94.85, 93.95, 93.0, 92.85),
        "kl": (6.83, 6.27, 6.01, 5.69, 5.56),
        "nll": (89.9, 88.6, 87.9, 87.3, 87.2),
    },
}


def curves(runs: Mapping[str, Mapping[str, Any]], kind: str, name: str) -> dict[int, float]:
    """Means over the seeds by K; K = 0 belongs to every kind."""
    found: dict[int, list[float]] = {}
    for key, run in runs.items():
        match = re.fullmatch(r"(.*) K=(\d+) seed=\d+", key)
        if match and (match[1] == kind or match[2] == "0"):
            found.setdefault(int(match[2]), []).append(run[name])
    return {K: mean(values) for K, values in sorted(found.items())}


def draw(runs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The three panels of Figure 4: bound, KL and −ln p(x) against K; the paper's dashed.

    Bars are one standard error over the test images. It is much the same for all K, whose images
    are the same: the differences between lengths are more certain than the bars say.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for ax, (name, title) in zip(figure.subplots(1, 3), NAMES.items(), strict=True):
        for kind, colour in {"planar": "C0", "NICE": "C1"}.items():
            ours, errors = curves(runs, kind, name), curves(runs, kind, f"{name}_se")
            style = {"fmt": "o-", "markersize": 4, "capsize": 3, "color": colour}
            ax.errorbar(
                list(ours),
                list(ours.values()),
                list(errors.values()),
                label=f"{kind}, pyroflow",
                **style,
            )
            ax.plot(LENGTHS, PAPER[kind][name], "--", color=colour, label=f"{kind}, the paper")
        ax.set(title=title, xlabel="flow length K", ylabel="nats", xticks=LENGTHS)
    ax.legend(frameon=False)
    return figure


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each kind and quantity, ours above the paper's."""
    lines = [f"{'nats, test images':<26}" + "".join(f"{f'K={K}':>9}" for K in LENGTHS)]
    for kind, paper in PAPER.items():
        for name in NAMES:
            ours = curves(runs, kind, name)
            cells = (f"{ours[K]:>9.2f}" if K in ours else f"{'':>9}" for K in LENGTHS)
            lines.append(f"{kind + ', ' + PLAIN[name]:<26}" + "".join(cells))
            lines.append(f"{'  the paper':<26}" + "".join(f"{v:>9.2f}" for v in paper[name]))
    return "\n".join(lines)
