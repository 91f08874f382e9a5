"""Hard edges that a model does not declare: draws outside cost the fit, and reach the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from cases import slow
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyroflow as pf
from pyroflow.diagnostics.psis import pareto_smooth
from pyroflow.inference.objectives import LOST, bound_scores, cut_loss

RATE, SD = 3.0, 0.8


def exact_bound(mu: float, size: int) -> float:
    """The bound of N(μ, SD²) cut to z > 0, for p(z) = exp(−RATE z), by quadrature."""
    z = torch.linspace(0, 8, 3001)
    q = dist.Normal(mu, SD)
    mass = q.log_prob(z).exp() * (z[1] - z[0])
    mass[0] /= 2
    log_w = -RATE * z - q.log_prob(z)
    inside = mass.sum()
    if size == 1:
        return float((mass * log_w).sum() / inside + (1 + LOST) * inside.log())
    both = torch.logaddexp(log_w[:, None], log_w) - math.log(2)
    total = mass @ both @ mass + 2 * (1 - inside) * (mass @ (log_w - math.log(2)))
    alive = 1 - (1 - inside) ** 2
    return float(total / alive + alive.log() + LOST * inside.log())


@pytest.mark.parametrize("mu", [0.0, 0.6])
@pytest.mark.parametrize(
    ("objective", "path"), [("elbo", True), ("elbo", False), ("iwae", False), ("dreg", True)]
)
def test_value_and_gradient_across_an_edge(objective: str, path: bool, mu: float) -> None:
    size = 1 if objective == "elbo" else 2
    loc, found, values = torch.tensor(mu, requires_grad=True), [], []
    for _ in range(60):
        z = loc + SD * torch.randn(2000)
        q = dist.Normal(loc.detach() if path else loc, SD)
        log_w = torch.where(z > 0, -RATE * z, -torch.inf) - q.log_prob(z)
        log_q = dist.Normal(loc, SD).log_prob(z.detach())
        loss = cut_loss(log_w, objective, size, z.unsqueeze(1), log_q, path=path)
        found.append(torch.autograd.grad(loss, loc)[0])
        values.append(-loss.detach())
        assert bound_scores(log_w.detach(), size).mean() == pytest.approx(loss.item())
    error = float(torch.stack(found).std()) / 60**0.5
    step = 1e-3
    exact = (exact_bound(mu + step, size) - exact_bound(mu - step, size)) / (2 * step)
    assert float(torch.stack(values).mean()) == pytest.approx(exact_bound(mu, size), abs=0.01)
    assert -float(torch.stack(found).mean()) == pytest.approx(exact, abs=4 * error + 0.03)
    assert error < 0.05


# Models whose evidence has a closed form, or a quadrature; their support is in no site.

DATA = torch.linspace(0.1, 1.9, 20)


def uniform() -> None:
    theta = pyro.sample("theta", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(DATA)):
        pyro.sample("y", dist.Uniform(0.0, theta), obs=DATA)


def pareto() -> None:
    """The latent's own support is declared, the data's is not: θ given y is Pareto."""
    theta = pyro.sample("theta", dist.Pareto(0.5, 2.0))
    with pyro.plate("rows", len(DATA)):
        pyro.sample("y", dist.Uniform(0.0, theta), obs=DATA)


def ordered() -> None:
    t = pyro.sample("t", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    inside = (t[..., 0] < t[..., 1]) & (t[..., 1] < t[..., 2])
    pyro.factor("order", torch.where(inside, 0.0, -torch.inf))


def box() -> None:
    t = pyro.sample("t", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("box", torch.where(((t > 0) & (t < 1)).all(-1), 0.0, -torch.inf))


def regression() -> None:
    """One coefficient is bounded two standard errors above its estimate."""
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(b, 0.5).to_event(1), obs=torch.tensor([-1.0, 0.7]))
    pyro.factor("bound", torch.where(b[..., 0] > 0, 0.0, -torch.inf))


def moments(density: Callable, low: float, high: float) -> tuple[float, float, float]:
    """Log integral, mean and sd."""
    powers = [
        scipy.integrate.quad(lambda t, k=k: t**k * density(t), low, high, epsabs=0)[0]
        for k in range(3)
    ]
    mean = powers[1] / powers[0]
    return math.log(powers[0]), mean, math.sqrt(powers[2] / powers[0] - mean**2)


def exact_uniform() -> tuple[float, float, float]:
    return moments(lambda t: scipy.stats.lognorm(1.0).pdf(t) * t**-20.0, 1.9, 20.0)


def exact_pareto() -> tuple[float, float, float]:
    posterior = scipy.stats.pareto(22, scale=1.9)
    return math.log(2 * 0.5**2 / 22) - 22 * math.log(1.9), posterior.mean(), posterior.std()


def exact_ordered() -> tuple[float, float, float]:
    """Of the largest of three normal numbers."""
    mean = 1.5 / math.sqrt(math.pi)
    return -math.log(6), mean, math.sqrt(1 + math.sqrt(3) / (2 * math.pi) - mean**2)


def exact_box() -> tuple[float, float, float]:
    part = scipy.stats.truncnorm(0, 1)
    return 2 * math.log(scipy.stats.norm.cdf(1) - 0.5), part.mean(), part.std()


def exact_regression() -> tuple[float, float, float]:
    variance = 1 / (1 + 4)
    mean, sd = -1.0 * 4 * variance, math.sqrt(variance)
    part = scipy.stats.truncnorm(-mean / sd, np.inf, loc=mean, scale=sd)
    evidence = sum(scipy.stats.norm(0, math.sqrt(1.25)).logpdf([-1.0, 0.7]))
    return evidence + scipy.stats.norm(mean, sd).logsf(0), part.mean(), part.std()


MODELS = {
    "uniform": (uniform, exact_uniform, lambda sites: sites["theta"]),
    "pareto": (pareto, exact_pareto, lambda sites: sites["theta"]),
    "ordered": (ordered, exact_ordered, lambda sites: sites["t"][:, 2]),
    "box": (box, exact_box, lambda sites: sites["t"][:, 0]),
    "regression": (regression, exact_regression, lambda sites: sites["b"][:, 0]),
}
SEEDS = [0, slow(1), slow(2)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [n if n == "pareto" else slow(n) for n in MODELS])
def test_a_fit_keeps_inside(name: str, seed: int) -> None:
    model, exact, pick = MODELS[name]
    evidence, mean, sd = exact()
    # Beyond an edge the posteriors fall off as an exponential does, more slowly than a normal base.
    guide = pf.AutoPlanarFlow(model, 8, base_df=5.0 if name in ("uniform", "pareto") else None)
    pf.fit_guide(model, guide, steps=1500, seed=seed, progress=False)
    report = pf.diagnose(model, guide, seed=seed)
    draws = pick(report.resample(10_000, seed=seed))
    # Beyond an edge the guide is short of mass: k-hat may say so, and then has the last word.
    assert report.level in ("good", "resample") or report.khat > report.khat_threshold
    assert report.num_nonfinite < 0.1 * report.num_samples
    assert report.ess_fraction > 0.7
    assert report.log_evidence == pytest.approx(evidence, abs=0.05)
    assert float(draws.mean()) == pytest.approx(mean, abs=0.05 * sd)
    assert float(draws.std()) == pytest.approx(sd, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["iwae", "dreg"])
def test_importance_weighted_bounds_keep_inside(objective: str) -> None:
    guide = pf.AutoPlanarFlow(box, num_layers=8)
    fit = pf.fit_guide(
        box, guide, steps=1500, seed=0, objective=objective, group_size=4, progress=False
    )
    report = pf.diagnose(box, guide)
    assert report.log_evidence == pytest.approx(exact_box()[0], abs=0.05)
    assert report.outside < 0.5  # a group needs one draw inside
    assert fit.skipped_particles > 0


@pytest.mark.slow
def test_an_energy_with_a_wall() -> None:
    """U = z on z > 0: −ln Z = 0, and F is above it."""

    def energy(z: Tensor) -> Tensor:
        z = z.squeeze(-1)
        return torch.where(z > 0, z, torch.inf)

    flow = pf.planar_flow(1, num_layers=8)
    fit = pf.fit_energy(flow, energy, steps=1500, seed=0, progress=False)
    z = flow().sample((20_000,))
    assert (z > 0).double().mean() > 0.9
    assert -0.01 < fit.best_loss < 0.15
    assert z[z > 0].mean() == pytest.approx(1.0, abs=0.15)


class TestVerdicts:
    """The guide is the prior, and a factor cuts off a known share of it."""

    @staticmethod
    def cut(share: float, value: float = -torch.inf) -> tuple[Callable, Callable]:
        edge = scipy.stats.norm.ppf(share)

        def model() -> None:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("edge", torch.where(z < edge, value, 0.0))

        return model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0))

    @pytest.mark.parametrize(
        ("share", "level"),
        [(0.001, "good"), (0.03, "resample"), (0.9, "resample"), (0.995, "bad")],
    )
    def test_the_share_outside_decides(self, share: float, level: str) -> None:
        report = pf.diagnose(*self.cut(share))
        error = 4 * math.sqrt(share * (1 - share) / report.num_samples)
        assert report.outside == pytest.approx(share, abs=error)
        assert report.level == level
        assert report.log_evidence == pytest.approx(math.log(1 - share), abs=0.5)
        assert f"{report.outside:.2%} of the draws lie outside the support" in report.verdict
        assert "'edge'" in report.advice[0]
        assert report.elbo == -math.inf

    def test_few_effective_draws_are_not_usable(self) -> None:
        report = pf.diagnose(*self.cut(0.995))
        assert report.verdict.startswith(f"do not trust: only {report.ess:.0f} of 10000 draws")
        assert "more draws, by a higher num_samples" in report.advice

    def test_failures_are_not_called_outside(self) -> None:
        report = pf.diagnose(*self.cut(0.03, torch.nan))
        assert (report.outside, report.level) == (0.0, "bad")
        assert "draws failed" in report.verdict
        assert "NaN" in report.advice[0]

    def test_zero_weights_are_no_part_of_the_tail(self) -> None:
        log_weights = dist.Pareto(1.0, 2.0).sample((1000,)).log()
        padded = torch.cat([log_weights, torch.full((9000,), -torch.inf)])
        smoothed, log_sum, khat = pareto_smooth(padded)
        alone, alone_sum, alone_khat = pareto_smooth(log_weights)
        assert khat == alone_khat
        assert log_sum == alone_sum
        torch.testing.assert_close(smoothed[:1000], alone)
        assert (smoothed[1000:] == -torch.inf).all()

    @pytest.mark.parametrize("positive", [1, 5, 24])
    def test_too_few_weights_for_a_tail(self, positive: int) -> None:
        padded = torch.cat([torch.randn(positive), torch.full((900,), -torch.inf)])
        smoothed, _, khat = pareto_smooth(padded)
        assert khat == math.inf
        assert smoothed.logsumexp(0) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "objective", "sequential"),
    [
        (AutoNormal, "elbo", False),
        (AutoNormal, "iwae", False),
        (AutoNormal, "elbo", True),
        (pf.AutoPlanarFlow, "elbo", False),
        (pf.AutoPlanarFlow, "iwae", False),
        (pf.AutoPlanarFlow, "elbo", True),
    ],
)
def test_by_pyro_s_traces(make: Callable, objective: str, sequential: bool) -> None:
    """θ > 1 and a parameter of the model, whose best value is the mean of the data."""

    def model() -> None:
        theta = pyro.sample("theta", dist.Exponential(1.0))
        loc = pyro.param("loc", torch.tensor(0.0))
        if sequential and float(theta) < -1.0:
            raise AssertionError
        pyro.sample("one", dist.Uniform(0.0, theta), obs=torch.tensor(1.0))
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(0.7))

    guide = make(model, init_scale=0.5)
    fit = pf.fit_guide(
        model, guide, steps=200, num_particles=16, objective=objective, seed=0, progress=False
    )
    report = pf.diagnose(model, guide, num_samples=1000)
    evidence = math.log(scipy.special.exp1(1.0)) - 0.5 * math.log(2 * math.pi)
    assert fit.skipped < 10  # where all 16 draws were lost
    assert report.outside < 0.5
    assert report.log_evidence == pytest.approx(evidence, abs=0.15)
    assert pyro.param("loc").item() == pytest.approx(0.7, abs=0.1)
