"""Edges and constraints: intervals, cut densities, simplices, correlations, counts."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..judging import Draws
from .grids import Grid, Gridded
from .target import Sampler, Target


def uniform() -> Target:
    """Three numbers in an interval, and no data."""

    def model() -> None:
        with pyro.plate("numbers", 3):
            pyro.sample("x", dist.Uniform(-2.0, 5.0))

    draw = lambda n: {"x": 7 * torch.rand(n, 3) - 2}  # noqa: E731
    return Target("uniform_3", "edges", lambda: (model, ()), lambda: Sampler(draw))


def truncated(name: str, y: float, sd: float) -> Target:
    """A normal observation of a number in (0, 1)."""

    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Uniform(0.0, 1.0))
        pyro.sample("y", dist.Normal(p, sd), obs=y)

    def solve() -> Sampler:
        low, high = (torch.special.ndtr(torch.tensor((edge - y) / sd)) for edge in (0.0, 1.0))

        def draw(num: int) -> Draws:
            p = y + sd * torch.special.ndtri(low + (high - low) * torch.rand(num))
            return {"p": p.clamp(1e-15, 1 - 1e-15)}

        return Sampler(draw, (high - low).log().item())

    return Target(name, "edges", lambda: (model, (torch.tensor(y),)), solve)


def cut() -> Target:
    """A Gaussian that a term of the model cuts off, at an edge that the support does not know."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("cut", torch.where(x[..., 0] > 0.5, 0.0, -torch.inf))

    def draw(num: int) -> Draws:
        low = torch.special.ndtr(torch.tensor(0.5))
        x = torch.special.ndtri(low + (1 - low) * torch.rand(num))
        return {"x": torch.stack([x, torch.randn(num)], -1)}

    evidence = math.log(0.5 * math.erfc(0.5 / math.sqrt(2)))
    answer = lambda: Sampler(draw, evidence)  # noqa: E731
    return Target("cut-half_plane_2", "edges", lambda: (model, ()), answer, smooth=False)


def scale_at_zero() -> Target:
    """A half-normal number that data push against zero."""

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.HalfNormal(1.0))
        pyro.sample("y", dist.Normal(x, 0.5), obs=y)

    def solve() -> Sampler:
        variance = 1 / (1 + 4)
        mean, sd = variance * 4 * -1.0, variance**0.5
        low = torch.special.ndtr(torch.tensor(-mean / sd))

        def draw(num: int) -> Draws:
            return {"x": mean - sd * torch.special.ndtri((1 - low) * torch.rand(num))}

        data = dist.Normal(0.0, math.sqrt(1.25)).log_prob(torch.tensor(-1.0))
        return Sampler(draw, (math.log(2) + data + torch.log1p(-low)).item())

    return Target("half_normal-pushed_1", "edges", lambda: (model, (torch.tensor(-1.0),)), solve)


def dirichlet(name: str, concentration: tuple[float, ...]) -> Target:
    """Shares without data."""

    def model() -> None:
        pyro.sample("share", dist.Dirichlet(torch.tensor(concentration)))

    def draw(num: int) -> Draws:
        # logs of Gamma(a) by Gamma(a + 1) U^{1 / a}, as small shares underflow; then a softmax
        a = torch.tensor(concentration)
        logs = dist.Gamma(a + 1, 1.0).sample((num,)).log() + torch.rand(num, len(a)).log() / a
        return {"share": logs.softmax(-1)}

    return Target(name, "edges", lambda: (model, ()), lambda: Sampler(draw))


def counts() -> Target:
    """Shares with counts, one of them zero."""
    seen = (12.0, 5.0, 0.0, 1.0, 3.0, 30.0)

    def model(seen: Tensor) -> None:
        share = pyro.sample("share", dist.Dirichlet(torch.ones(6)))
        pyro.sample("seen", dist.Multinomial(51, share), obs=seen)

    def solve() -> Sampler:
        after = 1 + torch.tensor(seen)
        evidence = sum(map(math.lgamma, (52, 6))) - math.lgamma(57)
        return Sampler(lambda n: {"share": dist.Dirichlet(after).sample((n,))}, evidence)

    return Target("shares-counts_5", "edges", lambda: (model, (torch.tensor(seen),)), solve)


