"""Simulation-based calibration: is a kind of guide right, on average over data sets?"""

from pyroflow.calibration.calibrate import calibrate
from pyroflow.calibration.result import Calibration

__all__ = ["Calibration", "calibrate"]
