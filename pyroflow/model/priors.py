"""Prior densities as functions of the unconstrained latents, where values would round."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch import distributions as td
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import AffineTransform, PowerTransform
from torch.nn.functional import logsigmoid, softplus

from pyroflow.model.supports import (
    CorrCholesky,
    StickBreaking,
    base_of,
    bijection,
    is_real,
    plain_bijection,
    preimage,
)

NO_SHAPE = Size()
_POSITIVE = (constraints.positive, constraints.nonnegative)  # by identity


def log_prob_at(fn: td.Distribution, latent: Tensor) -> Tensor:
    """Log density of a distribution at the value that unconstrained latents are mapped to.

    For families whose density has no bound at an edge of the support it is a function of the
    latents, exact where the value is rounded; for others it is that of the value.

    Args:
        fn: any distribution with a continuous support.
        latent: z, such that ``bijection(fn.support)(z)`` is the value.

    Example:
        >>> prior, z = td.Beta(torch.tensor(0.1), torch.tensor(0.1)), torch.tensor(100.0)
        >>> log_prob_at(prior, z) - z  # the value is 1, and log(1 − value) is −100
        tensor(-12.98...)
    """
    # By the method and not the class: a subclass with a density of its own is another family.
    rule = _RULES.get(type(fn).log_prob)
    return fn.log_prob(bijection(fn.support)(latent)) if rule is None else rule(fn, latent)


def _beta(fn: td.Beta, z: Tensor) -> Tensor:
    a, b = fn.concentration1, fn.concentration0
    log_norm = a.lgamma() + b.lgamma() - (a + b).lgamma()
    return (a - 1) * logsigmoid(z) + (b - 1) * logsigmoid(-z) - log_norm


def _dirichlet(fn: td.Dirichlet, z: Tensor) -> Tensor:
    a = fn.concentration
    log_norm = a.lgamma().sum(-1) - a.sum(-1).lgamma()
    return ((a - 1) * StickBreaking().log_parts(z)).sum(-1) - log_norm


def _gamma(fn: td.Gamma, z: Tensor) -> Tensor:
    log_scaled = z + fn.rate.log()
    return fn.concentration * log_scaled - z - log_scaled.exp() - fn.concentration.lgamma()


def _half_cauchy(fn: td.HalfCauchy, z: Tensor) -> Tensor:
    log_scale = fn.scale.log()
    return math.log(2 / math.pi) - log_scale - softplus(2 * (z - log_scale))


def _fisher_snedecor(fn: td.FisherSnedecor, z: Tensor) -> Tensor:
    a, b = fn.df1 / 2, fn.df2 / 2
    log_odds = z + a.log() - b.log()
    log_norm = a.lgamma() + b.lgamma() - (a + b).lgamma()
    return a * log_odds - z - (a + b) * softplus(log_odds) - log_norm


def _lkj_cholesky(fn: td.LKJCholesky, z: Tensor) -> Tensor:
    powers = torch.arange(fn.dim - 1, -1, -1, dtype=z.dtype, device=z.device)
    powers = 2 * (fn.concentration - 1).unsqueeze(-1) + powers
    identity = torch.eye(fn.dim, dtype=z.dtype, device=z.device)  # all of its factors are one
    return (powers * CorrCholesky().log_diagonal(z)).sum(-1) + fn.log_prob(identity)


def _kumaraswamy(fn: td.Kumaraswamy, z: Tensor) -> Tensor:
    a, b = fn.concentration1, fn.concentration0
    log_rest = _log1mexp(a.log() + _log_softplus(-z))
    return a.log() + b.log() + (a - 1) * logsigmoid(z) + (b - 1) * log_rest


def _log_softplus(x: Tensor) -> Tensor:
    """Log log(1 + e^x), by its series where the inner logarithm underflows."""
    series = x - x.clamp(max=-15).exp() / 2
    return torch.where(x < -15, series, softplus(x.clamp(min=-15)).log())


def _log1mexp(log_u: Tensor) -> Tensor:
    """Log(1 − e^{−u}) of log u, by its series where u underflows."""
    u = log_u.exp()
    larger = u.clamp(min=1e-3)
    quotient = (-torch.expm1(-larger)).log() - larger.log()
    return log_u + torch.where(u < 1e-3, u.square() / 24 - u / 2, quotient)


def _transformed(fn: td.TransformedDistribution, z: Tensor) -> Tensor:
    """By the density of what the last transform is applied to, if its latents are known."""
    if isinstance(fn, td.Kumaraswamy):
        return _kumaraswamy(fn, z)
    *first, last = fn.transforms
    inner = td.TransformedDistribution(fn.base_dist, first) if first else fn.base_dist
    support, to_value = base_of(fn.support), bijection(fn.support)
    if is_real(inner.support) and last == plain_bijection(support):
        log_det = to_value.log_abs_det_jacobian(z, to_value(z))
        return inner.log_prob(z) - log_det
    if isinstance(inner, td.LKJCholesky) and support is constraints.corr_matrix:
        factor = CorrCholesky()(z)
        return log_prob_at(inner, z) - last.log_abs_det_jacobian(factor, last(factor))
    if fn.support in _POSITIVE and inner.support in _POSITIVE:
        if isinstance(last, PowerTransform):
            x = z / last.exponent
            return log_prob_at(inner, x) - last.exponent.abs().log() - z + x
        if isinstance(last, AffineTransform) and not isinstance(last.loc, Tensor) and last.loc == 0:
            log_scale = torch.as_tensor(last.scale, dtype=z.dtype, device=z.device).log()
            return log_prob_at(inner, z - log_scale) - log_scale
    return fn.log_prob(to_value(z))


def _independent(fn: td.Independent, z: Tensor) -> Tensor:
    return sum_rightmost(log_prob_at(fn.base_dist, z), fn.reinterpreted_batch_ndims)


def _masked(fn: dist.MaskedDistribution, z: Tensor) -> Tensor:
    if fn._mask is False:
        return fn.log_prob(bijection(fn.support)(z))
    return scale_and_mask(log_prob_at(fn.base_dist, z), mask=fn._mask)


def _expanded(fn: ExpandedDistribution, z: Tensor) -> Tensor:
    log_prob = log_prob_at(fn.base_dist, z)
    return log_prob.expand(torch.broadcast_shapes(fn.batch_shape, log_prob.shape))


_RULES: dict[Callable, Callable[[Any, Tensor], Tensor]] = {
    td.Beta.log_prob: _beta,
    td.Dirichlet.log_prob: _dirichlet,
    td.FisherSnedecor.log_prob: _fisher_snedecor,
    td.Gamma.log_prob: _gamma,
    td.HalfCauchy.log_prob: _half_cauchy,
    td.LKJCholesky.log_prob: _lkj_cholesky,
    td.TransformedDistribution.log_prob: _transformed,
    td.Independent.log_prob: _independent,
    dist.MaskedDistribution.log_prob: _masked,
    ExpandedDistribution.log_prob: _expanded,
}


class AtLatent(dist.TorchDistribution):
    """A prior with its density at the latents that a value remembers to come from."""

    arg_constraints = {}

    def __init__(self, base_dist: td.Distribution) -> None:
        self.base_dist, self.has_rsample = base_dist, base_dist.has_rsample
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=False)

    @constraints.dependent_property
    def support(self) -> Constraint:
        """That of the prior."""
        return self.base_dist.support

    def expand(self, batch_shape: Size, _instance: object = None) -> AtLatent:
        """The same in a larger batch."""
        return AtLatent(self.base_dist.expand(batch_shape))

    def sample(self, sample_shape: Size = NO_SHAPE) -> Tensor:
        """Draws of the prior."""
        return self.base_dist.sample(sample_shape)

    def rsample(self, sample_shape: Size = NO_SHAPE) -> Tensor:
        """Likewise."""
        return self.base_dist.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at a value, by the latents that it remembers."""
        origin = preimage(value)
        if origin is None or not _same_map(origin.support, self.support):
            return self.base_dist.log_prob(value)
        return log_prob_at(self.base_dist, origin.latent)


def _same_map(first: Constraint, second: Constraint) -> bool:
    """Whether two supports are one for all values of the other latents."""
    first, second = base_of(first), base_of(second)
    bounds = vars(first).values()
    fixed = not any(isinstance(bound, Tensor) for bound in [*bounds, *vars(second).values()])
    return type(first) is type(second) and fixed and vars(first) == vars(second)


class PriorsAtLatents(Messenger):
    """Score the latents of a model where the guide drew them, and not where they were rounded to.

    Values that remember no latents, such as those of other guides, are scored as they are.
    """

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = msg["fn"]
        if msg["is_observed"] or site_is_subsample(msg) or type(fn).log_prob not in _RULES:
            return
        if not (fn.support.is_discrete or is_real(fn.support)):
            msg["fn"] = AtLatent(fn)
