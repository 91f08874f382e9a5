"""What a guide is refused for is refused wherever its model is run; the ways out are exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from pyro.infer import SVI, Trace_ELBO
from test_refused_supports import angle, moved_interval, one

import pyroflow as pf


@pytest.mark.parametrize("model", [moved_interval, one(angle)])
def test_a_refused_model_is_refused_by_the_whole_package(model: Callable, tmp_path: Path) -> None:
    guide = pf.AutoPlanarFlow(model, 1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    options = {"steps": 2, "progress": False}
    for call in (
        svi.step,
        guide.median,
        lambda: pf.fit_guide(model, guide, **options),
        lambda: pf.diagnose(model, guide),
        lambda: pf.to_arviz(model, guide, num_samples=30),
        lambda: pyro.infer.Predictive(model, guide=guide, num_samples=2)(),
    ):
        with pytest.raises(ValueError, match="site 'x' (is a latent angle|has a support that)"):
            call()


@pytest.mark.parametrize("model", [moved_interval, one(angle)])
def test_a_file_of_old_is_refused_with_its_model(model: Callable, tmp_path: Path) -> None:
    def real() -> None:
        if model is moved_interval:
            pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Uniform(0.0, 1.0) if model is moved_interval else dist.Normal(0, 1))

    pf.save(pf.AutoPlanarFlow(real, 1).setup(), tmp_path / "guide.pt")
    with pytest.raises(ValueError, match="site 'x' (is a latent angle|has a support that)"):
        pf.load(tmp_path / "guide.pt", model=model)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, slow(1)])
def test_the_way_out_of_moving_bounds_has_the_known_evidence(seed: int) -> None:
    """Of x ~ U(0, s), s ~ LogNormal, y ~ N(x, 0.3) by quadrature."""

    def model() -> None:
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        x = pyro.deterministic("x", s * pyro.sample("u", dist.Uniform(0.0, 1.0)))
        pyro.sample("y", dist.Normal(x, 0.3), obs=torch.tensor(1.5))

    log_s = torch.linspace(-7.0, 7.0, 4001)
    normal = dist.Normal(1.5, 0.3)
    by_s = (normal.cdf(log_s.exp()) - normal.cdf(torch.tensor(0.0))) / log_s.exp()
    expected = torch.trapezoid(dist.Normal(0.0, 1.0).log_prob(log_s).exp() * by_s, log_s).log()
    guide = pf.AutoPlanarFlow(model, 8)
    pf.fit_guide(model, guide, steps=600, seed=seed, progress=False)
    report = pf.diagnose(model, guide, num_samples=4000, seed=seed)
    assert report.log_evidence == pytest.approx(expected.item(), abs=0.05)
