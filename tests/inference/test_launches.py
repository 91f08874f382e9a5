"""Steps by graphs are the steps that they replace; those of a GPU are played on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from played import played
from pyro.distributions.transforms import affine_coupling, batchnorm
from torch import Tensor, nn

import pyroflow as pf
from pyroflow import inference
from pyroflow.inference import launches, recorded_step
from pyroflow.inference.fit import Objective
from pyroflow.inference.launches import ONE_LAUNCH, READ
from pyroflow.inference.trainer import Trainer
from pyroflow.targets import eight_schools_noncentered, energy
from pyroflow.transforms.kernels import autograd

QUICK = {"seed": 3, "progress": False}


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
    options = {"num_particles": 16, "early_stop": False, "warm_start": False} | options
    return fitted, pf.fit_guide(
        eight_schools_noncentered, fitted, **{"steps": 120} | options, **QUICK
    )


FITS = {
    "density": density,
    "energy": reverse,
    "guide": guide,
    "Sylvester": partial(guide, pf.AutoSylvesterFlow),
    "dreg": partial(guide, objective="dreg", group_size=4),
}


@pytest.mark.parametrize("name", [slow(n) if n in ("Sylvester", "dreg") else n for n in FITS])
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


# Recorded steps, on the CPU


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """From which step on they are recorded, those of energies too."""

    def any_objective(*args: Any, **options: Any) -> Objective:
        return Objective(*args, **options | {"recordable": True})

    monkeypatch.setattr(inference.energy, "Objective", any_objective)

    def switch(first: int) -> None:
        monkeypatch.setattr(recorded_step, "FROM", first)
        monkeypatch.setattr(recorded_step, "LEFT", 0)

    return switch


NEVER = 10**9


@pytest.mark.parametrize("name", [slow(n) if n in ("Sylvester", "dreg") else n for n in FITS])
def test_recorded_steps_are_the_steps_that_they_replace(name: str, recorded: Callable) -> None:
    recorded(NEVER)
    plain, expected = FITS[name]()
    recorded(7)
    found, fit = FITS[name]()
    assert (expected.launches, fit.launches) == ("", "recorded")
    assert len(fit.losses) == len(expected.losses)
    assert fit.losses[:7] == expected.losses[:7]
    assert fit.losses[:40] == pytest.approx(expected.losses[:40], rel=1e-4, abs=1e-4)
    assert fit.best_loss == pytest.approx(expected.best_loss, abs=1e-3)


def test_lost_draws_are_those_of_steps_as_they_come(recorded: Callable) -> None:
    """A step that loses draws is taken as it comes, with the draws that it had."""
    found = []
    for first in (NEVER, 3):
        recorded(first)
        flow = flow_of(pf.planar_flow)
        found.append(pf.fit_energy(flow, cliff, steps=200, num_particles=32, **QUICK))
    plain, fit = found
    assert fit.launches == "recorded, until 20 losses were not finite"
    assert fit.losses[:40] == pytest.approx(plain.losses[:40], rel=1e-4, abs=1e-4)
    assert fit.skipped == plain.skipped == 0


def test_a_recorded_fit_resumes_bit_by_bit(recorded: Callable, tmp_path: Any) -> None:
    recorded(20)
    whole, expected = guide(steps=60)
    for cut in (10, 40):
        path = tmp_path / f"{cut}.pt"

        def show(trainer: Trainer, bar: Any, cut: int = cut) -> None:
            if trainer.state.step == cut:
                raise SystemExit

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_show", show)
            with pytest.raises(SystemExit):
                guide(steps=60, checkpoint=path)
        resumed, fit = guide(steps=60, checkpoint=path)
        assert fit.launches == "recorded"
        assert fit.losses == expected.losses
        assert all(map(torch.equal, resumed.parameters(), whole.parameters()))


class Odd(nn.Module):
    """An energy with what cannot be in a graph, or a graph does not say."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls, self.kept = kind, 0, torch.Generator().manual_seed(0)

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        value = z.square().sum(-1) / 2
        match self.kind:
            case "draws by its values":
                return value + 0 * torch.poisson(value.detach())
            case "changes":
                return value * (1 + self.calls % 2)
            case "grows":
                return value * (1 + self.calls // 9 / 100)
            case "is looked at":
                return value * (1.0 if z.sum().item() > -1e9 else 2.0)
            case "has a generator":
                return value + 0.1 * torch.randn(len(z), generator=self.kept)
            case "has a new generator":
                return value + torch.randn(len(z), generator=torch.Generator().manual_seed(0))
            case "is strided":
                noise = z.new_empty(2, len(z)).t().normal_()
                return value + 0.1 * noise.sum(-1)
            case "fills":
                return value + 0 * torch.rand(len(z), out=z.new_empty(len(z)))
            case "masks":
                far = z[:, 0] > 1
                value = value.clone()
                value[far] = value[far] + z[far].square().sum(-1)
                return value


ODD = [
    "draws by its values",
    "changes",
    "is looked at",
    "has a generator",
    "has a new generator",
    "is strided",
    "fills",
    "masks",
]


@pytest.mark.parametrize("kind", ODD)
def test_what_cannot_be_recorded_runs_as_it_comes(kind: str, recorded: Callable) -> None:
    found = []
    for first in (NEVER, 3):
        recorded(first)
        options = {"steps": 30, "num_particles": 32, "lr": 0.001} | QUICK
        found.append(pf.fit_energy(flow_of(pf.planar_flow), Odd(kind), **options))
    plain, fit = found
    assert fit.launches.startswith("as they come: ")
    if kind not in ("changes", "has a generator"):  # which the trial moves on
        assert fit.losses == plain.losses


def test_a_loss_that_moves_on_by_itself_is_seen(
    recorded: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded_step, "CHECKED_EVERY", 10)
    recorded(3)
    fit = pf.fit_energy(flow_of(pf.planar_flow), Odd("grows"), steps=40, num_particles=32, **QUICK)
    assert fit.launches == "recorded, until a step was another as it came"


def test_energies_of_the_caller_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_step, "LEFT", 0)
    monkeypatch.setattr(recorded_step, "FROM", 3)
    assert reverse()[1].launches == ""


