"""fit_guide on guides of the AutoFlow family: initialized, resumed, grown, and what it refuses."""

import math
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from pyro.infer.autoguide import init_to_value
from torch import Tensor

import pyroflow as pf
from pyroflow.inference import guide_fit, objectives
from pyroflow.inference.objectives import LogJointBound, nothing_left
from pyroflow.inference.trainer import Trainer
from pyroflow.shown import missing
from pyroflow.targets import (
    TOY_LOG_EVIDENCE,
    eight_schools_centered,
    eight_schools_noncentered,
    toy_model,
)

QUICK = {"num_particles": 8, "seed": 0, "progress": False}


def banana() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x.square(), 0.5), obs=torch.tensor(1.5))
    pyro.sample("w", dist.Normal(x.square() - 1, 0.3))


def state(guide: pf.AutoFlow) -> list[Tensor]:
    return [t.detach().clone() for t in (*guide.parameters(), *guide.buffers())]


def test_scales_and_correlations_of_any_size_are_met_by_the_start_alone() -> None:
    """The exact log evidence of a Gaussian: every weight equals it."""
    scale = torch.tensor([1e-3, 1.0, 1e4])
    correlation = torch.tensor([[1.0, 0.9999, 0.0], [0.9999, 1.0, 0.0], [0.0, 0.0, 1.0]])
    target = dist.MultivariateNormal(
        torch.tensor([5.0, -40.0, 6e4]), scale[:, None] * correlation * scale
    )

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1).mask(False))
        pyro.factor("target", target.log_prob(z) + 3.0)

    guide = pf.AutoPlanarFlow(model, 2)
    fit = pf.fit_guide(model, guide, steps=2, **QUICK)
    assert fit.best_loss == pytest.approx(-3.0, abs=2e-3)
    covariance = torch.cov(guide.get_posterior().sample((100_000,)).T)
    found = covariance / (scale[:, None] * scale)
    assert torch.allclose(found, correlation, atol=0.03)


def test_ends_no_worse_than_the_gaussian_it_starts_from() -> None:
    placed = []
    initialize = guide_fit.initialize

    def watched(guide: pf.AutoFlow, gaussian: object) -> None:
        initialize(guide, gaussian)
        placed.append(gaussian.bound)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guide_fit, "initialize", watched)
        guide = pf.AutoPlanarFlow(eight_schools_noncentered, 4)
        fit = pf.fit_guide(eight_schools_noncentered, guide, steps=1, lr=10.0, **QUICK)
    assert fit.best_loss <= fit.scores[0][1]
    assert fit.scores[0][1] == pytest.approx(-placed[0], abs=0.1)


def two_modes(share: float) -> Callable:
    """Two Gaussians in five dimensions, at a distance of 13 standard deviations."""
    centres = torch.tensor([[-3.0], [3.0]]).expand(2, 5)
    parts = dist.Normal(centres, 1.0).to_event(1)
    weights = torch.tensor([share, 1 - share])

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(5), 3.0).to_event(1).mask(False))
        pyro.factor("density", (parts.log_prob(z.unsqueeze(-2)) + weights.log()).logsumexp(-1))

    return model


def test_nearly_all_of_the_mass_is_a_plain_number() -> None:
    assert missing([], 0.9999) == "its draws miss a region with about 100 % of the mass or more"
    assert missing([], 0.0123) == "its draws miss a region with about 1.2 % of the mass or more"


@pytest.mark.parametrize("share", [slow(0.6), 0.9])
def test_modes_that_the_ascents_led_to_are_told_as_by_the_report(share: float) -> None:
    model = two_modes(share)
    guide = pf.AutoPlanarFlow(model, 2, init_loc_fn=init_to_value(values={"z": torch.zeros(5)}))
    with pytest.warns(UserWarning, match="at one mode: its draws miss another mode with about "):
        fit = pf.fit_guide(model, guide, steps=5, **QUICK)
    (missed,) = fit.missed
    assert fit.missed_share == pytest.approx(1 - share, abs=0.005)
    torch.testing.assert_close(missed.mode.loc, torch.full((5,), 3.0), atol=0.1, rtol=0)
    report = pf.diagnose(model, guide, num_samples=1000)
    assert str(fit).endswith(report.verdict.removeprefix("do not trust: "))


