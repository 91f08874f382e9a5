"""Tensors live where the module or data that they belong to live, whatever torch's defaults are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from pyro.distributions.transforms import affine_coupling
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyroflow as pf
from pyroflow.inference import launches
from pyroflow.seeds import seeded
from pyroflow.targets import eight_schools_exact, energy

QUICK = {"progress": False, "seed": 3}


@pytest.fixture
def default_device() -> Iterator[Callable]:
    yield torch.set_default_device
    torch.set_default_device(None)


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=CUDA)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def model(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(y.new_zeros(()), 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc.sum(-1, keepdim=loc.dim() > 1), scale), obs=y)


def rows_model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def density(y: Tensor) -> list[Tensor]:
    found = []
    for made in (
        partial(pf.planar_flow, 2, 3),
        partial(pf.radial_flow, 2, 3, affine="diagonal"),
        partial(pf.sylvester_flow, 2, 2, 2, context_dim=1),
    ):
        with y.device, seeded(0):
            flow = made().to(y)
        data = pf.datasets.two_moons(60, seed=1)
        context = data[:, :1] if flow.conditional else None
        pf.fit_density(flow, data, context=context, steps=4, polish=2, **QUICK)
        found += copy.deepcopy(flow).parameters()
    return found


def energies(y: Tensor) -> list[Tensor]:
    with y.device, seeded(0):
        flow = pf.planar_flow(2, 3).to(y)
    pf.fit_energy(flow, energy(1), steps=4, **QUICK)
    return list(flow.parameters())


def guides(y: Tensor) -> list[Tensor]:
    found = []
    for made in (
        partial(pf.AutoPlanarFlow, num_layers="auto", base_df=5.0),
        partial(pf.AutoSylvesterFlow, num_layers=1, orthogonal="random", affine="diagonal"),
        lambda model: pf.AutoFlow(model, lambda dim: [pf.Radial(dim), affine_coupling(dim, [4])]),
    ):
        guide = made(model)
        pf.fit_guide(model, guide, (y,), steps=4, **QUICK)
        again = copy.deepcopy(guide)
        found += again.parameters()
        found += again.quantiles([0.1, 0.9]).values()
        found.append(again.log_prob(again.median()))
    return found


def cold_guide(y: Tensor) -> list[Tensor]:
    guide = pf.AutoPlanarFlow(model, 2)
    options = {"warm_start": False, "objective": "iwae", "group_size": 4, "steps": 4}
    pf.fit_guide(model, guide, (y,), **options, **QUICK)
    return list(guide.parameters())


def structured_guide(y: Tensor) -> list[Tensor]:
    guide = pf.AutoStructuredFlow(rows_model)
    pf.fit_guide(rows_model, guide, (y,), steps=4, **QUICK)
    return [*guide.parameters(), *copy.deepcopy(guide).quantiles([0.1, 0.9]).values()]


def amortised_guide(y: Tensor) -> list[Tensor]:
    found = []
    for context in ("y", None):
        guide = pf.AmortizedPlanarGuide(rows_model, "rows", context, num_layers=2, global_layers=1)
        pf.fit_guide(rows_model, guide, (y,), steps=4, **QUICK)
        found += [*guide.parameters(), *guide.quantiles([0.1, 0.9], y).values()]
    return found


def reports(y: Tensor) -> list[Tensor]:
    with seeded(0):
        guide = pf.AutoPlanarFlow(model, 2).setup(y)
    report = pf.diagnose(model, guide, (y,), num_samples=200, seed=1)
    exported = pf.to_arviz(model, guide, (y,), num_samples=40, resample=True, seed=1)
    arrays = [exported[g][n].values for g in ("posterior", "prior") for n in ("loc", "scale")]
    return [*report.resample(20, seed=2).values(), *map(torch.from_numpy, arrays)]


def calibration(y: Tensor) -> list[Tensor]:
    make = partial(pf.AutoPlanarFlow, num_layers=1)
    options = {"num_simulations": 2, "num_samples": 30, "steps": 3}
    found = pf.calibrate(model, make, (y,), **options, **QUICK)
    return [*found.probabilities.values(), *found.symmetry_p_values.values()]


def files(y: Tensor) -> list[Tensor]:
    with y.device, seeded(0):
        flow = pf.radial_flow(2, 3).to(y)
        guide = pf.AutoPlanarFlow(model, 2).setup(y)
    pf.save(flow, "flow.pt")
    pf.save(guide, "guide.pt")
    loaded = pf.load("flow.pt", device=y.device), pf.load("guide.pt", device=y.device)
    return [t for each in loaded for t in each.state_dict().values() if isinstance(t, Tensor)]


def data_sets(y: Tensor) -> list[Tensor]:
    return [
        *(make(9, seed=1).to(y.device) for make in (pf.datasets.sine, pf.datasets.ring)),
        *(t.to(y.device) for t in eight_schools_exact(5, y=y, sigma=1 + y**2)[0].values()),
    ]


TASKS = [
    density,
    energies,
    guides,
    cold_guide,
    structured_guide,
    amortised_guide,
    reports,
    calibration,
    files,
    data_sets,
]
QUICKER = [slow(task) if task in (guides, amortised_guide) else task for task in TASKS]


# The index of Pyro's plates, which an amortised guide reads, has no data on the default device.
@pytest.mark.parametrize("task", [t for t in QUICKER if t is not amortised_guide])
def test_a_default_device_changes_nothing_of_what_is_elsewhere(
    task: Callable[[Tensor], list[Tensor]],
    device: str,
    default_device: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The default is torch's device without data, where nothing can be computed."""
    monkeypatch.chdir(tmp_path)
    y = torch.tensor([0.3, -1.2, 0.8, 2.0], device=device)
    expected = task(y)
    pyro.clear_param_store()
    default_device("meta")
    found = task(y)
    default_device(None)
    assert all(map(torch.equal, found, expected))
    assert len(found) == len(expected) > 0


