"""Natural gradient steps: against known matrices, exact posteriors, heavy tails and edges."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from pyro.distributions.transforms import Planar as PyroPlanar
from torch import Tensor
from torch.distributions import Normal

import pyroflow as pf
from pyroflow.flows import Flow, StandardNormal
from pyroflow.inference import natural
from pyroflow.inference.natural import Natural, natural_steps, steps_within
from pyroflow.inference.objectives import LogJointBound
from pyroflow.model.bound import BoundModel
from pyroflow.targets import TOY_LOG_EVIDENCE, eight_schools_noncentered, toy_log_joint, toy_model

QUIET = {"seed": 0, "progress": False}


def gaussian(z: Tensor) -> Tensor:
    """U of N((1, −2), diag(4, 0.25)) up to a constant: −ln Z = −ln 2π."""
    return ((z[:, 0] - 1) / 2).square() / 2 + ((z[:, 1] + 2) / 0.5).square() / 2


class Seen:
    """Notes the natural gradient steps of a fit: their phase, and the damping after each."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.dampings: list[float] = []
        step = Natural.step

        def noting(phase: Natural) -> None:
            step(phase)
            self.phase = phase
            self.dampings.append(phase.damping)

        patch.setattr(Natural, "step", noting)


def test_a_gaussian_is_met_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, flow = Seen(monkeypatch), pf.planar_flow(2, num_layers=2)
    fit = pf.fit_energy(flow, gaussian, steps=600, **QUIET)
    assert len(seen.dampings) == 40
    assert fit.steps == 600
    weights = -gaussian(draws := flow().sample((2000,))) - flow().log_prob(draws)
    assert weights.std() < 2e-3
    assert weights.mean().item() == pytest.approx(math.log(2 * math.pi), abs=1e-4)


