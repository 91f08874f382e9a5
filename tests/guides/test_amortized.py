"""AmortizedPlanarGuide against exact posteriors of models with latents in a plate."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from amortized_cases import (
    BY_ROW,
    LOSS,
    SD,
    SHRINK,
    Y,
    effects_model,
    exact_effects,
    exact_guide,
    rows_model,
)
from cases import slow
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO

import pyroflow as pf
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("context", ["y", None])
def test_bound_is_the_evidence_at_the_posterior(context: str | None, elbo: type) -> None:
    """In full exactly, for each draw; in parts on average, as each part has its own evidence."""
    guide = exact_guide(context)
    assert elbo().loss(rows_model, guide, Y, 20) == pytest.approx(LOSS, abs=1e-9)
    for index in (torch.tensor([3, 17, 0, 9, 4]), torch.tensor([19])):
        loss = elbo().loss(rows_model, guide, Y, None, index)
        assert loss == pytest.approx(20 * BY_ROW[index].mean().item(), abs=1e-9)


@pytest.mark.parametrize("context", ["y", None])
def test_model_keeps_the_rows_it_picks_itself(context: str | None) -> None:
    """Pyro's guides draw rows of their own here and override the model's (pyro #3468)."""
    guide, index = exact_guide(context), torch.tensor([11, 2, 7])
    trace = pyro.poutine.trace(guide).get_trace(Y, None, index)
    assert torch.equal(trace.nodes["rows"]["value"], index)
    found = Predictive(guide, num_samples=4000, parallel=True)(Y, None, index)["z"]
    assert torch.allclose(found.mean(0).flatten(), SHRINK * Y[index], atol=0.05)


def test_minibatch_as_context_stands_for_the_rows_drawn() -> None:
    guide, index = exact_guide("y"), torch.tensor([11, 2, 7])
    whole = Trace_ELBO().loss(rows_model, guide, Y, None, index)
    part = Trace_ELBO().loss(rows_model, guide, Y[index], None, index)
    assert part == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize(("context", "lr", "init_scale"), [("y", 0.05, 0.1), slow(None, 0.2, 1.0)])
def test_svi_on_minibatches_reaches_the_posterior_of_all_rows(
    context: str | None, lr: float, init_scale: float
) -> None:
    guide = pf.AmortizedPlanarGuide(
        rows_model, "rows", context, num_layers=2, init_scale=init_scale
    ).setup(Y)
    steps, elbo = 400, Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    optimizer = torch.optim.Adam(guide.parameters(), lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, 1.2 * (1 - s / steps))
    )
    for _ in range(steps):
        optimizer.zero_grad()
        elbo.differentiable_loss(rows_model, guide, Y).backward()
        optimizer.step()
        schedule.step()
    full = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1)
    kl = (full.loss(rows_model, guide, Y, 20) - LOSS) / 20
    assert -0.005 < kl < 0.05
    assert torch.allclose(guide.median(Y)["z"], SHRINK * Y, atol=0.3)


def test_hierarchy_has_its_exact_evidence_in_each_draw_and_in_parts_on_average() -> None:
    y = 1.5 + torch.randn(12)
    guide, log_evidence = exact_effects(y)
    for _ in range(3):
        assert Trace_ELBO().loss(effects_model, guide, y) == pytest.approx(-log_evidence, abs=1e-9)
    elbo = Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1)
    losses = torch.tensor([elbo.loss(effects_model, guide, y, 4) for _ in range(100)])
    error = (losses.std() / 10).item()
    assert losses.mean().item() == pytest.approx(-log_evidence, abs=4 * error)
    assert error < 1.0


def test_vectorized_particles_follow_their_own_globals() -> None:
    y = 1.5 + torch.randn(12)
    guide, log_evidence = exact_effects(y)
    problem = BoundModel(effects_model, guide, (y,))
    assert problem.max_plate_nesting == 1
    weights = draw(problem, 50).log_weights
    assert torch.allclose(weights, torch.full((50,), log_evidence), atol=1e-9)


def test_predictive_draws_the_joint_posterior_of_the_training_rows() -> None:
    y = 1.5 + torch.randn(12)
    guide, _ = exact_effects(y)
    draws = Predictive(effects_model, guide=guide, num_samples=20_000, parallel=True)(y)
    mu, z = draws["mu"].reshape(-1, 1), draws["z"]
    assert z.shape == (20_000, 12)
    var = 1 / (0.25 + 12 / 1.25)
    covariance = ((z - z.mean(0)) * (mu - mu.mean())).mean(0)
    assert torch.allclose(covariance, torch.full((12,), var / 5), atol=0.004)
    assert torch.allclose(z.var(0), torch.full((12,), 0.2 + var / 25), rtol=0.05)


def test_new_rows_are_predicted_without_a_fit() -> None:
    y = 1.5 + torch.randn(12)
    guide, _ = exact_effects(y)
    new = torch.tensor([-3.0, 0.0, 8.0])
    draws = Predictive(effects_model, guide=guide, num_samples=20_000, parallel=True)(new)
    loc = guide.global_guide.affine.offset.item()
    assert torch.allclose(draws["z"].mean(0), (4 * new + loc) / 5, atol=0.02)
    assert torch.allclose(guide.median(new)["z"], (4 * new + loc) / 5, atol=0.02)


def test_median_and_quantiles_of_all_rows() -> None:
    for context in ("y", None):
        found = exact_guide(context).quantiles([0.1, 0.5, 0.9], Y)["z"]
        expected = dist.Normal(SHRINK * Y, SD).icdf(torch.tensor([0.1, 0.5, 0.9])[:, None])
        assert found.shape == (3, 20)
        assert torch.allclose(found, expected, atol=0.03)
    y = 1.5 + torch.randn(12)
    guide, _ = exact_effects(y)
    var = 1 / (0.25 + 12 / 1.25)
    found = guide.quantiles([0.5, 0.9], y)
    loc = guide.global_guide.affine.offset
    assert torch.allclose(found["mu"][1], loc + var**0.5 * 1.2816, atol=0.02)
    sd = (0.2 + var / 25) ** 0.5
    assert torch.allclose(found["z"][1] - found["z"][0], torch.tensor(sd * 1.2816), atol=0.03)
