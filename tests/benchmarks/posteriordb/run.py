"""Fit and judge every method on every posterior, each result written at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro

import pyroflow as pf

from .judge import judge
from .models import Posterior
from .rivals import GUIDES, at_most, fit_rival, nuts

OURS, NUTS = "pyroflow", "NUTS"
METHODS = (OURS, *GUIDES, NUTS)
GUIDE: Callable = pf.AutoSylvesterFlow  # the guide that is judged, with its defaults
JUDGED_WITH = 10_000  # added to the seed of a fit, for the draws it is judged by

Record = dict[str, Any]
Results = dict[str, dict[str, dict[str, Record]]]  # by posterior, method and seed


@dataclass(frozen=True)
class Settings:
    """How much is done.

    Attributes:
        fit: options of ``fit_guide`` beside the defaults.
        num_samples: draws behind ELBO and moments.
        num_weights: draws behind k-hat and ESS.
        warmup: of NUTS.
        chain: draws of NUTS.
        limit: seconds after which a fit or a chain is stopped.
    """

    fit: dict[str, Any] = field(default_factory=dict)
    num_samples: int = 100_000
    num_weights: int = 10_000
    warmup: int = 500
    chain: int = 1000
    limit: float = 600.0


QUICK = Settings({"steps": 20}, num_samples=2000, num_weights=1000, warmup=20, chain=20, limit=60)


def measure(
    posterior: Posterior, method: str, seed: int, budget: float, settings: Settings
) -> Record:
    """Fit one method with one seed and judge it; ``budget`` seconds for a rival's SVI."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    if method == NUTS:
        return nuts(posterior, settings.warmup, settings.chain, settings.limit)
    if method in GUIDES:
        guide, record = fit_rival(posterior, method, budget)
    else:
        with at_most(settings.limit):
            guide, record = _fit_ours(posterior, seed, settings)
    if "error" in record:
        return record
    sizes = settings.num_samples, settings.num_weights
    return record | judge(posterior, guide, *sizes, seed=JUDGED_WITH + seed)


def attempt(posterior: Posterior, method: str, *options: Any) -> Record:
    """What ``measure`` finds, or the message of what went wrong, so that the others go on."""
    start = time.perf_counter()
    try:
        return measure(posterior, method, *options)
    except (ArithmeticError, RuntimeError, TimeoutError, ValueError) as error:
        return {"seconds": time.perf_counter() - start, "error": str(error)}


def _fit_ours(posterior: Posterior, seed: int, settings: Settings) -> tuple[Callable, Record]:
    start = time.perf_counter()
    guide = GUIDE(posterior.model)
    options = {"seed": seed, "progress": False, **settings.fit}
    fit = pf.fit_guide(posterior.model, guide, posterior.args, **options)
    seconds = time.perf_counter() - start
    return guide, {"seconds": seconds, "steps": fit.steps, "stopped": fit.stopped}


def complete(
    posterior: Posterior,
    methods: tuple[str, ...],
    seeds: int,
    results: Results,
    settings: Settings,
    save: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Add to the results what they lack of one posterior, and save after each.

    Ours comes first, since its time is the rivals' budget. NUTS runs with seed 0 only.
    """
    found = results.setdefault(posterior.name, {})
    for seed in range(seeds):
        for method in sorted(methods, key=METHODS.index):
            of_method = found.setdefault(method, {})
            if str(seed) in of_method or (method == NUTS and seed > 0):
                continue
            if method in GUIDES and str(seed) not in found.get(OURS, {}):
                raise ValueError(
                    f"the budget of {method} is the time of {OURS}, which has no result for "
                    f"{posterior.name}, seed {seed}: add it to the methods"
                )
            budget = found[OURS][str(seed)]["seconds"] if method in GUIDES else settings.limit
            of_method[str(seed)] = attempt(posterior, method, seed, budget, settings)
            save()
            say(f"{posterior.name}, {method}, seed {seed}: {summary(of_method[str(seed)])}")


def summary(record: Record) -> str:
    """One line of a record, for the terminal."""
    names = ("kl", "khat", "ess", "mean error", "sd error", "seconds")
    said = [f"{name} {record[name]:.3g}" for name in names if record.get(name) is not None]
    return ", ".join(said + ([record["error"]] if "error" in record else []))
