"""Hierarchies written centred, with the hyperparameters by quadrature, and random walks."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Normal, StudentT

from pyroflow.targets import EIGHT_SCHOOLS_SIGMA, EIGHT_SCHOOLS_Y, eight_schools_centered

from ..judging import Draws
from .grids import Axis, Groups, LinearGaussian, NormalGroups, half_cauchy, half_normal
from .target import Target, double


def spread(num: int) -> Tensor:
    """Quantiles of a standard normal in an order that looks random, float64."""
    order = (torch.arange(num) * 7919) % num if num % 7919 else torch.arange(num)
    return torch.special.ndtri((order.double() + 0.5) / num)


def own(*values: Tensor) -> tuple[Tensor, ...]:
    """Data in torch's default dtype."""
    return tuple(value.to(torch.get_default_dtype()) for value in values)


def normal_groups(name: str, y: Tensor, s: Tensor, tau_scale: float) -> Target:
    """Means of groups with known standard errors."""

    def model(y: Tensor, s: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(tau_scale))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, s), obs=y)

    def solve() -> NormalGroups:
        top = math.log(tau_scale)
        return NormalGroups(y, s, half_normal(tau_scale), (top - 15, top + 1.6, 1200))

    return Target(name, "hierarchy", lambda: (model, own(y, s)), solve)


def eight_schools() -> Target:
    """The centred form, as posteriordb has it."""
    data = torch.tensor(EIGHT_SCHOOLS_Y), torch.tensor(EIGHT_SCHOOLS_SIGMA)

    def solve() -> NormalGroups:
        return NormalGroups(*data, half_cauchy(5.0), (-12.0, 8.0, 2000))

    build = lambda: (eight_schools_centered, own(*data))  # noqa: E731
    return Target("eight_schools-centred_10", "hierarchy", build, solve)


def rows_of_groups() -> Target:
    """Six groups with one to five hundred rows each, the rows in the model."""
    sizes = torch.tensor([1, 2, 5, 20, 100, 500])
    group = torch.repeat_interleave(torch.arange(6), sizes)
    centre = torch.tensor([2.0, -1.0, 0.5, 1.5, 0.0, 1.0], dtype=torch.float64)
    y = centre[group] + torch.cat([spread(int(n)) for n in sizes])

    def model(group: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("groups", 6):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(theta[group], 1.0), obs=y)

    class Rows(NormalGroups):
        """With the evidence of the rows beside that of their means."""

        def __init__(self) -> None:
            means = torch.zeros(6).index_add(0, group, y) / sizes
            super().__init__(means, sizes.double().rsqrt(), half_normal(2.0), (-14.0, 2.5, 1200))
            inside = Normal(means[group], 1.0).log_prob(y).sum()
            at_the_means = Normal(means, sizes.double().rsqrt()).log_prob(means).sum()
            self.log_evidence += (inside - at_the_means).item()

    return Target("groups-rows_8", "hierarchy", lambda: (model, (group, *own(y))), Rows)


