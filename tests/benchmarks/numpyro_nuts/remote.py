"""This side of the process that runs numpyro."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..judging import Draws
from ..problems import Problem
from ..remote import Remote


class Numpyro(Remote):
    """numpyro's worker, which has ports of the posteriors under the same names."""

    library = "numpyro"
    module = "benchmarks.numpyro_nuts.worker"

    def chain(
        self, problem: Problem, seed: int, warmup: int, rounds: int
    ) -> tuple[dict[str, Tensor], float, float]:
        """Draws of NUTS by site, seconds until the end of the warm-up, and seconds in all.

        The draws are ``rounds`` times ``warmup``. The seconds are of the worker, from having the
        model and the data to having the draws, with compilation.
        """
        options = {"seed": seed, "warmup": warmup, "rounds": rounds}
        made, said = self._do("chain", problem, {}, options=options)
        return made, said["warmup"], said["seconds"]

    def log_joint(self, problem: Problem, draws: Draws) -> Tensor:
        """The log density of the port at draws {site: (S, *site)}, constrained; shape (S,)."""
        return self._do("log_joint", problem, draws)[0]["log_joint"]

    def _do(
        self, what: str, problem: Problem, draws: Draws, **request: Any
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The arrays and the rest of an answer."""
        arrays = {f"arg{i}": np.asarray(arg) for i, arg in enumerate(problem.args)}
        arrays |= {f"site {name}": value.numpy() for name, value in draws.items()}
        with tempfile.TemporaryDirectory() as folder:
            given, made = f"{folder}/given.npz", f"{folder}/made.npz"
            np.savez(given, **arrays)
            said = self.ask(do=what, name=problem.name, given=given, made=made, **request)
            with np.load(made) as found:
                return {name: torch.from_numpy(found[name]) for name in found}, said
