"""Ways to a posterior, each run alone on one thread, judged and written at once."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch

import pyroflow as pf
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw

from .judging import Draws, judge, least_ess
from .numpyro_nuts.remote import Numpyro
from .posteriordb.rivals import at_most, chain, fit_rival
from .problems import Problem, find
from .remote import JAX_PYTHON

Record = dict[str, Any]
Results = dict[str, dict[str, dict[str, Record]]]  # by way, name and seed
Run = tuple[str, str, int]  # way, name, seed

NUM = 4000  # draws of a rival
WARMUP = 500
RIGHT, WRONG = 0.1, 0.2  # of an sd; what is between them is neither
TRUSTED = ("good", "resample")  # levels at which an answer is to be used


@dataclass(frozen=True)
class Answer:
    """What a way says of a posterior.

    Attributes:
        draws: {site: (S, *site)}.
        level: "good", "resample" or "bad"; None where a way says nothing of its draws.
        verdict: the same in words.
        log_evidence: NaN where it is not estimated.
        ess: of the worst column, where the way says it; 0 for draws that cannot be trusted.
        warmup: of a chain, the seconds before the first draw that is kept; else None.
        seconds: by the clock of another process; else None.
    """

    draws: Draws
    level: str | None = None
    verdict: str = ""
    log_evidence: float = math.nan
    ess: float = math.nan
    warmup: float | None = None
    seconds: float | None = None


def by_posterior(problem: Problem, seed: int, budget: float) -> Answer:
    """One call."""
    found = pf.posterior(problem.model, problem.args, seed=seed)
    said = found.draws, found.level, str(found), float(found.log_evidence)
    return Answer(*said, ess=found.error**-2)


def by_sylvester(problem: Problem, seed: int, budget: float) -> Answer:
    """``fit_guide`` and ``diagnose`` with their defaults; draws as the level says."""
    guide = pf.AutoSylvesterFlow(problem.model)
    pf.fit_guide(problem.model, guide, problem.args, seed=seed, progress=False)
    report = pf.diagnose(problem.model, guide, problem.args, seed=seed)
    good = report.level == "good"
    draws = report.draws.sites if good else report.resample(report.num_samples, seed=seed)
    return Answer(draws, report.level, report.verdict, report.log_evidence)


def by_rival(problem: Problem, seed: int, budget: float, *, guide: str) -> Answer:
    """One of Pyro's guides, after the seconds that one call took."""
    fitted, record = fit_rival(problem, guide, budget)
    if "error" in record:
        raise ArithmeticError(record["error"])
    return Answer(draw(BoundModel(problem.model, fitted, problem.args), NUM, seed=seed).sites)


