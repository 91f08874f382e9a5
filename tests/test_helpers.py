"""The helper functions: each makes what its class makes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import pyroflow as pf

HELPERS: dict[str, tuple[Callable, Callable]] = {
    "planar": (pf.planar, pf.Planar),
    "radial": (pf.radial, pf.Radial),
    "conditional_planar": (pf.conditional_planar, pf.ConditionalPlanar),
    "conditional_radial": (pf.conditional_radial, pf.ConditionalRadial),
}


@pytest.mark.parametrize("name", HELPERS)
def test_helpers_make_what_the_classes_make(name: str) -> None:
    helper, kind = HELPERS[name]
    conditional = name.startswith("conditional")
    sizes = (2, 5) if conditional else (2,)
    options = {"num_layers": 3} | ({"hidden_dims": (4, 6)} if conditional else {})
    for own, other in (
        (helper(*sizes), kind(*sizes)),
        (helper(*sizes, **options), kind(*sizes, **options)),
    ):
        assert type(own) is kind
        shapes = [{n: p.shape for n, p in t.named_parameters()} for t in (own, other)]
        assert shapes[0] == shapes[1]
    with pytest.raises(ValueError, match="input_dim must be an integer of at least 1, got 0"):
        helper(0, *sizes[1:])