def correlated() -> None:
    factor = torch.tensor([[1.0, 0, 0], [30.0, 0.5, 0], [-2.0, 4.0, 0.1]])
    pyro.sample("z", dist.MultivariateNormal(torch.ones(3), scale_tril=factor))


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(0.0, (v / 2).exp()).expand([9]).to_event(1))


def logistic() -> None:
    x = torch.linspace(-2, 2, 20)
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    logits = b[..., :1] + b[..., 1:] * x
    pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=(x.sin() > 0.3).float())


@pytest.mark.parametrize("centring", ["auto", None])
@pytest.mark.parametrize(
    "model",
    [*map(slow, [eight_schools_centered, eight_schools_noncentered, funnel]), correlated, logistic],
)
def test_no_mode_is_missed_where_there_is_one(model: Callable, centring: str | None) -> None:
    fit = pf.fit_guide(model, pf.AutoPlanarFlow(model, 2, centring=centring), steps=50, **QUICK)
    assert (fit.missed, fit.missed_share) == ([], 0.0)
    assert str(fit) == repr(fit)


def test_a_fitted_guide_goes_on_from_where_it_is() -> None:
    guide = pf.AutoPlanarFlow(banana, 4, centring=None)
    first = pf.fit_guide(banana, guide, steps=100, warm_start=False, **QUICK)
    second = pf.fit_guide(banana, guide, steps=20, **QUICK)
    assert second.scores[0][1] == pytest.approx(first.best_loss, abs=0.05)


