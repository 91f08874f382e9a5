"""Posteriors with a reference, of whatever suite, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .hierarchies import models as of_hierarchies
from .judging import Reference, from_draws, supports
from .known import SEVEN, TARGETS, THOUSAND
from .posteriordb import models as of_posteriordb

POSTERIORS = (*of_posteriordb.NAMES, *of_hierarchies.NAMES, *SEVEN, THOUSAND)


@dataclass(frozen=True)
class Problem:
    """A model, its data, and what its posterior is.

    Attributes:
        name: of the target, the hierarchy or the posterior of posteriordb.
        model: called as ``model(*args)``.
        args: numbers in torch's default dtype, those of posteriordb in float64.
        reference: to judge draws by.
        log_evidence: None where it is not known.
    """

    name: str
    model: Callable
    args: tuple
    reference: Reference
    log_evidence: float | None


@functools.lru_cache(maxsize=1)
def find(name: str) -> Problem:
    """The problem of that name; the last one is kept, for its further seeds.

    Raises:
        ValueError: If there is none, or its files are not there.
    """
    if name in TARGETS:
        target = TARGETS[name]
        return Problem(name, *target.build(), target.reference(), target.exact.log_evidence)
    if name in of_hierarchies.NAMES:
        found = of_hierarchies.load(name)
        return Problem(name, found.model, found.args, found.reference, found.log_evidence)
    found = of_posteriordb.load(name)
    reference = from_draws(found.draws, supports(found.model, found.args))
    return Problem(name, found.model, found.args, reference, found.log_normalizer)


def reference_draws(name: str, num: int) -> dict[str, Tensor]:
    """The first draws of the reference of that problem, {site: (num, *site)}."""
    if name in TARGETS:
        return TARGETS[name].draws(num)
    suite = of_hierarchies if name in of_hierarchies.NAMES else of_posteriordb
    return {site: value[:num] for site, value in suite.load(name).draws.items()}
