"""Data to fit: tables from files, and sets of points in the plane with known densities."""

from pyroflow.datasets.synthetic import (
    SINE_ENTROPY,
    ring,
    ring_log_prob,
    sine,
    sine_log_prob,
    two_moons,
    two_moons_log_prob,
)
from pyroflow.datasets.tables import read_table

__all__ = [
    "SINE_ENTROPY",
    "read_table",
    "ring",
    "ring_log_prob",
    "sine",
    "sine_log_prob",
    "two_moons",
    "two_moons_log_prob",
]
