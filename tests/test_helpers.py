"""The lower-case names, as Pyro has them: the classes themselves, with every option."""

from __future__ import annotations

import pytest

import pyroflow as pf


@pytest.mark.parametrize("name", ["planar", "radial", "sylvester"])
@pytest.mark.parametrize("conditional", [False, True])
def test_lower_case_names_are_the_classes(name: str, conditional: bool) -> None:
    lower = f"conditional_{name}" if conditional else name
    kind = f"Conditional{name.title()}" if conditional else name.title()
    assert getattr(pf, lower) is getattr(pf, kind)


def test_no_option_is_lost() -> None:
    t = pf.conditional_planar(2, 3, nonlinearity="leaky_relu", negative_slope=0.3)
    assert t.planar.activation.negative_slope == 0.3
