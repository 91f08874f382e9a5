"""What simulated data sets say of a kind of guide, as tests, in words and as a figure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyroflow.checks import check_count
from pyroflow.model.records import Values
from pyroflow.shown import Shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLIPS = 9999  # random reflections behind a p-value of symmetry
POWER, TOO_NARROW = 0.8, 0.5  # chance of seeing a guide with so much of the right sd


@dataclass(repr=False)
class Calibration(Shown):
    """The result of :func:`calibrate`; tensors are in float64, by latent site.

    Attributes:
        probabilities: p = Pr_q(θ < θ₀), the part of the guide's draws below the value that made
            the data, shape (M, *shape of the site).
        symmetry_p_values: Of the hypothesis that p and 1 − p are distributed alike, as they are
            if the guide is right or wrong in width only; shape of the site.
        dispersion_p_values: Of the hypothesis that p spreads about ½ as a uniform variable does;
            shape of the site.
        ks_statistics: Largest distance of the distribution functions of p and 1 − p.
        verdicts: By site, in words.
        level: The false alarm rate of all verdicts together.
        fits: How the data sets were fitted: "together", or how many of them were, and why others
            one by one.
    """

    probabilities: dict[str, Tensor]
    symmetry_p_values: dict[str, Tensor]
    dispersion_p_values: dict[str, Tensor]
    ks_statistics: dict[str, Tensor]
    verdicts: dict[str, str]
    level: float
    fits: str

    @property
    def calibrated(self) -> bool:
        """Whether no site gave cause for doubt."""
        return all(verdict.startswith("no sign") for verdict in self.verdicts.values())

    @property
    def num_simulations(self) -> int:
        """M, the data sets."""
        return len(next(iter(self.probabilities.values())))

    @property
    def too_few(self) -> str:
        """Why the data sets are too few to judge by, with how many would do; empty if they do."""
        scalars = sum(p_value.numel() for p_value in self.dispersion_p_values.values())
        if self.num_simulations >= (needed := needed_for(self.level, scalars)):
            return ""
        return (
            f"{self.num_simulations} data sets are too few to judge by: it takes {needed} to see "
            f"with a chance of {POWER:.0%} that a guide's sd is {TOO_NARROW:.0%} of the right one"
        )

    def plot(self, *, bins: int = 10, figure: Figure | None = None) -> Figure:
        """Histograms of the probabilities, one panel for each scalar.

        A calibrated guide's bars stay in the grey band in 95 % of cases each. A slope is a bias,
        a ∪ a guide that is too narrow, a ∩ one that is too wide.

        Args:
            bins: Bars of a histogram.
            figure: Where to draw; a new figure by default.

        Returns:
            The figure.

        Raises:
            ValueError: If ``bins`` is below 2.
        """
        from pyroflow.plots import drawing

        check_count("bins", bins, 2)
        scalars = drawing.scalars_of(self.probabilities)
        figure, axes = drawing.panels(figure, len(scalars), 2.8, 2.3, sharey=True)
        expected = self.num_simulations / bins
        half = 1.96 * math.sqrt(expected * (1 - 1 / bins))
        for ax, (name, values) in zip(axes, scalars.items(), strict=False):
            ax.axhspan(max(0.0, expected - half), expected + half, color="0.9")
            ax.axhline(expected, color="0.6", linewidth=1)
            ax.hist(values, bins=bins, range=(0, 1), color=drawing.COLOURS[1], rwidth=0.9)
            ax.set(title=name, xlim=(0, 1), xlabel=r"$\Pr_q(\theta < \theta_0)$")
        for ax in axes[len(scalars) :]:
            ax.axis("off")
        figure.supxlabel("grey: where 95 % of a calibrated guide's bars end", fontsize="small")
        return figure

    def _shown(self) -> tuple[str, dict[str, str]]:
        return self.too_few or f"{self.num_simulations} simulated data sets", self.verdicts


def summarise(probabilities: Values, level: float, fits: str) -> Calibration:
    """The tests of every scalar, and what they say of each site."""
    tests = {name: symmetry_test(p) for name, p in probabilities.items()}
    symmetry = {name: p_value for name, (_, p_value) in tests.items()}
    dispersion = {name: dispersion_test(p) for name, p in probabilities.items()}
    share = level / (2 * sum(p_value.numel() for p_value in dispersion.values()))
    verdicts = {
        name: _verdict(p, symmetry[name] <= share, dispersion[name] <= share)
        for name, p in probabilities.items()
    }
    statistics = {name: statistic for name, (statistic, _) in tests.items()}
    return Calibration(probabilities, symmetry, dispersion, statistics, verdicts, level, fits)


def needed_for(level: float, scalars: int) -> int:
    """Data sets by which the test of each scalar sees too narrow a guide with the stated power.

    Of a guide with a times the right sd p is Φ(z/a), z ~ N(0, 1). The test of symmetry must be able
    to reject too: among 2^(M − 1) reflections that differ, the smallest p-value is one of them.
    """
    share, ndtri = level / (2 * scalars), torch.special.ndtri
    z = ndtri((torch.arange(1000, dtype=torch.float64, device="cpu") + 0.5) / 1000)
    squares = (torch.special.ndtr(z / TOO_NARROW) - 0.5) ** 2
    right, found = math.sqrt(1 / 180), squares.std().item()
    points = torch.tensor([1 - share / 2, POWER], dtype=torch.float64, device="cpu")
    at, beyond = ndtri(points).tolist()
    spread = ((at * right + beyond * found) / (squares.mean().item() - 1 / 12)) ** 2
    return math.ceil(max(spread, 1 - math.log2(share)))


def symmetry_test(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Whether p and 1 − p are distributed alike: KS statistic and p-value of each scalar."""
    # Signs and ranks of p − ½ are all that the distance between the two functions depends on.
    flat = probabilities.reshape(len(probabilities), -1) - 0.5
    num = len(flat)
    flips = torch.randint(2, (FLIPS, num), device="cpu")
    signs = 2.0 * torch.cat([torch.ones_like(flips[:1]), flips]) - 1
    statistics, p_values = [], []
    for column in flat.unbind(1):
        distances = column.abs().round(decimals=9)  # equal ones but for rounding
        order = distances.argsort(descending=True)
        last = distances.new_ones(1, dtype=torch.bool)
        group_ends = torch.cat([distances[order].diff() != 0, last])
        walks = (signs.to(column) * column.sign()[order]).cumsum(1)[:, group_ends].abs()
        found = walks.amax(1) / num
        statistics.append(found[0])
        p_values.append((found >= found[0] - 1e-9).double().mean())
    shape = probabilities.shape[1:]
    return torch.stack(statistics).reshape(shape), torch.stack(p_values).reshape(shape)


def dispersion_test(probabilities: Tensor) -> Tensor:
    """Two-sided p-value of (p − ½)² having the mean of a uniform p, 1/12; its variance is 1/180."""
    excess = ((probabilities - 0.5) ** 2).mean(0) - 1 / 12
    z = excess * math.sqrt(180 * len(probabilities))
    return torch.special.erfc(z.abs() / math.sqrt(2))


def _verdict(probabilities: Tensor, biased: Tensor, dispersed: Tensor) -> str:
    words = []
    middle, spread = probabilities.mean(0), ((probabilities - 0.5) ** 2).mean(0)
    signs = {
        "biased, its draws lie too low": biased & (middle > 0.5),
        "biased, its draws lie too high": biased & (middle <= 0.5),
        # A bias alone moves p away from its middle, and so says nothing of the width.
        "too narrow": dispersed & ~biased & (spread > 1 / 12),
        "too wide": dispersed & ~biased & (spread <= 1 / 12),
    }
    for text, found in signs.items():
        if found.any():
            places = [str(tuple(index)) for index in found.nonzero().tolist()]
            words.append(f"{text} at {', '.join(places)}" if probabilities.dim() > 1 else text)
    return "; ".join(words) or "no sign of miscalibration"
