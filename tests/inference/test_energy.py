"""Reverse KL to exp(−U)."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pyroflow as pf
from pyroflow.inference.trainer import Trainer


def gaussian_energy(z: Tensor) -> Tensor:
    """U of N((1, −2), diag(4, 0.25)) up to a constant: −ln Z = −ln 2π."""
    return ((z[:, 0] - 1) / 2).square() / 2 + ((z[:, 1] + 2) / 0.5).square() / 2


def test_gaussian_energy_reaches_its_normaliser() -> None:
    flow = pf.planar_flow(2, num_layers=2)
    fit = pf.fit_energy(flow, gaussian_energy, steps=1500, lr=0.03, seed=0, progress=False)
    assert fit.best_loss == pytest.approx(-math.log(2 * math.pi), abs=2e-3)
    with torch.no_grad():
        draws = flow().sample((100_000,))
    assert torch.allclose(draws.mean(0), torch.tensor([1.0, -2.0]), atol=0.05)
    assert torch.allclose(draws.std(0), torch.tensor([2.0, 0.5]), rtol=0.05)


def test_runs_from_base_to_data() -> None:
    flow = pf.planar_flow(2, num_layers=2)
    pf.fit_energy(flow, gaussian_energy, steps=2, progress=False)
    assert flow.transforms()[0] is flow.parts[0]


def test_a_flow_trained_by_hand_is_trained_on() -> None:
    """From the direction that it was trained in as well."""
    flow = pf.planar_flow(2, num_layers=4)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.03)
    for _ in range(300):
        q = flow()
        z = q.rsample((256,))
        loss = (q.log_prob(z) + gaussian_energy(z)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fit = pf.fit_energy(flow, gaussian_energy, steps=1, lr=1e-6, seed=0, progress=False)
    assert loss.item() < -math.log(2 * math.pi) + 0.5
    assert fit.losses[0] == pytest.approx(loss.item(), abs=0.1)
    assert flow.transforms()[0] is not flow.parts[0]


@pytest.mark.slow
def test_bound_is_above_minus_log_z_on_the_papers_energies() -> None:
    for number in (1, 2, 3, 4):
        target = pf.targets.energy(number)
        fit = pf.fit_energy(pf.planar_flow(2, 4), target, steps=200, seed=0, progress=False)
        assert -target.log_normalizer < fit.best_loss < fit.scores[0][1] - 1
        assert fit.best_loss < -target.log_normalizer + 2.5


def constant(z: Tensor) -> Tensor:
    return 50.0 + 0 * z[:, 0]


def test_paper_annealing_weighs_the_energy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [pf.paper_annealing(t) for t in (0, 5000, 9900, 20_000)] == [0.01, 0.51, 1.0, 1.0]
    losses = {}
    monkeypatch.setattr(
        Trainer, "run", lambda self: losses.update({t: self.loss(t) for t in (0, 9900)})
    )
    flow = pf.planar_flow(2, 0, affine=None)
    with pytest.warns(UserWarning, match="does not rise along coordinate 0, 1"):
        pf.fit_energy(flow, constant, annealing=pf.paper_annealing, progress=False)
    entropy = math.log(2 * math.pi * math.e)
    assert losses[0].item() == pytest.approx(0.01 * 50 - entropy, abs=0.3)
    assert losses[9900].item() == pytest.approx(50 - entropy, abs=0.3)


def test_default_steps_outlast_the_annealing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "run", lambda self: self.total)
    flow = pf.planar_flow(2, 1)
    assert pf.fit_energy(flow, gaussian_energy, annealing=pf.paper_annealing) == 14_900
    assert pf.fit_energy(flow, gaussian_energy) == 5000


BAD = {
    "annealing that does not end": ({"annealing": pf.paper_annealing, "steps": 100}, "last step"),
    "annealing that never ends": ({"annealing": lambda step: 0.5}, "must reach 1"),
    "steps": ({"steps": -3}, "steps"),
    "num_particles": ({"num_particles": 0}, "num_particles"),
    "lr": ({"lr": math.nan}, "lr"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        pf.fit_energy(pf.planar_flow(2, 1), gaussian_energy, progress=False, **options)


@pytest.mark.parametrize("energy", [lambda z: z, lambda z: gaussian_energy(z).sum(), lambda z: 1.0])
def test_energies_of_the_wrong_shape_are_refused(energy: Callable) -> None:
    with pytest.raises(ValueError, match=r"energy must map \(N, D\) to \(N,\)"):
        pf.fit_energy(pf.planar_flow(2, 1), energy, progress=False)


def test_energy_without_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="differentiable"):
        pf.fit_energy(pf.planar_flow(2, 1), lambda z: gaussian_energy(z.detach()), progress=False)


def test_checkpoint_of_another_energy_is_refused(tmp_path: Path) -> None:
    options = {"steps": 3, "seed": 0, "checkpoint": tmp_path / "e.pt", "progress": False}
    pf.fit_energy(pf.planar_flow(2, 1), pf.targets.energy(1), **options)
    with pytest.raises(ValueError, match="energy="):
        pf.fit_energy(pf.planar_flow(2, 1), pf.targets.energy(2), **options)


def test_conditional_flow_is_refused() -> None:
    with pytest.raises(ValueError, match="unconditional"):
        pf.fit_energy(pf.planar_flow(2, 1, context_dim=1), gaussian_energy, progress=False)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_energies_without_containment_are_refused(number: int) -> None:
    target = pf.targets.energy(number, containment=None)
    with pytest.raises(ValueError, match=r"finite integral.*containment=8\.0"):
        pf.fit_energy(pf.planar_flow(2, 1), target, progress=False)
    fit = pf.fit_energy(pf.planar_flow(2, 1), pf.targets.energy(number), steps=1, progress=False)
    assert fit.steps == 1


@pytest.mark.parametrize("number", [2, 3, 4])
def test_energies_that_hide_that_they_are_improper_are_warned_of(number: int) -> None:
    bare = pf.targets.energy(number, containment=None)
    with pytest.warns(UserWarning, match=r"does not rise along coordinate 0 \(of 0 to 1\)"):
        pf.fit_energy(pf.planar_flow(2, 1), lambda z: bare(z), steps=1, progress=False)


def funnel(z: Tensor) -> Tensor:
    return z[:, 0].square() / 18 + 0.5 * (z[:, 1].square() * (-z[:, 0]).exp() + z[:, 0])


def uncomputable(z: Tensor) -> Tensor:
    factor = torch.linalg.cholesky(torch.diag_embed(40 - z.abs()))
    return z.square().sum(-1) + factor.sum((-1, -2))


PROPER = {
    "Cauchy": lambda z: (1 + z.square()).log().sum(-1),
    "Student-t, half a degree": lambda z: 1.25 * (1 + z.square().sum(-1) / 0.5).log(),
    "banana": lambda z: (z[:, 1] - z[:, 0].square()).square() + z[:, 0].square() / 2,
    "funnel": funnel,
    "Laplace": lambda z: 0.01 * z.abs().sum(-1),
    "far from the origin": lambda z: (z - 50).square().sum(-1) / 2,
    "bare U1": pf.targets.energy(1, containment=None),
    "no numbers far out": uncomputable,
}


@pytest.mark.parametrize("case", PROPER)
def test_proper_energies_are_not_warned_of(case: str) -> None:
    pf.fit_energy(pf.planar_flow(2, 1), PROPER[case], steps=1, seed=0, progress=False)


@pytest.mark.slow
@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize(("number", "bound"), [(1, 0.05), (2, 0.05), (3, 0.15), (4, 0.1)])
def test_energies_with_the_defaults(number: int, bound: float) -> None:
    target, flow = pf.targets.energy(number), pf.planar_flow(2, num_layers=32)
    fit = pf.fit_energy(flow, target, annealing=pf.paper_annealing, seed=0, progress=False)
    with torch.no_grad():
        z = flow().sample((100_000,))
        kl = (flow().log_prob(z) + target(z)).mean().item() + target.log_normalizer
    print(f"U{number}: KL = {kl:.4f}, {fit.seconds:.0f} s")
    assert -0.01 < kl < bound
