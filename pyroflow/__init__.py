"""Planar normalizing flows for Pyro, exact both ways."""

from importlib.metadata import version

from pyroflow import datasets, targets
from pyroflow.flows import Flow, planar_flow
from pyroflow.guides import AutoPlanarFlow
from pyroflow.inference import Fit, fit_density, fit_energy, fit_guide, paper_annealing
from pyroflow.transforms import Affine, ConditionalAffine, ConditionalPlanar, Planar

__version__ = version("pyroflow")

__all__ = [
    "Affine",
    "AutoPlanarFlow",
    "ConditionalAffine",
    "ConditionalPlanar",
    "Fit",
    "Flow",
    "Planar",
    "datasets",
    "fit_density",
    "fit_energy",
    "fit_guide",
    "paper_annealing",
    "planar_flow",
    "targets",
]
