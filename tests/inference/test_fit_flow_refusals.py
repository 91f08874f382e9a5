"""What fit_guide refuses on guides of the AutoFlow family, and how it says so."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflow as pf
from pyroflow.targets import toy_model

QUICK = {"num_particles": 8, "seed": 0, "progress": False}


def nowhere_finite() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("bad", z * math.nan)


def test_model_without_a_finite_density_is_refused_by_site() -> None:
    with pytest.raises(ValueError, match=r"not finite where the guide starts.*'bad'.*init_loc_fn"):
        pf.fit_guide(nowhere_finite, pf.AutoPlanarFlow(nowhere_finite, 2), **QUICK)


def changed(size: int, name: str = "z") -> Callable:
    def model() -> None:
        pyro.sample(name, dist.Normal(torch.zeros(size), 1.0).to_event(1))

    return model


@pytest.mark.parametrize("other", [changed(3), changed(2, "theta")])
def test_guide_of_another_model_is_refused_by_site(other: Callable) -> None:
    guide = pf.AutoPlanarFlow(changed(2), 2).setup()
    with pytest.raises(ValueError, match=r"'(z|theta)'"):
        pf.fit_guide(other, guide, steps=5, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "elbow"}, "objective must be one of"),
        ({"objective": "iwae", "group_size": 3}, "group_size must divide num_particles = 8"),
        ({"steps": 0}, "steps must be an integer"),
    ],
)
def test_options_are_checked_by_name(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pf.fit_guide(toy_model, pf.AutoPlanarFlow(toy_model, 2), **options, **QUICK)


def test_latent_of_some_runs_only_is_refused_by_site() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("o", dist.Normal(z, 0.5), obs=torch.tensor(1.0))
        if z > 0.5:
            pyro.sample("b", dist.Normal(5.0, 0.1))

    # init_loc_fn: the guide is set up by a run without the second latent
    start = pyro.infer.autoguide.init_to_value(values={"z": torch.tensor(0.45)})
    guide = pf.AutoPlanarFlow(model, 1, init_loc_fn=start)
    with pytest.raises(ValueError, match="'b'"):
        pf.fit_guide(model, guide, steps=5, **QUICK)


def test_guide_of_another_support_is_refused_by_site() -> None:
    guide = pf.AutoPlanarFlow(changed(1), 1).setup()

    def model() -> None:
        pyro.sample("z", dist.Exponential(torch.ones(1)).to_event(1))

    with pytest.raises(ValueError, match="'z' has support .* and had Real"):
        pf.fit_guide(model, guide, steps=5, **QUICK)
