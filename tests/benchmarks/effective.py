"""Seconds to the same Monte Carlo error: the effective draws of each way, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

import pandas as pd

from . import tables
from .problems import POSTERIORS
from .runs import POSTERIOR, WAYS, WRONG, Record, Results, error

WANTED = 400  # effective draws: a mean to 0.05 sd, which is what ``posterior`` promises
NOISE = 4.0  # standard errors, over all columns
CAPTION = f"""\
Seconds to the same Monte Carlo error. The ESS is that of the worst parameter; set-up, warm-up and
compilation are in the seconds. "to {WANTED}" is seconds to an ESS of {WANTED}: of `posterior` those
that it took, as it goes on until it has them; of a chain those of its warm-up, and as many more as
{WANTED} / ESS of its draws took, extrapolated from this run, of which an ESS below some 50 says
little. Median over the seeds. An ESS knows nothing of a mode that was missed: *wrong* marks draws
that are off by more than {WRONG} sd or {WRONG:.0%}, and by more than {NOISE:g} of the standard
errors that their ESS says.
""".replace("\n", " ").strip()


def markdown(results: Results) -> str:
    """A row a posterior, and how the seconds of the others are to ours; "" without any ESS."""
    ways = [way for way in WAYS if any(map(_known, results.get(way, {}).values()))]
    others = [way for way in ways if way != POSTERIOR]
    rows, ratios = [], {way: [] for way in others}
    for name in POSTERIORS:
        found = {way: list(results[way].get(name, {}).values()) for way in ways}
        if not any(found.values()):
            continue
        row = [name]
        for way in ways:
            row += _cells(found[way])
        for way in others:
            ratio = _ratio(found[way], found.get(POSTERIOR, []))
            row.append("–" if ratio is None else f"{ratio:.2g}")
            if ratio is not None and _right(found[way]) and _right(found[POSTERIOR]):
                ratios[way].append(ratio)
        rows.append(row)
    if not rows:
        return ""
    columns = ["posterior"]
    for way in ways:
        columns += [f"{way}: seconds", "ESS", "a second", f"to {WANTED}"]
    columns += [f"{way} / {POSTERIOR}, to {WANTED}" for way in others]
    said = "\n".join(f"- {_summary(way, found)}" for way, found in ratios.items() if found)
    table = tables.markdown(pd.DataFrame(rows, columns=columns))
    return "\n\n".join(part for part in (CAPTION, table, said) if part)


def seconds_to(record: Record, ess: float = WANTED) -> float | None:
    """To so many effective draws; None for a run without an ESS, or that stopped short of them."""
    if not record.get("ess"):
        return None
    warmup = record.get("warmup seconds")
    if warmup is None:  # not a chain: what it has is what it was run for
        return record["seconds"] if record["ess"] >= ess else None
    return warmup + (record["seconds"] - warmup) * ess / record["ess"]


def _known(seeds: dict[str, Record]) -> bool:
    return any(record.get("ess") for record in seeds.values())


def _cells(records: list[Record]) -> list[str]:
    """Seconds, ESS, ESS a second, and seconds to those that are wanted."""
    if not records:
        return ["–"] * 4
    seconds = f"{median(record['seconds'] for record in records):.1f}"
    if not _right(records):
        seconds += " *wrong*"
    ess = _median(records, lambda record: record.get("ess"))
    rate = _median(records, lambda record: (record.get("ess") or 0) / record["seconds"])
    return [seconds, _shown(ess), _shown(rate), _shown(_median(records, seconds_to))]


def _median(records: list[Record], number: Callable[[Record], float | None]) -> float | None:
    """Over records; None if one has none, as the median of the others would flatter."""
    found = [number(record) for record in records]
    return median(found) if all(found) else None


def _ratio(records: list[Record], ours: list[Record]) -> float | None:
    a, b = (_median(found, seconds_to) if found else None for found in (records, ours))
    return a / b if a and b else None


def _right(records: list[Record]) -> bool:
    return not any(is_wrong(record) for record in records if "error" not in record)


def is_wrong(record: Record) -> bool:
    """Whether draws are off by more than is of use, and than so few effective ones explain."""
    ess = record.get("ess") or math.inf  # of draws that cannot be trusted nothing is explained
    noise = ess**-0.5, (record["sd noise"] or 0.0) * (record["draws"] / ess) ** 0.5
    return any(
        error(record, f"{name} error") > max(WRONG, NOISE * own)
        for name, own in zip(("mean", "sd"), noise, strict=True)
    )


def _shown(number: float | None) -> str:
    if number is None:
        return "–"
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _summary(way: str, ratios: list[float]) -> str:
    slower = sum(ratio > 1 for ratio in ratios)
    return (
        f"{way}, seconds to {WANTED} over those of {POSTERIOR}: median {median(ratios):.2g} of "
        f"{len(ratios)} posteriors on which neither is wrong; {POSTERIOR} is first on {slower}"
    )
