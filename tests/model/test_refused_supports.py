"""Supports that no guide's map can follow: angles, and bounds that other latents move."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from drop_in_cases import GUIDES
from pyro import poutine
from pyro.infer.autoguide import init_to_sample, init_to_value
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor

import pyroflow as pf
from pyroflow.guides import base


def one(made: Callable) -> Callable:
    return lambda: pyro.sample("x", made())


def in_a_plate(made: Callable) -> Callable:
    def model() -> None:
        with pyro.plate("rows", 3):
            pyro.sample("x", made())

    return model


def angle(loc: float | Tensor = 0.0, concentration: float | Tensor = 2.0) -> dist.VonMises:
    return dist.VonMises(torch.as_tensor(loc), torch.as_tensor(concentration))


def latent_location() -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("x", angle(loc, pyro.sample("concentration", dist.Gamma(2.0, 1.0))))


def torus() -> dist.SineBivariateVonMises:
    two = torch.tensor([2.0, 3.0])
    return dist.SineBivariateVonMises(0.0, 0.0, two[0], two[1], correlation=torch.tensor(0.5))


ANGLES = {
    "von Mises": one(angle),
    "torch's": one(lambda: dist.Independent(angle().expand([3]), 1)),
    "in a plate": in_a_plate(angle),
    "event": one(lambda: angle().expand([2]).to_event(1)),
    "masked": one(lambda: angle().mask(True)),
    "expanded and masked": one(lambda: angle().expand([2]).mask(True).to_event(1)),
    "latent parameters": latent_location,
    "torus": one(torus),
    "skewed": one(lambda: dist.SineSkewed(angle().expand([1]).to_event(1), torch.tensor([0.5]))),
    "skewed uniform": one(
        lambda: dist.SineSkewed(
            dist.Uniform(-math.pi * torch.ones(2), math.pi).to_event(1), torch.tensor([0.3, 0.2])
        )
    ),
    "shifted": one(
        lambda: dist.TransformedDistribution(angle(), [dist.transforms.AffineTransform(1.0, 1.0)])
    ),
}


@pytest.mark.parametrize("name", ANGLES)
def test_a_latent_angle_is_refused_by_name_with_the_way_out(name: str) -> None:
    for make in GUIDES.values():
        guide = make(ANGLES[name], init_loc_fn=init_to_sample)
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"site 'x' is a latent angle.*atan2.*pyro\.factor"
            ):
                guide()


@pytest.mark.parametrize("of_row", [True, False])
def test_an_amortised_guide_refuses_angles_of_rows_and_of_all(of_row: bool) -> None:
    def model() -> None:
        kinds = {"x": angle(), "z": dist.Normal(0.0, 1.0)}
        one, other = ("z", "x") if of_row else ("x", "z")
        pyro.sample(one, kinds[one])
        with pyro.plate("rows", 5):
            pyro.sample(other, kinds[other])

    with pytest.raises(ValueError, match="site 'x' is a latent angle"):
        pf.AmortizedPlanarGuide(model, "rows")()


def test_observed_angles_are_data() -> None:
    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("x", angle(loc), obs=torch.tensor(3.0))

    assert pf.AutoPlanarFlow(model, 1)()["loc"].isfinite()


def compass(prior: dist.VonMises, readings: Tensor) -> Callable:
    """The way out of the message."""

    def model() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        x = pyro.deterministic("x", torch.atan2(v[..., 1], v[..., 0]))
        pyro.factor("prior", prior.log_prob(x) + math.log(2 * math.pi))
        for i, y in enumerate(readings):
            pyro.sample(f"y_{i}", dist.VonMises(x, 4.0), obs=y)

    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prior", "readings"),
    [
        (angle(0.0, 0.5), torch.tensor([2.9, -2.8, 3.1])),  # the posterior lies across ±π
        slow(angle(1.0, 2.0), torch.tensor([0.5])),
        (angle(-3.0, 0.1), torch.tensor([])),  # nearly uniform
    ],
)
@pytest.mark.parametrize("seed", [0, slow(1)])
def test_the_way_out_of_angles_has_the_evidence_of_a_quadrature(
    prior: dist.VonMises, readings: Tensor, seed: int
) -> None:
    x = torch.linspace(-math.pi, math.pi, 20_001)
    log_joint = prior.log_prob(x) + sum(dist.VonMises(x, 4.0).log_prob(y) for y in readings)
    model = compass(prior, readings)
    guide = pf.AutoPlanarFlow(model, 8)
    pf.fit_guide(model, guide, steps=600, seed=seed, progress=False)
    report = pf.diagnose(model, guide, num_samples=4000, seed=seed)
    expected = torch.trapezoid(log_joint.exp(), x).log().item()
    assert report.log_evidence == pytest.approx(expected, abs=0.06)


def moved_interval() -> None:
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    pyro.sample("x", dist.Uniform(0.0, s))


def moved_by_a_number() -> None:
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    pyro.sample("x", dist.Uniform(0.0, s.item()))


def moved_by_a_detached_value() -> None:
    s = pyro.sample("s", dist.Normal(1e6, 1.0))
    pyro.sample("x", dist.Uniform(s.detach(), 2e6))


def moved_by_a_deterministic() -> None:
    s = pyro.sample("s", dist.Beta(2.0, 2.0))
    room = pyro.deterministic("room", 1 - s)
    pyro.sample("x", dist.Uniform(-room, room))


def moved_threshold() -> None:
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    pyro.sample("x", dist.Pareto(s, 2.0))


def moved_below() -> None:
    s = pyro.sample("s", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.ImproperUniform(dist.constraints.less_than(s), (), ()))


def moved_beta() -> None:
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    pyro.sample("x", dist.AffineBeta(2.0, 3.0, torch.tensor(0.0), s))


def moved_in_plates() -> None:
    with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Uniform(0.0, s))


def moved_event() -> None:
    s = pyro.sample("s", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("x", dist.Uniform(torch.zeros(3), s).to_event(1).mask(True))


def moved_in_opposition() -> None:
    """Both move alike where all latents do."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Uniform(a - b - 5.0, 5.0))


