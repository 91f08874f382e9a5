"""Whether a guide can be trusted: ELBO, evidence, effective sample size, k-hat and a verdict."""

from pyroflow.diagnostics.diagnose import diagnose
from pyroflow.diagnostics.report import Report

__all__ = ["Report", "diagnose"]