def test_the_matrix_is_the_fisher_information(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where q = p, of y = offset + softplus(raw) x: 1/s², and σ(raw)² 2/s² where s is the scale."""
    seen, flow = Seen(monkeypatch), pf.planar_flow(1, num_layers=0, affine="diagonal")
    pf.fit_energy(flow, lambda z: ((z[:, 0] - 3) / 2).square() / 2, steps=1500, **QUIET)
    names = [name for name, p in flow.named_parameters() if p.numel()]
    slope = 1 - math.exp(-2)  # of softplus, where it is s = 2
    expected = {"offset": 1 / 4, "raw_scale": slope**2 * 2 / 4}
    found = seen.phase.matrix
    for i, name in enumerate(names):
        wanted = expected[name.split(".")[-1]]
        assert found[i, i].item() == pytest.approx(wanted, rel=0.05)
    assert abs(found[0, 1].item()) < 0.01


def test_rows_are_the_gradients_of_single_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    flow = Flow(StandardNormal(3), [pf.Planar(3, 4), pf.Radial(3, 2), pf.Affine(3)])
    parameters = list(flow.parameters())
    for p in parameters:
        torch.nn.init.normal_(p)

    def energy(z: Tensor) -> Tensor:
        return (z - 1).square().sum(-1) + z[:, 0].cos()

    pf.fit_energy(flow, energy, steps=15, **QUIET)
    phase, x = seen.phase, torch.randn(5, 3)
    _, _, slope = phase._along_path(x)
    rows = phase._rows(x, slope)
    for i in range(5):
        z = x[i : i + 1]
        for t in (q := flow()).transforms:
            z = t(z)
        loss = q.log_prob(z).sum() + energy(z).sum()
        single = torch.autograd.grad(loss, parameters, materialize_grads=True)
        wanted = torch.cat([g.flatten() for g in single])
        assert torch.allclose(rows[i], wanted, atol=1e-8)


@pytest.mark.parametrize("seed", [0, slow(1), slow(2)])
def test_the_toy_posterior_by_default(seed: int) -> None:
    guide = pf.AutoPlanarFlow(toy_model, num_layers=32)
    pf.fit_guide(toy_model, guide, seed=seed, progress=False)
    with torch.no_grad():
        z = (q := guide.get_posterior()).sample((100_000,))
        kl = TOY_LOG_EVIDENCE - (toy_log_joint(z) - q.log_prob(z)).mean().item()
    assert kl < 0.01


def test_a_step_that_raises_the_loss_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights with heavy tails: some steps would lose whole nats."""
    seen = Seen(monkeypatch)
    guide = pf.AutoPlanarFlow(eight_schools_noncentered)
    fit = pf.fit_guide(eight_schools_noncentered, guide, steps=600, **QUIET)
    raised = [b > a for a, b in zip(seen.dampings[:-1], seen.dampings[1:], strict=True)]
    assert any(raised)
    before = min(score for step, score in fit.scores if step <= 560)
    assert fit.best_loss < before
    assert max(fit.losses[-40:]) < before + 0.1


def test_an_edge_keeps_its_draws() -> None:
    """Half of a normal: outside of z > 0 there is no density."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.factor("edge", torch.where(z[..., 0] > 0, 0.0, -torch.inf))

    guide = pf.AutoPlanarFlow(model, num_layers=8)
    fit = pf.fit_guide(model, guide, steps=900, **QUIET)
    with torch.no_grad():
        z = guide.get_posterior().sample((20_000,))
    assert (z[:, 0] > 0).double().mean() > 0.97
    assert fit.best_loss < -math.log(0.5) + 0.15
    before = min(score for step, score in fit.scores if step <= 840)
    assert fit.best_loss <= before


def steps_of(
    guide: pf.AutoFlow, objective: str = "elbo", annealing: Callable[[int], float] | None = None
) -> int:
    """How many of 300 steps of a fit to the toy posterior are natural gradient steps."""
    guide()
    bound = LogJointBound(BoundModel(toy_model, guide), objective, 1, None, seed=0)
    return natural_steps(bound, 300, annealing)


def test_which_guides_take_them() -> None:
    assert steps_of(pf.AutoPlanarFlow(toy_model)) == 20
    assert steps_of(pf.AutoPlanarFlow(toy_model), objective="iwae") == 0
    assert steps_of(pf.AutoPlanarFlow(toy_model), annealing=lambda step: 1.0) == 0
    assert steps_of(pf.AutoFlow(toy_model, [PyroPlanar(2)])) == 0
    assert steps_of(pf.AutoPlanarFlow(toy_model, num_layers=204)) == 0  # of 5 numbers each
    assert steps_of(pf.AutoPlanarFlow(toy_model, base_df=5)) == 20


def test_which_flows_take_them() -> None:
    def steps(*layers: object, steps: int = 300) -> int:
        flow = Flow(StandardNormal(2), list(layers))
        trained = [p for p in flow.parameters() if p.requires_grad]
        return steps_within(flow(), trained, steps)

    frozen, twice = pf.Planar(2, 3), pf.Planar(2, 3)
    frozen.w.requires_grad_(False)
    assert steps(pf.Planar(2, 3), pf.Affine(2)) == 20
    assert steps(frozen) == 20
    assert steps(twice, twice) == 0
    assert steps(pf.Planar(2, 3).inv) == 0
    assert steps(pf.Planar(2, 3), steps=14) == 0
    assert steps(pf.Planar(2, 3), steps=10_000) == natural.MOST_STEPS


def test_draws_are_of_the_base() -> None:
    """By Kolmogorov's distance, far below that of as many independent draws; and none is lost."""
    flow = pf.planar_flow(2, num_layers=1)
    with pytest.MonkeyPatch.context() as patch:
        seen = Seen(patch)
        pf.fit_energy(flow, gaussian, steps=15, **QUIET)
    x = seen.phase._draws()
    assert x.shape == (natural.DRAWS, 2)
    even = (torch.arange(len(x)) + 0.5) / len(x)
    for column in x.T:
        assert (Normal(0.0, 1.0).cdf(column.sort().values) - even).abs().max() < 2e-3
