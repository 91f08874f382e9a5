"""AutoPlanarFlow in Pyro's own SVI, and fit_guide."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from torch import Tensor

import pyroflow as pf
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw
from pyroflow.targets import (
    TOY_LOG_EVIDENCE,
    eight_schools_centered,
    eight_schools_exact,
    eight_schools_noncentered,
    toy_model,
)


def svi_losses(guide: Callable, steps: int = 50) -> list[float]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True)
    svi = SVI(eight_schools_noncentered, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    svi.loss(eight_schools_noncentered, guide)  # sets the guide up
    pyro.set_rng_seed(1)
    return [svi.step() for _ in range(steps)]


@pytest.mark.parametrize(
    ("affine", "rival"), [("diagonal", AutoDiagonalNormal), ("full", AutoMultivariateNormal)]
)
def test_depth_zero_is_the_gaussian_guide_step_by_step(affine: str, rival: type) -> None:
    ours = svi_losses(pf.AutoPlanarFlow(eight_schools_noncentered, 0, affine=affine))
    theirs = svi_losses(rival(eight_schools_noncentered))
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert ours[-1] != ours[0]


def test_starts_as_the_gaussian_that_was_asked_for() -> None:
    start = {"mu": torch.tensor(3.0), "tau": torch.tensor(2.0), "theta_trans": torch.ones(8)}
    guide = pf.AutoPlanarFlow(
        eight_schools_noncentered, 8, init_loc_fn=init_to_value(values=start), init_scale=0.01
    )
    median = guide.median()
    for site, value in start.items():
        assert torch.allclose(median[site], value, atol=0.01)
    draws = guide.get_posterior().sample((20_000,))
    assert torch.allclose(draws.std(0), torch.full((10,), 0.01), rtol=0.05)


def test_svi_takes_the_planar_guide_below_a_gaussian() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x.square(), 0.3), obs=torch.tensor(1.0))
        pyro.sample("z", dist.Normal(x, 0.5), obs=torch.tensor(0.8))

    guide = pf.AutoPlanarFlow(model, num_layers=4)
    svi = SVI(
        model,
        guide,
        pyro.optim.Adam({"lr": 0.02}),
        Trace_ELBO(num_particles=16, vectorize_particles=True),
    )
    losses = [svi.step() for _ in range(400)]
    grid = torch.linspace(-4, 4, 4001)
    log_joint = (
        dist.Normal(0.0, 1.0).log_prob(grid)
        + dist.Normal(grid.square(), 0.3).log_prob(torch.tensor(1.0))
        + dist.Normal(grid, 0.5).log_prob(torch.tensor(0.8))
    )
    log_evidence = (log_joint.logsumexp(0) + math.log(8 / 4000)).item()
    tail = sum(losses[-100:]) / 100
    assert -log_evidence - 0.01 < tail < -log_evidence + 0.1


def test_quantiles_of_a_known_posterior() -> None:
    def model() -> None:
        pyro.sample("s", dist.LogNormal(torch.tensor([0.0, 1.0]), 0.5).to_event(1))

    guide = pf.AutoPlanarFlow(model, 0, affine="diagonal")
    pf.fit_guide(model, guide, steps=600, seed=0, progress=False)
    found = guide.quantiles([0.1, 0.5, 0.9])["s"]
    levels = torch.tensor([0.1, 0.5, 0.9])[:, None]
    expected = dist.LogNormal(torch.tensor([0.0, 1.0]), 0.5).icdf(levels)
    assert torch.allclose(found, expected, rtol=0.05)
    assert torch.equal(found, guide.quantiles([0.1, 0.5, 0.9])["s"])


def test_second_guide_is_trained_although_the_first_ones_parameters_are_stored() -> None:
    def model(loc: float) -> None:
        pyro.sample("z", dist.Normal(loc, 1.0))

    for loc in (3.0, -3.0):
        guide = pf.AutoPlanarFlow(model, 2)
        options = {"steps": 300, "lr": 0.1, "num_particles": 16, "seed": 0, "progress": False}
        fit = pf.fit_guide(model, guide, (loc,), **options)
        assert guide.median()["z"].item() == pytest.approx(loc, abs=0.1)
        assert fit.best_loss == pytest.approx(0.0, abs=0.02)


def test_path_derivative_leaves_losses_and_quiets_gradients() -> None:
    """At the posterior the path derivative of every draw is zero, the plain one is not."""

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.tensor([1.0, -1.0]), 2.0).to_event(1))

    guide = pf.AutoPlanarFlow(model, 3, affine="diagonal", init_scale=2.0)
    guide()
    with torch.no_grad():
        guide.affine.offset.copy_(torch.tensor([1.0, -1.0]))
    losses, norms = {}, {}
    for along in (False, True):
        guide.path_derivative = along
        pyro.set_rng_seed(3)
        loss = Trace_ELBO().differentiable_loss(model, guide)
        gradients = torch.autograd.grad(loss, list(guide.parameters()))
        losses[along], norms[along] = loss.item(), max(g.abs().max().item() for g in gradients)
    assert losses[True] == pytest.approx(losses[False], abs=1e-12)
    assert norms[True] < 1e-10 < 1e-2 < norms[False]


def test_fit_guide_finds_a_correlated_gaussian_exactly() -> None:
    precision = torch.tensor([[2.0, 1.9], [1.9, 2.0]])
    target = dist.MultivariateNormal(torch.tensor([5.0, -3.0]), precision_matrix=precision)

    def model() -> Tensor:
        return pyro.sample("z", target)

    guide = pf.AutoPlanarFlow(model, num_layers=2)
    fit = pf.fit_guide(model, guide, steps=800, num_particles=32, seed=0, progress=False)
    assert abs(fit.best_loss) < 0.01
    assert guide.path_derivative is False


@pytest.mark.slow
def test_fit_guide_is_reproducible_and_leaves_the_generator_alone() -> None:
    losses = []
    for global_seed in (1, 2):
        pyro.clear_param_store()
        pyro.set_rng_seed(global_seed)
        state = torch.get_rng_state()
        guide = pf.AutoPlanarFlow(toy_model, 2)
        options = {"steps": 20, "num_particles": 8, "progress": False}
        losses.append(pf.fit_guide(toy_model, guide, seed=5, **options).losses)
        assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1]


def test_any_other_guide_and_parameters_of_the_model() -> None:
    def model(data: Tensor) -> None:
        shift = pyro.param("shift", torch.tensor(0.0))
        z = pyro.sample("z", dist.Normal(0.0, 0.1))
        with pyro.plate("data", len(data)):
            pyro.sample("obs", dist.Normal(z + shift, 1.0), obs=data)

    data = torch.full((10,), 4.0)
    pf.fit_guide(model, AutoNormal(model), (data,), steps=400, lr=0.05, seed=0, progress=False)
    assert pyro.param("shift").item() == pytest.approx(4.0, abs=0.1)  # where the evidence peaks


@pytest.mark.slow
def test_subsampled_plate_is_vectorized() -> None:
    def model(data: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(data), subsample_size=20) as index:
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=data[index])

    data = torch.randn(200) + 2
    guide = pf.AutoPlanarFlow(model, 2)
    problem = BoundModel(model, guide, (data,))
    assert problem.max_plate_nesting == 1
    assert problem.subsampled
    pf.fit_guide(model, guide, (data,), steps=600, seed=0, progress=False)
    assert guide.median()["loc"].item() == pytest.approx(data.mean().item(), abs=0.07)


@pytest.mark.slow
def test_model_that_reads_its_latents_from_the_left_runs_one_by_one() -> None:
    """Vectorised, z[0] would be the first particle, and no error would say so."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("obs", dist.Normal(z[0], 0.5).to_event(z[0].dim()), obs=torch.tensor(1.0))

    guide = pf.AutoPlanarFlow(model, 1)
    assert BoundModel(model, guide).max_plate_nesting is None
    pf.fit_guide(model, guide, steps=300, lr=0.05, num_particles=2, seed=0, progress=False)
    assert guide.median()["z"][0].item() == pytest.approx(0.8, abs=0.25)


