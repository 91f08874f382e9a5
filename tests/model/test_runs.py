"""Draws that run side by side are what runs of their own give, or they do not run side by side."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyroflow as pf
from pyroflow.model.bound import BoundModel
from pyroflow.model.comparison import agree
from pyroflow.model.draws import draw
from pyroflow.model.log_joint import LogJoint
from pyroflow.model.runs import Runs

ROWS = 1000


def x_only(size: int = 3) -> Tensor:
    with pyro.plate("effects", size):
        return pyro.sample("x", dist.Normal(0.0, 2.0))


# Right in a run of their own; in a plate around them they reduce over all draws.
def ridge() -> None:
    pyro.factor("site", -0.5 * (x_only() ** 2).sum())


def centred() -> None:
    x = x_only()
    with pyro.plate("rows", 3):
        pyro.sample("site", dist.Normal(x - x.mean(), 1.0), obs=torch.tensor([1.0, 0.0, -2.0]))


def scaled_by_own_spread() -> None:
    x = x_only()
    pyro.sample("site", dist.Normal(0.0, 1 + x.std()), obs=torch.tensor(1.0))


def softmax_over_rows() -> None:
    pyro.factor("site", x_only().softmax(0)[0].log())


def walk_along_rows() -> None:
    level = x_only(4).cumsum(0)
    pyro.sample("site", dist.Normal(level, 1.0).to_event(1), obs=torch.arange(4.0))


def ordered_rows() -> None:
    pyro.factor("site", -x_only().sort(0).values[-1].abs())


def normalised_by_rows() -> None:
    x = x_only()
    pyro.factor("site", -0.5 * x.square().sum(-1) / x.shape[0])


def detached() -> None:
    x = x_only()
    pyro.factor("site", -(x.detach().mean() ** 2))


def among_many_rows() -> None:
    """A small penalty beside a likelihood of a million nats."""
    x = x_only()
    pyro.factor("site", -1e-3 * x.square().sum())
    with pyro.plate("rows", 100_000):
        pyro.sample("y", dist.Normal(x[..., :1], 0.1), obs=torch.ones(100_000))


MIXING = [
    ridge,
    centred,
    scaled_by_own_spread,
    softmax_over_rows,
    walk_along_rows,
    ordered_rows,
    normalised_by_rows,
    detached,
    among_many_rows,
]


def problem_of(model: Callable) -> BoundModel:
    return BoundModel(model, pf.AutoPlanarFlow(model, 0), ())


@pytest.mark.parametrize("float32", [False, True], ids=["float64", "float32"])
@pytest.mark.parametrize("model", MIXING)
def test_mixing_in_a_plate_is_seen_and_named(
    model: Callable, float32: bool, request: pytest.FixtureRequest
) -> None:
    if float32:
        request.getfixturevalue("float32")
    problem = problem_of(model)
    assert problem.mixes(away=True) in ("site 'site'", "the log joint")
    assert problem.max_plate_nesting is None


@pytest.mark.parametrize("model", MIXING)
def test_side_by_side_each_draw_gets_what_it_gets_alone(model: Callable) -> None:
    problem = problem_of(model)
    log_joint = LogJoint(problem, problem.guide, 8)
    assert log_joint.traced
    z = 2 * torch.randn(8, problem.guide.latent_dim)
    alone = problem.runs.one_by_one({"x": z}, 8)
    expected = torch.stack([site.by_draw() for site in alone.values()]).sum(0)
    assert torch.allclose(log_joint.values_and_gradients(z)[0], expected, rtol=1e-10)


def regression(x: Tensor, y: Tensor) -> None:
    with pyro.plate("columns", x.shape[1]):
        slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    pyro.factor("ridge", -2.0 * (slope**2).sum())
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ slope, 1.0), obs=y)


@pytest.mark.parametrize("seed", [0, slow(1), slow(2)])
def test_evidence_of_a_ridge_by_factor_is_exact(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(ROWS, 3)
    y = x @ torch.tensor([0.5, -1.0, 2.0]) + torch.randn(ROWS)
    guide = pf.AutoPlanarFlow(regression, 0)
    pf.fit_guide(regression, guide, (x, y), steps=60, seed=seed, progress=False)
    report = pf.diagnose(regression, guide, (x, y), num_samples=1000)
    # N(0, 10²) times exp(−2 s²) is N(0, v) with 1/v = 1/100 + 4, times sqrt(v)/10
    v = 1 / (0.01 + 4.0)
    marginal = dist.MultivariateNormal(torch.zeros(ROWS), torch.eye(ROWS) + v * x @ x.T)
    exact = marginal.log_prob(y) + 3 * math.log(math.sqrt(v) / 10)
    assert report.level == "good"
    assert report.log_evidence == pytest.approx(exact.item(), abs=0.02)


def levels(group: Tensor, y: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 10.0))
    with pyro.plate("groups", 5):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
    effect = effect - effect.mean()
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(level + effect[group], 1.0), obs=y)


def test_sd_of_a_level_beside_centred_effects_is_exact() -> None:
    group = torch.arange(200) % 5
    y = torch.randn(200) + group
    design = torch.cat([torch.ones(200, 1), torch.eye(5)[group] - 0.2], 1)
    precision = design.T @ design + torch.diag(torch.tensor([0.01, 1.0, 1.0, 1.0, 1.0, 1.0]))
    guide = pf.AutoPlanarFlow(levels, 0)
    pf.fit_guide(levels, guide, (group, y), steps=60, seed=0, progress=False)
    draws = pf.diagnose(levels, guide, (group, y), num_samples=4000).draws
    sd = precision.inverse().diagonal().sqrt()
    assert draws.sites["level"].std().item() == pytest.approx(sd[0].item(), rel=0.05)
    assert torch.allclose(draws.sites["effect"].std(0), sd[1:], rtol=0.08)


def far_branch() -> None:
    """Right from the start to z = 20; beyond, one number stands for all draws side by side."""
    z = pyro.sample("z", dist.Normal(0.0, 100.0))
    loc = z if bool((z < 20).all()) else z.mean()
    pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(40.0))


@pytest.mark.slow
def test_mixing_where_the_fit_ends_is_warned_of() -> None:
    guide = pf.AutoPlanarFlow(far_branch, 0)
    with pytest.warns(UserWarning, match="mixes draws that run side by side, at site 'y'"):
        pf.fit_guide(far_branch, guide, steps=200, seed=0, progress=False)
    report = pf.diagnose(far_branch, guide, num_samples=500)  # one by one, and so right
    z = report.draws.sites["z"]
    expected = dist.Normal(0.0, 100.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(
        torch.tensor(40.0)
    )
    assert torch.allclose(report.draws.log_p, expected)


def test_a_guide_that_mixes_its_draws_runs_one_by_one() -> None:
    def model() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    def guide() -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1), infer=AUXILIARY)
        pyro.sample("a", dist.Normal(loc.mean() * torch.ones(2), 1.0).to_event(1))

    problem = BoundModel(model, guide)
    draws = draw(problem, 400, seed=0)
    assert problem.guide_runs.sequential
    assert problem.max_plate_nesting is None
    # a = mean of three + noise, whose variance is 1/3 + 1
    assert draws.sites["a"].var().item() == pytest.approx(4 / 3, rel=0.2)


AUXILIARY = {"is_auxiliary": True}


def covariance(y: Tensor) -> None:
    """Written for one draw: a plate around it would not run."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0).expand([3]).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(3, 1.0))
    tril = torch.diag(scale) @ factor
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=tril), obs=y)


