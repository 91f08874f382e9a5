"""Checks of arguments, and seeds that leave the global generator alone."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from pyroflow.checks import check_choice, check_count, check_fraction, check_positive
from pyroflow.seeds import seeded


def test_good_values_are_returned() -> None:
    assert check_count("n", 3, 3) == 3
    assert check_positive("rate", 2) == 2
    assert check_positive("rate", 1e-30) == 1e-30
    assert check_fraction("share", 0.5) == 0.5
    assert check_choice("kind", None, ("full", None)) is None


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (lambda v: check_count("n", v, 1), 0, "n must be an integer of at least 1, got 0"),
        (lambda v: check_count("n", v, 1), 2.0, "n must be an integer of at least 1, got 2.0"),
        (lambda v: check_count("n", v, 0), True, "n must be an integer of at least 0, got True"),
        (lambda v: check_count("n", v, 0), "3", "n must be an integer of at least 0, got '3'"),
        (lambda v: check_positive("rate", v), 0, "rate must be a finite number above 0, got 0"),
        (lambda v: check_positive("rate", v), float("inf"), "above 0, got inf"),
        (lambda v: check_positive("rate", v), float("nan"), "above 0, got nan"),
        (lambda v: check_positive("rate", v), None, "above 0, got None"),
        (lambda v: check_positive("rate", v), True, "above 0, got True"),
        (
            lambda v: check_choice("kind", v, ("a", None)),
            "b",
            "kind must be one of 'a', None; got 'b'",
        ),
        (
            lambda v: check_fraction("share", v),
            1.0,
            "share must be a fraction between 0 and 1, got 1.0",
        ),
        (
            lambda v: check_fraction("share", v),
            0,
            "share must be a fraction between 0 and 1, got 0",
        ),
        (lambda v: check_fraction("share", v), float("nan"), "between 0 and 1, got nan"),
    ],
)
def test_messages(check: Callable, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check(value)


def test_seeded_draws_are_reproducible_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.randn(4)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(3):
        assert torch.equal(torch.randn(4), first)
    with seeded(4):
        assert not torch.equal(torch.randn(4), first)


def test_without_a_seed_the_global_generator_is_used() -> None:
    torch.manual_seed(5)
    expected = torch.randn(4)
    torch.manual_seed(5)
    with seeded(None):
        assert torch.equal(torch.randn(4), expected)
    assert not torch.equal(torch.randn(4), expected)


def test_the_generator_is_restored_after_an_error() -> None:
    before = torch.get_rng_state()

    def fail() -> None:
        with seeded(1):
            torch.randn(3)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(torch.get_rng_state(), before)
