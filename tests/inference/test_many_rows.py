"""Regressions of many rows and few coefficients: few draws, near exact answers, bounded memory."""

import math
import sys
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyroflow as pf
from pyroflow.inference.census import census
from pyroflow.inference.objectives import LogJointBound
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw
from pyroflow.model.program import CHEAP, NUMBERS

ROWS, COEFFICIENTS = 10_000, 20


def normal(eta: Tensor) -> dist.Distribution:
    return dist.Normal(eta, 1.0)


def logistic(eta: Tensor) -> dist.Distribution:
    return dist.Bernoulli(logits=eta)


def poisson(eta: Tensor) -> dist.Distribution:
    return dist.Poisson((eta / 2).exp())


def model(family: Callable[[Tensor], dist.Distribution], x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", family(x @ w), obs=y)


def data(family: Callable[[Tensor], dist.Distribution], rows: int) -> tuple[Tensor, Tensor]:
    pyro.set_rng_seed(0)
    x, w = torch.randn(rows, COEFFICIENTS), torch.randn(COEFFICIENTS) / 2
    return x, family(x @ w).sample()


def log_evidence(family: Callable, x: Tensor, y: Tensor) -> float:
    """By draws around the mode, which are even where the likelihood is normal."""
    w = torch.zeros(COEFFICIENTS)
    for _ in range(20):
        eta = (x @ w).requires_grad_()
        value = family(eta).log_prob(y).sum()
        (slope,) = torch.autograd.grad(value, eta, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), eta)
        precision = torch.eye(COEFFICIENTS) - x.mT @ (x * curvature.unsqueeze(-1))
        w = w + torch.linalg.solve(precision, x.mT @ slope.detach() - w)
    q = dist.MultivariateNormal(w, precision_matrix=precision)
    draws = q.sample((1000,))
    log_p = dist.Normal(0.0, 1.0).log_prob(draws).sum(-1) + family(draws @ x.mT).log_prob(y).sum(-1)
    return float((log_p - q.log_prob(draws)).logsumexp(0)) - math.log(len(draws))


def exact(x: Tensor, y: Tensor) -> float:
    """Of the normal likelihood."""
    precision = torch.eye(COEFFICIENTS) + x.mT @ x
    w = torch.linalg.solve(precision, x.mT @ y)
    size = (y @ y - y @ (x @ w)) + torch.logdet(precision) + len(y) * math.log(2 * math.pi)
    return float(-size / 2)


@pytest.mark.slow
@pytest.mark.parametrize("family", [logistic, normal, poisson])
def test_a_fit_ends_with_the_best_gaussian_where_that_is_the_posterior(family: Callable) -> None:
    args = (family, *data(family, ROWS))
    guide = pf.AutoSylvesterFlow(model, num_layers=2)
    fit = pf.fit_guide(model, guide, args, seed=0, progress=False)
    assert fit.steps == 0
    report = pf.diagnose(model, guide, args)
    assert report.level == "good", report.verdict
    evidence = log_evidence(*args)
    if family is normal:
        assert evidence == pytest.approx(exact(*args[1:]), abs=1e-6)
    assert abs(evidence - report.log_evidence) < 0.01
    assert abs(evidence - report.elbo) < 0.01
    assert report.num_samples == 10_000 * CHEAP // ROWS
    assert "5,000 a set and not 10,000" in str(report)


def test_draws_are_fewer_where_each_is_dear_by_sizes_alone() -> None:
    found = {}
    for rows in (CHEAP, 10 * CHEAP):
        args = (normal, *data(normal, rows))
        problem = BoundModel(model, pf.AutoPlanarFlow(model, 2), args)
        bound = LogJointBound(problem, "elbo", 1, None, seed=0)
        found[rows] = bound.num_particles, bound.scored, bound.evaluations
        given = LogJointBound(problem, "elbo", 1, 40, seed=0)
        assert given.num_particles == 40
    assert found == {CHEAP: (128, 2048, 25), 10 * CHEAP: (16, 204, 8)}


def test_data_that_are_few_for_each_latent_are_not_dear() -> None:
    def groups(y: Tensor) -> None:
        with pyro.plate("groups", 300):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z[..., torch.arange(len(y)) % 300], 1.0), obs=y)

    problem = BoundModel(groups, pf.AutoPlanarFlow(groups, 2), (torch.randn(2 * CHEAP),))
    assert not problem.runs.dear


@pytest.mark.slow
def test_a_fit_is_reproducible_by_its_seed() -> None:
    args, losses = (logistic, *data(logistic, CHEAP + 1)), []
    for _ in range(2):
        guide = pf.AutoPlanarFlow(model, 2)
        options = {"steps": 8, "warm_start": False, "progress": False, "seed": 3}
        losses.append(pf.fit_guide(model, guide, args, **options).losses)
    assert losses[0] == losses[1]


class Largest(TorchDispatchMode):
    """The largest number of elements that a result has memory for."""

    size = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if type(found) is Tensor and not found.is_meta:  # others have no memory
            storage = found.untyped_storage().nbytes() // found.element_size()
            self.size = max(self.size, storage)
        return found


def test_memory_does_not_grow_with_draws_times_rows() -> None:
    args = (normal, *data(normal, 8 * CHEAP))
    guide = pf.AutoPlanarFlow(model, 2).setup(*args)
    problem = BoundModel.for_weights(model, guide, args)
    with Largest() as largest:
        draws = draw(problem, 400)
        LogJointBound(problem, "elbo", 1, None, seed=0).score()
    assert largest.size <= NUMBERS
    whole = model_log_joint(draws.sites["w"][:5], *args)
    assert torch.allclose(draws.log_p[:5], whole)


def model_log_joint(w: Tensor, family: Callable, x: Tensor, y: Tensor) -> Tensor:
    return dist.Normal(0.0, 1.0).log_prob(w).sum(-1) + family(w @ x.mT).log_prob(y).sum(-1)


def test_chains_run_beside_each_other() -> None:
    args = (logistic, *data(logistic, CHEAP + 1))
    guide = pf.AutoPlanarFlow(model, 2).setup(*args)
    options = {"num_samples": 20, "num_chains": 24, "warmup": 5, "progress": False}
    chains = pf.mcmc(model, guide, args, method="independence", **options)
    assert chains.log_p.shape == (480,)
    assert torch.allclose(chains.log_p[:5], model_log_joint(chains.draws["w"][:5], *args))


@pytest.mark.slow
def test_the_modes_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second check of ``posterior`` has other draws, and the modes of the first."""
    calls = []

    def counted(*args: object) -> list:
        calls.append(0)
        return census(*args)

    monkeypatch.setattr(sys.modules["pyroflow.diagnostics.diagnose"], "census", counted)
    for rows, times in ((ROWS, 1), (200, 2)):  # where draws are dear, and where not
        calls.clear()
        post = pf.posterior(model, (normal, *data(normal, rows)), seed=0, progress=False)
        assert post.level == "good"
        assert len(calls) == times
        assert post.report.census == "one mode"