@pytest.mark.parametrize("warm_start", [slow(True), False])
@pytest.mark.parametrize("killed", [5, slow(25)])
def test_killed_fit_resumes_bit_by_bit(tmp_path: Path, warm_start: bool, killed: int) -> None:
    def fit(**options: object) -> tuple[pf.Fit, list[Tensor]]:
        pyro.clear_param_store()
        guide = pf.AutoSylvesterFlow(banana, num_layers=2)
        options |= {"steps": 40, "warm_start": warm_start}
        return pf.fit_guide(banana, guide, **options, **QUICK), state(guide)

    def show(self: Trainer, bar: object) -> None:
        if self.label == "fit_guide" and self.state.step == killed:
            raise SystemExit

    whole, expected = fit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_show", show)
        with pytest.raises(SystemExit):
            fit(checkpoint=tmp_path / "fit.pt")
    resumed, found = fit(checkpoint=tmp_path / "fit.pt")
    assert resumed.losses == whole.losses
    assert resumed.missed_share == whole.missed_share
    assert whole.missed_share == (pytest.approx(0.5, abs=0.1) if warm_start else 0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("layers", [4, slow(8)])
def test_growing_fit_resumes_bit_by_bit(tmp_path: Path, layers: int) -> None:
    def fit(**options: object) -> tuple[pf.Fit, pf.AutoFlow]:
        pyro.clear_param_store()
        guide = pf.AutoPlanarFlow(banana, num_layers="auto", centring=None)
        return pf.fit_guide(banana, guide, steps=30, **options, **QUICK), guide

    def show(self: Trainer, bar: object) -> None:
        if self.checkpoint.settings["num_layers"] == layers and self.state.step == 20:
            raise SystemExit

    whole, expected = fit()
    assert expected.num_layers >= 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_show", show)
        with pytest.raises(SystemExit):
            fit(checkpoint=tmp_path / "fit.pt")
    resumed, found = fit(checkpoint=tmp_path / "fit.pt")
    assert resumed.losses == whole.losses
    assert found.num_layers == expected.num_layers
    assert all(torch.equal(a, b) for a, b in zip(state(found), state(expected), strict=True))


def test_grows_only_while_the_bound_gains() -> None:
    def gaussian() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = pf.AutoPlanarFlow(gaussian, num_layers="auto")
    pf.fit_guide(gaussian, guide, steps=20, early_stop=False, **QUICK)
    assert guide.num_layers == 8  # the second depth brought nothing


def test_draws_without_a_finite_weight_are_left_out_and_counted() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("hole", torch.where(z[..., 0] > 1.5, torch.nan, 0.0))

    guide = pf.AutoPlanarFlow(model, 2)
    fit = pf.fit_guide(model, guide, steps=50, num_particles=32, seed=0, progress=False)
    assert fit.skipped_particles > 0
    assert fit.skipped == 0
    assert math.isfinite(fit.best_loss)


def test_fit_goes_back_to_its_best_state_where_all_is_lost() -> None:
    guide = pf.AutoPlanarFlow(banana, 2, centring=None)
    guide.setup()
    calls, plain = [], objectives.bound_loss

    def broken(*args: object) -> Tensor:
        calls.append(len(calls))
        return plain(*args) * (math.nan if 10 <= len(calls) < 31 else 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "bound_loss", broken)
        fit = pf.fit_guide(banana, guide, steps=60, **QUICK)
    assert (fit.skipped, fit.rolled_back) == (21, 1)
    assert all(p.isfinite().all() for p in guide.parameters())


@pytest.mark.parametrize("objective", [slow("iwae"), "dreg"])
def test_importance_weighted_objectives_reach_the_posterior(objective: str) -> None:
    guide = pf.AutoPlanarFlow(banana, 8, centring=None)
    options = {"objective": objective, "group_size": 4, "num_particles": 32}
    fit = pf.fit_guide(banana, guide, steps=400, seed=0, progress=False, **options)
    report = pf.diagnose(banana, guide, num_samples=20_000)
    assert abs(report.log_evidence + fit.best_loss) < 0.05
    assert fit.skipped == 0


@pytest.mark.slow
def test_paper_like_and_adaptive_annealing_end_at_the_posterior() -> None:
    seen = []

    def rising(step: int) -> float:
        seen.append(min(1.0, 0.01 + step / 400))
        return seen[-1]

    adaptive = pf.AdaptiveAnnealing(max_steps=400)
    for annealing in (rising, adaptive):
        guide = pf.AutoPlanarFlow(toy_model, 8)
        options = {"annealing": annealing, "warm_start": False, "num_particles": 32}
        fit = pf.fit_guide(toy_model, guide, steps=1000, seed=0, progress=False, **options)
        assert 0 < TOY_LOG_EVIDENCE + fit.best_loss < 0.6  # the best Gaussian is at 0.91
    assert [0.01, 0.0125, 0.015] in [seen[i : i + 3] for i in range(len(seen))]
    assert adaptive.beta == 1.0


def test_student_base_is_trained_along_paths() -> None:
    guide = pf.AutoPlanarFlow(banana, 4, base_df=10.0, centring=None)
    fit = pf.fit_guide(banana, guide, steps=100, warm_start=False, **QUICK)
    assert fit.scores[-1][1] < fit.scores[0][1]


@pytest.mark.slow
def test_funnel_with_the_defaults() -> None:
    guide = pf.AutoSylvesterFlow(eight_schools_centered)
    pf.fit_guide(eight_schools_centered, guide, seed=0, progress=False)
    report = pf.diagnose(eight_schools_centered, guide)
    assert report.elbo > -31.311 - 0.45


@pytest.mark.slow
def test_importance_weighted_states_are_chosen_by_their_own_bound() -> None:
    """A mean-field guide of a correlated Gaussian is wider where the objective is IWAE."""
    covariance = torch.tensor([[1.0, 0.95], [0.95, 1.0]])

    def model() -> None:
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), covariance))

    sds = {}
    for objective in ("elbo", "iwae", "dreg"):
        guide = pf.AutoPlanarFlow(model, 0, affine="diagonal")
        options = {"objective": objective, "group_size": 32, "num_particles": 128, "seed": 0}
        pf.fit_guide(model, guide, steps=200, progress=False, **options)
        sds[objective] = guide.get_posterior().sample((10_000,)).std(0).mean().item()
    assert sds["elbo"] == pytest.approx(math.sqrt(1 - 0.95**2), rel=0.05)
    assert sds["iwae"] > 1.3 * sds["elbo"]
    assert sds["dreg"] == pytest.approx(sds["iwae"], rel=0.1)


