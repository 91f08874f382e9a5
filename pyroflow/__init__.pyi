"""The public names and where they are; ``__init__.py`` reads them from here."""

from . import datasets, plots, targets
from .arviz import to_arviz
from .calibration import Calibration, calibrate
from .chains import Chains, mcmc, neutra
from .diagnostics import Report, diagnose
from .estimator import FlowDensity
from .flows import Flow, planar_flow, radial_flow, sylvester_flow
from .guides import (
    AmortizedPlanarGuide,
    AutoFlow,
    AutoPlanarFlow,
    AutoStructuredFlow,
    AutoSylvesterFlow,
)
from .inference import (
    AdaptiveAnnealing,
    Fit,
    StopRule,
    fit_density,
    fit_energy,
    fit_guide,
    paper_annealing,
)
from .ladder import Posterior, posterior
from .saving import load, save
from .transforms import (
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
    conditional_planar,
    conditional_radial,
    conditional_sinh_arcsinh,
    conditional_sylvester,
    planar,
    radial,
    sinh_arcsinh,
    sylvester,
)

__version__: str

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
    "FlowDensity",
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
    "plots",
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
