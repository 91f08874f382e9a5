"""Heavy tails and skew: families that are known, and likelihoods that do not bound them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Cauchy, Normal

from ..judging import Draws
from .grids import Grid, Gridded
from .target import Sampler, Target

Family = Callable[[], dist.TorchDistribution]


def independent(name: str, kind: str, dim: int, family: Family, heavy: bool = False) -> Target:
    """That many independent numbers of a family, which torch samples."""

    def model() -> None:
        with pyro.plate("numbers", dim):
            pyro.sample("x", family())

    def solve() -> Sampler:
        return Sampler(lambda n: {"x": family().expand((n, dim)).sample()})

    return Target(name, kind, lambda: (model, ()), solve, heavy=("x",) if heavy else ())


def elliptical() -> Target:
    """A multivariate t with three degrees of freedom: one radius for all directions."""

    def scale_tril() -> Tensor:
        return torch.linalg.cholesky(torch.full((5, 5), 0.7) + 0.3 * torch.eye(5))

    def model() -> None:
        pyro.sample("x", dist.MultivariateStudentT(torch.tensor(3.0), torch.zeros(5), scale_tril()))

    def draw(num: int) -> Draws:
        chi2 = torch.randn(num, 3).square().sum(1, keepdim=True)
        return {"x": torch.randn(num, 5) @ scale_tril().T * (3 / chi2).sqrt()}

    build = lambda: (model, ())  # noqa: E731
    return Target("t3-elliptical_5", "tails", build, lambda: Sampler(draw), heavy=("x",))


def outliers() -> Target:
    """The place of Cauchy data that disagree: two unlike modes."""

    def values() -> Tensor:
        return torch.tensor([-4.0, -3.5, -3.8, 4.0, 4.9, 4.1])

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Cauchy(loc, 0.5), obs=y)

    def log_density(loc: Tensor) -> Tensor:
        data = Cauchy(loc[:, None], 0.5).log_prob(values()).sum(1)
        return Normal(0.0, 10.0).log_prob(loc) + data

    def solve() -> Gridded:
        return Gridded(Grid(log_density, (-25.0, 25.0, 8001)), lambda x: {"loc": x[:, 0]})

    return Target("outliers_1", "modes", lambda: (model, (values(),)), solve)


def cauchy_prior() -> Target:
    """A Cauchy prior and data that say no more than that the number is large."""

    def model() -> None:
        x = pyro.sample("x", dist.Cauchy(0.0, 1.0))
        pyro.sample("y", dist.Bernoulli(logits=x - 3), obs=torch.tensor(1.0))

    def solve() -> Gridded:
        # in t = sinh⁻¹ x, where the density falls like exp(−t)
        def log_density(t: Tensor) -> Tensor:
            x = t.sinh()
            return (
                Cauchy(0.0, 1.0).log_prob(x)
                + torch.nn.functional.logsigmoid(x - 3)
                + t.cosh().log()
            )

        grid = Grid(log_density, (-6.0, 30.0, 8001))
        return Gridded(grid, lambda t: {"x": t[:, 0].sinh()}, in_columns=False)

    return Target("cauchy-one_sided_1", "tails", lambda: (model, ()), solve, heavy=("x",))


def horseshoe_prior(dim: int) -> Target:
    """The prior of a horseshoe: a funnel with heavy tails for each coefficient."""

    def model() -> None:
        with pyro.plate("coefficients", dim):
            lam = pyro.sample("lam", dist.HalfCauchy(1.0))
            pyro.sample("beta", dist.Normal(0.0, lam))

    def draw(num: int) -> Draws:
        lam = (math.pi / 2 * torch.rand(num, dim)).tan()
        return {"lam": lam, "beta": lam * torch.randn(num, dim)}

    build = lambda: (model, ())  # noqa: E731
    name = f"horseshoe-prior_{2 * dim}"
    return Target(name, "tails", build, lambda: Sampler(draw), heavy=("beta",))


def horseshoe_means(y: tuple[float, ...]) -> Target:
    """A horseshoe prior of normal means, with its overall scale known."""

    def model(y: Tensor) -> None:
        with pyro.plate("means", len(y)):
            lam = pyro.sample("lam", dist.HalfCauchy(1.0))
            beta = pyro.sample("beta", dist.Normal(0.0, 0.5 * lam))
            pyro.sample("y", dist.Normal(beta, 1.0), obs=y)

    def solve() -> Sampler:
        def grid(y: float) -> Grid:
            def log_density(u: Tensor) -> Tensor:
                data = Normal(0.0, (1 + 0.25 * (2 * u).exp()).sqrt()).log_prob(torch.tensor(y))
                return data + math.log(2 / math.pi) + u - torch.log1p((2 * u).exp())

            return Grid(log_density, (-14.0, 16.0, 3001))

        grids = [grid(value) for value in y]

        def draw(num: int) -> Draws:
            lam = torch.cat([g.sample(num) for g in grids], 1).exp()
            shrink = 0.25 * lam**2 / (1 + 0.25 * lam**2)
            beta = shrink * torch.tensor(y) + shrink.sqrt() * torch.randn(num, len(y))
            return {"lam": lam, "beta": beta}

        return Sampler(draw, sum(g.log_evidence for g in grids))

    return Target(
        f"horseshoe-means_{2 * len(y)}", "tails", lambda: (model, (torch.tensor(y),)), solve
    )


TARGETS: list[Target] = [
    independent("cauchy_1", "tails", 1, lambda: dist.Cauchy(0.0, 1.0), heavy=True),
    independent("cauchy_5", "tails", 5, lambda: dist.Cauchy(2.0, 3.0), heavy=True),
    independent("t2_3", "tails", 3, lambda: dist.StudentT(2.0, 0.0, 1.0), heavy=True),
    independent("t5_10", "tails", 10, lambda: dist.StudentT(5.0, 0.0, 1.0)),
    independent("half_cauchy_1", "tails", 1, lambda: dist.HalfCauchy(1.0)),
    independent("half_cauchy_4", "tails", 4, lambda: dist.HalfCauchy(5.0)),
    independent("laplace_10", "tails", 10, lambda: dist.Laplace(0.0, 1.0)),
    independent("gamma-half_1", "skewed", 1, lambda: dist.Gamma(0.5, 1.0)),
    independent("gamma-three_5", "skewed", 5, lambda: dist.Gamma(3.0, 0.1)),
    independent("inverse_gamma_2", "skewed", 2, lambda: dist.InverseGamma(1.0, 2.0)),
    independent("lognormal_4", "skewed", 4, lambda: dist.LogNormal(1.0, 2.0)),
    independent("beta-half_2", "skewed", 2, lambda: dist.Beta(0.5, 0.5)),
    independent("beta-uneven_3", "skewed", 3, lambda: dist.Beta(0.7, 12.0)),
    independent("gumbel_5", "skewed", 5, lambda: dist.Gumbel(0.0, 1.0)),
    independent("weibull_3", "skewed", 3, lambda: dist.Weibull(2.0, 0.7)),
    elliptical(),
    outliers(),
    cauchy_prior(),
    horseshoe_prior(1),
    horseshoe_prior(4),
    horseshoe_means((0.0, 0.5, -1.0, 3.0, 6.0)),
]
