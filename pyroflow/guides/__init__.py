"""Guides for Pyro models."""

from pyroflow.guides.amortized import AmortizedPlanarGuide
from pyroflow.guides.autoflow import AutoFlow
from pyroflow.guides.layered import AutoPlanarFlow, AutoSylvesterFlow
from pyroflow.guides.structured import AutoStructuredFlow

__all__ = [
    "AmortizedPlanarGuide",
    "AutoFlow",
    "AutoPlanarFlow",
    "AutoStructuredFlow",
    "AutoSylvesterFlow",
]
