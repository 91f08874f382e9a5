"""What Pyro has: its guides fitted by its SVI for a given time, and NUTS."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import pyro
from pyro.distributions.transforms import iterated, planar
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from pyro.optim import ClippedAdam
from torch import Tensor

from pyroflow.model.bound import BoundModel

from .judge import moments
from .models import Posterior

GUIDES: dict[str, Callable] = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAFNormal": AutoIAFNormal,
    "16 planar": partial(AutoNormalizingFlow, init_transform_fn=partial(iterated, 16, planar)),
}
PARTICLES, LR, DECAY = 32, 0.01, 0.1  # the rate falls to DECAY times LR over the fit
PROBE = 10  # steps by which the number of steps in the given time is estimated


class Problem(Protocol):
    """What a fit needs to know of a posterior."""

    model: Callable
    args: tuple


def svi(posterior: Problem, guide: Callable, steps: int) -> Iterator[float]:
    """Pyro's SVI with vectorised particles, as its tutorials say; yield the loss of each step.

    A model that does not run for many particles side by side has one particle a step.
    """
    nesting = BoundModel(posterior.model, guide, posterior.args).max_plate_nesting
    if nesting is None:
        elbo = Trace_ELBO()
    else:
        options = {"vectorize_particles": True, "max_plate_nesting": nesting}
        elbo = Trace_ELBO(num_particles=PARTICLES, **options)
    optimizer = ClippedAdam({"lr": LR, "lrd": DECAY ** (1 / steps)})
    steps_of = SVI(posterior.model, guide, optimizer, elbo)
    while True:
        yield steps_of.step(*posterior.args)


def fit_rival(posterior: Problem, name: str, seconds: float) -> tuple[Callable, dict[str, Any]]:
    """One of Pyro's guides after so many seconds of SVI, its set-up included.

    The probe, which sets the pace of the decay, is on a guide of its own and costs the rival no
    time; Pyro's validation is off, which is faster.
    """
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NaN, which ends the fit
        with pyro.get_param_store().scope():
            probe = svi(posterior, GUIDES[name](posterior.model), steps=PROBE)
            next(probe)
            start = time.perf_counter()
            for _ in range(PROBE):
                next(probe)
            steps = max(PROBE, round(seconds * PROBE / (time.perf_counter() - start)))
        start, taken, loss = time.perf_counter(), 0, 0.0
        guide = GUIDES[name](posterior.model)
        fit = svi(posterior, guide, steps)
        while loss == loss and time.perf_counter() - start < seconds:
            loss, taken = next(fit), taken + 1
    record = {"budget": seconds, "seconds": time.perf_counter() - start, "steps": taken}
    return guide, record if loss == loss else record | {"error": f"NaN at step {taken}"}


def nuts(posterior: Posterior, warmup: int, num_samples: int, limit: float) -> dict[str, Any]:
    """Pyro's NUTS, one chain, jit-compiled: its seconds and errors."""
    with at_most(limit):
        draws, _, seconds = chain(posterior, warmup, num_samples)
    errors = moments(posterior, posterior.columns(draws))
    return {"seconds": seconds, "draws": num_samples, **errors}


def chain(
    posterior: Problem, warmup: int, num_samples: int
) -> tuple[dict[str, Tensor], float, float]:
    """The draws of a chain by site, its seconds until the end of the warm-up, and in all."""
    warm = start = time.perf_counter()

    def watch(kernel: NUTS, values: dict[str, Tensor], stage: str, i: int) -> None:
        nonlocal warm
        if stage == "Warmup":
            warm = time.perf_counter()

    kernel = NUTS(posterior.model, jit_compile=True, ignore_jit_warnings=True)
    mcmc = MCMC(kernel, num_samples, warmup, disable_progbar=True, hook_fn=watch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of its jit
        mcmc.run(*posterior.args)
    return mcmc.get_samples(), warm - start, time.perf_counter() - start


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """End what takes longer by a ``TimeoutError``; in the main thread only."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
