"""The results as Markdown, and which of the bars they meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import pandas as pd

from .. import tables
from .models import NAMES
from .rivals import GUIDES
from .run import NUTS, OURS, Record

COLUMNS = {
    "KL": "kl",
    "k-hat": "khat",
    "ESS": "ess",
    "mean, sds": "mean error",
    "log sd": "sd error",
    "mean, PSIS": "mean error, weighted",
    "log sd, PSIS": "sd error, weighted",
    "seconds": "seconds",
}
HEAD = ["posterior", *COLUMNS, "best rival: KL", "NUTS: mean, log sd, seconds"]
HARD = {"gp_pois_regr-gp_pois_regr": 0.2, "eight_schools-eight_schools_centered": 0.45}
NOISE = 3  # standard errors by which ours may be above a rival

Found = dict[str, dict[str, Record]]  # of one posterior, by method and seed
Bar = Callable[[Record], bool]


def finished(stored: dict[str, Any]) -> dict[str, Found]:
    """The results by posterior, of those where ours has been run."""
    results = {name: stored["results"].get(name, {}) for name in NAMES}
    return {name: found for name, found in results.items() if found.get(OURS)}


def markdown(stored: dict[str, Any]) -> str:
    """Ours beside the best rival and NUTS; all rivals; the bars."""
    results = finished(stored)
    if not results:
        return f"there are no results of {OURS} yet"
    ours = [[name, *_ours(found), _best(found), _nuts(found)] for name, found in results.items()]
    rivals = [
        [name, *(spread(found.get(rival, {}), "kl") for rival in GUIDES)]
        for name, found in results.items()
    ]
    return "\n\n".join(
        [
            "Median over the seeds, and their range:",
            tables.markdown(pd.DataFrame(ours, columns=HEAD)),
            "KL of the rivals in the same time:",
            tables.markdown(pd.DataFrame(rivals, columns=["posterior", *GUIDES])),
            "\n".join(f"- {line}" for line in bars(results)),
        ]
    )


def _ours(found: Found) -> list[str]:
    return [spread(found[OURS], key) for key in COLUMNS.values()]


def _best(found: Found) -> str:
    best = best_rival(found)
    return "–" if best is None else f"{spread(found[best], 'kl')} {best}"


def _nuts(found: Found) -> str:
    record = found.get(NUTS, {}).get("0")
    if record is None:
        return "–"
    if "error" in record:
        return record["error"]
    return ", ".join(number(record[key]) for key in ("mean error", "sd error", "seconds"))


def best_rival(found: Found) -> str | None:
    """The rival with the lowest median KL; one that failed with a seed has no finite one."""
    medians = {rival: _median(found[rival], "kl") for rival in GUIDES if found.get(rival)}
    best = min(medians, key=medians.get, default=None)
    return best if best is not None and medians[best] < math.inf else None


def _values(records: dict[str, Record], key: str) -> list[float]:
    found = (record.get(key) for record in records.values())
    return [math.inf if value is None else value for value in found]


def _median(records: dict[str, Record], key: str) -> float:
    return median(_values(records, key))


def spread(records: dict[str, Record], key: str) -> str:
    """Median and range over the seeds; "fails" for what has no value."""
    if not records:
        return "–"
    values = _values(records, key)
    if min(values) == max(values):
        return number(values[0])
    return f"{number(median(values))} ({number(min(values))} to {number(max(values))})"


def number(value: float | None) -> str:
    """Three decimals below 10, one up to 1000."""
    if value is None or math.isinf(value):
        return "fails"
    if abs(value) < 9.9995:
        return f"{value:.3f}"
    return f"{value:.1f}" if abs(value) < 999.95 else f"{value:.2g}"


def bars(results: dict[str, Found]) -> list[str]:
    """For each bar, on how many posteriors it is met with every seed, and where it is not."""
    easy = {name: found for name, found in results.items() if name not in HARD}
    lines = [_met("KL ≤ 0.03", lambda r: _kl(r) <= 0.03, easy)]
    for name, most in HARD.items():
        if name in results:
            lines.append(
                _met(f"KL ≤ {most}", lambda r, most=most: _kl(r) <= most, {name: results[name]})
            )
    return [
        *lines,
        _met("k-hat < 0.7 or ESS ≥ 0.95", _trusted, results),
        _met("means within 0.05 sd", lambda r: _value(r, "mean error") <= 0.05, results),
        _met("sds within 5 %", lambda r: _value(r, "sd error") <= math.log(1.05), results),
        _met("within 60 s", lambda r: _value(r, "seconds") <= 60, results),
        _said("KL not above the best rival's, beyond noise", _above_rival(results), len(results)),
    ]


def _value(record: Record, key: str) -> float:
    value = record.get(key)
    return math.inf if value is None else value


def _kl(record: Record) -> float:
    return _value(record, "kl")


def _trusted(record: Record) -> bool:
    return _value(record, "khat") < 0.7 or (record.get("ess") or 0) >= 0.95


def _met(label: str, bar: Bar, results: dict[str, Found]) -> str:
    missed = [
        name
        for name, found in results.items()
        if not all(bar(record) for record in found[OURS].values())
    ]
    return _said(label, missed, len(results))


def _said(label: str, missed: Iterable[str], total: int) -> str:
    missed = list(missed)
    where = f"; not {', '.join(missed)}" if missed else ""
    return f"{label}, every seed: {total - len(missed)} of {total}{where}"


def _above_rival(results: dict[str, Found]) -> list[str]:
    """Where a rival with the same seed has a KL below ours by more than noise."""
    return [name for name, found in results.items() if any(_losses(found))]


def _losses(found: Found) -> Iterable[bool]:
    for seed, ours in found[OURS].items():
        for rival in GUIDES:
            theirs = found.get(rival, {}).get(seed, {})
            noise = math.hypot(ours.get("elbo_se") or 0, theirs.get("elbo_se") or 0)
            yield _kl(theirs) < _kl(ours) - NOISE * noise