def test_parameters_in_another_order_of_memory(recorded: Callable) -> None:
    """Fused Adam goes through parameter and gradient in the order of their memory."""
    found = []
    for first in (NEVER, 3):
        recorded(first)
        flow = flow_of(lambda dim, num: pf.sylvester_flow(dim, 2, num))
        for p in flow.parameters():
            if p.dim() == 2:
                p.data = p.data.t().contiguous().t()
        data = pf.datasets.two_moons(200, seed=1)
        found.append(pf.fit_density(flow, data, steps=60, polish=0, **QUICK))
    plain, fit = found
    assert fit.launches == "recorded"
    assert fit.losses == pytest.approx(plain.losses, rel=1e-3, abs=1e-3)


def test_a_hook_of_a_parameter_is_kept(recorded: Callable) -> None:
    def still(p: Tensor) -> None:
        p.grad.zero_()

    found = []
    for first in (NEVER, 3):
        recorded(first)
        flow = flow_of(pf.planar_flow)
        for p in flow.parameters():
            p.register_post_accumulate_grad_hook(still)
        found.append(pf.fit_density(flow, pf.datasets.sine(100), steps=30, polish=0, **QUICK))
    plain, fit = found
    assert fit.launches == "as they come: a parameter has hooks"
    assert fit.losses == plain.losses


def test_the_global_generator_goes_on_as_without_a_record(recorded: Callable) -> None:
    found = []
    for first in (NEVER, 3):
        recorded(first)
        torch.manual_seed(0)
        flow, data = flow_of(pf.planar_flow), pf.datasets.sine(100)
        fit = pf.fit_density(flow, data, steps=30, polish=0, seed=None, progress=False)
        found.append((fit.losses, torch.rand(3)))
    (plain, drawn), (losses, drawn_after) = found
    assert losses == pytest.approx(plain, rel=1e-3, abs=1e-3)
    assert torch.equal(drawn, drawn_after)


def test_batch_normalisation_is_not_recorded(recorded: Callable) -> None:
    """It keeps moments of the batches, which a trial leaves as they are."""
    found = []
    for first in (NEVER, 3):
        recorded(first)
        torch.manual_seed(0)
        flow = pf.Flow(pf.flows.StandardNormal(2), [batchnorm(2), pf.transforms.Planar(2, 2)])
        found.append(pf.fit_density(flow, pf.datasets.sine(100), steps=20, polish=0, **QUICK))
    plain, fit = found
    assert fit.launches.startswith("as they come: ")
    assert fit.losses == plain.losses


def test_dropout_is_drawn_as_before(recorded: Callable) -> None:
    found = []
    for first in (NEVER, 3):
        recorded(first)
        torch.manual_seed(0)
        flow = pf.Flow(pf.flows.StandardNormal(2), [affine_coupling(2, [8])])
        flow.parts[0].nn.f = nn.Dropout(0.5)
        found.append(pf.fit_density(flow, pf.datasets.sine(100), steps=30, polish=0, **QUICK))
    plain, fit = found
    assert fit.launches == "recorded"
    assert fit.losses == pytest.approx(plain.losses, rel=1e-4, abs=1e-4)


def test_few_steps_are_not_worth_a_record() -> None:
    assert guide(steps=recorded_step.FROM + 5)[1].launches == ""
