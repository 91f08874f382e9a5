"""Draws of a guide as ArviZ wants them."""

from pyroflow.arviz.export import to_arviz

__all__ = ["to_arviz"]
