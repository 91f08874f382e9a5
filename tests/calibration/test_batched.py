"""Calibration by fits of all data sets side by side, beside fits one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyroflow as pf
from pyroflow.calibration import batched
from pyroflow.calibration.batched import Batched
from pyroflow.flows import AlongPath, log_prob_at_fixed
from pyroflow.inference.objectives import bound_scores, cut_loss, mean_scores
from pyroflow.inference.schedule import LearningRateSchedule
from pyroflow.inference.together import FlowsTogether, _Training
from pyroflow.model.bound import BoundModel
from pyroflow.model.log_joint import LogJoint
from pyroflow.model.log_joint_of_data import LogJointOfData
from pyroflow.model.priors import PriorsAtLatents
from pyroflow.model.runs import Runs
from pyroflow.seeds import seeded
from pyroflow.targets import eight_schools_centered, eight_schools_noncentered

ROWS, SD = 3, 0.5
QUIET: dict[str, Any] = {"seed": 0, "progress": False}
QUICK = QUIET | {"num_simulations": 4, "num_samples": 50, "steps": 5}


def normal(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2).to(y), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc, SD).to_event(1), obs=y)


def edge(y: Tensor) -> None:
    """Draws of the guide below the largest datum have no weight."""
    top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Uniform(0.0, top), obs=y)


def branching(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0 if y.mean() > 0 else 2.0).expand([3]).to_event(1), obs=y)


def walk(x: Tensor, y: Tensor) -> None:
    """The prior of ``level`` lies where the data x do, so that coordinates depend on these."""
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 3.0).to_event(1), obs=x)
    level = pyro.sample("level", dist.Normal(x, tau).to_event(1))
    pyro.sample("y", dist.Normal(level, 2.0).to_event(1), obs=y)


@contextmanager
def spied() -> Iterator[list[tuple]]:
    """The flows, the log joint and the truth of each batch."""
    kept, below = [], Batched._below

    def keep(self: Batched, *found: Any) -> Any:
        kept.append(found)
        return below(self, *found)

    with patch.object(Batched, "_below", keep):
        yield kept


@torch.no_grad()
def bounds(flows: FlowsTogether, log_joint: LogJointOfData) -> Tensor:
    x = flows.draw(2000)
    return -mean_scores(log_joint(x) - flows().log_prob(x))


class TestFits:
    @pytest.mark.parametrize("dtype", [slow(torch.float32), torch.float64])
    def test_of_a_conjugate_model_are_exact(self, dtype: torch.dtype) -> None:
        args = (torch.zeros(ROWS, 2, dtype=dtype),)
        options = QUIET | {"num_simulations": 30, "steps": 100}
        with spied() as kept:
            result = pf.calibrate(
                normal, partial(pf.AutoPlanarFlow, num_layers=2), args, data={"y": "y"}, **options
            )
        ((flows, log_joint, truth),) = kept
        assert result.fits == "together"
        assert result.calibrated
        precision = 1 + ROWS / SD**2
        mean, sd = log_joint.data["y"].sum(1) / SD**2 / precision, precision**-0.5
        x = flows.draw(4000).detach()
        assert x.dtype == dtype
        torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.1 * sd)
        torch.testing.assert_close(x.std(0), torch.full_like(mean, sd), rtol=0.06, atol=0)
        exact = torch.special.ndtr(((truth["loc"] - mean) / sd).double())
        torch.testing.assert_close(result.probabilities["loc"], exact, rtol=0, atol=0.09)
        evidence = dist.MultivariateNormal(
            torch.zeros(ROWS).to(mean), SD**2 * torch.eye(ROWS).to(mean) + 1
        ).log_prob(log_joint.data["y"].mT)
        torch.testing.assert_close(bounds(flows, log_joint), evidence.sum(1), rtol=0, atol=0.02)

    @pytest.mark.parametrize(
        ("model", "make"),
        [
            slow(eight_schools_noncentered, pf.AutoPlanarFlow),
            slow(eight_schools_noncentered, pf.AutoSylvesterFlow),
            slow(eight_schools_centered, pf.AutoPlanarFlow),
            slow(partial(edge, torch.ones(3)), pf.AutoPlanarFlow),
        ],
    )
    def test_are_as_good_as_one_by_one(self, model: Callable, make: Callable) -> None:
        """At the edge the layers that a guide starts with make a difference of 0.06 nats."""
        num, steps, edges = 4, 300, isinstance(model, partial)
        with spied() as kept:
            result = pf.calibrate(model, make, num_simulations=num, steps=steps, **QUIET)
        assert result.fits == "together"
        ((flows, log_joint, _),) = kept
        together, alone = bounds(flows, log_joint), []
        for i in range(num):
            observed = poutine.condition(model, data={"y": log_joint.data["y"][i]})
            options = {"steps": steps, "num_particles": 32, "progress": False, "seed": i}
            alone.append(-pf.fit_guide(observed, make(observed), **options).best_loss)
        better = together - torch.tensor(alone)
        assert better.min() > (-0.3 if edges else -0.1)
        assert better.mean() > (-0.1 if edges else -0.04)

    def test_the_data_sets_are_the_same_either_way(self) -> None:
        seen: dict[str, list[Tensor]] = {"together": [], "alone": []}

        def make(where: str, observed: Callable) -> pf.AutoPlanarFlow:
            trace = poutine.trace(observed).get_trace(torch.zeros(ROWS, 2))
            seen[where].append(trace.nodes["y"]["value"])
            return pf.AutoPlanarFlow(observed, num_layers=1)

        args = (torch.zeros(ROWS, 2),)
        pf.calibrate(normal, partial(make, "together"), args, **QUICK)
        alone = pf.calibrate(
            normal,
            partial(make, "alone"),
            args,
            fit=lambda *given: pf.fit_guide(*given, steps=5, progress=False),
            **QUICK,
        )
        assert alone.fits == "one by one: by the fit given"
        assert len(seen["alone"]) == 4
        assert all(map(torch.equal, *seen.values()))

    def test_in_parts(self) -> None:
        with patch.object(batched, "MOST", 5000), spied() as kept:
            result = pf.calibrate(normal, pf.AutoPlanarFlow, (torch.zeros(ROWS, 2),), **QUICK)
        assert len(kept) > 1
        assert result.fits == "together"
        assert result.probabilities["loc"].shape == (4, 2)


class TestOneByOne:
    @pytest.mark.slow
    def test_where_the_model_branches_on_its_data(self) -> None:
        args = (torch.ones(3),)
        make = partial(pf.AutoPlanarFlow, num_layers=1)
        result = pf.calibrate(
            branching, make, args, data={"y": "y"}, **QUICK | {"num_simulations": 2}
        )
        assert result.fits.startswith("one by one: ")

    @pytest.mark.parametrize("sought", ["agrees", "train"])
    def test_a_data_set_that_failed(self, sought: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if sought == "agrees":
            monkeypatch.setattr(LogJointOfData, "agrees", lambda *_: [True, False, True, True])
        else:
            train = batched.train

            def failing(*given: Any) -> Tensor:
                return train(*given).index_fill(0, torch.tensor([1]), torch.inf)

            monkeypatch.setattr(batched, "train", failing)
        args = (torch.zeros(ROWS, 2),)
        result = pf.calibrate(normal, pf.AutoPlanarFlow, args, **QUICK)
        assert result.fits.startswith("3 together, 1 one by one: ")
        assert result.probabilities["loc"].shape == (4, 2)

    @pytest.mark.parametrize(
        ("make", "why"),
        [
            (AutoNormal, "AutoNormal is no flow"),
            (partial(pf.AutoPlanarFlow, num_layers="auto"), "the guide grows"),
            (partial(pf.AutoPlanarFlow, affine=None), "the guide has no affine layer"),
            (
                lambda model: pf.AutoPlanarFlow(model, 1).setup(torch.zeros(ROWS, 2)),
                "make_guide returns guides that were called before",
            ),
        ],
    )
    def test_guides(self, make: Callable, why: str) -> None:
        options = QUICK | {"num_simulations": 2}
        result = pf.calibrate(normal, make, (torch.zeros(ROWS, 2),), **options)
        assert result.fits.startswith(f"one by one: {why}")

    def test_guides_of_several_forms(self) -> None:
        depths = iter([1, 2, 1, 2])
        make = lambda model: pf.AutoPlanarFlow(model, next(depths, 1))  # noqa: E731
        options = QUICK | {"num_simulations": 2}
        result = pf.calibrate(normal, make, (torch.zeros(ROWS, 2),), **options)
        assert result.fits.startswith("one by one: ")


def test_the_log_joint_is_that_of_each_data_set() -> None:
    y = torch.randn(3, 8).double() * 10
    models = [poutine.condition(eight_schools_centered, data={"y": own}) for own in y]
    args = (y[0], 10 + torch.arange(8.0).double())
    guides = [pf.AutoPlanarFlow(model).setup(*args) for model in models]
    problems = [BoundModel(*pair, args) for pair in zip(models, guides, strict=True)]
    guides[0].find_coordinates(args, {})

    def bind(data: dict[str, Tensor]) -> Any:
        observed = poutine.condition(eight_schools_centered, data=data)
        return Runs(PriorsAtLatents()(observed), args)

    found = LogJointOfData(bind, problems[0].runs, guides[0], {"y": y}, 7)
    x = guides[0].start() + torch.randn(5, 3, 10).double().requires_grad_()
    value = found(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    for i, problem in enumerate(problems):
        guides[i].coordinates = guides[0].coordinates
        own = LogJoint(problem, guides[i], 5)
        torch.testing.assert_close(value[:, i], own(x[:, i]))
        torch.testing.assert_close(gradient[:, i], own.values_and_gradients(x[:, i])[1])
    assert found.agrees(x[0], [problem.runs for problem in problems]) == [True] * 3
    others = [problems[1].runs, *(problem.runs for problem in problems[1:])]
    assert found.agrees(x[0], others) == [False, True, True]


@pytest.mark.parametrize("make", [pf.AutoPlanarFlow, pf.AutoSylvesterFlow])
def test_flows_together_are_the_flows(make: Callable) -> None:
    guides = [make(normal).setup(torch.zeros(ROWS, 2)) for _ in range(3)]
    with torch.no_grad():
        for guide in guides:
            for p in guide.parameters():
                p.add_(0.5 * torch.randn_like(p))
    flows = FlowsTogether([guide.flow.double() for guide in guides])
    x = flows.draw(7)
    found = flows().log_prob(x)
    for i, guide in enumerate(guides):
        torch.testing.assert_close(found[:, i], guide.flow().log_prob(x[:, i].detach()))


def test_losses_have_the_gradients_of_each_flow_alone() -> None:
    """Where draws are lost too."""
    guides = [pf.AutoPlanarFlow(normal, 4).setup(torch.zeros(ROWS, 2)) for _ in range(3)]
    with torch.no_grad():
        for p in [p for guide in guides for p in guide.parameters()]:
            p.add_(0.3 * torch.randn_like(p))

    def log_joint(x: Tensor) -> Tensor:
        lost = ((20 * x[..., 0]).sin() > 0.5) & (
            torch.arange(x.shape[-2]) > 0 if x.dim() == 3 else True
        )
        return (-x.square().sum(-1)).masked_fill(lost, -torch.inf)

    flows = FlowsTogether([guide.flow for guide in guides])
    training = _Training(flows, log_joint, LearningRateSchedule(1), 64, 0.03)
    with seeded(0):
        losses = training.losses()
    gradients = torch.autograd.grad(losses.sum(), flows.trained)
    with seeded(0):
        noise = flows().base_dist.sample((64,))
    for i, guide in enumerate(guides):
        q, x = guide.flow(), noise[:, i]
        q = AlongPath(q.base_dist, q.transforms)
        for t in q.transforms:
            x = t(x)
        log_weights = (log_joint(x) if i else -x.square().sum(-1)) - q.log_prob(x)
        loss = cut_loss(log_weights, "elbo", 1, x, log_prob_at_fixed(q, x), path=True)
        assert bool(log_weights.isfinite().all()) == (i == 0)
        torch.testing.assert_close(losses[i], loss)
        own = torch.autograd.grad(loss, [p for t in q.transforms for p in t.parameters()])
        for found, expected in zip(gradients, own, strict=True):
            torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-4)


def test_mean_scores_are_the_means_of_scores() -> None:
    log_weights = torch.randn(20, 4)
    log_weights[:5, 1], log_weights[2:9, 2], log_weights[:, 3] = -torch.inf, torch.nan, torch.nan
    expected = torch.stack([bound_scores(column).mean() for column in log_weights.unbind(1)])
    torch.testing.assert_close(mean_scores(log_weights), expected)


@pytest.mark.slow
def test_coordinates_that_depend_on_the_data_are_noticed() -> None:
    """Only the data set that they were recorded with may be fitted with others."""
    args = (torch.zeros(3),) * 2
    few = QUICK | {"num_simulations": 2}
    result = pf.calibrate(walk, pf.AutoPlanarFlow, args, **few)
    assert "one by one" in result.fits
    alone = pf.calibrate(walk, partial(pf.AutoPlanarFlow, centring=None), args, **few)
    assert alone.fits == "together"


@pytest.mark.slow
def test_guides_of_several_forms_are_fitted_one_by_one() -> None:
    few = QUICK | {"num_simulations": 2}

    def one(dim: int) -> list[pf.Planar]:
        return [pf.Planar(dim)]

    def leaky(slope: float) -> Callable:
        return lambda dim: [pf.Planar(dim, nonlinearity="leaky_relu", negative_slope=slope)]

    for usual, other in (
        ({}, {"centring": None}),
        ({"base_df": 30.0}, {"base_df": 31.0}),
        ({"transforms": leaky(0.1)}, {"transforms": leaky(0.2)}),
    ):
        options = iter([usual, other] * 2)  # once for the fits side by side, once one by one

        def make(model: Callable) -> pf.AutoFlow:
            given = {"transforms": one} | next(options)  # noqa: B023
            return pf.AutoFlow(model, **given)

        result = pf.calibrate(normal, make, (torch.zeros(ROWS, 2),), **few)
        assert result.fits == "one by one: make_guide returns guides of several forms"

    def tied(dim: int) -> list[pf.Planar]:
        return [pf.Planar(dim)] * 2

    make = partial(pf.AutoFlow, transforms=tied)
    result = pf.calibrate(normal, make, (torch.zeros(ROWS, 2),), **few)
    assert result.fits == "one by one: make_guide returns guides with layers that are used twice"