@pytest.mark.parametrize("default", [torch.float32, slow(torch.float64)])
@pytest.mark.parametrize("task", QUICKER)
def test_a_default_dtype_changes_nothing_of_what_has_another(
    task: Callable[[Tensor], list[Tensor]],
    default: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    other = {torch.float32: torch.float64, torch.float64: torch.float32}[default]
    y = torch.tensor([0.3, -1.2, 0.8, 2.0], dtype=other)
    torch.set_default_dtype(default)
    try:
        found = [t.dtype for t in task(y) if t.is_floating_point()]
    finally:
        torch.set_default_dtype(torch.float64)
    expected = (
        {torch.float32, torch.float64} if task in (reports, calibration, data_sets) else {other}
    )
    assert set(found) <= expected


@CUDA
@pytest.mark.parametrize("task", TASKS)
def test_modules_made_under_a_default_device_live_there(
    task: Callable[[Tensor], list[Tensor]],
    default_device: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    default_device("cuda")
    y = torch.tensor([0.3, -1.2, 0.8, 2.0])
    found = task(y)
    places = {t.device.type for t in found}
    assert "cuda" in places
    assert places <= ({"cuda", "cpu"} if task in (reports, calibration) else {"cuda"})


@CUDA
def test_a_guide_of_pyro_is_fitted_under_a_default_device(default_device: Callable) -> None:
    default_device("cuda")
    y = torch.tensor([0.3, -1.2, 0.8, 2.0])
    guide = AutoNormal(model)
    pf.fit_guide(model, guide, (y,), steps=4, **QUICK)
    assert guide.median()["loc"].device.type == "cuda"


LAUNCHED = {
    "density": lambda flow, **options: pf.fit_density(
        flow, pf.datasets.sine(400, seed=1), polish=0, batch_size=64, **options
    ),
    "energy": lambda flow, **options: pf.fit_energy(
        flow, energy(1), num_particles=64, annealing=lambda t: min(1.0, t / 50), **options
    ),
    "guide": lambda flow, **options: pf.fit_guide(
        model, flow, (torch.tensor([0.3, -1.2, 0.8], device="cuda"),), early_stop=False, **options
    ),
}


@CUDA
@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize("kind", LAUNCHED)
def test_launches_of_a_graph_are_the_steps_that_they_replace(
    kind: str, seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for on in (False, True):
        monkeypatch.setattr(launches, "_is_one_gpu", lambda devices, on=on: on)
        pyro.set_rng_seed(0)
        flow = pf.AutoPlanarFlow(model, 2) if kind == "guide" else pf.planar_flow(2, 3).cuda()
        found.append(LAUNCHED[kind](flow, steps=100, seed=seed, progress=False))
    plain, launched = found
    assert (plain.launches, launched.launches) == ("", launches.ONE_LAUNCH)
    if seed is not None:  # else the steps before the capture have drawn from the global generator
        assert launched.losses == pytest.approx(plain.losses, rel=1e-4, abs=1e-4)
    assert launched.best_loss == pytest.approx(plain.best_loss, abs=0.1)


@CUDA
def test_a_step_that_cannot_be_a_launch_harms_nothing() -> None:
    def looking(z: Tensor) -> Tensor:
        return z.square().sum(-1) / 2 * (1.0 if z.sum().item() > -1e9 else 2.0)

    flow = pf.planar_flow(2, 3).cuda()
    fit = pf.fit_energy(flow, looking, steps=40, num_particles=64, **QUICK)
    assert "could not be one launch" in fit.launches
    assert torch.isfinite(torch.tensor(fit.losses)).all()
    assert torch.randn(3, device="cuda").isfinite().all()
