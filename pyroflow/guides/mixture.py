"""A mixture of flows over the latents of a model, for posteriors with several modes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from pyroflow.guides.autoflow import AutoFlow
from pyroflow.guides.flow_guide import FlowGuide
from pyroflow.seeds import drawing
from pyroflow.shown import listed

NO_SHAPE = Size()


class FlowMixture(dist.TorchDistribution):
    """q(z) = Σ_k π_k q_k(z) over vectors z (D,); it has no gradient along the path of a sample.

    Args:
        log_weights: log π, shape (K,).
        parts: K distributions with event shape (D,).
    """

    arg_constraints = {"log_weights": constraints.real_vector}
    support = constraints.real_vector

    def __init__(
        self, log_weights: Tensor, parts: Sequence[Distribution], batch_shape: Size = NO_SHAPE
    ) -> None:
        self.log_weights, self.parts = log_weights, list(parts)
        super().__init__(batch_shape, parts[0].event_shape, validate_args=False)

    def sample(self, sample_shape: Size = NO_SHAPE) -> Tensor:
        """Draws (*S, *batch, D), independent along the batch."""
        shape = Size(sample_shape) + self.batch_shape
        with torch.no_grad(), drawing():
            weights = self.log_weights.exp().cpu()
            chosen = torch.multinomial(weights, shape.numel(), replacement=True)
            counts = chosen.bincount(minlength=len(self.parts)).tolist()
            drawn = [part.sample((n,)) for part, n in zip(self.parts, counts, strict=True)]
            draws = torch.cat(drawn)
            order = torch.randperm(len(draws), device="cpu").to(draws.device)
            return draws[order].reshape(shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at value (*B, D), shape (*B); zero of a part that has no inverse there."""
        parts = torch.stack([part.log_prob(value) for part in self.parts], -1)
        return (self.log_weights + _finite(parts)).logsumexp(-1)

    def expand(self, batch_shape: Size, _instance: object = None) -> FlowMixture:
        """The same in a batch."""
        return FlowMixture(self.log_weights, self.parts, Size(batch_shape))


def _finite(log_q: Tensor) -> Tensor:
    return log_q.nan_to_num(-torch.inf, torch.inf, -torch.inf)


class _Parts(nn.Module):
    """The flows of several guides in their coordinates, as one over the unconstrained latents."""

    def __init__(self, guides: Sequence[AutoFlow], log_weights: Tensor) -> None:
        super().__init__()
        self.guides = nn.ModuleList(guides)
        self.register_buffer("log_weights", log_weights)

    @property
    def base(self) -> nn.Module:
        """Of the first one, for its dtype and device."""
        return self.guides[0].flow.base

    def forward(self) -> FlowMixture:
        """The distribution, with event shape (D,)."""
        return FlowMixture(self.log_weights, [guide.get_posterior() for guide in self.guides])


class MixtureGuide(FlowGuide):
    """A mixture of fitted guides of one model, each at a mode of its own.

    It samples, scores and is diagnosed as any guide; it is not trained further.

    Args:
        model: a Pyro model.
        guides: K guides of the AutoFlow family, set up for the model.
        weights: π, shape (K,), positive; normalised here.

    Attributes:
        guides: the guides.
        weights: π.

    Raises:
        ValueError: If there is no guide, or not as many weights, or one is not positive.

    Example:
        >>> from pyroflow import AutoPlanarFlow
        >>> from pyroflow.targets import toy_model
        >>> guides = [AutoPlanarFlow(toy_model, num_layers=1).setup() for _ in range(2)]
        >>> guide = MixtureGuide(toy_model, guides, torch.tensor([0.7, 0.3]))
        >>> guide()["z"].shape
        torch.Size([2])
    """

    def __init__(self, model: Callable, guides: Sequence[AutoFlow], weights: Tensor) -> None:
        super().__init__(model)
        if not guides or weights.shape != (len(guides),) or not bool((weights > 0).all()):
            raise ValueError(
                f"weights expects a positive number for each of {len(guides)} guides, at least "
                f"one, got {weights}"
            )
        like = guides[0].flow.base.loc
        self.coordinates = None
        self.flow = _Parts(guides, (weights / weights.sum()).log().to(like))
        self.set_latents(guides[0].latents)

    @property
    def guides(self) -> list[AutoFlow]:
        """The guides."""
        return list(self.flow.guides)

    @property
    def weights(self) -> Tensor:
        """The part of the mass in each, shape (K,)."""
        return self.flow.log_weights.exp()

    def _shown_parts(self) -> dict[str, str]:
        pairs = zip(self.guides, self.weights.tolist(), strict=True)
        shares = listed(f"{type(part).__name__} {weight:.3g}" for part, weight in pairs)
        return {"parts": f"{len(self.guides)}, by weight: {shares}"}

    def _init_loc(self) -> Tensor:
        return self.guides[0]._init_loc()

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowMixture:
        """The mixture over the unconstrained latents, event shape (D,)."""
        return self.flow()
