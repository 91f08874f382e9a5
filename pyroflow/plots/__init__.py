"""Figures of flows, posteriors and fits: each function returns its figure, pyplot is not used."""

from pyroflow.plots.columns import plot_marginals, plot_pairs, plot_pit
from pyroflow.plots.losses import plot_losses
from pyroflow.plots.plane import plot_density, plot_grid_bending, plot_posteriors

__all__ = [
    "plot_density",
    "plot_grid_bending",
    "plot_losses",
    "plot_marginals",
    "plot_pairs",
    "plot_pit",
    "plot_posteriors",
]
