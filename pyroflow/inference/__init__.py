"""Fitting flows and guides."""

from pyroflow.inference.density import fit_density
from pyroflow.inference.energy import fit_energy
from pyroflow.inference.fit import Fit
from pyroflow.inference.guide import fit_guide
from pyroflow.inference.schedule import AdaptiveAnnealing, paper_annealing
from pyroflow.inference.stop_rule import StopRule

__all__ = [
    "AdaptiveAnnealing",
    "Fit",
    "StopRule",
    "fit_density",
    "fit_energy",
    "fit_guide",
    "paper_annealing",
]