def poisson_groups(
    name: str, num: int, reach: tuple[float, float], tau: float, axes: tuple[Axis, Axis]
) -> Target:
    """Counts with exposures exp(low) to exp(high)."""
    exposure = torch.linspace(*reach, num, dtype=torch.float64).exp()
    count = (exposure * (0.5 + tau * spread(num)).exp()).round()

    def model(exposure: Tensor, count: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("groups", num):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("count", dist.Poisson(exposure * theta.exp()), obs=count)

    def solve() -> Groups:
        def log_likelihood(j: int, theta: Tensor) -> Tensor:
            rate, k = exposure[j] * theta.exp(), count[j]
            return k * (theta + exposure[j].log()) - rate - torch.lgamma(k + 1)

        def log_prior(m: Tensor, u: Tensor) -> Tensor:
            return Normal(0.0, 2.0).log_prob(m) + half_normal(2.0)(u)

        return Groups(log_likelihood, num, Normal(0.0, 1.0).log_prob, log_prior, *axes)

    return Target(name, "hierarchy", lambda: (model, own(exposure, count)), solve)


def bernoulli_groups(
    name: str, tries: list[int], seen: list[int], axes: tuple[Axis, Axis]
) -> Target:
    """Few trials a group."""

    def values() -> tuple[Tensor, Tensor]:
        dtype = torch.get_default_dtype()
        return torch.tensor(tries, dtype=dtype), torch.tensor(seen, dtype=dtype)

    def model(tries: Tensor, seen: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.5))
        with pyro.plate("groups", len(tries)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("seen", dist.Binomial(tries, logits=theta), obs=seen)

    def solve() -> Groups:
        n, k = values()
        ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)

        def log_likelihood(j: int, theta: Tensor) -> Tensor:
            return ways[j] + k[j] * theta - n[j] * torch.nn.functional.softplus(theta)

        def log_prior(m: Tensor, u: Tensor) -> Tensor:
            return Normal(0.0, 2.0).log_prob(m) + half_normal(1.5)(u)

        return Groups(log_likelihood, len(n), Normal(0.0, 1.0).log_prob, log_prior, *axes)

    return Target(name, "hierarchy", lambda: (model, values()), solve)


def student_groups() -> Target:
    """Group means with heavy tails, one of them far off."""

    def values() -> tuple[Tensor, Tensor]:
        y = torch.tensor([0.2, -0.5, 0.9, 0.1, -0.3, 0.6, -0.9, 0.4, 7.0, 0.0])
        return y, torch.linspace(0.2, 1.2, 10)

    def model(y: Tensor, s: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.StudentT(3.0, mu, tau))
            pyro.sample("y", dist.Normal(theta, s), obs=y)

    def solve() -> Groups:
        y, s = values()

        def log_likelihood(j: int, theta: Tensor) -> Tensor:
            return Normal(theta, s[j]).log_prob(y[j])

        def log_prior(m: Tensor, u: Tensor) -> Tensor:
            return Normal(0.0, 2.0).log_prob(m) + half_normal(1.0)(u)

        effect = StudentT(3.0).log_prob
        axes = (-2.5, 2.5, 48), (-10.0, 1.6, 72)
        return Groups(log_likelihood, 10, effect, log_prior, *axes, reach=11.0)

    return Target("groups-student_12", "hierarchy", lambda: (model, values()), solve)


