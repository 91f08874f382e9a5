"""Every test starts from the same state, and must leave torch's global state as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroflow.transforms.kernels import per_point, shared, units

torch.set_num_threads(1)  # the tensors are small: threads would wait for each other


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Seed 0, float64, an empty parameter store and validation on."""
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.enable_validation(True)
    yield
    dtype, validates = torch.get_default_dtype(), Distribution._validate_args
    torch.set_default_dtype(torch.float32)
    Distribution.set_default_validate_args(True)
    assert dtype == torch.float64, f"the test left the default dtype at {dtype}"
    assert validates, "the test left torch's validation of arguments switched off"
    assert torch.is_grad_enabled(), "the test left gradients switched off"


@pytest.fixture
def float32() -> Iterator[None]:
    """What users have by default."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every pass that has roots to find, of the kernels or the general path."""
    calls = []
    searching = {shared: "inverse", per_point: "inverse", units: "monotone_root"}

    def counted(search: Callable) -> Callable:
        def call(value: Tensor, other: object) -> object:
            calls.append(value.numel())
            return search(value, other)

        return call

    for module, name in searching.items():
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return calls
