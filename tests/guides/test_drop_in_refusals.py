"""What the guides refuse: by the name of the site, with the way out."""

import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from drop_in_cases import GUIDES, mixture, model, readings
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor


@pytest.fixture(params=GUIDES)
def make(request: pytest.FixtureRequest) -> Callable:
    return GUIDES[request.param]


def test_discrete_sites_that_are_not_hidden_are_refused_by_name(make: Callable) -> None:
    with pytest.raises(ValueError, match=r"'side'.* hide=\['side'\]"):
        make(mixture).setup(readings())


def test_pyro_names_a_site_that_comes_or_goes(make: Callable) -> None:
    def changing(more: bool) -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        if more:
            pyro.sample("b", dist.Normal(0.0, 1.0))

    for first in (False, True):
        guide = make(changing).setup(first)
        with pytest.warns(UserWarning, match="'b'"), warnings.catch_warnings():
            Trace_ELBO().loss(changing, guide, not first)
        trace = poutine.trace(changing).get_trace(not first)
        with pytest.raises(ValueError, match=r"samples site 'b'.*make a new guide"):
            guide.check_model(trace)


def test_a_latent_of_another_shape_is_refused_by_name(make: Callable) -> None:
    def growing(size: int) -> None:
        with pyro.plate("rows", size):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = make(growing).setup(3)
    guide.check_model(poutine.trace(growing).get_trace(3))
    with pytest.raises(ValueError, match=r"'z' has shape \(4,\) in the model, and had \(3,\)"):
        guide.check_model(poutine.trace(growing).get_trace(4))
    with pytest.raises(ValueError, match="'z'|rows"):
        Trace_ELBO().loss(growing, guide, 4)


def test_a_guide_of_another_model_is_refused_by_name(make: Callable) -> None:
    guide = make(model).setup(readings())
    trace = poutine.trace(poutine.block(model, hide=["rate"])).get_trace(readings())
    with pytest.raises(ValueError, match="guide samples site 'rate', which the model does not"):
        guide.check_model(trace)


def test_a_model_without_latents_is_refused(make: Callable) -> None:
    def observed() -> None:
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    for _ in range(2):
        with pytest.raises(RuntimeError, match="found no latent variables"):
            make(observed).setup()


def rows(y: Tensor) -> None:
    """The case of the complaint: Pyro's flow guide ends at a loss of 1233, AutoNormal at 77."""
    with pyro.plate("rows", 20, subsample_size=5) as index:
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y[index])


def test_local_latents_of_a_subsampled_plate_are_refused_with_the_way_out(make: Callable) -> None:
    guide, y = make(rows), torch.arange(20.0)
    for call in (guide, guide.setup, guide.median):
        with pytest.raises(ValueError, match=r"'z'.*'rows'.* 5 of 20.*AmortizedPlanarGuide"):
            call(y)
    assert list(guide.parameters()) == []
