"""Targets with a known answer: the paper's four energies, a toy model, and eight schools."""

from pyroflow.targets.energies import Energy, energy
from pyroflow.targets.models import (
    EIGHT_SCHOOLS_SIGMA,
    EIGHT_SCHOOLS_Y,
    TOY_LOG_EVIDENCE,
    eight_schools_centered,
    eight_schools_exact,
    eight_schools_noncentered,
    toy_log_joint,
    toy_model,
)

__all__ = [
    "EIGHT_SCHOOLS_SIGMA",
    "EIGHT_SCHOOLS_Y",
    "TOY_LOG_EVIDENCE",
    "Energy",
    "eight_schools_centered",
    "eight_schools_exact",
    "eight_schools_noncentered",
    "energy",
    "toy_log_joint",
    "toy_model",
]
