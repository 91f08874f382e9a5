"""Fits of AmortizedPlanarGuide by the log joint of the rows at hand, against exact posteriors."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from amortized_cases import LOSS, Y, exact_effects, exact_guide, rows_model
from torch import Tensor

import pyroflow as pf
from pyroflow.inference.minibatches import MinibatchBound
from pyroflow.model.at_hand import Subsampling
from pyroflow.model.bound import BoundModel


def effects(y: Tensor, batch: int | None = None) -> None:
    """Random effects: mu ~ N(0, 2²), z_n ~ N(mu, 1), y_n ~ N(z_n, 0.5²)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y), subsample_size=batch) as rows:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y[rows])


def two_sites(y: Tensor, batch: int | None = None) -> None:
    """Rows with a plain and a positive number, left of a full plate with a global one."""
    t = pyro.sample("t", dist.Gamma(3.0, 3.0))
    columns = pyro.plate("columns", 2, dim=-1)
    with columns:
        c = pyro.sample("c", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y), subsample_size=batch, dim=-2) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        with columns:
            pyro.sample("y", dist.Normal(z + c, s + t), obs=y[rows])


def scattered(model: Callable, args: tuple, context: str | None, **options: object) -> BoundModel:
    guide = pf.AmortizedPlanarGuide(model, "rows", context, num_layers=2, **options)
    problem = BoundModel(model, guide, args)
    with pf.seeds.seeded(1), torch.no_grad():
        for p in guide.parameters():
            p += 0.1 * torch.randn_like(p)
    return problem


@pytest.mark.parametrize("context", ["y", None])
@pytest.mark.parametrize("batch", [4, None])
@pytest.mark.parametrize(
    "options", [{}, {"affine": "diagonal", "condition_on_globals": False}], ids=["full", "plain"]
)
def test_draws_are_scored_as_by_pyro(context: str | None, batch: int | None, options: dict) -> None:
    """At the same globals and rows, the same density of each row; on average the same bound."""
    y = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    problem = scattered(two_sites, (y, batch), context, **options)
    guide = problem.guide
    q = guide.over_coordinates(y, batch)
    z = q.sample((5,))
    values, _ = guide.latents.constrain(z)
    above = guide.global_guide
    g = above.latents.unconstrain({n: values[n] for n in above.latents.sites}, z)[0]
    inner = guide.parts[0].rows.latents
    rows = {n: values[n].squeeze(-1) for n in inner.sites}
    local = torch.stack([rows["z"], rows["s"].log()], -1)
    features = None if guide.context is None else guide.context(y, z)
    shared = above.affine.inv(g) if guide._conditioned else None
    one = guide.local_flow(torch.arange(12), features, None if shared is None else shared[:, None])
    expected = above.flow().log_prob(g) + one.log_prob(local).sum(-1)
    torch.testing.assert_close(q.log_prob(z.clone()), expected)


@pytest.mark.parametrize("context", ["y", None])
def test_the_bound_at_the_posterior_is_the_evidence_and_its_gradient_vanishes(
    context: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In full; with half of the rows its mean is, and a draw's is that of its rows."""
    guide = exact_guide(context)
    for batch in (20, 10):
        problem = BoundModel(rows_model, guide, (Y, batch))
        bound = MinibatchBound(problem, "elbo", 1, 8, seed=0)
        guide.path_derivative, found = True, []
        for rows in bound.part.subsampling.cover():
            monkeypatch.setattr(Subsampling, "draw", lambda _, rows=rows: rows)
            found.append(bound.loss(1.0))
        assert torch.stack(found).mean().item() == pytest.approx(LOSS, abs=1e-8)
        moved = torch.autograd.grad(sum(found), list(guide.parameters()), allow_unused=True)
        dense = [g.to_dense() if g.is_sparse else g for g in moved if g is not None and g.numel()]
        assert max(g.abs().max() for g in dense) < 1e-7
        monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("context", "batch"),
    [("y", 50), ("y", None), (None, 50)],
)
def test_random_effects_are_found(context: str | None, batch: int | None) -> None:
    """Most of it by the start; the evidence is by linear algebra."""
    y = 1.5 + torch.randn(200, generator=torch.Generator().manual_seed(0))
    marginal = dist.MultivariateNormal(
        torch.zeros(200), 4.0 * torch.ones(200, 200) + 1.25 * torch.eye(200)
    )
    guide = pf.AmortizedPlanarGuide(effects, "rows", context, num_layers=2, global_layers=2)
    fit = pf.fit_guide(effects, guide, (y, batch), steps=60, seed=0, progress=False)
    assert -0.1 < fit.best_loss + marginal.log_prob(y).item() < 0.5
    z = guide.median(y, None)["z"]
    mean = (4 * y + guide.median(y, None)["mu"]) / 5
    assert (z - mean).abs().max() < 0.1
    if context is not None:
        assert guide.median(y[:3])["z"].shape == (3,)


def test_one_row_at_a_time_is_enough() -> None:
    guide = exact_guide("y")
    problem = BoundModel(rows_model, guide, (Y, 1))
    scores = MinibatchBound(problem, "elbo", 1, 8, seed=0).score()
    torch.testing.assert_close(scores, torch.full_like(scores, LOSS))
    fit = pf.fit_guide(rows_model, guide, (Y, 1), steps=2, seed=0, progress=False)
    assert fit.best_loss == pytest.approx(LOSS, abs=1e-6)


def test_a_minibatch_as_context_is_fitted_by_traces() -> None:
    guide = exact_guide("y")
    index = torch.tensor([11, 2, 7])
    with pytest.raises(ValueError, match="picks the rows|recorded with its rows|all 20 rows"):
        MinibatchBound(BoundModel(rows_model, guide, (Y[index], None, index)), "elbo", 1, 8, seed=0)
    args = Y[index], None, index
    with pytest.warns(UserWarning, match="the fit is by Pyro's traces"):
        fit = pf.fit_guide(rows_model, guide, args, steps=3, seed=0, progress=False)
    assert fit.steps == 3


def test_its_report_is_of_all_rows() -> None:
    y = 1.5 + torch.randn(30, generator=torch.Generator().manual_seed(0))
    guide, log_evidence = exact_effects(y)
    report = pf.diagnose(effects, guide, (y, 10), num_samples=1000)
    assert report.log_evidence == pytest.approx(log_evidence, abs=1e-6)
    assert report.level == "good"
