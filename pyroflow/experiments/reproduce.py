"""The experiments of Rezende & Mohamed 2015 by name."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

EXPERIMENTS = {
    "figure1": "planar and radial layers on a Gaussian and a uniform (Figure 1)",
    "figure3": "the four energies of Table 1, planar beside NICE (Figure 3)",
    "mnist": "a deep latent Gaussian model of MNIST (Figure 4, Table 2); needs --data",
    "sylvester": "Sylvester flows on the same model of MNIST; needs --data",
    "cifar": "patches of natural images (Table 3); needs --data",
}


def experiment(name: str) -> ModuleType:
    """The module of an experiment, with ``run(options) -> report`` and ``table(report) -> str``."""
    return import_module(f"pyroflow.experiments.{name}")
