"""Planar normalizing flows for Pyro, exact both ways."""

from importlib import import_module
from types import ModuleType

from pyroflow import datasets, targets
from pyroflow.arviz import to_arviz
from pyroflow.calibration import Calibration, calibrate
from pyroflow.diagnostics import Report, diagnose
from pyroflow.distribution import VERSION, warn_of_another
from pyroflow.flows import Flow, planar_flow, radial_flow, sylvester_flow
from pyroflow.guides import (
    AmortizedPlanarGuide,
    AutoFlow,
    AutoPlanarFlow,
    AutoStructuredFlow,
    AutoSylvesterFlow,
)
from pyroflow.inference import Fit, fit_density, fit_energy, fit_guide, paper_annealing
from pyroflow.inference.schedule import AdaptiveAnnealing
from pyroflow.inference.stop_rule import StopRule
from pyroflow.ladder import Posterior, posterior
from pyroflow.mcmc import Chains, mcmc, neutra
from pyroflow.saving import load, save
from pyroflow.transforms import (
    Affine,
    ConditionalAffine,
    ConditionalPlanar,
    ConditionalRadial,
    ConditionalSinhArcsinh,
    ConditionalSylvester,
    Planar,
    Radial,
    SinhArcsinh,
    Sylvester,
)

__version__ = VERSION
warn_of_another()

# Named as Pyro names the functions that make a transform.
planar, conditional_planar = Planar, ConditionalPlanar
radial, conditional_radial = Radial, ConditionalRadial
sinh_arcsinh, conditional_sinh_arcsinh = SinhArcsinh, ConditionalSinhArcsinh
sylvester, conditional_sylvester = Sylvester, ConditionalSylvester

__all__ = [
    "AdaptiveAnnealing",
    "Affine",
    "AmortizedPlanarGuide",
    "AutoFlow",
    "AutoPlanarFlow",
    "AutoStructuredFlow",
    "AutoSylvesterFlow",
    "Calibration",
    "Chains",
    "ConditionalAffine",
    "ConditionalPlanar",
    "ConditionalRadial",
    "ConditionalSinhArcsinh",
    "ConditionalSylvester",
    "Fit",
    "Flow",
    "Planar",
    "Posterior",
    "Radial",
    "Report",
    "SinhArcsinh",
    "StopRule",
    "Sylvester",
    "calibrate",
    "conditional_planar",
    "conditional_radial",
    "conditional_sinh_arcsinh",
    "conditional_sylvester",
    "datasets",
    "diagnose",
    "fit_density",
    "fit_energy",
    "fit_guide",
    "load",
    "mcmc",
    "neutra",
    "paper_annealing",
    "planar",
    "planar_flow",
    "posterior",
    "radial",
    "radial_flow",
    "save",
    "sinh_arcsinh",
    "sylvester",
    "sylvester_flow",
    "targets",
    "to_arviz",
]


def __getattr__(name: str) -> ModuleType:
    """``pyroflow.plots``, which is imported when it is asked for, as it brings in matplotlib."""
    if name == "plots":
        return import_module("pyroflow.plots")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "plots"])