def test_keyword_arguments_and_float64_and_predictive() -> None:
    def model(x: Tensor, *, y: Tensor | None = None) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(slope * x, scale), obs=y)

    x = torch.linspace(-1, 1, 100)
    y = 0.7 * x + 0.2 * torch.randn(100)
    guide = pf.AutoPlanarFlow(model, 4)
    pf.fit_guide(model, guide, (x,), {"y": y}, steps=400, seed=0, progress=False)
    assert guide.median()["slope"].item() == pytest.approx(0.7, abs=0.1)
    assert guide.median()["slope"].dtype == torch.float64
    drawn = Predictive(model, guide=guide, num_samples=50, parallel=True)(x)["y"]
    assert drawn.shape == (50, 100)


@pytest.mark.slow
def test_checkpoint_resumes(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    from pyroflow.inference.trainer import Trainer

    def fit(**options: object) -> pf.Fit:
        pyro.clear_param_store()
        options = {"steps": 40, "num_particles": 8, "seed": 0, "progress": False} | options
        return pf.fit_guide(toy_model, pf.AutoPlanarFlow(toy_model, 2), **options)

    def show(self: Trainer, bar: object) -> None:
        if self.label == "fit_guide" and self.state.step == 20:
            raise SystemExit

    whole, path = fit(), tmp_path / "guide.pt"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_show", show)
        with pytest.raises(SystemExit):
            fit(checkpoint=path)
    assert fit(checkpoint=path).losses == pytest.approx(whole.losses, rel=1e-9)


def elbo_of(model: Callable, guide: Callable) -> float:
    with torch.no_grad():
        return draw(BoundModel(model, guide), 100_000).log_weights.mean().item()


@pytest.mark.slow
@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_toy_posterior_with_the_defaults(seed: int) -> None:
    guide = pf.AutoPlanarFlow(toy_model, num_layers=32)
    fit = pf.fit_guide(toy_model, guide, seed=seed, progress=False)
    kl = TOY_LOG_EVIDENCE - elbo_of(toy_model, guide)
    print(f"toy, seed {seed}: KL = {kl:.4f}, {fit.seconds:.0f} s")
    assert kl <= 0.03


@pytest.mark.slow
@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("model", [eight_schools_noncentered, eight_schools_centered])
def test_eight_schools_against_the_gaussian_guides(model: Callable) -> None:
    elbos = {}
    for guide in (pf.AutoPlanarFlow(model, 32), AutoNormal(model), AutoMultivariateNormal(model)):
        pyro.clear_param_store()
        pf.fit_guide(model, guide, seed=0, progress=False)
        elbos[type(guide).__name__] = elbo_of(model, guide)
        if model is eight_schools_noncentered and isinstance(guide, pf.AutoPlanarFlow):
            _check_marginals(guide)
    print(elbos)
    assert max(elbos, key=elbos.get) == "AutoPlanarFlow"


def _check_marginals(guide: pf.AutoPlanarFlow) -> None:
    exact, _ = eight_schools_exact(100_000)
    predictive = Predictive(
        eight_schools_noncentered,
        guide=guide,
        num_samples=100_000,
        return_sites=tuple(exact),
        parallel=True,
    )
    for site, draws in predictive().items():
        reference = exact[site]
        draws = draws.reshape(reference.shape)
        error = (draws.mean(0) - reference.mean(0)) / reference.std(0)
        ratio = draws.std(0) / reference.std(0)
        print(site, error.abs().max().item(), (ratio - 1).abs().max().item())
        assert error.abs().max() <= 0.1
        assert (ratio - 1).abs().max() <= 0.1