def moved_by_a_part() -> None:
    s = pyro.sample("s", dist.Dirichlet(torch.ones(3)))
    both = dist.constraints.stack([dist.constraints.real, dist.constraints.greater_than(s[0])], -1)
    pyro.sample("x", dist.ImproperUniform(both, (), (2,)))


def moved_by_chance() -> None:
    pyro.sample("x", dist.Uniform(0.0, 1.0 + torch.rand(())))


MOVED = [
    moved_interval,
    moved_by_a_number,
    moved_by_a_detached_value,
    moved_by_a_deterministic,
    moved_threshold,
    moved_below,
    moved_beta,
    moved_in_plates,
    moved_event,
    moved_in_opposition,
    moved_by_a_part,
    moved_by_chance,
]


@pytest.mark.parametrize("model", MOVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_support_that_moves_is_refused_by_name_with_the_way_out(
    model: Callable, dtype: torch.dtype
) -> None:
    start = {"s": torch.tensor(0.4)} if model in (moved_interval, moved_by_a_number) else {}
    torch.set_default_dtype(dtype)
    try:
        for make in GUIDES.values():
            init = init_to_value(values=start, fallback=init_to_median)
            guide = make(model, init_loc_fn=init)
            for _ in range(2):
                with pytest.raises(ValueError, match="site 'x' has a support that .*Uniform"):
                    guide()
            assert guide.prototype_trace is None
    finally:
        torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("of_row", [True, False])
def test_an_amortised_guide_refuses_supports_that_move(of_row: bool) -> None:
    def model() -> None:
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        if not of_row:
            pyro.sample("x", dist.Uniform(0.0, s))
        with pyro.plate("rows", 5):
            pyro.sample("x" if of_row else "z", dist.Uniform(0.0, s if of_row else 1.0))

    with pytest.raises(ValueError, match=r"site 'x' has a support that another latent moves"):
        pf.AmortizedPlanarGuide(model, "rows")()


def still(bound: Tensor) -> None:
    """Bounds from the arguments, and scales from other latents."""
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(bound)):
        pyro.sample("x", dist.Uniform(-1.0, bound))
        pyro.sample("w", dist.Pareto(bound, s))
    pyro.sample("n", dist.Normal(0.0, s))
    pyro.sample("h", dist.HalfNormal(s))
    pyro.sample("l", dist.LogNormal(s, s))
    pyro.sample("b", dist.Beta(s, s))
    pyro.sample("d", dist.Dirichlet(s * torch.ones(3)))
    shift = dist.transforms.AffineTransform(0.0, s)
    pyro.sample("t", dist.TransformedDistribution(dist.Normal(0.0, 1.0), [shift]))


def test_supports_of_the_arguments_and_scales_of_latents_are_kept() -> None:
    bound = torch.tensor([1.0, 2.0, 5.0])
    for make in GUIDES.values():
        guide = make(still).setup(bound)
        assert (guide.quantiles([0.0, 1.0])["x"] <= bound).all()
        guide.check_model(poutine.trace(still).get_trace(bound))
        with pytest.raises(ValueError, match="'x' has support .*make a new guide"):
            guide.check_model(poutine.trace(still).get_trace(bound + 1.0))
        guide.float().check_model(poutine.trace(still).get_trace(bound))


@pytest.mark.parametrize(("bounds", "runs"), [(True, 2), (False, 1)])
def test_the_model_runs_once_more_only_where_there_are_bounds(
    bounds: bool, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def model() -> None:
        called.append(torch.rand(()))
        pyro.sample("s", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Uniform(0.0, 2.0) if bounds else dist.Beta(2.0, 2.0))

    def number_after_set_up() -> Tensor:
        pyro.set_rng_seed(3)
        pf.AutoPlanarFlow(model, 1).setup()
        return torch.rand(())

    found = number_after_set_up()
    assert len(called) == runs
    monkeypatch.setattr(base, "refuse_moving_supports", lambda *args: None)
    assert found == number_after_set_up()
