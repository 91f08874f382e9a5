"""Exact draws from a posterior, with a fitted guide as map and as proposal."""

from pyroflow.chains.neutra import NeuTra, neutra
from pyroflow.chains.result import Chains
from pyroflow.chains.sampler import mcmc

__all__ = ["Chains", "NeuTra", "mcmc", "neutra"]