def walk(name: str, num: int, noise: float, as_steps: bool) -> Target:
    """A random walk with an unknown scale, as steps that are summed or place by place."""
    y = (torch.arange(num, dtype=torch.float64) / 3).sin() + noise * spread(num)

    def steps(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("steps", num):
            step = pyro.sample("step", dist.Normal(0.0, scale))
        with pyro.plate("rows", num):
            pyro.sample("y", dist.Normal(step.cumsum(-1), noise), obs=y)

    def places(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        x = 0.0
        for t in range(num):
            x = pyro.sample(f"x{t}", dist.Normal(x, scale))
            pyro.sample(f"y{t}", dist.Normal(x, noise), obs=y[t])

    def solve() -> LinearGaussian:
        def prior(scale: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros(num), scale**2 * torch.eye(num)

        def sites(step: Tensor, scale: Tensor) -> Draws:
            if as_steps:
                return {"scale": scale, "step": step}
            x = step.cumsum(-1)
            return {"scale": scale} | {f"x{t}": x[:, t] for t in range(num)}

        H, s = torch.ones(num, num).tril(), torch.full((num,), noise)
        return LinearGaussian(prior, H, y, s, half_normal(1.0), (-12.0, 1.6, 160), sites)

    return Target(name, "hierarchy", lambda: (steps if as_steps else places, own(y)), solve)


def ridge() -> Target:
    """Twelve coefficients whose common scale is unknown, and no more rows than they."""
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    y = X[:, 0] - 0.5 * X[:, 3] + 0.5 * spread(12)

    def model(X: Tensor, y: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        with pyro.plate("coefficients", 12):
            beta = pyro.sample("beta", dist.Normal(0.0, scale))
        with pyro.plate("rows", 12):
            pyro.sample("y", dist.Normal(X @ beta, 0.5), obs=y)

    def solve() -> LinearGaussian:
        def prior(scale: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros(12), scale**2 * torch.eye(12)

        sites = lambda x, scale: {"scale": scale, "beta": x}  # noqa: E731
        s = torch.full((12,), 0.5)
        return LinearGaussian(prior, X, y, s, half_cauchy(1.0), (-6.0, 6.0, 160), sites)

    return Target("ridge-scale_13", "hierarchy", lambda: (model, own(X, y)), solve)


def process() -> Target:
    """A Gaussian process with an unknown amplitude, centred."""
    x = torch.linspace(0, 2, 15, dtype=torch.float64)
    K = (-0.5 * (x[:, None] - x).square() / 0.5**2).exp() + 1e-4 * torch.eye(15).double()
    y = 0.8 * (4 * x).sin() + 0.3 * spread(15)

    def model(K: Tensor, y: Tensor) -> None:
        amplitude = pyro.sample("amplitude", dist.HalfNormal(2.0))
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(15), amplitude**2 * K))
        with pyro.plate("rows", 15):
            pyro.sample("y", dist.Normal(f, 0.5), obs=y)

    def solve() -> LinearGaussian:
        prior = lambda scale: (torch.zeros(15), scale**2 * K)  # noqa: E731
        sites = lambda f, scale: {"amplitude": scale, "f": f}  # noqa: E731
        options = torch.eye(15), y, torch.full((15,), 0.5), half_normal(2.0), (-11.0, 2.3, 160)
        return LinearGaussian(prior, *options, sites)

    return Target("gp-amplitude_16", "hierarchy", lambda: (model, own(K, y)), solve)


def _targets() -> list[Target]:
    with double():
        even, uneven = spread(8), torch.logspace(math.log10(0.1), math.log10(50), 40)
        y40, y1000 = 1 + (1 + uneven**2).sqrt() * spread(40), 1.5 + 1.2 * spread(1000)
        errors = (torch.arange(1000) % 6 + 1.0).rsqrt()
        tries, seen = [1] * 12, [1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1]
        return [
            eight_schools(),
            normal_groups("groups-even_10", 2 + 2 * even, torch.ones(8), 5.0),
            normal_groups("groups-none_10", 0.9 * even, torch.ones(8), 1.0),
            normal_groups("groups-three_5", torch.tensor([-1.0, 0.5, 3.0]), torch.ones(3), 2.0),
            normal_groups("groups-strong_22", 3 * spread(20), torch.full((20,), 0.05), 5.0),
            normal_groups("groups-uneven_42", y40, uneven, 2.0),
            normal_groups("groups-thousand_1002", y1000, errors, 2.0),
            rows_of_groups(),
            poisson_groups(
                "poisson-60_62", 60, (-3.0, 2.0), 1.9, ((-2.0, 2.0, 49), (-0.8, 1.4, 36))
            ),
            poisson_groups(
                "poisson-few_8", 6, (-1.0, 1.0), 0.7, ((-4.0, 4.0, 60), (-12.0, 2.0, 60))
            ),
            bernoulli_groups("bernoulli-one_14", tries, seen, ((-6.0, 8.0, 52), (-10.5, 2.0, 64))),
            bernoulli_groups(
                "bernoulli-20_10",
                [20, 5, 3, 8, 40, 2, 9, 1],
                [4, 0, 3, 6, 30, 0, 2, 1],
                ((-5.0, 5.0, 44), (-9.0, 2.0, 72)),
            ),
            student_groups(),
            walk("walk-steps_41", 40, 0.3, as_steps=True),
            walk("walk-places_13", 12, 0.5, as_steps=False),
            ridge(),
            process(),
        ]


TARGETS: list[Target] = _targets()
