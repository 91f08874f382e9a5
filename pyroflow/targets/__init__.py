"""Targets with a known answer: the paper's four energies, a toy model, and eight schools."""

from pyroflow.targets.eight_schools import (
    EIGHT_SCHOOLS_SIGMA,
    EIGHT_SCHOOLS_Y,
    eight_schools_centered,
    eight_schools_exact,
    eight_schools_noncentered,
)
from pyroflow.targets.energies import Energy, energy
from pyroflow.targets.toy import TOY_LOG_EVIDENCE, toy_log_joint, toy_model

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
