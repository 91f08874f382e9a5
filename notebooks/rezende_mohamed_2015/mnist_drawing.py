"""Figure 4 with the paper's curves beside ours."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from rezende_mohamed_2015.results import Run

LENGTHS = (0, 10, 20, 40, 80)
NAMES = {"free_energy": "$-$ELBO", "kl": "KL(q ‖ p(z|x))", "nll": "$-$ln p(x)"}

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


def curves(runs: Sequence[Run], kind: str, name: str) -> dict[int, float]:
    """Means over the seeds by K; K = 0 belongs to every kind."""
    frame = pd.DataFrame(runs)
    return frame[(frame.kind == kind) | (frame.K == 0)].groupby("K")[name].mean().to_dict()


def by_draws(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs on fresh draws of the training images, and those on static ones, where any are."""
    found = {draws: [run for run in runs if run["draws"] == draws] for draws in ("fresh", "static")}
    return {draws: some for draws, some in found.items() if some}


def draw(runs: Sequence[Run]) -> Figure:
    """The three panels of Figure 4: bound, KL and −ln p(x) against K; the paper's dashed.

    Those on fresh draws of the training images are full, those on static ones, as the paper's are,
    empty. Bars are one standard error over the test images. It is much the same for all K, whose
    images are the same: the differences between lengths are more certain than the bars say.
    """
    figure = Figure(figsize=(14, 3.6), layout="constrained")
    for ax, (name, title) in zip(figure.subplots(1, 3), NAMES.items(), strict=True):
        for kind, colour in {"planar": "C0", "NICE": "C1"}.items():
            for draws, some in by_draws(runs).items():
                ours, errors = curves(some, kind, name), curves(some, kind, f"{name}_se")
                style = {"fmt": "o-", "markersize": 4, "capsize": 3, "color": colour}
                style |= {} if draws == "fresh" else {"markerfacecolor": "white", "linewidth": 0.8}
                ax.errorbar(
                    list(ours),
                    list(ours.values()),
                    list(errors.values()),
                    label=f"{kind}, pyroflow, {draws}",
                    **style,
                )
            ax.plot(LENGTHS, PAPER[kind][name], "--", color=colour, label=f"{kind}, the paper")
        ax.set(title=title, xlabel="flow length K", ylabel="nats", xticks=LENGTHS)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure
