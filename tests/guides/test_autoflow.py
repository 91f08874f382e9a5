"""AutoFlow: a guide from any stack of transforms."""

import copy
import pickle
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from cases import slow
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import init_to_value
from torch import Tensor
from torch.distributions.transforms import AffineTransform, IndependentTransform, ReshapeTransform

import pyroflow as pf
from pyroflow.guides import AutoFlow, AutoPlanarFlow
from pyroflow.inference import guide_fit
from pyroflow.targets import eight_schools_noncentered, toy_model


def pair_model() -> None:
    """Two latents, of which one is positive."""
    pyro.sample("a", dist.Normal(1.0, 2.0))
    pyro.sample("b", dist.LogNormal(0.0, 0.5))


def mixed_layers(latent_dim: int) -> list:
    """A layer that runs backwards, a composition, and a module inside what is none."""
    coupling = T.affine_coupling(latent_dim, hidden_dims=[4])
    composed = T.ComposeTransform([coupling, AffineTransform(0.5, 2.0)])
    spline = IndependentTransform(T.spline(latent_dim), 1, cache_size=1)
    return [pf.Planar(latent_dim, 2).inv, composed, spline]


def svi_losses(guide: AutoFlow, steps: int = 20) -> list[float]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True)
    svi = SVI(eight_schools_noncentered, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    return [svi.step() for _ in range(steps)]


def scatter(guide: AutoFlow) -> AutoFlow:
    """The guide set up, and away from its start."""
    guide()
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return guide


def test_planar_stack_is_the_planar_guide_step_by_step() -> None:
    ours = svi_losses(AutoFlow(eight_schools_noncentered, lambda dim: [pf.Planar(dim, 4)]))
    planar = svi_losses(AutoPlanarFlow(eight_schools_noncentered, 4))
    assert ours == planar
    assert ours[-1] != ours[0]


@pytest.mark.parametrize("form", ["list", "tuple", "function", "composed", "one"])
def test_every_way_to_give_the_transforms_is_the_same_distribution(form: str) -> None:
    coupling, planar = T.affine_coupling(2, hidden_dims=[4]), pf.Planar(2, 2)
    with torch.no_grad():
        planar.u.normal_()
    stack = [coupling, planar.inv]
    given = {
        "list": stack,
        "tuple": tuple(stack),
        "function": lambda latent_dim: stack,
        "composed": [T.ComposeTransform(stack)],
        "one": T.ComposeTransform(stack),
    }[form]
    guide = AutoFlow(pair_model, given, init_scale=0.5)
    guide()
    z = torch.randn(7, 2)
    x = (z - guide.affine.offset) / 0.5
    y = planar(x)
    base = coupling.inv(y)
    expected = (
        dist.Normal(0.0, 1.0).log_prob(base).sum(-1)
        - coupling.log_abs_det_jacobian(base, y)
        + planar.log_abs_det_jacobian(x, y)
        - 2 * torch.tensor(0.5).log()
    )
    assert torch.allclose(guide.get_posterior().log_prob(z), expected)


def test_parameters_are_registered_under_names_of_their_own() -> None:
    guides = [AutoFlow(pair_model, mixed_layers) for _ in range(2)]
    for guide in guides:
        guide()
    names = set(pyro.get_param_store().keys())
    assert len(names) == sum(len(list(guide.parameters())) for guide in guides)
    # u, w, b; four of the coupling's network; four of the spline; three of the affine layer
    assert len(names) == 2 * (3 + 4 + 4 + 3)


def test_second_guide_is_trained_although_the_first_ones_parameters_are_stored() -> None:
    def model(loc: float) -> None:
        pyro.sample("z", dist.Normal(torch.tensor([loc, -loc]), 1.0).to_event(1))

    for loc in (2.0, -2.0):
        guide = AutoFlow(model, lambda dim: [T.affine_coupling(dim, hidden_dims=[4])])
        options = {"steps": 100, "lr": 0.1, "num_particles": 16, "seed": 0, "progress": False}
        assert pf.fit_guide(model, guide, (loc,), **options).best_loss < 0.1
        assert torch.allclose(guide.median()["z"], torch.tensor([loc, -loc]), atol=0.2)


@pytest.mark.parametrize("route", ["deepcopy", "pickle", "state dict"])
@pytest.mark.parametrize("listed", [True, False])
def test_copies_are_the_same_distribution(route: str, listed: bool) -> None:
    def fresh() -> AutoFlow:
        return AutoFlow(pair_model, mixed_layers(2) if listed else lambda dim: mixed_layers(dim))

    guide = scatter(fresh())
    svi = SVI(pair_model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step()  # leaves tensors with a graph in the caches of Pyro's transforms
    if route == "state dict":
        other = fresh()
        other()
        other.load_state_dict(guide.state_dict())
    else:
        other = copy.deepcopy(guide) if route == "deepcopy" else pickle.loads(pickle.dumps(guide))
    z = torch.randn(5, 2)
    assert torch.equal(other.get_posterior().log_prob(z), guide.get_posterior().log_prob(z))
    assert torch.equal(other.median()["b"], guide.median()["b"])
    with torch.no_grad():
        other.flow.parts[0].b.add_(1.0)
    assert not torch.equal(other.get_posterior().log_prob(z), guide.get_posterior().log_prob(z))


def test_median_and_quantiles_of_a_known_distribution() -> None:
    guide = AutoFlow(pair_model, [AffineTransform(1.0, 0.5)], affine=None)
    levels = torch.tensor([0.1, 0.5, 0.9])
    found = guide.quantiles([0.1, 0.5, 0.9])
    assert torch.allclose(found["a"], dist.Normal(1.0, 0.5).icdf(levels), atol=0.03)
    assert torch.allclose(found["b"], dist.LogNormal(1.0, 0.5).icdf(levels), rtol=0.03)
    assert guide.median()["a"] == found["a"][1]


def test_starts_at_the_values_that_were_asked_for() -> None:
    start = {"a": torch.tensor(3.0), "b": torch.tensor(2.0)}
    guide = AutoFlow(
        pair_model,
        lambda dim: [pf.Planar(dim, 2).inv, pf.Planar(dim, 2)],
        init_loc_fn=init_to_value(values=start),
        init_scale=0.01,
    )
    median = guide.median()
    assert all(torch.allclose(median[site], start[site], atol=0.01) for site in start)


@pytest.mark.usefixtures("float32")
def test_takes_the_dtype_of_the_latents() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))

    guide = AutoFlow(model, lambda dim: [T.spline_coupling(dim, hidden_dims=[4]), pf.Planar(dim)])
    pf.fit_guide(model, guide, steps=3, seed=0, progress=False)
    assert guide()["z"].dtype == torch.float64
    assert {p.dtype for p in guide.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("layers", "along"),
    [
        (lambda dim: [pf.Planar(dim), pf.Affine(dim)], True),
        slow(lambda dim: [pf.Planar(dim), T.affine_coupling(dim)], False),
        (lambda dim: [pf.Planar(dim).inv], False),
    ],
    ids=["ours", "mixed", "inverse"],
)
def test_fit_takes_path_derivatives_where_all_transforms_have_them(
    layers: Callable, along: bool
) -> None:
    seen = []

    class Watched(AutoFlow):
        def over_coordinates(self) -> dist.TransformedDistribution:
            seen.append((self.path_derivative, torch.is_grad_enabled()))
            return super().over_coordinates()

    guide = Watched(toy_model, layers)
    pf.fit_guide(toy_model, guide, steps=5, num_particles=4, seed=0, progress=False)
    training = [derivative for derivative, with_grad in seen if with_grad]
    assert training == [along] * 5
    assert guide.path_derivative is False


@pytest.mark.parametrize("affine", ["full", None])
def test_affine_layer_is_placed_before_the_layers_inside_it(
    affine: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    class Watched(guide_fit.Trainer):
        def run(self) -> pf.Fit:
            trained.append({id(p) for p in self.objective.parameters})
            return super().run()

    monkeypatch.setattr(guide_fit, "Trainer", Watched)
    guide = AutoFlow(toy_model, mixed_layers, affine=affine)
    options = {"steps": 10, "num_particles": 4, "seed": 0, "progress": False}
    fit = pf.fit_guide(toy_model, guide, warm_start=False, **options)
    everything = {id(p) for p in guide.parameters()}
    outer = [] if affine is None else [{id(p) for p in guide.affine.parameters()}]
    assert trained == [*outer, everything]
    assert fit.steps == 10


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (lambda: pf.Planar(3), "Planar expects a vector of 3"),
        (lambda: pf.Planar(3).inv, r"Planar\.inv expects a vector of 3"),
        (lambda: T.affine_coupling(3), "AffineCoupling expects a vector of 3"),
        (lambda: T.affine_autoregressive(4), "AffineAutoregressive expects a vector of 4"),
        (lambda: T.spline(1), "Spline expects a vector of 1"),
        (lambda: T.spline_coupling(5), "SplineCoupling expects a vector of 5"),
        (lambda: T.Permute(torch.tensor([2, 0, 1])), "Permute expects a vector of 3"),
        (lambda: T.Permute(torch.tensor([0])), "Permute expects a vector of 1"),
        (lambda: T.GeneralizedChannelPermute(2), "3 dimensions.* ReshapeTransform"),
        (lambda: ReshapeTransform((3,), (3, 1)), "ReshapeTransform expects a vector of 3"),
        (lambda: ReshapeTransform((2,), (2, 1)), r"end in shape \(2, 1\)"),
    ],
)
def test_transform_of_another_size_is_refused(transform: Callable, expected: str) -> None:
    guide = AutoFlow(pair_model, [transform()])
    for _ in range(2):
        with pytest.raises(ValueError, match=expected) as caught:
            guide()
        assert "2 unconstrained latents" in str(caught.value)


def test_what_is_no_stack_of_transforms_is_refused() -> None:
    conditional = T.conditional_affine_coupling(2, 1)
    with pytest.raises(ValueError, match=r"ConditionalAffineCoupling.* t.condition\(context\)"):
        AutoFlow(pair_model, [conditional])
    with pytest.raises(ValueError, match="must not be conditional"):
        AutoFlow(pair_model, lambda dim: conditional)()
    with pytest.raises(TypeError, match="sequence of transforms.* got int"):
        AutoFlow(pair_model, 16)
    with pytest.raises(TypeError, match="must hold transforms, got Linear"):
        AutoFlow(pair_model, lambda dim: [torch.nn.Linear(dim, dim)])()
    with pytest.raises(ValueError, match="affine"):
        AutoFlow(pair_model, [], affine="none")


def test_local_latents_of_a_subsampled_plate_are_refused() -> None:
    def model() -> None:
        with pyro.plate("rows", 100, subsample_size=10):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"'z' is a latent in plate 'rows'.* 10 of 100"):
        AutoFlow(model, lambda dim: [pf.Planar(dim)])()


def test_posterior_scores_anew_after_a_step() -> None:
    guide = scatter(AutoFlow(pair_model, [T.affine_coupling(2)], affine=None))
    z = torch.randn(5, 2)

    def score(z: Tensor) -> Tensor:
        with torch.no_grad():
            return guide.get_posterior().log_prob(z)

    before = score(z)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.1)
    assert not torch.allclose(score(z), before)
    assert torch.equal(score(z), score(z.clone()))
