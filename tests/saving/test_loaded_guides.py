"""Loaded guides train on with their model, and refuse another."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import Tensor

import pyroflow as pf
from tests.saved_cases import Y, assert_same, draws, made, returned, schools


def trained(guide: pf.AutoFlow, loss: ELBO | None = None) -> list[float]:
    """The losses of three steps."""
    svi = SVI(schools, guide, Adam({"lr": 0.01}), loss or Trace_ELBO(num_particles=2))
    pyro.set_rng_seed(1)
    return [svi.step(Y) for _ in range(3)]


def test_training_continues_where_it_was(tmp_path: Path) -> None:
    guide = made()
    trained(guide)
    loaded = returned(guide, tmp_path, model=schools)
    fresh = pf.AutoPlanarFlow(schools, 3)
    fresh(Y)
    start = copy.deepcopy(fresh.state_dict())
    assert loaded._pyro_name == guide._pyro_name  # until it is called
    assert trained(loaded) == trained(guide)
    assert_same(draws(guide, Y), draws(loaded, Y))
    assert torch.equal(fresh.planar.w, start["flow.parts.0.w"])
    assert {g._pyro_name for g in (guide, loaded, fresh)} == {
        "AutoPlanarFlow",
        "AutoPlanarFlow_2",
        "AutoPlanarFlow_3",
    }


ELBOS = {
    "vectorized": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "mean_field": TraceMeanField_ELBO,
}


@pytest.mark.parametrize("elbo", ELBOS)
def test_a_loaded_guide_trains_in_each_elbo(elbo: str, tmp_path: Path) -> None:
    """The first call, which compares the model, has other handlers around it."""
    guide = made()
    loaded = returned(guide, tmp_path, model=schools)
    assert trained(loaded, loss=ELBOS[elbo]()) == trained(guide, loss=ELBOS[elbo]())
    assert not loaded._forward_pre_hooks


def test_fit_guide_trains_a_loaded_guide(tmp_path: Path) -> None:
    loaded = returned(made(), tmp_path, model=schools)
    before = copy.deepcopy(loaded.state_dict())
    pf.fit_guide(schools, loaded, (Y,), steps=2, seed=0, progress=False)
    assert any(
        not torch.equal(value, before[name])
        for name, value in loaded.state_dict().items()
        if isinstance(value, Tensor)
    )


@pytest.mark.parametrize("model", [None, schools])
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_runs(model: Callable | None, parallel: bool, tmp_path: Path) -> None:
    guide = made()
    loaded = returned(guide, tmp_path, model=model)
    results = []
    for each in (guide, loaded):
        pyro.set_rng_seed(2)
        results.append(Predictive(schools, guide=each, num_samples=4, parallel=parallel)())
    assert_same(*results)
    assert results[0]["y"].shape == (4, 8)


def test_a_guide_without_model_says_so_when_it_needs_one(tmp_path: Path) -> None:
    loaded = returned(made(), tmp_path)
    with pytest.raises(RuntimeError, match=r"loaded without its model: .*model=model"):
        loaded.model(Y)


NORMAL, UNIFORM = dist.Normal(0.0, 10.0), dist.Uniform(0.0, 5.0)


def other_schools(
    y: Tensor,
    mu: dist.Distribution | None = NORMAL,
    tau: dist.Distribution = UNIFORM,
    size: int = 8,
    plate: str = "schools",
) -> None:
    if mu is not None:
        pyro.sample("mu", mu)
    pyro.sample("tau", tau)
    with pyro.plate(plate, size):
        pyro.sample("theta", dist.Normal(0.0, 1.0))


def with_another(y: Tensor) -> None:
    other_schools(y)
    pyro.sample("extra", dist.Normal(0.0, 1.0))


# By name: a model, and how it differs from other_schools.
DIFFERENCES: dict[str, tuple[Callable, str]] = {
    "missing": (partial(other_schools, mu=None), "site 'mu' of the file is no latent"),
    "added": (with_another, "the model has a latent 'extra' that the file has not"),
    "shape": (
        partial(other_schools, mu=dist.Normal(0.0, 10.0).expand([2]).to_event(1)),
        r"site 'mu' has event shape \[\] in the file and \[2\] now",
    ),
    "support": (
        partial(other_schools, tau=dist.Normal(0.0, 1.0)),
        r"site 'tau' has support Interval\(.* in the file and Real\(\) now",
    ),
    "bounds": (
        partial(other_schools, tau=dist.Uniform(0.0, 9.0)),
        r"site 'tau' has support Interval\(.*=5\.0\) in the file and Interval\(.*=9\.0\) now",
    ),
    "size": (
        partial(other_schools, size=7),
        r"site 'theta' has batch shape \[8\] in the file and \[7\] now",
    ),
    "plate": (
        partial(other_schools, plate="pupils"),
        r"site 'theta' has plates schools\(size=8, dim=-1\) in the file and pupils\(.*\) now",
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_model_with_other_latents_is_refused_by_site(name: str, tmp_path: Path) -> None:
    model, message = DIFFERENCES[name]
    loaded = returned(made(other_schools), tmp_path, model=model)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"does not fit the guide in the file: {message}"):
            loaded(Y)
    assert draws(loaded)["theta"].shape == (5, 8)  # sampling needs no model


def test_a_model_without_arguments_is_compared_at_once(tmp_path: Path) -> None:
    pf.save(made(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), ()), tmp_path / "guide.pt")
    with pytest.raises(ValueError, match=r"site 'x' has support Real\(\) in the file"):
        pf.load(tmp_path / "guide.pt", model=lambda: pyro.sample("x", dist.LogNormal(0.0, 1.0)))


def test_the_comparison_is_made_once_and_leaves_no_trace(tmp_path: Path) -> None:
    runs = []

    def model(y: Tensor) -> None:
        runs.append(y)
        schools(y)

    loaded = returned(made(), tmp_path, model=model)
    copied, pickled = copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))
    torch.manual_seed(0)
    there = poutine.trace(loaded).get_trace(Y)
    once = len(runs)
    torch.manual_seed(0)
    again = poutine.trace(loaded).get_trace(Y)
    assert once > 0
    assert len(runs) == once
    assert there.stochastic_nodes == again.stochastic_nodes
    assert torch.equal(there.nodes["theta"]["value"], again.nodes["theta"]["value"])
    assert not loaded._forward_pre_hooks
    copied(Y)
    assert len(runs) == 2 * once
    assert pickled(Y).keys() == {"mu", "tau", "theta"}


def test_sampling_is_not_compared(tmp_path: Path) -> None:
    """Without its argument y the model cannot run, and without y's data it has another latent."""
    loaded = returned(made(), tmp_path, model=schools)
    with torch.no_grad():
        assert loaded().keys() == {"mu", "tau", "theta"}
    needs_y = returned(made(other_schools), tmp_path, model=other_schools)
    assert needs_y().keys() == {"mu", "tau", "theta"}


def test_a_model_with_bound_arguments_is_compared_at_once(tmp_path: Path) -> None:
    """``functools.partial`` is no handler of Pyro: its arguments are the model's."""

    def model(count: int, scale: float) -> None:
        pyro.sample("z", dist.Normal(torch.zeros(count), scale).to_event(1))

    guide = pf.AutoPlanarFlow(partial(model, 3, 1.0)).setup()
    pf.save(guide, tmp_path / "guide.pt")
    assert pf.load(tmp_path / "guide.pt", partial(model, 3, 1.0))()["z"].shape == (3,)
    with pytest.raises(ValueError, match="site 'z' has"):
        pf.load(tmp_path / "guide.pt", partial(model, 4, 1.0))
