"""A posterior in one call: fits of rising cost, each checked, until one can be trusted."""

from pyroflow.ladder.climb import posterior
from pyroflow.ladder.result import Posterior

__all__ = ["Posterior", "posterior"]
