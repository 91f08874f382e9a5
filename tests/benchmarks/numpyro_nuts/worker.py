"""numpyro's NUTS, run and timed in a process and an environment of its own.

``python -m benchmarks.numpyro_nuts.worker``, in the folder tests. No torch here.
"""

from __future__ import annotations

import os
import time
from typing import Any

# As everything that is compared: one thread, of XLA's pool and of its compiler too.
os.environ["NPROC"] = "1"
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_cpu_multi_thread_eigen=false",
        "--xla_cpu_parallel_codegen_split_count=1",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import numpyro  # noqa: E402
from jax import Array  # noqa: E402
from numpyro.infer import NUTS  # noqa: E402
from numpyro.infer.hmc import HMCState  # noqa: E402
from numpyro.infer.util import log_density  # noqa: E402

from ..serving import serve, versions  # noqa: E402
from . import hierarchies, known, posteriordb  # noqa: E402

PORTS = posteriordb.PORTS | hierarchies.PORTS | known.PORTS


def chain(name: str, args: tuple, seed: int, warmup: int, rounds: int) -> dict[str, Any]:
    """Draws of a chain by site, and the seconds until the warm-up's end and in all.

    ``MCMC.run`` compiles warm-up and draws as one loop, which cannot be timed in parts, and
    ``MCMC.warmup`` with ``MCMC.run`` compiles twice. So the kernel is called in a loop as long as
    the warm-up, compiled once, in the seconds of the warm-up; the draws are ``rounds`` of it.
    """
    start = time.perf_counter()
    kernel = NUTS(PORTS[name])
    state = kernel.init(jax.random.key(seed), warmup, None, args, {})
    constrained = kernel.postprocess_fn(args, {})

    @jax.jit
    def run(state: HMCState) -> tuple[HMCState, dict[str, Array]]:
        def step(state: HMCState, _: None) -> tuple[HMCState, dict[str, Array]]:
            state = kernel.sample(state, args, {})
            return state, constrained(state.z)

        return jax.lax.scan(step, state, length=warmup)

    state, _ = jax.block_until_ready(run(state))
    warm, parts = time.perf_counter() - start, []
    for _ in range(rounds):
        state, draws = run(state)
        parts.append(jax.tree.map(np.asarray, draws))
    draws = {site: np.concatenate([part[site] for part in parts]) for site in parts[0]}
    return {"draws": draws, "warmup": warm, "seconds": time.perf_counter() - start}


def log_joint(name: str, args: tuple, draws: dict[str, np.ndarray]) -> np.ndarray:
    """The port's log density at draws {site: (S, *site)}, constrained; shape (S,)."""

    def of_one(values: dict[str, Any]) -> Any:
        return log_density(PORTS[name], args, {}, values)[0]

    return np.asarray(jax.jit(jax.vmap(of_one))(draws))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do what one request asks for."""
    if request["do"] == "versions":
        return versions("jax", "numpyro")
    name = request["name"]
    with np.load(request["given"]) as given:
        args = tuple(_argument(given[key]) for key in given if key.startswith("arg"))
        draws = {key[5:]: given[key] for key in given if key.startswith("site ")}
    if request["do"] == "log_joint":
        np.savez(request["made"], log_joint=log_joint(name, args, draws))
        return {}
    found = chain(name, args, **request["options"])
    np.savez(request["made"], **found.pop("draws"))
    return found


def _argument(array: np.ndarray) -> Any:
    """A number of a model's arguments as Python's, as it is a size."""
    is_size = array.ndim == 0 and array.dtype.kind == "i"
    return int(array) if is_size else jnp.asarray(array)


if __name__ == "__main__":
    numpyro.enable_x64()
    serve(answer)
