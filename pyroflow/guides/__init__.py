"""Guides for Pyro models."""

from pyroflow.guides.autoguide import AutoPlanarFlow

__all__ = ["AutoPlanarFlow"]
