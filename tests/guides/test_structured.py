"""Structured guides: what they read off plates, and many groups with known answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from pyro.infer.autoguide.initialization import init_to_median, init_to_value
from torch import Tensor

import pyroflow as pf
from pyroflow.transforms import Arrowhead, Leading, Sylvester

F64 = torch.float64


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def scattered(seed: int) -> Arrowhead:
    """An arrowhead of three globals, rows of two numbers and rows of one, at random parameters."""
    rows = [torch.tensor([[0, 3], [5, 1], [7, 9]]), torch.tensor([[2], [10]])]
    t = Arrowhead(torch.tensor([4, 6, 8]), rows, init_loc=torch.zeros(11, dtype=F64))
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in [*t.named_parameters(), *t.named_buffers()]:
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=draw, dtype=F64)
            tensor.data.copy_(noise.tril() if name.startswith("unit") else noise)
    return t


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["arrowhead", "leading"])
def test_the_layers_are_exact_both_ways(kind: str, seed: int) -> None:
    t = scattered(seed)
    if kind == "leading":
        with pf.seeds.seeded(seed):
            inner = Sylvester(3, num_units=2, num_layers=2).double()
            for p in inner.parameters():
                p.data.normal_()
        t = Leading(inner, 11)
    x = torch.randn(4, 11, generator=torch.Generator().manual_seed(seed), dtype=F64)
    y = t(x)
    torch.testing.assert_close(t.inv(y.clone()), x, rtol=1e-8, atol=1e-8)
    expected = [torch.autograd.functional.jacobian(t, row).slogdet().logabsdet for row in x]
    torch.testing.assert_close(t.log_abs_det_jacobian(x, y), torch.stack(expected))
    back, log_det = t.inverse_and_log_det(y.clone())
    torch.testing.assert_close(log_det, torch.stack(expected))
    assert torch.autograd.gradcheck(lambda x: t.forward_and_log_det(x), x.requires_grad_())


def groups(num: int) -> tuple[Callable, float]:
    """Normal groups with uneven noise, and the log evidence by quadrature over log tau and mu."""
    draw = torch.Generator().manual_seed(num)
    sd = torch.logspace(-1, 1, num, dtype=F64)
    truth = 1 + 0.7 * torch.randn(num, generator=draw, dtype=F64)
    y = truth + sd * torch.randn(num, generator=draw, dtype=F64)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(number(0.0), number(3.0)))
        tau = pyro.sample("tau", dist.HalfNormal(number(2.0)))
        with pyro.plate("groups", num):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sd), obs=y)

    t = torch.linspace(-6, 3, 1500, dtype=F64)
    precision = 1 / (t.exp().square().unsqueeze(1) + sd.square())  # given tau, mu is normal
    total = precision.sum(1) + 1 / 9
    mean = (precision * y).sum(1) / total
    log_p = (
        precision.log().sum(1) - (precision * y.square()).sum(1) - num * math.log(2 * math.pi)
    ) / 2
    log_p = log_p - math.log(3) - total.log() / 2 + total * mean.square() / 2
    log_p = log_p + dist.HalfNormal(number(2.0)).log_prob(t.exp()) + t
    return model, log_p.logsumexp(0).item() + math.log(t[1] - t[0])


@pytest.mark.parametrize("num", [8, slow(300)])
def test_normal_groups_have_their_evidence(num: int) -> None:
    model, evidence = groups(num)
    guide = pf.AutoStructuredFlow(model)
    fit = pf.fit_guide(model, guide, steps=300, seed=0, progress=False)
    assert fit.best_loss + evidence < 0.03
    c = guide.centring["theta"]
    assert c[0] > 0.9 > 0.1 > c[-1]  # the data of the first groups say where they are
    report = pf.diagnose(model, guide, num_samples=2000)
    assert report.log_evidence == pytest.approx(evidence, abs=0.03)
    assert report.level in ("good", "resample")


def slopes(num: int) -> Callable:
    """Intercepts and slopes with a correlation, and a second site in each row."""
    x = torch.linspace(-1, 1, 6, dtype=F64)
    y = torch.randn(num, 6, generator=torch.Generator().manual_seed(1), dtype=F64)

    def model() -> None:
        sd = pyro.sample("sd", dist.HalfNormal(torch.ones(2, dtype=F64)).to_event(1))
        L = pyro.sample("L", dist.LKJCholesky(2, number(2.0)))
        with pyro.plate("groups", num, dim=-2):
            zero = torch.zeros(2, dtype=F64)
            b = pyro.sample("b", dist.MultivariateNormal(zero, scale_tril=sd.diag_embed() @ L))
            noise = pyro.sample("noise", dist.LogNormal(number(0.0), number(0.3)))
            with pyro.plate("rows", 6, dim=-1):
                pyro.sample("y", dist.Normal(b[..., 0] + b[..., 1] * x, noise), obs=y)

    return model


def nested() -> None:
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    with pyro.plate("districts", 7, dim=-2):
        a = pyro.sample("a", dist.Normal(top, 1.0))
        with pyro.plate("schools", 4, dim=-1):
            pyro.sample("b", dist.Normal(a, 1.0))


def crossed() -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    site, year = torch.arange(40) % 8, torch.arange(40) // 8
    with pyro.plate("sites", 8):
        a = pyro.sample("a", dist.Normal(0.0, scale))
    with pyro.plate("years", 5):
        b = pyro.sample("b", dist.Normal(0.0, scale))
    pyro.sample("y", dist.Normal(a[site] + b[year], 1.0).to_event(1), obs=torch.zeros(40))


def beside() -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("cats", 8):
        pyro.sample("a", dist.Normal(0.0, scale))
    with pyro.plate("dogs", 5):
        pyro.sample("b", dist.Normal(0.0, scale))


def walk() -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("steps", 9):
        step = pyro.sample("step", dist.Normal(0.0, scale))
    pyro.sample("y", dist.Normal(step.cumsum(0), 1.0).to_event(1), obs=torch.zeros(9))


@pytest.mark.parametrize(
    ("model", "leading", "rows"),
    [
        (slopes(6), 3, [(6, 3)]),
        (nested, 1, [(7, 5)]),
        (crossed, 6, [(8, 1)]),
        (beside, 1, [(8, 1), (5, 1)]),
        (walk, 10, []),
    ],
    ids=["slopes", "nested", "crossed", "beside", "walk"],
)
def test_what_is_local(model: Callable, leading: int, rows: list) -> None:
    affine = pf.AutoStructuredFlow(model).setup().affine
    assert len(affine.leading()) == leading
    assert [tuple(places.shape) for places in affine.rows()] == rows


@pytest.mark.slow
@pytest.mark.parametrize("model", [slopes(6), nested, crossed, beside, walk])
def test_it_is_as_good_as_the_dense_guide(model: Callable) -> None:
    losses = []
    for guide in (pf.AutoStructuredFlow(model), pf.AutoSylvesterFlow(model, num_layers=4)):
        losses.append(pf.fit_guide(model, guide, steps=200, seed=0, progress=False).best_loss)
    assert losses[0] < losses[1] + (0.1 if model is walk else 0.05)  # no axes for many globals


def test_files_copies_and_names(tmp_path: Path) -> None:
    model, _ = groups(30)
    guide = pf.AutoStructuredFlow(model, tails=True)
    pf.fit_guide(model, guide, steps=5, warm_start=False, seed=0, progress=False)
    pf.save(guide, tmp_path / "guide.pt")
    again = pf.load(tmp_path / "guide.pt")
    with pf.seeds.seeded(0):
        draws = guide.sample((5,)) if hasattr(guide, "sample") else guide()
    torch.testing.assert_close(again.log_prob(draws), guide.log_prob(draws))
    chains = pf.mcmc(model, guide, num_samples=100, num_chains=8, progress=False)
    assert chains.draws["theta"].shape == (800, 30)


def alone(num: int = 30) -> Callable:
    """Rows, and no global number."""

    def model() -> None:
        with pyro.plate("groups", num):
            rate = pyro.sample("rate", dist.Gamma(number(2.0), number(1.0)))
            pyro.sample("y", dist.Poisson(rate), obs=torch.ones(num, dtype=F64))

    return model


def test_rows_without_globals_have_their_evidence() -> None:
    guide = pf.AutoStructuredFlow(alone(), tails=True)
    fit = pf.fit_guide(alone(), guide, steps=200, seed=0, progress=False)
    evidence = 30 * math.log(2 / 2**3)  # of each row, Gamma(3) / (Gamma(2) 1!) / 2^3
    assert fit.best_loss + evidence < 0.15


@pytest.mark.parametrize("seed", [0, 1])
def test_recentring_keeps_the_map(seed: int) -> None:
    t = scattered(seed)
    x = torch.randn(4, 11, generator=torch.Generator().manual_seed(seed), dtype=F64)
    before = t(x).detach()
    t.recentre()
    assert not t.offset.any()
    torch.testing.assert_close(t(x), before)


@pytest.mark.slow
def test_it_trains_from_its_start_without_a_warm_one() -> None:
    model, evidence = groups(8)
    guide = pf.AutoStructuredFlow(model)
    options = {"warm_start": False, "steps": 600, "seed": 0, "progress": False}
    assert pf.fit_guide(model, guide, **options).best_loss + evidence < 1.2  # as written


def test_vague_priors_do_not_hide_the_rows() -> None:
    def model() -> None:
        precision = pyro.sample("precision", dist.Gamma(0.01, 0.01))
        with pyro.plate("groups", 300):
            theta = pyro.sample("theta", dist.Normal(0.0, precision**-0.5))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.linspace(-2, 2, 300))

    affine = pf.AutoStructuredFlow(model).setup().affine
    assert [tuple(places.shape) for places in affine.rows()] == [(300, 1)]


def components() -> None:
    """Two far components that can change places, and effects of 300 rows beside them."""
    y = torch.cat([torch.full((150,), -2.0), torch.full((150,), 2.0)])
    y = y + torch.linspace(-0.5, 0.5, 300).roll(77)
    c = pyro.sample("c", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("rows", 300):
        u = pyro.sample("u", dist.Normal(0.0, 0.3))
        either = [dist.Normal(c[k] + u, 0.5).log_prob(y) for k in (0, 1)]
        pyro.factor("y", torch.logaddexp(*either) - math.log(2))


DRAW = torch.Generator().manual_seed(0)
FACTOR = torch.randn(290, 1, generator=DRAW) * torch.tensor([1.0, -0.5, 2.0, 0.7, 1.5])
FACTOR = FACTOR + 0.5 * torch.randn(290, 5, generator=DRAW)


def one_factor() -> None:
    """Loadings and scores that can change their signs together; far from Gaussian rows."""
    loadings = pyro.sample("loadings", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
    with pyro.plate("rows", 290):
        f = pyro.sample("f", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(f.unsqueeze(-1) * loadings, 0.5).to_event(1), obs=FACTOR)


def lesser_mode() -> None:
    """A fifth of the mass at a mode of its own, beside 300 skewed effects."""
    at = dist.Normal(torch.tensor([-4.0, 4.0]), 0.5)
    pyro.sample("m", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.8, 0.2])), at))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    with pyro.plate("rows", 300):
        u = pyro.sample("u", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Poisson(u.exp()), obs=(torch.arange(300) % 4).float())


SHARES = {components: 0.5, one_factor: 0.5, lesser_mode: 0.2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [components, one_factor, lesser_mode],
    ids=lambda model: model.__name__,
)
def test_modes_are_looked_for_above_256_latents(model: Callable) -> None:
    start = init_to_value(values={"m": torch.tensor(-4.0)}, fallback=init_to_median)
    guide = pf.AutoStructuredFlow(model, init_loc_fn=start)
    pf.fit_guide(model, guide, steps=100, seed=0, progress=False)
    report = pf.diagnose(model, guide, num_samples=1000)
    assert report.level == "bad"
    assert report.missed_share == pytest.approx(SHARES[model], rel=0.3)


@pytest.mark.slow
def test_one_call_for_many_groups() -> None:
    model, evidence = groups(300)
    post = pf.posterior(model, seed=0, progress=False)
    assert isinstance(post.guide, pf.AutoStructuredFlow)
    assert post.level in ("good", "resample")
    assert post.log_evidence == pytest.approx(evidence, abs=0.03)
