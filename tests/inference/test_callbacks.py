"""What callers are told in a fit, and how callbacks and Ctrl-C end one."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from tqdm import tqdm

import pyroflow as pf
from pyroflow.inference import guide_fit
from pyroflow.inference.callbacks import FitProgress, part_of_a_whole
from pyroflow.progress import progress_bar
from pyroflow.targets import energy

DATA = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)).tanh()
QUIET = {"seed": 0, "progress": False}
Fit = Callable[..., tuple[pf.Fit, nn.Module]]


def banana() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.2))


def density(**options: Any) -> tuple[pf.Fit, nn.Module]:
    torch.manual_seed(1)
    flow = pf.planar_flow(2, 2)
    return pf.fit_density(flow, DATA, **{"steps": 14, "polish": 30} | QUIET | options), flow


def of_energy(**options: Any) -> tuple[pf.Fit, nn.Module]:
    torch.manual_seed(1)
    flow = pf.planar_flow(2, 2)
    options = {"steps": 14, "num_particles": 16} | QUIET | options
    return pf.fit_energy(flow, energy(1), **options), flow


def guide(**options: Any) -> tuple[pf.Fit, nn.Module]:
    """Of 14 steps the first 3 are of the Gaussian."""
    pyro.clear_param_store()
    torch.manual_seed(1)
    made = pf.AutoPlanarFlow(banana, 2, centring=None)
    options = {"steps": 14, "num_particles": 8, "warm_start": False} | QUIET | options
    return pf.fit_guide(banana, made, **options), made


def by_traces(**options: Any) -> tuple[pf.Fit, nn.Module]:
    pyro.clear_param_store()
    made = pyro.infer.autoguide.AutoNormal(banana)
    return pf.fit_guide(banana, made, **{"steps": 14, "num_particles": 8} | QUIET | options), made


def state(module: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in module.state_dict().values() if isinstance(t, Tensor)]


@cache
def whole(fit: Fit) -> tuple[pf.Fit, list[Tensor]]:
    found, module = fit()
    return found, state(module)


FITS = {"density": density, "energy": of_energy, "guide": guide, "by traces": by_traces}


def interrupting(step: int, *after: int) -> Callable[[FitProgress], None]:
    def callback(progress: FitProgress) -> None:
        if progress.step in (step, *after):
            raise KeyboardInterrupt

    return callback


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_callbacks_are_told_and_change_nothing(fit: Fit) -> None:
    plain, expected = whole(fit)
    seen: list[FitProgress] = []

    def told(progress: FitProgress) -> int:
        torch.randn(3)  # of the global generator
        seen.append(progress)
        return 1  # as a function that writes may

    found, module = fit(callbacks=[told, lambda progress: None])
    assert found.losses == plain.losses
    assert all(map(torch.equal, state(module), expected))
    steps = [each.step for each in seen]
    assert steps[:14] == list(range(1, 15))
    assert steps == sorted(set(steps))
    assert steps[-1] == found.steps
    assert [each.loss for each in seen] == [found.losses[step - 1] for step in steps]
    scored = [(each.step, each.score) for each in seen if each.score is not None]
    assert set(scored) <= set(found.scores)
    assert len(scored) >= 14
    assert seen[-1].best_score == found.best_loss
    with pytest.raises(FrozenInstanceError):
        seen[0].loss = 0.0


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_a_callback_ends_a_fit(fit: Fit) -> None:
    found, _ = fit(callbacks=lambda progress: np.bool_(progress.step == 9))
    assert found.stopped == "stopped by a callback at step 9"
    assert found.steps == len(found.losses) == 9
    assert found.losses == whole(fit)[0].losses[:9]


ENDS = {"True": lambda step: lambda p: p.step == step, "Ctrl-C": interrupting}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.filterwarnings("ignore:the fit was interrupted")
def test_the_first_part_of_a_fit_is_then_all_of_it(end: Callable) -> None:
    found, made = guide(callbacks=end(2))
    assert (found.steps, found.stopped.split(" at ")[1]) == (2, "step 2")
    assert made()["x"].isfinite()


def test_a_guide_that_was_ended_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guide_fit, "LEAST_GAIN", -1e9)
    made = pf.AutoPlanarFlow(banana, num_layers="auto", centring=None)
    options = {"steps": 20, "num_particles": 8, "warm_start": False} | QUIET
    found = pf.fit_guide(banana, made, callbacks=lambda p: p.step == 30, **options)
    assert (found.steps, made.num_layers) == (30, 8)


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_ctrl_c_gives_the_fit_so_far(fit: Fit) -> None:
    with pytest.warns(UserWarning, match="the fit was interrupted at step 9: it is in its best"):
        found, module = fit(callbacks=interrupting(9))
    assert found.stopped == "interrupted at step 9"
    assert found.losses == whole(fit)[0].losses[:9]
    if fit is density:
        again = pf.fit_density(module, DATA, steps=1, polish=0, **QUIET)
        assert again.scores[0][1] == pytest.approx(found.best_loss, rel=1e-12)
        assert found.best_loss == min(score for _, score in found.scores)


def test_ctrl_c_in_the_polish() -> None:
    with pytest.warns(UserWarning, match="interrupted at step"):
        found, _ = density(callbacks=lambda p: interrupting(p.step)(p) if p.step > 25 else None)
    assert 25 < found.steps == len(found.losses) < 44
    assert found.best_loss == min(score for _, score in found.scores)


def test_ctrl_c_before_the_first_score_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(guide_fit.Trainer, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        density()


def test_ctrl_c_before_the_score_of_a_deeper_flow_keeps_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluate, seen = guide_fit.Trainer.evaluate, []

    def interrupted(trainer: guide_fit.Trainer) -> None:
        seen.extend([trainer] if trainer not in seen else [])
        if len(seen) == 3:
            raise KeyboardInterrupt
        evaluate(trainer)

    monkeypatch.setattr(guide_fit.Trainer, "evaluate", interrupted)
    flow = pf.planar_flow(2, "auto")
    with pytest.warns(UserWarning, match="interrupted before a score of .* layers: it is in its"):
        found = pf.fit_density(flow, DATA, steps=10, polish=0, **QUIET)
    assert re.fullmatch(r"interrupted before a score of \d+ layers", found.stopped)
    assert len(found.depths) == 2
    assert found.best_loss == min(score for _, score in found.depths)
    monkeypatch.undo()
    again = pf.fit_density(flow, DATA, steps=1, polish=0, **QUIET)
    assert again.scores[0][1] == pytest.approx(found.best_loss, rel=1e-12)
    with part_of_a_whole(), monkeypatch.context() as patch:
        patch.setattr(guide_fit.Trainer, "evaluate", interrupted)
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            pf.fit_density(pf.planar_flow(2, "auto"), DATA, steps=10, polish=0, **QUIET)


@pytest.mark.parametrize("step", [3, 10])
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("fit", [density, guide])
@pytest.mark.filterwarnings("ignore:the fit was interrupted")
def test_a_fit_that_was_ended_goes_on(fit: Fit, end: Callable, step: int, tmp_path: Path) -> None:
    unbroken, expected = whole(fit)
    files, steps = {"checkpoint": tmp_path / "fit.pt"}, []
    assert end is interrupting or fit(callbacks=end(step), **files)[0].steps == step
    if end is interrupting:
        fit(callbacks=end(step), **files)
    resumed, found = fit(callbacks=lambda p: steps.append(p.step), **files)
    assert resumed.losses == unbroken.losses
    assert resumed.stopped == unbroken.stopped
    assert all(map(torch.equal, state(found), expected))
    assert steps[0] == step + (end is not interrupting)  # that in which Ctrl-C comes is done again


def test_what_a_callback_raises_is_raised(tmp_path: Path) -> None:
    def failing(progress: FitProgress) -> None:
        if progress.step == 9:
            raise ZeroDivisionError("in a callback")

    with pytest.raises(ZeroDivisionError, match="in a callback"):
        density(callbacks=failing, checkpoint=tmp_path / "fit.pt")
    resumed, _ = density(checkpoint=tmp_path / "fit.pt")
    assert resumed.losses == whole(density)[0].losses


@pytest.mark.parametrize("callbacks", [3, [print, "name"]])
def test_callbacks_are_functions(callbacks: Any) -> None:
    with pytest.raises(TypeError, match="callbacks must be a function of a FitProgress, or a list"):
        density(callbacks=callbacks)


def test_ctrl_c_in_a_fit_ends_a_calibration() -> None:
    """And leaves Pyro's parameters and the generators as they were."""

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    def fit(*given: Any) -> None:
        options = {"steps": 20, "warm_start": False, "callbacks": interrupting(5)} | QUIET
        fits.append(pf.fit_guide(*given, **options))

    fits: list[pf.Fit] = []
    pyro.param("own", torch.ones(()))
    before = torch.get_rng_state()
    options = {"num_simulations": 4, "fit": fit} | QUIET
    with pytest.raises(KeyboardInterrupt):
        pf.calibrate(
            model, lambda m: pf.AutoPlanarFlow(m, 1, init_scale=0.5), (torch.zeros(4),), **options
        )
    assert fits == []
    assert list(pyro.get_param_store()) == ["own"]
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.warns(UserWarning, match="interrupted at step 5"):  # alone it is not part of one
        fit(model, pf.AutoPlanarFlow(model, 1), (torch.zeros(4),))


