"""Seeded calls in several threads, and beside draws from the global generator."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from amortized_cases import Y, rows_model
from cases import slow
from pyro.distributions.transforms import affine_coupling
from torch import Tensor, nn
from torch.distributions import Distribution

import pyroflow as pf
from pyroflow.seeds import seeded
from pyroflow.targets import eight_schools_centered as schools
from pyroflow.targets import energy
from pyroflow.targets import toy_model as toy

# Each makes its own objects, and returns numbers that depend on all that was drawn.
# Of noisy_model; dropout is drawn by the fit's own generators all the same.
pytestmark = pytest.mark.filterwarnings("ignore:the model says something else")

QUICK: dict[str, Any] = {"progress": False, "seed": 3}


def _numbers(module: nn.Module, fit: pf.Fit) -> list[Tensor]:
    return [torch.tensor(fit.losses), *(p.detach() for p in module.parameters())]


def density() -> list[Tensor]:
    with seeded(0):
        flow = pf.planar_flow(2, 4)
    data = pf.datasets.sine(200).double()
    return _numbers(flow, pf.fit_density(flow, data, steps=15, polish=10, **QUICK))


def density_with_dropout() -> list[Tensor]:
    with seeded(0):
        flow = pf.Flow(pf.flows.StandardNormal(2), [affine_coupling(2, [8])])
        flow.parts[0].nn.f = nn.Dropout(0.5)
    data = pf.datasets.sine(200).double()
    return _numbers(flow, pf.fit_density(flow, data, steps=15, polish=0, **QUICK))


def energies() -> list[Tensor]:
    with seeded(0):
        flow = pf.planar_flow(2, 4)
    return _numbers(flow, pf.fit_energy(flow, energy(1), steps=15, **QUICK))


def noisy_energy() -> list[Tensor]:
    with seeded(0):
        flow = pf.planar_flow(2, 2)

    def noisy(z: Tensor) -> Tensor:
        return z.square().sum(-1) * (1 + torch.rand(()))

    return _numbers(flow, pf.fit_energy(flow, noisy, steps=15, **QUICK))


def flow_guide() -> list[Tensor]:
    with seeded(0):
        guide = pf.AutoPlanarFlow(toy, 2).setup()
    return _numbers(guide, pf.fit_guide(toy, guide, steps=15, **QUICK))


def noisy_model() -> list[Tensor]:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(F.dropout(z, 0.5).sum(-1), 1.0), obs=torch.tensor(1.0))

    guide = pf.AutoPlanarFlow(model, 2)
    return _numbers(guide, pf.fit_guide(model, guide, steps=10, **QUICK))


def amortised_guide() -> list[Tensor]:
    guide = pf.AmortizedPlanarGuide(rows_model, "rows", "y", num_layers=2)
    return _numbers(guide, pf.fit_guide(rows_model, guide, (Y,), steps=6, **QUICK))


def diagnosis() -> list[Tensor]:
    with seeded(0):
        guide = pf.AutoPlanarFlow(schools, 2).setup()
    report = pf.diagnose(schools, guide, num_samples=200, seed=1)
    return [report.log_weights, *report.resample(20, seed=2).values()]


def quantiles() -> list[Tensor]:
    with seeded(0):
        guide = pf.AutoPlanarFlow(schools, 2)
        return list(guide.quantiles([0.1, 0.9]).values())


def calibration() -> list[Tensor]:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    options = {"num_simulations": 2, "num_samples": 50, "steps": 5}
    make = partial(pf.AutoPlanarFlow, num_layers=2)
    found = pf.calibrate(model, make, (torch.zeros(4),), **options, **QUICK)
    return [found.probabilities["loc"], found.symmetry_p_values["loc"]]


def export() -> list[Tensor]:
    with seeded(0):
        guide = pf.AutoPlanarFlow(schools, 2).setup()
    found = pf.to_arviz(schools, guide, num_samples=40, resample=True, seed=1)
    groups = ("posterior", "posterior_predictive", "prior", "prior_predictive")
    return [torch.as_tensor(v.values) for g in groups for v in found[g].data_vars.values()]


TASKS = [
    density,
    density_with_dropout,
    energies,
    noisy_energy,
    flow_guide,
    noisy_model,
    amortised_guide,
    diagnosis,
    quantiles,
    calibration,
    export,
]


def _same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(a, b) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("task", [slow(t) if t is amortised_guide else t for t in TASKS])
def test_seeded_calls_repeat_and_leave_the_global_generator(
    task: Callable[[], list[Tensor]],
) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = task()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert _same(task(), first)


@pytest.mark.parametrize(
    "tasks",
    [
        (density, diagnosis),
        slow((density, flow_guide)),
        slow((amortised_guide, calibration)),
    ],
)
def test_two_threads_have_the_results_of_one(tasks: tuple[Callable, ...]) -> None:
    _check_threads(list(tasks))


@pytest.mark.slow
def test_four_threads_have_the_results_of_one() -> None:
    _check_threads(TASKS * 2)


def _check_threads(tasks: list[Callable]) -> None:
    expected = [task() for task in tasks]
    torch.manual_seed(5)
    global_draws = [torch.rand(2) for _ in range(200)]
    torch.manual_seed(5)
    with ThreadPoolExecutor(min(4, len(tasks))) as pool:
        running = [pool.submit(task) for task in tasks]
        drawn = [torch.rand(2) for _ in range(200)]  # meanwhile
        found = [each.result() for each in running]
    assert all(_same(a, b) for a, b in zip(found, expected, strict=True))
    assert _same(drawn, global_draws)
    assert Distribution._validate_args
    assert not torch.utils._python_dispatch.is_in_any_mode_without_ignore_compile_internals()
