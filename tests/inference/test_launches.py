"""Steps as launches of a graph are the steps that they replace; the graph is played on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyroflow as pf
from pyroflow.inference import launches
from pyroflow.inference.launches import ONE_LAUNCH, READ
from pyroflow.targets import eight_schools_noncentered, energy
from pyroflow.transforms.kernels import autograd

QUICK = {"seed": 3, "progress": False}
LOOKS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}


class Blind(TorchDispatchMode):
    """Where the host may not see a result, as in a graph."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in LOOKS or any(m is not None and m.dtype == torch.bool for m in masks):
            raise RuntimeError(f"{name} in a graph")
        return func(*args, **(kwargs or {}))


def played(step: Callable[[], None], idle: Tensor) -> Callable[[], None]:
    """A step that is run by Python each time, blind."""

    def replay() -> None:
        with pyro.validation_enabled(False), Blind():
            step()

    idle.fill_(True)
    for _ in range(launches.WARM_UP):
        replay()
    idle.fill_(False)
    return replay


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether steps are launches; the planar kernels look at weights on the CPU alone."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(autograd, "_constrain_rows", lambda w, u: None)
        monkeypatch.setattr(launches, "capture", played)
        monkeypatch.setattr(launches, "_is_one_gpu", lambda devices: on)

    return switch


def density() -> tuple[Any, pf.Fit]:
    flow = flow_of(pf.planar_flow)
    data = pf.datasets.two_moons(200, seed=1)
    return flow, pf.fit_density(flow, data, steps=130, polish=0, batch_size=32, **QUICK)


def reverse() -> tuple[Any, pf.Fit]:
    flow = flow_of(pf.radial_flow)
    options = {"steps": 120, "num_particles": 32, "annealing": lambda step: min(1.0, step / 100)}
    return flow, pf.fit_energy(flow, energy(1), **options, **QUICK)


def flow_of(make: Callable[..., pf.Flow]) -> pf.Flow:
    torch.manual_seed(0)
    return make(2, 4)


def guide(make: Callable = pf.AutoPlanarFlow, **options: Any) -> tuple[Any, pf.Fit]:
    pyro.clear_param_store()
    fitted = make(eight_schools_noncentered)
    options = {"steps": 120, "num_particles": 16, "early_stop": False} | options
    return fitted, pf.fit_guide(eight_schools_noncentered, fitted, **options, **QUICK)


FITS = {
    "density": density,
    "energy": reverse,
    "guide": guide,
    "Sylvester": partial(guide, pf.AutoSylvesterFlow),
    "dreg": partial(guide, objective="dreg", group_size=4),
}


@pytest.mark.parametrize("name", FITS)
def test_launches_are_the_steps_that_they_replace(name: str, graphs: Callable) -> None:
    graphs(False)
    plain, expected = FITS[name]()
    graphs(True)
    launched, fit = FITS[name]()
    assert (expected.launches, fit.launches) == ("", ONE_LAUNCH)
    num = min(len(fit.losses), len(expected.losses))
    assert num > READ
    # The rate of a launch is in float32.
    assert fit.losses[:num] == pytest.approx(expected.losses[:num], rel=1e-4, abs=1e-4)
    assert fit.best_loss == pytest.approx(expected.best_loss, abs=1e-4)
    for p, q in zip(launched.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-3, atol=1e-4)


def cliff(z: Tensor) -> Tensor:
    """Finite to the left of 2.5 alone."""
    return z.square().sum(-1) / 2 + torch.where(z[:, 0] < 2.5, 0.0, torch.nan)


def test_a_step_that_is_not_finite_has_no_effect_and_is_the_last(graphs: Callable) -> None:
    graphs(True)
    flow = flow_of(pf.planar_flow)
    fit = pf.fit_energy(flow, cliff, steps=200, num_particles=32, **QUICK)
    assert fit.launches == "one launch a step, until a loss or gradient was not finite"
    assert 1 <= fit.skipped <= READ
    first = next(i for i, loss in enumerate(fit.losses) if math.isnan(loss))
    assert all(map(math.isfinite, fit.losses[-100:]))
    assert first < 100
    assert all(bool(p.isfinite().all()) for p in flow.parameters())
    assert len(fit.losses) == fit.steps == 200


def looking(z: Tensor) -> Tensor:
    """An energy whose value the host reads."""
    return z.square().sum(-1) / 2 * (1.0 if z.sum().item() > -1e9 else 2.0)


def test_a_step_that_is_looked_at_is_no_launch(graphs: Callable) -> None:
    results = []
    for on in (False, True):
        graphs(on)
        flow = flow_of(pf.planar_flow)
        results.append(pf.fit_energy(flow, looking, steps=40, num_particles=32, **QUICK))
    plain, fit = results
    assert fit.launches == "a step could not be one launch: _local_scalar_dense in a graph"
    assert fit.losses == pytest.approx(plain.losses, rel=1e-12)


def lonely(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z if z.sum() > 0 else -z, 1.0), obs=x)


def test_what_has_no_steady_loss_is_fitted_as_before(graphs: Callable, tmp_path: Any) -> None:
    graphs(True)
    fitted = pf.AutoPlanarFlow(lonely, 1)
    fit = pf.fit_guide(lonely, fitted, (torch.ones(()),), steps=4, **QUICK)
    assert fit.launches == ""
    assert guide(checkpoint=tmp_path / "fit.pt", steps=4)[1].launches == ""
