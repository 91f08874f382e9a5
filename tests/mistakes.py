"""What the tables of mistakes share: data, short fits, and how a row is checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import pyroflow as pf

Row = tuple[Callable[[], Any], type[Exception], str]  # the call, what is raised, what it says
X = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))


def flow(*args: Any, **options: Any) -> pf.Flow:
    return pf.planar_flow(2, 2, *args, **options)


def density(data: Any, of: Any = None, **options: Any) -> pf.Fit:
    options = {"steps": 2, "polish": 0, "seed": 0, "progress": False} | options
    return pf.fit_density(flow() if of is None else of, data, **options)


def check(row: Row) -> None:
    """The call raises the very type, with what it says, in one line."""
    call, kind, said = row
    with pytest.raises(kind, match=said) as caught:
        call()
    assert caught.type is kind
    # Pyro adds the shapes of a trace to what is raised inside of it.
    assert len(str(caught.value).partition("\nTrace Shapes:")[0].splitlines()) == 1


def by_name(**tables: dict[str, Row]) -> dict[str, Row]:
    """The rows of all tables, under the names of both."""
    return {f"{table}: {n}": row for table, rows in tables.items() for n, row in rows.items()}
