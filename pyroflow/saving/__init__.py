"""One safe file for a flow or a guide."""

from pyroflow.saving.files import load, save

__all__ = ["load", "save"]
