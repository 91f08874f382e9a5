"""Ordinary mistakes with models and guides, and the line that each is answered with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import pyroflow as pf
from tests.mistakes import Row, X, by_name, check, density, flow

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


def schools(y: Any = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


def counted(y: torch.Tensor) -> None:
    k = pyro.sample("k", dist.Poisson(3.0))
    pyro.sample("y", dist.Normal(k, 1.0).expand([8]).to_event(1), obs=y)


def observed(y: torch.Tensor) -> None:
    pyro.sample("y", dist.Normal(0.0, 1.0).expand([8]).to_event(1), obs=y)


def minibatch(y: torch.Tensor) -> None:
    with pyro.plate("rows", 8, subsample_size=4) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def moving(y: torch.Tensor) -> None:
    a = pyro.sample("a", dist.HalfNormal(1.0))
    b = pyro.sample("b", dist.Uniform(0.0, a))
    pyro.sample("y", dist.Normal(b, 1.0).expand([8]).to_event(1), obs=y)


def guide(model: Callable = schools) -> pf.AutoPlanarFlow:
    return pf.AutoPlanarFlow(model, 2)


def set_up() -> pf.AutoPlanarFlow:
    return guide().setup(Y)


def fit(*given: Any, **options: Any) -> pf.Fit:
    return pf.fit_guide(*given, **({"steps": 2, "seed": 0, "progress": False} | options))


def written(name: str, content: bytes) -> str:
    with open(name, "wb") as file:
        file.write(content)
    return name


def saved(name: str = "flow.pt") -> str:
    pf.save(flow(), name)
    return name


GUIDES: dict[str, Row] = {
    "swapped": (lambda: fit(set_up(), schools, Y), TypeError, "model and guide are swapped"),
    "a class as guide": (
        lambda: fit(schools, pf.AutoPlanarFlow, Y),
        TypeError,
        r"give AutoPlanarFlow\(model\)",
    ),
    "a flow as guide": (lambda: fit(schools, flow(), Y), TypeError, "a density alone"),
    "a word as guide": (lambda: fit(schools, "planar", Y), TypeError, "guide .* got str"),
    "a model that was called": (
        lambda: pf.AutoPlanarFlow(schools(Y)),
        TypeError,
        r"got NoneType: give the function itself",
    ),
    "a model forgotten": (lambda: pf.AutoPlanarFlow(16), TypeError, "model must be .* got int"),
    "an optimiser": (lambda: fit(schools, guide(), Adam({}), Y), TypeError, "SVI.model, guide"),
    "Pyro's SVI": (
        lambda: fit(SVI(schools, guide(), Adam({}), Trace_ELBO()), guide(), Y),
        TypeError,
        r"fit_guide\(svi.model, \.\.\.\)",
    ),
    "a loss": (lambda: fit(schools, guide(), Y, loss=Trace_ELBO()), TypeError, "Pyro's SVI"),
    "counts": (lambda: fit(counted, guide(counted), Y), ValueError, "discrete .* site 'k'"),
    "nothing to infer": (
        lambda: fit(observed, guide(observed), Y),
        RuntimeError,
        "no latent variables in the model: leave out obs=",
    ),
    "args without a tuple": (
        lambda: fit(schools, guide(), args=Y),
        TypeError,
        r"args must be a tuple, as in args=\(y,\)",
    ),
    "a list of data": (
        lambda: fit(schools, guide(), Y.tolist()),
        TypeError,
        "does not take these 8: give data as a tensor",
    ),
    "too many arguments": (lambda: fit(schools, guide(), Y, Y), TypeError, "2 were given"),
    "an unknown argument": (
        lambda: fit(schools, guide(), y=Y),
        TypeError,
        r"it is an argument of the model: give kwargs=\{'y': \.\.\.\}",
    ),
    "a subsampled plate": (
        lambda: fit(minibatch, guide(minibatch), Y),
        ValueError,
        "plate 'rows', which subsamples 4 of 8 rows: .*AutoStructuredFlow",
    ),
    "a moving support": (
        lambda: fit(moving, guide(moving), Y),
        ValueError,
        "site 'b' has a support that another latent moves",
    ),
    "another model": (lambda: fit(moving, set_up(), Y), ValueError, "the model samples site 'a'"),
    "no draws": (
        lambda: fit(schools, guide(), Y, num_particles=0),
        ValueError,
        "num_particles must be .* got 0",
    ),
    "no spread": (lambda: pf.AutoPlanarFlow(schools, init_scale=0), ValueError, "init_scale"),
    "half a word": (
        lambda: pf.AutoPlanarFlow(schools, affine="diag"),
        ValueError,
        "affine must be one of .* got 'diag'",
    ),
    "layers of another size": (
        lambda: pf.AutoFlow(schools, [pf.Planar(3)])(Y),
        ValueError,
        r"10 unconstrained latents, and Planar expects a vector of 3 .*AutoFlow\(model, lambda",
    ),
    "a misspelt plate": (
        lambda: pf.AmortizedPlanarGuide(schools, "school")(Y),
        ValueError,
        "got 'school'; those of the model are in: 'schools'",
    ),
    "a misspelt context": (
        lambda: pf.AmortizedPlanarGuide(schools, "schools", context="x"),
        ValueError,
        "arguments of the model, got 'x'; it has 'y'",
    ),
    "a value without its sites": (
        lambda: set_up().log_prob({"mu": torch.zeros(())}),
        ValueError,
        r"lacks \['tau', 'theta'\]",
    ),
    "a percentage": (lambda: set_up().quantiles([50]), ValueError, r"numbers in \[0, 1\]"),
}

RESULTS: dict[str, Row] = {
    "the fit of a guide": (
        lambda: pf.diagnose(schools, density(X), Y),
        TypeError,
        "guide must be .* got Fit",
    ),
    "a density": (lambda: pf.diagnose(schools, flow(), Y), TypeError, "a density alone"),
    "no data": (
        lambda: pf.diagnose(schools, set_up()),
        ValueError,
        "site 'y', .* this call gives the model no data; pass them",
    ),
    "a made guide": (lambda: pf.calibrate(schools, set_up(), (Y,)), TypeError, "made already"),
    "no samples": (
        lambda: pf.mcmc(schools, set_up(), Y, num_samples=0),
        ValueError,
        "num_samples must be .* got 0",
    ),
    "chains": (lambda: pf.mcmc(schools, set_up(), Y, chains=4), TypeError, r"mean num_chains\?"),
    "draws": (lambda: pf.to_arviz(schools, set_up(), Y, draws=9), TypeError, r"mean num_samples\?"),
    "a guide for posterior": (
        lambda: pf.posterior(set_up(), Y),
        TypeError,
        r"call posterior\(model, \.\.\.\), which makes its own guide",
    ),
    "data for posterior": (lambda: pf.posterior(Y), TypeError, "model must be .* got Tensor"),
    "name and flow swapped": (
        lambda: pf.save("flow.pt", flow()),
        TypeError,
        r"path must be the name of a file, got Flow: call save\(obj, path\)",
    ),
    "a fit in a file": (lambda: pf.save(density(X), "f.pt"), TypeError, "save the flow or guide"),
    "a guide never called": (
        lambda: pf.save(guide(), "g.pt"),
        ValueError,
        "never set up, .* call it once",
    ),
    "a folder of a file": (
        lambda: pf.save(flow(), "no/f.pt"),
        FileNotFoundError,
        "in a folder that does not exist: make it first",
    ),
    "a missing file": (lambda: pf.load("no.pt"), FileNotFoundError, "no.pt does not exist"),
    "a text": (
        lambda: pf.load(written("f.txt", b"hello")),
        ValueError,
        "f.txt is not a file of pyroflow.save; nothing in it was run",
    ),
    "a model for a flow": (
        lambda: pf.load(saved(), model=schools),
        TypeError,
        "holds a flow, which takes no model",
    ),
    "a guide in place of its fit": (
        lambda: pf.plots.plot_losses(set_up()),
        TypeError,
        "losses must be a Fit or numbers, got AutoPlanarFlow",
    ),
    "data before the flow": (
        lambda: pf.plots.plot_pairs(X.numpy(), flow()),
        TypeError,
        "got ndarray: the flow comes first, then the data",
    ),
    "data before the flow, in the plane": (
        lambda: pf.plots.plot_density(X, flow()),
        TypeError,
        "got Tensor: the flow comes first, then the data",
    ),
    "data before the flow, ranked": (
        lambda: pf.plots.plot_pit(X, flow()),
        TypeError,
        "got Tensor: the flow comes first, then the data",
    ),
    "three columns in the plane": (
        lambda: pf.plots.plot_density(pf.planar_flow(3), torch.randn(9, 3)),
        ValueError,
        r"event shape \(2,\), got \(3,\); fit one to 2 columns",
    ),
}

MISTAKES = by_name(guides=GUIDES, results=RESULTS)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_a_line(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check(MISTAKES[mistake])


def test_data_that_were_forgotten() -> None:
    said = "observes nothing, .* argument 'y', the data of site 'y', was not given"
    with pytest.warns(UserWarning, match=said):
        fit(schools, guide(), warm_start=False)
