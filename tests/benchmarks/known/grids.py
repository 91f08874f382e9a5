"""Exact answers by quadrature: a grid in few dimensions, and latents that are easy given it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import HalfCauchy, HalfNormal, MultivariateNormal, Normal

from ..judging import Draws

EDGE = 1e-4  # of the largest density: what may be left at the ends of a grid

LogDensity = Callable[..., Tensor]  # of coordinates that broadcast
Axis = tuple[float, float, int]  # first, last, number of points


class Grid:
    """A smooth density in unconstrained coordinates as a sum over a grid.

    The trapezoidal sum of a smooth density that vanishes at both ends converges faster than any
    power of the step, so draws of the grid's points have its moments.

    Raises:
        ValueError: If the density does not vanish at the ends of an axis.
    """

    def __init__(self, log_density: LogDensity, *axes: Axis) -> None:
        self.log_density = log_density
        self.axes = [torch.linspace(*axis) for axis in axes]
        self.points = torch.cartesian_prod(*self.axes).reshape(-1, len(axes))
        values = log_density(*self.points.T)
        cells = sum(math.log(axis[1] - axis[0]) for axis in self.axes)
        self.log_evidence = (values.logsumexp(0) + cells).item()
        self.weights = values.softmax(0)
        self._check(values.reshape([len(axis) for axis in self.axes]))

    def _check(self, values: Tensor) -> None:
        for i in range(values.dim()):
            ends = values.movedim(i, 0)[[0, -1]].amax().exp() / values.amax().exp()
            if ends > EDGE:
                raise ValueError(f"axis {i} of the grid ends where the density is {ends:.1e}")

    def indices(self, num: int) -> Tensor:
        """Points of the grid drawn by weight, shape (num,)."""
        edges = self.weights.cumsum(0)
        return torch.searchsorted(edges, torch.rand(num) * edges[-1]).clamp(max=len(edges) - 1)

    def sample(self, num: int) -> Tensor:
        """Points drawn by weight, shape (num, number of axes)."""
        return self.points[self.indices(num)]


class Gridded:
    """A posterior of few numbers: a grid, and the sites made of its coordinates.

    ``in_columns`` says that the coordinates are the unconstrained columns.
    """

    def __init__(
        self, grid: Grid, sites: Callable[[Tensor], Draws], in_columns: bool = True
    ) -> None:
        self.grid, self.sites, self.in_columns = grid, sites, in_columns
        self.log_evidence = grid.log_evidence

    def draws(self, num: int) -> Draws:
        """Points of the grid as values of the sites."""
        return self.sites(self.grid.sample(num))

    def moments(self) -> None:
        """None: they are those of the draws."""


class LinearGaussian:
    """Latents x ~ N(m, S(scale)) and data y ~ N(H x, diag(s²)) with an unknown scale of S.

    Args:
        prior: from the scale to m (D,) and S (D, D).
        H: shape (N, D).
        y: shape (N,).
        s: shape (N,).
        log_scale: of the prior of the scale, as a function of its log, Jacobian included.
        axis: of the log scale.
        sites: from x (num, D) and the scale (num,) to values of the sites.
    """

    def __init__(
        self,
        prior: Callable[[Tensor], tuple[Tensor, Tensor]],
        H: Tensor,
        y: Tensor,
        s: Tensor,
        log_scale: LogDensity,
        axis: Axis,
        sites: Callable[[Tensor, Tensor], Draws],
    ) -> None:
        self.prior, self.H, self.y, self.s, self.sites = prior, H, y, s, sites
        self.grid = Grid(lambda u: self._evidence(u) + log_scale(u), axis)
        self.log_evidence = self.grid.log_evidence

    def _evidence(self, u: Tensor) -> Tensor:
        found = []
        for scale in u.exp():
            m, S = self.prior(scale)
            data = MultivariateNormal(self.H @ m, self.H @ S @ self.H.T + self.s.square().diag())
            found.append(data.log_prob(self.y))
        return torch.stack(found)

    def draws(self, num: int) -> Draws:
        """The scale by weight, then x from its exact conditional."""
        index = self.grid.indices(num).sort().values
        x = []
        for i, count in zip(*index.unique_consecutive(return_counts=True), strict=True):
            mean, factor = self._given(self.grid.points[i, 0].exp())
            x.append(mean + torch.randn(int(count), len(mean)) @ factor.T)
        order = torch.randperm(num)
        return self.sites(torch.cat(x)[order], self.grid.points[index, 0].exp()[order])

    def _given(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, and a factor of the covariance, of x given data and scale."""
        m, S = self.prior(scale)
        gain = torch.linalg.solve(self.H @ S @ self.H.T + self.s.square().diag(), self.H @ S).T
        rest = torch.eye(len(m)) - gain @ self.H
        covariance = rest @ S @ rest.T + gain @ self.s.square().diag() @ gain.T
        values, vectors = torch.linalg.eigh(covariance)
        return m + gain @ (self.y - self.H @ m), vectors * values.clamp(min=0).sqrt()

    def moments(self) -> None:
        """None: they are those of the draws."""


