"""The distributions of flows: scored in one pass a transform, or along the path of a sample."""

from __future__ import annotations

import pyro.distributions as dist
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import Transform, TransformedDistribution
from torch.distributions.transforms import _InverseTransform

from pyroflow.transforms import Bijection


class FlowDistribution(dist.TransformedDistribution):
    """A transformed distribution whose ``log_prob`` reads each transform's parameters once.

    Values, samples and gradients are those of ``TransformedDistribution``, of any transforms.

    Example:
        >>> import torch
        >>> from pyroflow import Planar
        >>> base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> FlowDistribution(base, [Planar(2)]).log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at value (*, D)."""
        if self._validate_args:
            self._validate_sample(value)
        total, event_dim = 0.0, len(self.event_shape)
        for t in reversed(self.transforms):
            value, log_det = _inverse_and_log_det(t, value)
            event_dim += t.domain.event_dim - t.codomain.event_dim
            total = total - sum_rightmost(log_det, event_dim - t.domain.event_dim)
        base = self.base_dist
        return total + sum_rightmost(base.log_prob(value), event_dim - len(base.event_shape))


def _inverse_and_log_det(t: Transform, y: Tensor) -> tuple[Tensor, Tensor]:
    """X with t(x) = y, and log |det dy/dx|."""
    if isinstance(t, Bijection):
        return t.inverse_and_log_det(y)
    if isinstance(t, _InverseTransform) and isinstance(t.inv, Bijection):
        x, log_det = t.inv.forward_and_log_det(y)
        return x, -log_det
    x = t.inv(y)
    return x, t.log_abs_det_jacobian(x, y)


class AlongPath(dist.TransformedDistribution):
    """A transformed distribution whose ``log_prob`` holds its parameters fixed.

    Values and samples are those of ``TransformedDistribution``. The gradient of log q(z) for
    z = z(θ, ε) then leaves out the score ∂ log q/∂θ, whose expectation is zero: the ELBO's gradient
    stays unbiased, and its variance vanishes where q is the posterior. Scoring a sample that
    the transforms have just made takes no root search.

    Every transform must be one of pyroflow's.

    References:
        Roeder, Wu and Duvenaud, Sticking the landing, 2017, https://arxiv.org/abs/1703.09194.

    Example:
        >>> import torch
        >>> from pyroflow import Planar
        >>> base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> q = AlongPath(base, [Planar(2, num_layers=4)])
        >>> q.log_prob(q.rsample((5,))).shape
        torch.Size([5])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at value (*, D), differentiable in value alone."""
        if self._validate_args:
            self._validate_sample(value)
        log_det, origin = 0.0, value
        for t in reversed(self.transforms):
            if not isinstance(t, Bijection):
                raise TypeError(
                    f"AlongPath needs pyroflow's transforms, got {type(t).__name__}: use "
                    "TransformedDistribution instead"
                )
            value, step, origin = t.inverse_along_path(value, origin)
            log_det = log_det + step
        return self.base_dist.log_prob(value) - log_det


def log_prob_at_fixed(q: TransformedDistribution, z: Tensor) -> Tensor | None:
    """A number for each sample z = z(θ, ε) of q, with the gradient ∂ log q/∂θ at z held fixed.

    Among pyroflow's transforms that is the gradient of log q(z(θ, ε)) less the part along the path,
    and takes no root search.

    Args:
        q: the distribution; it may be an :class:`AlongPath`.
        z: the sample that it has just made, shape (*, D).

    Returns:
        Shape (*); None where a transform can be run forwards only.
    """
    full = FlowDistribution(q.base_dist, q.transforms)
    if all(isinstance(t, Bijection) for t in q.transforms):
        return full.log_prob(z) - AlongPath(q.base_dist, q.transforms).log_prob(z)
    try:
        return full.log_prob(z.detach())
    except (KeyError, NotImplementedError):  # Pyro's and torch's own for an inverse there is not
        return None
