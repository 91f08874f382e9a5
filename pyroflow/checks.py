"""Checks of arguments: name, what was expected, what came."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral, Real


def check_count(name: str, value: int, minimum: int) -> int:
    """Return value as an int if it is an integer of at least minimum, else raise ``ValueError``."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return int(value)


def check_positive(name: str, value: float) -> float:
    """Return value if it is a finite number above zero, else raise ``ValueError``."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return value


def check_choice(name: str, value: object, choices: Collection) -> None:
    """Raise ``ValueError`` unless value is one of the choices."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}; got {value!r}")


def check_fraction(name: str, value: float) -> float:
    """Return value if it lies strictly between 0 and 1, else raise ``ValueError``."""
    if not isinstance(value, Real) or not 0 < value < 1:
        raise ValueError(f"{name} must be a fraction between 0 and 1, got {value!r}")
    return value