def test_a_model_written_for_one_draw_is_diagnosed_in_few_runs() -> None:
    y = torch.randn(50, 3)
    runs = []

    def counted(y: Tensor) -> None:
        runs.append(1)
        covariance(y)

    guide = pf.AutoPlanarFlow(counted, 2).setup(y)
    runs.clear()
    report = pf.diagnose(counted, guide, (y,), num_samples=500, max_sets=1)
    assert len(runs) < 15
    draws = report.draws
    value = {name: v[7] for name, v in draws.sites.items()}
    trace = pyro.poutine.trace(pyro.poutine.condition(covariance, data=value)).get_trace(y)
    assert draws.log_p[7].item() == pytest.approx(trace.log_prob_sum().item())


def test_the_tolerance_is_of_the_largest_among_the_draws() -> None:
    expected = torch.tensor([[1e6, 1.0], [2e6, -3.0]], dtype=torch.float64)
    assert agree(expected * (1 + 1e-8), expected)
    assert not agree(expected + torch.tensor([0.0, 1e-3]), expected)  # small beside the other site
    assert agree(torch.tensor([torch.nan, torch.inf]), torch.tensor([torch.nan, torch.inf]))
    assert not agree(torch.tensor([torch.inf]), torch.tensor([1.0]))


def test_predictions_of_a_mixing_model_are_its_own() -> None:
    def model() -> None:
        x = x_only()
        pyro.sample("y", dist.Normal(x.sum(), 0.01), obs=torch.tensor(0.0))

    x = torch.randn(20, 3)
    sites = Runs(model, depth=1, predict=True).evaluate({"x": x}, 20)
    assert (sites["y"].values - x.sum(1)).abs().max() < 0.06


