"""Fits that are cut off anywhere end, resumed, where an unbroken one does: to the last bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from torch import Tensor

import pyroflow as pf
from pyroflow.inference import guide_fit
from pyroflow.inference.guide_fit import GuideFit
from pyroflow.inference.likelihood import Likelihood
from pyroflow.inference.natural import Natural
from pyroflow.inference.objectives import LogJointBound
from pyroflow.inference.trainer import Descent, Trainer
from pyroflow.targets import energy


@contextmanager
def cut(owner: Any, name: str, call: int, *, after: bool = False) -> Iterator[list[int]]:
    """Interrupt at a call of a function, before it or after it."""
    plain, calls = getattr(owner, name), []

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == call and not after:
            raise SystemExit
        result = plain(*args, **kwargs)
        if len(calls) == call:
            raise SystemExit
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, broken)
        yield calls


def assert_ends_alike(
    fit: Callable[..., pf.Fit], make: Callable[[], torch.nn.Module], cutting: Any, path: Path
) -> None:
    """Unbroken, and cut off and resumed with a new object and with the one that was cut off."""
    whole_object = make()
    whole = fit(whole_object)
    for again in (False, True):
        path.unlink(missing_ok=True)
        broken = make()
        with cutting(), pytest.raises(SystemExit):
            fit(broken, checkpoint=path)
        resumed_object = broken if again else make()
        resumed = fit(resumed_object, checkpoint=path)
        assert resumed.losses == whole.losses
        assert resumed.scores == whole.scores
        assert resumed.stopped == whole.stopped
        assert resumed.skipped_particles == whole.skipped_particles
        expected, found = whole_object.state_dict(), resumed_object.state_dict()
        for name, value in expected.items():
            assert not isinstance(value, Tensor) or torch.equal(value, found[name]), name
    assert [file.name for file in path.parent.iterdir()] == [path.name]


DATA = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)) @ torch.ones(2, 2).tril()


def fit_density(flow: pf.Flow, **options: Any) -> pf.Fit:
    options = {"steps": 8, "polish": 40, "seed": 0, "progress": False} | options
    return pf.fit_density(flow, DATA.tanh(), **options)


def planar() -> pf.Flow:
    torch.manual_seed(1)
    return pf.planar_flow(2, 2)


# The first are losses and scores of Adam's steps; from about the 18th on, L-BFGS evaluates.
@pytest.mark.parametrize(
    "call", [1, 4, 9, 18, 20, 41, *map(slow, [2, 3, 14, 17, 19, 23, 29, 44, 45, 55])]
)
def test_interrupted_in_any_evaluation(tmp_path: Path, call: int) -> None:
    def cutting() -> Any:
        return cut(Likelihood, "_losses", call, after=call % 2 == 0)

    assert_ends_alike(fit_density, planar, cutting, tmp_path / "fit.pt")


def fit_energy(flow: pf.Flow, **options: Any) -> pf.Fit:
    return pf.fit_energy(flow, energy(1), steps=90, seed=0, progress=False, **options)


@pytest.mark.parametrize(
    ("name", "call"), [("_move", 3), ("_rows", 2), slow("step", 1), slow("_draws", 6)]
)
def test_interrupted_in_a_natural_gradient_step(tmp_path: Path, name: str, call: int) -> None:
    def cutting() -> Any:
        return cut(Natural, name, call, after=name == "_rows")

    assert_ends_alike(fit_energy, planar, cutting, tmp_path / "fit.pt")


POINTS = {
    "backward": (Tensor, "backward", False),
    "gradient": (Tensor, "backward", True),
    "Adam": (torch.optim.Adam, "step", False),
    "Adam done": (torch.optim.Adam, "step", True),
    "kernel": (torch, "_fused_adam_", False),
    "average": (Descent, "_average", True),
    "bookkeeping": (Descent, "_watch", True),
    "shown": (Trainer, "_show", False),
    "noted": (Trainer, "_note", True),
    "saved": (Trainer, "_save", True),
    "moved": (os, "replace", False),
    "flushed": (os, "fsync", True),
    "line search": (torch.optim.LBFGS, "_directional_evaluate", True),
    "searched": (torch.optim.LBFGS, "_add_grad", True),
    "polished": (torch.optim.LBFGS, "step", True),
}
QUICK = ("gradient", "Adam done", "saved", "moved", "line search", "polished")


@pytest.mark.parametrize("call", [1, slow(2)])
@pytest.mark.parametrize("point", [p if p in QUICK else slow(p) for p in POINTS])
def test_interrupted_between_evaluations(tmp_path: Path, point: str, call: int) -> None:
    owner, name, after = POINTS[point]
    assert_ends_alike(
        fit_density, planar, lambda: cut(owner, name, call, after=after), tmp_path / "fit.pt"
    )


@pytest.mark.parametrize("call", [3, 30, 50])
def test_an_interrupted_fit_leaves_the_best_state(tmp_path: Path, call: int) -> None:
    flow, kept = planar(), []
    with cut(Likelihood, "_losses", call), pytest.MonkeyPatch.context() as patch:
        plain = Trainer.evaluate

        def watched(trainer: Trainer) -> None:
            plain(trainer)
            kept[:] = [trainer.state.best_score.mean()]

        patch.setattr(Trainer, "evaluate", watched)
        with pytest.raises(SystemExit):
            fit_density(flow, checkpoint=tmp_path / "fit.pt")
    again = fit_density(flow, checkpoint=tmp_path / "other.pt", steps=1, polish=0)
    assert again.scores[0][1] == pytest.approx(kept[0].item(), rel=1e-12)


def test_interrupted_in_an_energy(tmp_path: Path) -> None:
    def fit(flow: pf.Flow, **options: Any) -> pf.Fit:
        options = {"steps": 12, "seed": 0, "progress": False} | options
        return pf.fit_energy(flow, target, num_particles=16, **options)

    target = energy(1)
    assert_ends_alike(fit, planar, lambda: cut(type(target), "__call__", 9), tmp_path / "fit.pt")


def banana() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.2))


def growing() -> pf.AutoFlow:
    pyro.clear_param_store()
    torch.manual_seed(1)
    return pf.AutoPlanarFlow(banana, num_layers="auto", centring=None).setup()


ANNEALINGS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "steps": lambda: lambda step: min(1.0, 0.1 + 0.05 * step),
    "adaptive": lambda: pf.AdaptiveAnnealing(max_steps=15),
}
# Of Adam's steps: the Gaussian takes 6, each depth 24.
CUTS = {"Gaussian": 3, "Gaussian's end": 6, "first": 7, "middle": 15, "grown": 31, "later": 40}


BOTH = [(where, annealing) for where in CUTS for annealing in ANNEALINGS]


@pytest.mark.parametrize(
    ("where", "annealing"),
    [pair if pair == ("first", "adaptive") else slow(*pair) for pair in BOTH],
)
def test_a_growing_fit_with_annealing(
    tmp_path: Path, where: str, annealing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guide_fit, "DEEPEST", 8)
    monkeypatch.setattr(guide_fit, "LEAST_GAIN", -1e9)

    def fit(guide: pf.AutoFlow, **options: Any) -> pf.Fit:
        options = {"steps": 30, "num_particles": 8, "seed": 0, "progress": False} | options
        schedule = ANNEALINGS[annealing]()
        found = pf.fit_guide(banana, guide, annealing=schedule, warm_start=False, **options)
        assert guide.num_layers == 8
        return found

    def cutting() -> Any:
        return cut(LogJointBound, "loss", CUTS[where], after=True)

    assert_ends_alike(fit, growing, cutting, tmp_path / "fit.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name"),
    [(GuideFit, "_train"), (LogJointBound, "score")],
)
def test_a_guide_cut_off_between_its_parts(
    tmp_path: Path, owner: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guide_fit, "DEEPEST", 8)
    monkeypatch.setattr(guide_fit, "LEAST_GAIN", -1e9)

    def fit(guide: pf.AutoFlow, **options: Any) -> pf.Fit:
        options = {"steps": 20, "num_particles": 8, "seed": 0, "progress": False} | options
        return pf.fit_guide(banana, guide, **options)

    cutting = lambda: cut(owner, name, 1, after=True)  # noqa: E731
    assert_ends_alike(fit, growing, cutting, tmp_path / "fit.pt")


@pytest.mark.parametrize("call", [slow(2), slow(4), 5, slow(18)])
def test_a_guide_fitted_by_traces(tmp_path: Path, call: int) -> None:
    """Its affine layer is trained first, and a parameter of the model with it."""

    def model() -> None:
        scale = pyro.param("scale", torch.tensor(0.5))
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x**2, scale.exp()))

    def make() -> pf.AutoFlow:
        pyro.clear_param_store()
        torch.manual_seed(1)
        return pf.AutoPlanarFlow(model, 2).setup()

    def fit(guide: pf.AutoFlow, **options: Any) -> pf.Fit:
        options = {"steps": 20, "num_particles": 8, "seed": 0, "progress": False} | options
        return pf.fit_guide(model, guide, **options)

    cutting = lambda: cut(torch.optim.Adam, "step", call, after=True)  # noqa: E731
    assert_ends_alike(fit, make, cutting, tmp_path / "fit.pt")


def test_a_fit_with_the_stop_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off after the rule has fired: the fall of the rate goes on."""
    monkeypatch.setattr(guide_fit, "WINDOW", 40)

    def fit(guide: pf.AutoFlow, **options: Any) -> pf.Fit:
        options = {"steps": 900, "num_particles": 4, "seed": 0, "progress": False} | options
        found = pf.fit_guide(banana, guide, warm_start=False, **options)
        assert found.steps < 900
        return found

    def make() -> pf.AutoFlow:
        pyro.clear_param_store()
        torch.manual_seed(1)
        return pf.AutoPlanarFlow(banana, 0, centring=None).setup()

    def cutting() -> Any:
        return cut(Trainer, "_show", 333)

    assert_ends_alike(fit, make, cutting, tmp_path / "fit.pt")


def test_another_annealing_is_another_fit(tmp_path: Path) -> None:
    options = {"steps": 5, "num_particles": 8, "seed": 0, "progress": False}
    options |= {"warm_start": False, "checkpoint": tmp_path / "fit.pt"}
    pf.fit_guide(banana, pf.AutoPlanarFlow(banana, 1), annealing=lambda t: 1.0, **options)
    with pytest.raises(ValueError, match=r"fit.pt is of a fit with annealing="):
        pf.fit_guide(banana, pf.AutoPlanarFlow(banana, 1), annealing=lambda t: 0.5, **options)