class NormalGroups:
    """y_j ~ N(theta_j, s_j²), theta_j ~ N(mu, tau²), mu ~ N(0, 5²), tau of some prior.

    Quadrature over log tau; mu and theta are Gaussian given it.
    """

    def __init__(self, y: Tensor, s: Tensor, log_tau: LogDensity, axis: Axis) -> None:
        self.y, self.s = y, s
        self.grid = Grid(lambda u: self._evidence(u) + log_tau(u), axis)
        self.log_evidence = self.grid.log_evidence

    def _mu(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of mu given tau, shapes of tau."""
        weight = 1 / (self.s**2 + tau[:, None] ** 2)
        variance = 1 / (weight.sum(1) + 1 / 25)
        return variance * (weight @ self.y), variance

    def _evidence(self, u: Tensor) -> Tensor:
        """At mu = 0: p(y | tau) = p(y | mu, tau) p(mu) / p(mu | y, tau)."""
        mean, variance = self._mu(u.exp())
        data = Normal(0.0, (self.s**2 + u.exp()[:, None] ** 2).sqrt()).log_prob(self.y).sum(1)
        zero = torch.zeros_like(mean)
        return data + Normal(0.0, 5.0).log_prob(zero) - Normal(mean, variance.sqrt()).log_prob(zero)

    def draws(self, num: int) -> Draws:
        """log tau by weight, then mu, then theta."""
        tau = self.grid.sample(num)[:, 0].exp()
        mean, variance = self._mu(tau)
        mu = mean + variance.sqrt() * torch.randn(num)
        precision = self.s**-2 + tau[:, None] ** -2
        mean = (self.y * self.s**-2 + (mu / tau**2)[:, None]) / precision
        theta = mean + precision.rsqrt() * torch.randn(num, len(self.y))
        return {"mu": mu, "tau": tau, "theta": theta}

    def moments(self) -> tuple[Tensor, Tensor]:
        """Of mu, log tau and theta."""
        u, w = self.grid.points[:, 0], self.grid.weights
        tau = u.exp()
        mean, variance = self._mu(tau)
        v = 1 / (self.s**-2 + tau[:, None] ** -2)
        pull = v / tau[:, None] ** 2
        theta = v * self.y * self.s**-2 + pull * mean[:, None]
        means = torch.cat([mean[:, None], u[:, None], theta], 1)
        zero = torch.zeros_like(u)[:, None]
        variances = torch.cat([variance[:, None], zero, v + pull**2 * variance[:, None]], 1)
        total = w @ means
        return total, (w @ (variances + (means - total) ** 2)).sqrt()


class Groups:
    """Groups of one latent each, theta_j = mu + tau e_j, with any likelihood and prior of e.

    Quadrature over mu, log tau and each e_j, the last in sinh⁻¹ e, so that tails are reached.

    Args:
        log_likelihood: from j and theta, of any shape, to log p(data of group j | theta).
        num: number of groups.
        log_effect: log density of e.
        log_prior: of mu and log tau.
        mu: axis.
        log_tau: axis.
        reach: the largest sinh⁻¹ e.
    """

    def __init__(
        self,
        log_likelihood: Callable[[int, Tensor], Tensor],
        num: int,
        log_effect: LogDensity,
        log_prior: LogDensity,
        mu: Axis,
        log_tau: Axis,
        reach: float = 2.8,
    ) -> None:
        self.log_likelihood, self.num = log_likelihood, num
        t = torch.linspace(-reach, reach, 241)
        self.e = t.sinh()
        self.log_cell = log_effect(self.e) + t.cosh().log() + math.log(t[1] - t[0])
        self.grid = Grid(lambda m, u: self._integrate(m, u) + log_prior(m, u), mu, log_tau)
        self.log_evidence = self.grid.log_evidence

    def _terms(self, j: int, m: Tensor, u: Tensor) -> Tensor:
        """Log weights of the grid of e, shape (K, 241)."""
        theta = m[:, None] + u.exp()[:, None] * self.e
        return self.log_likelihood(j, theta) + self.log_cell

    def _integrate(self, m: Tensor, u: Tensor) -> Tensor:
        total, self.means, self.squares, tau = 0.0, [], [], u.exp()
        powers = torch.stack([self.e, self.e**2], 1)
        for j in range(self.num):
            log_weights = self._terms(j, m, u)
            sums = log_weights.logsumexp(1)
            first, second = ((log_weights - sums[:, None]).exp() @ powers).T
            total = total + sums
            self.means.append(m + tau * first)
            self.squares.append(m**2 + 2 * m * tau * first + tau**2 * second)
        return total

    def moments(self) -> tuple[Tensor, Tensor]:
        """Of mu, log tau and theta."""
        w, points = self.grid.weights, self.grid.points
        mean = w @ torch.cat([points, torch.stack(self.means, 1)], 1)
        square = w @ torch.cat([points**2, torch.stack(self.squares, 1)], 1)
        return mean, (square - mean**2).sqrt()

    def draws(self, num: int) -> Draws:
        """mu and log tau by weight, then each theta by weight on its grid."""
        m, u = self.grid.sample(num).T
        theta = []
        for j in range(self.num):
            edges = self._terms(j, m, u).softmax(1).cumsum(1)
            k = torch.searchsorted(edges, torch.rand(num, 1) * edges[:, -1:])
            theta.append(m + u.exp() * self.e[k.clamp(max=len(self.e) - 1)][:, 0])
        return {"mu": m, "tau": u.exp(), "theta": torch.stack(theta, 1)}


def half_normal(scale: float) -> LogDensity:
    """Log density of u = log x where x is half-normal."""
    return lambda u: HalfNormal(scale).log_prob(u.exp()) + u


def half_cauchy(scale: float) -> LogDensity:
    """Log density of u = log x where x is half-Cauchy."""
    return lambda u: HalfCauchy(scale).log_prob(u.exp()) + u
