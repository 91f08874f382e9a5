"""Exact draws from a posterior, with a fitted guide as map and as proposal."""

from pyroflow.mcmc.chains import Chains
from pyroflow.mcmc.neutra import NeuTra, neutra
from pyroflow.mcmc.sampler import mcmc

__all__ = ["Chains", "NeuTra", "mcmc", "neutra"]