def test_used_annealing_and_models_without_latents_are_refused() -> None:
    annealing = pf.AdaptiveAnnealing(max_steps=10)
    options = {"steps": 12, "warm_start": False, "annealing": annealing, **QUICK}
    pf.fit_guide(banana, pf.AutoPlanarFlow(banana, 1), **options)
    with pytest.raises(ValueError, match="annealing is an AdaptiveAnnealing that another fit"):
        pf.fit_guide(banana, pf.AutoPlanarFlow(banana, 1), **options)

    def observed() -> None:
        pyro.sample("o", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(ValueError, match="no latent sites"):
        pf.fit_guide(observed, lambda: None, steps=5, **QUICK)


@pytest.mark.slow
def test_cut_off_guide_object_goes_on_bit_by_bit(tmp_path: Path) -> None:
    plain, count = LogJointBound.loss, []

    def cut(self: LogJointBound, *args: object, **kwargs: object) -> Tensor:
        count.append(0)
        loss = plain(self, *args, **kwargs)  # the draws are made, and the step is lost
        if len(count) == 12:
            raise SystemExit
        return loss

    options = {"steps": 30, **QUICK}
    whole = pf.AutoPlanarFlow(banana, 2)
    expected = pf.fit_guide(banana, whole, **options)
    pyro.clear_param_store()
    guide, path = pf.AutoPlanarFlow(banana, 2), tmp_path / "fit.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LogJointBound, "loss", cut)
        with pytest.raises(SystemExit):
            pf.fit_guide(banana, guide, checkpoint=path, **options)
    found = pf.fit_guide(banana, guide, checkpoint=path, **options)
    assert found.losses == expected.losses
    assert all(torch.equal(a, b) for a, b in zip(state(guide), state(whole), strict=True))


def test_a_fit_ends_where_nothing_is_left_to_gain() -> None:
    factor = torch.eye(6) + 0.7 * torch.ones(6, 6).tril(-1)

    def model() -> None:
        pyro.sample("x", dist.MultivariateNormal(torch.arange(6.0), scale_tril=factor))

    guide = pf.AutoSylvesterFlow(model, num_layers=2)
    fit = pf.fit_guide(model, guide, seed=0, progress=False)
    assert fit.steps == 0
    assert fit.stopped.startswith("nothing is left to gain")
    assert fit.best_loss == pytest.approx(0, abs=1e-3)  # the log evidence is 0
    guide = pf.AutoSylvesterFlow(model, num_layers=2)
    assert pf.fit_guide(model, guide, steps=5, early_stop=False, progress=False).steps == 5


@pytest.mark.parametrize(
    ("log_weights", "ends"),
    [
        (0.01 * torch.linspace(-2, 2, 500), True),  # KL 7e-5
        (0.2 * torch.linspace(-2, 2, 500), False),  # KL 0.03
        (torch.cat([torch.zeros(2000), torch.tensor([3.0])]), False),  # one heavy draw
        (torch.cat([torch.zeros(500), torch.tensor([-torch.inf])]), False),
    ],
    ids=["even", "uneven", "heavy", "outside"],
)
def test_nothing_is_left_where_all_weights_are_equal(log_weights: Tensor, ends: bool) -> None:
    assert bool(nothing_left(-log_weights)) == ends
