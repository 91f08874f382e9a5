"""Samples of a flow: drawn with a graph, and scored along their path or with it held fixed."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import TransformedDistribution

from pyroflow.flows.flow import FlowDistribution
from pyroflow.seeds import drawing
from pyroflow.transforms import Bijection


class CountedNormal(dist.Normal):
    """Standard normal numbers, of each of which the log density counts several times."""

    def __init__(self, counts: Tensor) -> None:
        super().__init__(torch.zeros_like(counts), torch.ones_like(counts))
        self.counts = counts

    def log_prob(self, value: Tensor) -> Tensor:
        """Of each number, as often as it counts."""
        return self.counts * super().log_prob(value)


class AlongPath(dist.TransformedDistribution):
    """A ``TransformedDistribution`` whose ``log_prob`` holds its parameters fixed.

    The gradient of log q(z) for z = z(θ, ε) then leaves out the score ∂ log q/∂θ, whose
    expectation is zero: the ELBO's gradient stays unbiased, and its variance vanishes where q is
    the posterior. Scoring a sample that the transforms have just made takes no root search.
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

    z (*, D) is what q, or an :class:`AlongPath`, has just made. Among pyroflow's transforms that is
    the gradient of log q(z(θ, ε)) less the part along the path, without a root search. The
    result has shape (*), and is None where a transform can be run forwards only.
    """
    full = FlowDistribution(q.base_dist, q.transforms)
    if all(isinstance(t, Bijection) for t in q.transforms):
        return full.log_prob(z) - AlongPath(q.base_dist, q.transforms).log_prob(z)
    try:
        return full.log_prob(z.detach())
    except (KeyError, NotImplementedError):  # Pyro's and torch's own for an inverse there is not
        return None


def draw_from(
    q: TransformedDistribution, shape: Sequence[int] = (), part: slice | None = None
) -> Tensor:
    """``q.rsample(shape)``, or part of it, between draws but for those of the base."""
    with drawing():
        x = q.base_dist.rsample(shape)
    x = x if part is None else x[part]
    for t in q.transforms:
        x = t(x)
    return x
