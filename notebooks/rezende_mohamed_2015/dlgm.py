"""The deep latent Gaussian model of Rezende & Mohamed 2015, section 6.2, and its inference net."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import Distribution, SigmoidTransform, Transform

from pyroflow.checks import check_count
from pyroflow.flows import draw_from

MAX_LOG_SCALE = 5.0  # of the logit-normal: colours that repeat exactly have no finite likelihood


@dataclass(frozen=True)
class Likelihood:
    """p(x|z) from the outputs of the generative network.

    Attributes:
        outputs: how many a dimension of x needs.
        make: outputs (*B, outputs · X) ↦ distribution with batch shape B and event shape (X,).
    """

    outputs: int
    make: Callable[[Tensor], Distribution]


def _bernoulli(logits: Tensor) -> Distribution:
    return dist.Bernoulli(logits=logits, validate_args=False).to_event(1)


def _logit_normal(outputs: Tensor) -> Distribution:
    mean, raw = outputs.chunk(2, -1)
    log_scale = MAX_LOG_SCALE * (raw / MAX_LOG_SCALE).tanh()  # a clamp would stop its gradient
    normal = dist.Normal(mean, log_scale.exp(), validate_args=False)
    return dist.TransformedDistribution(normal, [SigmoidTransform()]).to_event(1)


BERNOULLI = Likelihood(1, _bernoulli)
LOGIT_NORMAL = Likelihood(2, _logit_normal)


class Terms(NamedTuple):
    """ln p(x|z_K) + ln p(z_K) and ln q_K(z_K|x), each of shape (S, N)."""

    log_joint: Tensor
    log_q: Tensor

    def bound(self, beta: float = 1.0) -> Tensor:
        """F^β of each image, in nats, shape (N,): equation 15, and 20 for β < 1.

        β scales the log joint, prior and likelihood alike, and never the entropy of q.
        """
        return (self.log_q - beta * self.log_joint).mean(0)


class Maxout(nn.Module):
    """The largest of ``window`` affine maps, for each of ``units`` hidden units."""

    def __init__(self, inputs: int, units: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.linear = nn.Linear(inputs, units * window)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (*B, inputs) to (*B, units)."""
        first, *others = self.linear(x).unflatten(-1, (self.window, -1)).unbind(-2)
        for other in others:  # a chain of maxima has a cheaper gradient than one over a dimension
            first = torch.maximum(first, other)
        return first


class DLGM(nn.Module):
    """p(z) = N(0, I), p(x|z) by a maxout network, and q(z|x): an amortised flow.

    One inference network maps x to the H hidden units, these linearly to the mean and log standard
    deviation of q_0, and over √H they are the context of the conditional transforms (section 4.2).

    Args:
        data_dim: X, the pixels.
        transforms: from z_0 to z_K, conditional ones with ``context_dim=hidden_dim``.
        latent_dim: D.
        hidden_dim: units of each network's hidden layer, after the maximum.
        window: affine maps behind each unit.
        likelihood: p(x|z).
        centre: shape (X,), taken off x before the inference network, such as the mean image: the
            same family of networks, trained with less trouble.

    Example:
        >>> import torch
        >>> from pyroflow import ConditionalPlanar
        >>> flow = ConditionalPlanar(4, context_dim=8, num_layers=3, hidden_dims=())
        >>> dlgm = DLGM(6, [flow], latent_dim=4, hidden_dim=8)
        >>> dlgm(torch.ones(5, 6)).bound().shape
        torch.Size([5])
    """

    def __init__(
        self,
        data_dim: int,
        transforms: Sequence[Transform | ConditionalTransform] = (),
        *,
        latent_dim: int = 40,
        hidden_dim: int = 400,
        window: int = 4,
        likelihood: Likelihood = BERNOULLI,
        centre: Tensor | None = None,
    ) -> None:
        super().__init__()
        sizes = {"data_dim": data_dim, "latent_dim": latent_dim, "hidden_dim": hidden_dim}
        for name, size in sizes.items():
            check_count(name, size, 1)
        self.latent_dim, self.likelihood = latent_dim, likelihood
        self.encoder = Maxout(data_dim, hidden_dim, window)
        self.q_0 = nn.Linear(hidden_dim, 2 * latent_dim)
        self.decoder = Maxout(latent_dim, hidden_dim, window)
        self.outputs = nn.Linear(hidden_dim, likelihood.outputs * data_dim)
        self.transforms = list(transforms)
        self.parts = nn.ModuleList(t for t in transforms if isinstance(t, nn.Module))
        self.register_buffer("centre", torch.zeros(data_dim) if centre is None else centre)

    def forward(self, x: Tensor, samples: int = 1) -> Terms:
        """The terms of the bound at images x (N, X), with S samples for each."""
        q = self.posterior(x)
        z = draw_from(q, (samples,))
        return Terms(self.log_joint(x, z), q.log_prob(z))

    def posterior(self, x: Tensor) -> Distribution:
        """q_K(z|x), with batch shape (N,) and event shape (D,)."""
        hidden = self.encoder(x - self.centre)
        mean, log_scale = self.q_0(hidden).chunk(2, -1)
        q_0 = dist.Normal(mean, log_scale.exp(), validate_args=False).to_event(1)
        # a linear map of H units moves √H times as far in a step of Adam as a parameter does
        context = hidden / math.sqrt(hidden.shape[-1])
        conditioned = [
            t.condition(context) if isinstance(t, ConditionalTransform) else t
            for t in self.transforms
        ]
        return dist.TransformedDistribution(q_0, conditioned, validate_args=False)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """The log joint ln p(x|z) + ln p(z) of x (N, X) and z (S, N, D); shape (S, N)."""
        prior = -0.5 * z.square().sum(-1) - 0.5 * self.latent_dim * math.log(2 * math.pi)
        return self.given(z).log_prob(x) + prior

    def given(self, z: Tensor) -> Distribution:
        """p(x|z), for z of shape (*B, D)."""
        return self.likelihood.make(self.outputs(self.decoder(z)))

    def model(self, x: Tensor) -> None:
        """The generative side as a Pyro model of images (N, X)."""
        pyro.module("dlgm", self)
        with pyro.plate("images", len(x)):
            prior = dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", self.given(z), obs=x)

    def guide(self, x: Tensor) -> Any:
        """The inference network as a Pyro guide."""
        pyro.module("dlgm", self)
        with pyro.plate("images", len(x)):
            return pyro.sample("z", self.posterior(x))
