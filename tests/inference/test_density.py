"""Maximum likelihood: the sine data, reproducibility, checkpoints, bad input."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import pyroflow as pf
from pyroflow import datasets
from pyroflow.inference.fit import Objective
from pyroflow.inference.schedule import LearningRateSchedule
from pyroflow.inference.trainer import Trainer

SHORT = {"steps": 60, "polish": 40, "progress": False}


@pytest.fixture
def sine() -> torch.Tensor:
    return datasets.sine(2000, seed=1)


def gap(flow: pf.Flow, points: int = 100_000) -> float:
    """Mean of log p − log q over fresh points."""
    fresh = datasets.sine(points, seed=10**6)
    with torch.no_grad():
        return (
            (datasets.sine_log_prob(fresh) - flow().log_prob(fresh.to(flow.base.loc))).mean().item()
        )


def test_gaussian_flow_reaches_the_maximum_likelihood(sine: torch.Tensor) -> None:
    flow = pf.planar_flow(2, num_layers=0)
    fit = pf.fit_density(flow, sine, seed=0, holdout=0.05, **SHORT)
    covariance = torch.cov(sine.double().T, correction=0)
    floor = 0.5 * torch.linalg.slogdet(2 * math.pi * math.e * covariance)[1].item()
    assert fit.best_loss == pytest.approx(floor, abs=0.15)
    with torch.no_grad():
        assert -flow().log_prob(sine.double()).mean().item() == pytest.approx(floor, abs=0.01)


def test_short_fit_is_far_below_a_gaussian(sine: torch.Tensor) -> None:
    flow = pf.planar_flow(2, num_layers=8)
    fit = pf.fit_density(flow, sine, steps=300, polish=200, seed=0, progress=False)
    assert gap(flow) < 0.2
    assert fit.best_loss == pytest.approx(datasets.SINE_ENTROPY + gap(flow), abs=0.2)


def test_best_state_is_kept(sine: torch.Tensor) -> None:
    flow = pf.planar_flow(2, num_layers=4)
    fit = pf.fit_density(flow, sine, seed=0, **SHORT)
    assert fit.best_loss == min(score for _, score in fit.scores)
    assert fit.best_loss < fit.scores[0][1]
    assert len(fit.losses) == fit.steps
    assert fit.seconds > 0


def test_reproducible_from_its_seed_alone(sine: torch.Tensor) -> None:
    fits, before = [], torch.get_rng_state()
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        flow = pf.planar_flow(2, num_layers=4)
        state = torch.get_rng_state()
        fits.append(pf.fit_density(flow, sine, seed=3, **SHORT).losses)
        assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)
    assert fits[0] == fits[1]
    other = pf.fit_density(pf.planar_flow(2, num_layers=4), sine, seed=4, **SHORT).losses
    assert other != fits[0]


def test_second_fit_goes_on(sine: torch.Tensor) -> None:
    flow = pf.planar_flow(2, num_layers=4)
    first = pf.fit_density(flow, sine, seed=0, **SHORT)
    second = pf.fit_density(flow, sine, seed=0, **SHORT)
    assert second.scores[0][1] == pytest.approx(first.best_loss, abs=1e-6)


def test_data_of_any_magnitude_fit_alike(sine: torch.Tensor) -> None:
    scale, shift = torch.tensor([1e5, 1e-4]), torch.tensor([-3e6, 5.0])
    losses = [
        pf.fit_density(pf.planar_flow(2, 4).double(), data, seed=0, **SHORT).best_loss
        for data in (sine.double(), sine * scale + shift)
    ]
    assert losses[1] - scale.log().sum().item() == pytest.approx(losses[0], abs=0.02)


def test_overfitting_stops_the_fit() -> None:
    data = datasets.sine(60, seed=0)
    fit = pf.fit_density(
        pf.planar_flow(2, 32), data, steps=400, polish=4000, holdout=0.3, seed=0, progress=False
    )
    assert fit.steps < 4400
    assert "overfitting" in fit.stopped or "not improved" in fit.stopped


def test_conditional_flow_learns_the_conditional(sine: torch.Tensor) -> None:
    flow = pf.planar_flow(1, num_layers=4, context_dim=1)
    pf.fit_density(flow, sine[:, :1], context=sine[:, 1:], steps=400, seed=0, progress=False)
    fresh = datasets.sine(20_000, seed=7)
    with torch.no_grad():
        loss = -flow(fresh[:, 1:].double()).log_prob(fresh[:, :1].double()).mean().item()
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.01)
    assert loss - entropy < 0.15


def test_numpy_and_lists_and_float32() -> None:
    array = np.random.default_rng(0).normal(size=(50, 2))
    for data in (array, array.tolist(), array.astype(np.float32)):
        fit = pf.fit_density(pf.planar_flow(2, 2), data, steps=5, polish=5, progress=False)
        assert math.isfinite(fit.best_loss)


@pytest.mark.parametrize("interrupted_at", [30, 75], ids=["Adam", "L-BFGS"])
def test_checkpoint_resumes_where_it_stopped(
    sine: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_at: int
) -> None:
    whole = pf.fit_density(pf.planar_flow(2, 4), sine, seed=0, **SHORT)
    options = {"seed": 0, "checkpoint": tmp_path / "fit.pt", **SHORT}
    flow = pf.planar_flow(2, 4)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_show", _interrupt(interrupted_at))
        with pytest.raises(SystemExit):
            pf.fit_density(flow, sine, **options)
    with torch.no_grad():
        assert flow().log_prob(sine.double()).isfinite().all()
    resumed = pf.fit_density(pf.planar_flow(2, 4), sine, **options)
    assert resumed.steps == whole.steps
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-6)
    assert resumed.best_loss == pytest.approx(whole.best_loss, rel=1e-6)
    assert [file.name for file in tmp_path.iterdir()] == ["fit.pt"]


def _interrupt(step: int) -> Callable:
    def show(self: Trainer, bar: object) -> None:
        if self.state.step >= step:
            raise SystemExit

    return show


def test_finished_checkpoint_is_not_trained_on(sine: torch.Tensor, tmp_path: Path) -> None:
    options = {"seed": 0, "checkpoint": tmp_path / "fit.pt", **SHORT}
    first, again = (pf.fit_density(pf.planar_flow(2, 4), sine, **options) for _ in range(2))
    assert (again.steps, again.best_loss) == (first.steps, first.best_loss)


def test_checkpoint_of_another_fit_is_refused(sine: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    pf.fit_density(pf.planar_flow(2, 2), sine, seed=0, checkpoint=path, **SHORT)
    with pytest.raises(ValueError, match=r"seed=0 \(now 1\)"):
        pf.fit_density(pf.planar_flow(2, 2), sine, seed=1, checkpoint=path, **SHORT)
    with pytest.raises(ValueError, match="data="):
        pf.fit_density(pf.planar_flow(2, 2), sine + 1, seed=0, checkpoint=path, **SHORT)
    with pytest.raises(ValueError, match="shapes="):
        pf.fit_density(pf.planar_flow(2, 8), sine, seed=0, checkpoint=path, **SHORT)
    with pytest.raises(ValueError, match="data="):
        pf.fit_density(pf.planar_flow(2, 2), sine.flip(1), seed=0, checkpoint=path, **SHORT)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="is not a checkpoint"):
        pf.fit_density(pf.planar_flow(2, 2), sine, seed=0, checkpoint=path, **SHORT)
    path.write_text("no checkpoint")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        pf.fit_density(pf.planar_flow(2, 2), sine, seed=0, checkpoint=path, **SHORT)
    with pytest.raises(ValueError, match="checkpoint needs a seed"):
        pf.fit_density(pf.planar_flow(2, 2), sine, checkpoint=path, **SHORT)


def test_skips_steps_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.tensor(3.0))

    def loss(step: int) -> torch.Tensor:
        return weight.square() * (math.nan if step % 3 == 0 else 1.0)

    def score() -> torch.Tensor:
        return weight.detach().square().reshape(1)

    options = {"lr": 0.1, "settings": {}, "label": "", "progress": False}
    fit = Trainer(Objective([weight], loss, score), LearningRateSchedule(300), **options).run()
    assert fit.skipped == 100
    assert sum(math.isnan(value) for value in fit.losses) == 100
    assert abs(weight.item()) < 0.05
    objective = Objective([weight], lambda step: weight * math.nan, score)
    hopeless = Trainer(objective, LearningRateSchedule(300), **options).run()
    assert hopeless.steps == 100
    assert "not finite for 100 steps in a row" in hopeless.stopped


GOOD = torch.randn(50, 2)
BAD_DATA = {
    "NaN": (torch.where(torch.arange(50)[:, None] == 7, math.nan, GOOD), "row 7"),
    "inf": (torch.where(torch.arange(50)[:, None] == 3, math.inf, GOOD), "row 3"),
    "width": (torch.randn(50, 3), r"\b2\b.*\b3\b"),
    "no rows": (torch.empty(0, 2), "row"),
    "one dimension": (torch.randn(50), r"data\[:, None\]"),
    "constant column": (torch.stack([GOOD[:, 0], torch.ones(50)], 1), "constant"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_are_refused_before_any_work(case: str) -> None:
    data, message = BAD_DATA[case]
    flow = pf.planar_flow(2, 2)
    with pytest.raises(ValueError, match=message):
        pf.fit_density(flow, data, **SHORT)
    assert not flow.fitted


def test_dependent_columns_are_refused_and_leave_the_flow_fresh(sine: torch.Tensor) -> None:
    flow = pf.planar_flow(2, 2)
    with pytest.raises(ValueError, match="linearly independent"):
        pf.fit_density(flow, torch.stack([sine[:, 0], 2 * sine[:, 0]], 1), seed=0, **SHORT)
    assert not flow.fitted
    fresh = pf.planar_flow(2, 2)
    losses = [pf.fit_density(f, sine, seed=0, **SHORT).best_loss for f in (flow, fresh)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("how", ["in place", "state", "older state"])
def test_a_flow_trained_by_hand_is_trained_on(sine: torch.Tensor, how: str) -> None:
    """One step from there must not be worse than where it began, nor turn the layers round."""
    trained = flow = pf.planar_flow(2, num_layers=4)
    sine = sine.double()
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    for _ in range(300):
        loss = -flow().log_prob(sine).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if how != "in place":
        state = trained.state_dict()
        if how == "older state":
            del state["_extra_state"]
        flow = pf.planar_flow(2, num_layers=4)
        flow.load_state_dict(state, strict=how == "state")
    fit = pf.fit_density(flow, sine, steps=1, polish=0, lr=1e-6, seed=0, progress=False)
    assert fit.losses[0] == pytest.approx(loss.item(), abs=0.15)
    assert -flow().log_prob(sine).mean().item() < loss.item() + 0.01


BAD_OPTIONS = {
    "steps": {"steps": 0},
    "batch_size": {"batch_size": 0},
    "lr": {"lr": -1.0},
    "holdout": {"holdout": 1.5},
    "polish": {"polish": -1},
    "seed": {"seed": -1},
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        pf.fit_density(pf.planar_flow(2, 2), GOOD, progress=False, **BAD_OPTIONS[name])


def test_bad_contexts_are_refused() -> None:
    conditional = pf.planar_flow(2, 2, context_dim=3)
    with pytest.raises(ValueError, match="context is needed"):
        pf.fit_density(conditional, GOOD, **SHORT)
    with pytest.raises(ValueError, match="one row for each of the 50 rows"):
        pf.fit_density(conditional, GOOD, context=torch.randn(49, 3), **SHORT)
    with pytest.raises(ValueError, match="context must be None"):
        pf.fit_density(pf.planar_flow(2, 2), GOOD, context=torch.randn(50, 3), **SHORT)


@pytest.mark.slow
@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("num_layers", "bound"), [(8, 0.035), (16, 0.02), (32, 0.02)])
def test_sine_gap_with_the_defaults(num_layers: int, bound: float, seed: int) -> None:
    flow = pf.planar_flow(2, num_layers)
    fit = pf.fit_density(flow, datasets.sine(10_000, seed=100 + seed), seed=seed, progress=False)
    with torch.no_grad():
        samples = flow().sample((100_000,))
    found = gap(flow)
    print(f"K={num_layers} seed={seed} gap={found:.4f} {fit.seconds:.1f} s, {fit.stopped}")
    assert found <= bound
    assert (samples[:, 0] - samples[:, 1].sin()).std().item() == pytest.approx(0.1, abs=0.02)