def rare() -> Target:
    """Rates of events that were never, seldom and always seen."""

    def values() -> tuple[Tensor, Tensor]:
        return torch.tensor([0.0, 1.0, 20.0, 3.0]), torch.tensor([10.0, 200.0, 20.0, 4.0])

    def model(seen: Tensor, tries: Tensor) -> None:
        with pyro.plate("groups", len(seen)):
            p = pyro.sample("p", dist.Beta(1.0, 1.0))
            pyro.sample("seen", dist.Binomial(tries, p), obs=seen)

    def solve() -> Sampler:
        seen, tries = values()
        after = dist.Beta(1 + seen, 1 + tries - seen)
        evidence = -(1 + tries).log().sum().item()
        return Sampler(lambda n: {"p": after.sample((n,))}, evidence)

    return Target("rates-rare_4", "edges", lambda: (model, values()), solve)


def correlation(dim: int, concentration: float) -> Target:
    """The Cholesky factor of a random correlation matrix."""

    def model() -> None:
        pyro.sample("L", dist.LKJCholesky(dim, torch.tensor(concentration)))

    def draw(num: int) -> Draws:
        # by partial correlations (Lewandowski, Kurowicka and Joe, 2009, section 2.4): torch's own
        # sampler has other marginals from three rows on
        L = torch.zeros(num, dim, dim)
        L[:, 0, 0] = 1.0
        for i in range(1, dim):
            left = torch.ones(num)
            for j in range(i):
                shape = torch.tensor(concentration + (dim - 2 - j) / 2)
                partial = 2 * dist.Beta(shape, shape).sample((num,)) - 1
                L[:, i, j] = partial * left.sqrt()
                left = left * (1 - partial**2)
            L[:, i, i] = left.sqrt()
        return {"L": L}

    free = dim * (dim - 1) // 2
    name = f"correlations-{concentration:g}_{free}"
    return Target(name, "edges", lambda: (model, ()), lambda: Sampler(draw))


def observed_correlation() -> Target:
    """One correlation of a few pairs that agree."""

    def values() -> Tensor:
        return torch.tensor([[1.0, 1.2], [-0.5, -0.6], [2.0, 1.7], [-1.5, -1.4], [0.3, 0.5]])

    def model(pairs: Tensor) -> None:
        rho = pyro.sample("rho", dist.Uniform(-1.0, 1.0))
        rows = torch.stack([torch.stack([1 + 0 * rho, rho]), torch.stack([rho, 1 + 0 * rho])])
        with pyro.plate("rows", len(pairs)):
            pyro.sample("pairs", dist.MultivariateNormal(torch.zeros(2), rows), obs=pairs)

    def solve() -> Gridded:
        def log_density(z: Tensor) -> Tensor:
            rho = (z / 2).tanh()  # the logit on (-1, 1)
            rest = 1 - rho**2
            x, y = values().T
            square = (x**2 + y**2).sum() - 2 * rho * (x * y).sum()
            n = len(x)
            data = -n * math.log(2 * math.pi) - n / 2 * rest.log() - 0.5 * square / rest
            return data + (rest / 4).log()

        return Gridded(
            Grid(log_density, (-9.0, 12.0, 4001)), lambda z: {"rho": (z[:, 0] / 2).tanh()}
        )

    return Target("correlation-observed_1", "edges", lambda: (model, (values(),)), solve)


TARGETS: list[Target] = [
    uniform(),
    truncated("truncated-below_1", -0.1, 0.05),
    truncated("truncated-wide_1", 0.7, 1.0),
    cut(),
    scale_at_zero(),
    dirichlet("dirichlet-flat_2", (1.0, 1.0, 1.0)),
    dirichlet("dirichlet-sparse_4", (0.3,) * 5),
    counts(),
    rare(),
    correlation(3, 1.0),
    correlation(2, 0.6),
    observed_correlation(),
]
