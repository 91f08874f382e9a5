"""What AutoPlanarFlow and fit_guide refuse."""

from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyroflow as pf
from pyroflow.targets import toy_model


def discrete() -> None:
    pyro.sample("k", dist.Bernoulli(0.5))


def no_latents() -> None:
    pyro.sample("obs", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


def continuous_and_discrete() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))
    discrete()


def test_models_without_continuous_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="'k'"):
        pf.fit_guide(discrete, pf.AutoPlanarFlow(discrete), progress=False)
    with pytest.raises(RuntimeError, match="AutoPlanarFlow found no latent"):
        pf.fit_guide(no_latents, pf.AutoPlanarFlow(no_latents), progress=False)
    hidden = pf.AutoPlanarFlow(poutine.block(continuous_and_discrete, hide=["k"]))
    with pytest.raises(ValueError, match="does not sample the model's latent site 'k'"):
        pf.fit_guide(continuous_and_discrete, hidden, progress=False)


@pytest.mark.parametrize(
    ("name", "value"), [("num_layers", -1), ("affine", "none"), ("init_scale", 0.0)]
)
def test_bad_guide_options_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        pf.AutoPlanarFlow(toy_model, **{name: value})


def test_local_latents_of_a_subsampled_plate_are_refused() -> None:
    def model() -> None:
        with pyro.plate("rows", 100, subsample_size=10):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = pf.AutoPlanarFlow(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'z' is a latent in plate 'rows'.* 10 of 100"):
            guide()


def test_arguments_may_have_any_name_and_another_model_is_not_resumed(tmp_path: Path) -> None:
    def model(guide: float, *, model: float) -> None:
        z = pyro.sample("z", dist.Normal(0.0, model))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=torch.tensor(guide))

    def fit(loc: float) -> pf.Fit:
        options = {"steps": 10, "seed": 0, "checkpoint": tmp_path / "g.pt", "progress": False}
        options["early_stop"] = False
        return pf.fit_guide(model, pf.AutoPlanarFlow(model, 1), (loc,), {"model": 1.0}, **options)

    assert fit(0.0).steps == 10
    with pytest.raises(ValueError, match="log joint of a draw"):
        fit(1.0)


def test_guide_without_parameters_is_refused() -> None:
    def guide() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match="no parameters to train"):
        pf.fit_guide(toy_model, guide, progress=False)


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("num_particles", 0), ("lr", 0.0)])
def test_bad_options_are_refused_before_the_model_runs(name: str, value: float) -> None:
    def model() -> None:
        raise AssertionError("the model ran")

    with pytest.raises(ValueError, match=name):
        pf.fit_guide(model, pf.AutoPlanarFlow(model), **{name: value})


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    """Its parameters may mean another density in this one."""

    def fit() -> pf.Fit:
        pyro.clear_param_store()
        options = {"steps": 3, "num_particles": 8, "seed": 0, "progress": False}
        return pf.fit_guide(toy_model, pf.AutoPlanarFlow(toy_model, 2), checkpoint=path, **options)

    path = tmp_path / "guide.pt"
    fit()
    state = torch.load(path, weights_only=True)
    for other in ({**state, "format": 1}, {k: v for k, v in state.items() if k != "format"}):
        torch.save(other, path)
        with pytest.raises(ValueError, match=r"guide\.pt is of another version of pyroflow"):
            fit()