def by_nuts(problem: Problem, seed: int, budget: float) -> Answer:
    """Pyro's NUTS, one chain."""
    draws, warmup, _ = chain(problem, WARMUP, NUM // 4)
    return Answer(draws, warmup=warmup)


def by_numpyro(problem: Problem, seed: int, budget: float) -> Answer:
    """numpyro's NUTS, one chain; its process is new, so that all is compiled."""
    with Numpyro(JAX_PYTHON) as remote:
        draws, warmup, seconds = remote.chain(problem, seed, WARMUP, NUM // 4 // WARMUP)
    return Answer(draws, warmup=warmup, seconds=seconds)


POSTERIOR, SYLVESTER, NUMPYRO = "posterior", "sylvester", "numpyro"
GUIDES = ("AutoNormal", "AutoMultivariateNormal")
WAYS: dict[str, Callable[[Problem, int, float], Answer]] = {
    POSTERIOR: by_posterior,
    SYLVESTER: by_sylvester,
    **{name: partial(by_rival, guide=name) for name in GUIDES},
    "NUTS": by_nuts,
    NUMPYRO: by_numpyro,
}


def measure(run: Run, budget: float, limit: float) -> Record:
    """One run and how far its draws are off, or the message of what went wrong."""
    way, name, seed = run
    problem = find(name)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    start = time.perf_counter()
    try:
        with at_most(limit):
            answer = WAYS[way](problem, seed, budget)
    except (ArithmeticError, RuntimeError, TimeoutError, ValueError) as error:
        return {"seconds": time.perf_counter() - start, "error": str(error).partition("\n")[0]}
    seconds = time.perf_counter() - start if answer.seconds is None else answer.seconds
    record = {"seconds": seconds, "level": answer.level}
    record |= judge(answer.draws, problem.reference)
    if answer.warmup is None:
        record["ess"] = answer.ess
    else:
        record |= {
            "warmup seconds": answer.warmup,
            "ess": least_ess(answer.draws, problem.reference),
        }
    record["draws"] = len(next(iter(answer.draws.values())))
    if problem.log_evidence is not None:
        record["log evidence off"] = answer.log_evidence - problem.log_evidence
    record["verdict"] = answer.verdict.partition("\n")[0]
    return {key: value if _is_stored(value) else None for key, value in record.items()}


def _is_stored(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def alone() -> None:
    """What each process of runs starts with: one thread, and float64."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)


def missing(ways: Iterable[str], names: Iterable[str], seeds: int, results: Results) -> list[Run]:
    """The runs that the results lack, all seeds of a problem in a row."""
    return [
        (way, name, seed)
        for way in ways
        for name in names
        for seed in range(seeds)
        if str(seed) not in results.get(way, {}).get(name, {})
    ]


def complete(
    runs: list[Run],
    results: Results,
    jobs: int,
    limit: float,
    save: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Make the runs, so many at a time in processes of their own, and save after each.

    Raises:
        ValueError: If a guide of Pyro has no run of ``posterior`` whose time it may take.
    """
    ours = [run for run in runs if run[0] not in GUIDES]
    rivals = [run for run in runs if run[0] in GUIDES]
    for part in (ours, rivals):  # the time of ours is what the rivals get
        for (way, name, seed), record in _made(part, results, jobs, limit):
            results.setdefault(way, {}).setdefault(name, {})[str(seed)] = record
            save()
            say(f"{way}, {name}, seed {seed}: {summary(record)}")


def _made(
    runs: list[Run], results: Results, jobs: int, limit: float
) -> Iterator[tuple[Run, Record]]:
    budgets = {run: _budget(run, results) for run in runs}
    if jobs == 1:
        alone()
        yield from ((run, measure(run, budgets[run], limit)) for run in runs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=alone) as pool:
        started = {pool.submit(measure, run, budgets[run], limit): run for run in runs}
        for done in as_completed(started):
            yield started[done], done.result()


def _budget(run: Run, results: Results) -> float:
    way, name, seed = run
    if way not in GUIDES:
        return math.nan
    found = results.get(POSTERIOR, {}).get(name, {}).get(str(seed))
    if found is None:
        raise ValueError(
            f"the budget of {way} is the time of {POSTERIOR}, which has no result for {name}, "
            f"seed {seed}: run it first"
        )
    return found["seconds"]


def summary(record: Record) -> str:
    """One line of a record, for the terminal."""
    said = [record["level"]] if record.get("level") else []
    for name in ("mean", "sd"):
        if record.get(f"{name} error") is not None:
            said.append(f"{name} error {record[f'{name} error']:.3g} at {record[f'{name} at']}")
    said.append(f"{record['seconds']:.1f} s")
    return ", ".join(said + ([record["error"]] if "error" in record else []))


def error(record: Record, name: str) -> float:
    """An error of a record; infinite where there is none."""
    value = record.get(name)
    return math.inf if value is None else value


def worst(records: Iterable[Record]) -> list[str]:
    """The worst error of a mean and of an sd over some records, as text."""
    records = list(records)
    mean, sd = (max(error(r, f"{name} error") for r in records) for name in ("mean", "sd"))
    return [
        f"{mean:.3f}" if math.isfinite(mean) else "–",
        f"{sd:.1%}" if math.isfinite(sd) else "–",
    ]


def within(record: Record, most: float) -> bool:
    """Whether all means are within so many sds, and all sds within that part of themselves."""
    return max(error(record, "mean error"), error(record, "sd error")) <= most