def test_ctrl_c_in_chains_leaves_the_guide_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pf.AutoPlanarFlow(banana, 1).setup()
    before, generator = state(made), torch.get_rng_state()
    options = {"num_samples": 10, "num_chains": 4, "method": "independence"} | QUIET

    def update(bar: tqdm, n: int = 1) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pyroflow.progress.tqdm.update", update)
        with pytest.raises(KeyboardInterrupt):
            pf.mcmc(banana, made, **options)
    assert all(map(torch.equal, state(made), before))
    assert torch.equal(torch.get_rng_state(), generator)
    assert pf.mcmc(banana, made, **options).num_samples == 10


def test_bars_are_for_people_who_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def __init__(self, watched: bool) -> None:
            self.watched, self.text = watched, ""

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None: ...

        def isatty(self) -> bool:
            return self.watched

    for watched, shown in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(sys, "stderr", written := Terminal(watched))
        with progress_bar("label", 3, shown) as bar:
            bar.update()
        assert ("label" in written.text) == (watched and shown)
        assert watched or not written.text


def test_bars_are_shown_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tqdm's own bar is of widgets, which takes None for "shown"."""
    notebook = pytest.importorskip("tqdm.notebook")
    pytest.importorskip("ipywidgets")
    monkeypatch.setattr("pyroflow.progress.tqdm", notebook.tqdm)
    monkeypatch.setattr(notebook, "display", lambda *_: None, raising=False)
    assert not progress_bar("label", 3, True).disable
    assert progress_bar("label", 3, False).disable
