"""Guides for Pyro models."""

from pyroflow.guides.autoguide import AutoFlow, AutoPlanarFlow

__all__ = ["AutoFlow", "AutoPlanarFlow"]