@pytest.mark.parametrize("seed", range(4))
def test_latents_of_some_runs_only_are_refused_where_no_draws_run_side_by_side(seed: int) -> None:
    """The draws of a new guide may all have the same latents: a fit would not meet the others."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z > 0:
            pyro.sample("more", dist.Normal(0.0, 1.0))

    guide = pf.AutoPlanarFlow(model, 0, init_scale=1e-3)
    with pytest.raises(ValueError, match="'more' is a latent in some runs"):
        pf.fit_guide(model, guide, steps=1, num_particles=2, seed=seed, progress=False)


def test_autoguides_vectorise() -> None:
    problem = BoundModel(walk, AutoNormal(walk), ())
    assert problem.max_plate_nesting == 1
    assert not problem.guide_runs.sequential


def smooth(x: Tensor, y: Tensor) -> None:
    """Singular in float32 where the length is large."""
    length = pyro.sample("length", dist.LogNormal(0.0, 3.0))
    gram = (-0.5 * ((x - x[:, None]) / length) ** 2).exp()
    factor = torch.linalg.cholesky(gram)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), scale_tril=factor), obs=y)


@pytest.mark.usefixtures("float32")
def test_a_matrix_without_a_factor_costs_its_draw_only() -> None:
    x = torch.linspace(0.0, 5.0, 12)
    guide = pf.AutoPlanarFlow(smooth, 0)
    problem = BoundModel(smooth, guide, (x, torch.sin(x)))
    length = torch.tensor([0.3, 1e6, 0.2, 0.5])
    log_p = problem.runs.evaluate({"length": length}, 4)["y"].by_draw()
    assert log_p.isfinite().tolist() == [True, False, True, True]
    alone = [pyro.poutine.condition(smooth, data={"length": v}) for v in length[[0, 2, 3]]]
    expected = [pyro.poutine.trace(m).get_trace(x, torch.sin(x)) for m in alone]
    expected = torch.stack([trace.nodes["y"]["fn"].log_prob(torch.sin(x)) for trace in expected])
    assert torch.allclose(log_p[[0, 2, 3]], expected, rtol=1e-3)


def test_guides_on_spheres_and_of_discrete_sites_are_compared_at_their_own_draws() -> None:
    def model() -> None:
        way = pyro.sample("way", dist.ProjectedNormal(torch.tensor([1.0, 0.5])))
        many = pyro.sample("many", dist.Poisson(3.0))
        pyro.sample("y", dist.Normal(way[..., 0] + many, 1.0), obs=torch.tensor(0.3))

    def guide() -> None:
        pyro.sample("way", dist.ProjectedNormal(pyro.param("c", torch.tensor([1.0, 0.0]))))
        pyro.sample("many", dist.Poisson(2.0))

    assert BoundModel(model, guide).max_plate_nesting == 0


def walk() -> None:
    with pyro.plate("effects", 3):
        x = pyro.sample("x", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(3))


GENERATOR = np.random.default_rng(0)
NOISE = {
    "torch": lambda: torch.randn(()),
    "NumPy": lambda: float(np.random.normal()),  # noqa: NPY002
    "NumPy's generators": lambda: float(GENERATOR.normal()),
    "random": lambda: random.gauss(0.0, 1.0),  # noqa: S311
}


@pytest.mark.parametrize("as_data", [False, True])
@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_random_numbers_of_the_models_own_are_told(noise: Callable[[], Any], as_data: bool) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        number = torch.as_tensor(noise())
        data, loc = (number, z) if as_data else (torch.tensor(0.5), z + number)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=data)

    guide = pf.AutoPlanarFlow(model, num_layers=0)
    with pytest.warns(UserWarning, match="same latents in each run, at site 'y'.*by torch, NumPy"):
        pf.diagnose(model, guide, num_samples=100)


def test_a_model_that_branches_has_no_random_numbers_of_its_own() -> None:
    """Each draw takes a run, and nothing is said (warnings are errors here)."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z if float(z) > 0 else 2 * z, 1.0), obs=torch.tensor(0.5))

    report = pf.diagnose(model, pf.AutoPlanarFlow(model, num_layers=0), num_samples=100)
    assert "each draw takes a run" in report.census
