"""Planar normalizing flows for Pyro, exact both ways."""

from importlib.metadata import version

from pyroflow import datasets, targets
from pyroflow.flow import Flow
from pyroflow.flows import planar_flow, radial_flow, sylvester_flow
from pyroflow.guides import AutoFlow, AutoPlanarFlow
from pyroflow.inference import Fit, fit_density, fit_energy, fit_guide, paper_annealing
from pyroflow.transforms import (
    Affine,
    ConditionalAffine,
    ConditionalPlanar,
    ConditionalRadial,
    ConditionalSylvester,
    Planar,
    Radial,
    Sylvester,
)
from pyroflow.transforms.helpers import (
    conditional_planar,
    conditional_radial,
    conditional_sylvester,
    planar,
    radial,
    sylvester,
)

__version__ = version("pyroflow")

__all__ = [
    "Affine",
    "AutoFlow",
    "AutoPlanarFlow",
    "ConditionalAffine",
    "ConditionalPlanar",
    "ConditionalRadial",
    "ConditionalSylvester",
    "Fit",
    "Flow",
    "Planar",
    "Radial",
    "Sylvester",
    "conditional_planar",
    "conditional_radial",
    "conditional_sylvester",
    "datasets",
    "fit_density",
    "fit_energy",
    "fit_guide",
    "paper_annealing",
    "planar",
    "planar_flow",
    "radial",
    "radial_flow",
    "sylvester",
    "sylvester_flow",
    "targets",
]
