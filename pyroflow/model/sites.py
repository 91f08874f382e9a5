"""One latent site of a model, and the distribution that a guide samples there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Size, Tensor
from torch.distributions import register_kl
from torch.distributions.constraints import Constraint

from pyroflow.model.supports import Preimage, bijection, of_parts, remember

Description = dict[str, Any]
Move = Callable[[Tensor], Tensor]

NO_SHAPE = Size()
WIDEST_PLATE = 10**8  # rows that a plate may subsample, all of which Pyro shuffles at each call


class Point(dist.Delta):
    """A draw of the guide at its site, with the log Jacobian of the map to the support.

    Unlike a ``Delta`` it keeps its ``log_density`` in Pyro's Kullback-Leibler divergence, where
    ``TraceMeanField_ELBO`` would lose the Jacobian of every constrained site, and its draws
    remember the latents that they come from, for priors to be scored there.
    """

    def __init__(
        self, v: Tensor, log_density: Tensor | float, event_dim: int, origin: Preimage
    ) -> None:
        super().__init__(v, log_density=log_density, event_dim=event_dim)
        self.origin = origin

    def expand(self, batch_shape: Size, _instance: object = None) -> Point:
        """The same point in a larger batch."""
        latent, support = self.origin
        event = latent.shape[len(self.batch_shape) :]
        new = super().expand(batch_shape, _instance=Point.__new__(Point))
        new.origin = Preimage(latent.expand(new.batch_shape + event), support)
        return new

    def rsample(self, sample_shape: Size = NO_SHAPE) -> Tensor:
        """The point, which remembers its latents."""
        value = super().rsample(sample_shape)
        return value if sample_shape else remember(value, *self.origin)


@register_kl(Point, dist.Distribution)
def _kl_point(p: Point, q: dist.Distribution) -> Tensor:
    return p.log_density - q.log_prob(p.v)


@dataclass(frozen=True)
class LatentSite:
    """A latent site without its prior, which may hold data or a graph.

    Attributes:
        batch_shape, event_shape: of its values.
        unconstrained_shape: of what the bijection of its support maps to them.
        plates: Pyro's frames.
        value: where it starts, on its support.
        local: whether it is of rows that a plate may draw a part of.
    """

    name: str
    support: Constraint
    batch_shape: Size
    event_shape: Size
    unconstrained_shape: Size
    plates: tuple[CondIndepStackFrame, ...]
    value: Tensor
    local: bool = False

    @classmethod
    def of(cls, site: dict[str, Any]) -> LatentSite:
        """The site of a trace; raises ``ValueError`` by name if it is discrete."""
        fn, value, plates = site["fn"], site["value"].detach(), tuple(site["cond_indep_stack"])
        with helpful_support_errors(site):
            support = _mapped(of_parts(fn.support), Tensor.detach)
            shape = bijection(support).inv(value).shape
        return cls(site["name"], support, fn.batch_shape, fn.event_shape, shape, plates, value)

    def to(self, move: Move) -> LatentSite:
        """The site with ``move`` applied to its tensors, such as the bounds of an interval."""
        return replace(self, support=_mapped(self.support, move), value=move(self.value))

    def constrain(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """The value at its latents, and log |det ∂value/∂latents| for each event of the support."""
        transform = bijection(self.support)
        value = remember(transform(latent), latent, self.support)
        return value, transform.log_abs_det_jacobian(latent, value)

    def point(self, latent: Tensor, masked: bool) -> Point:
        """The distribution of a draw at its latents; masked: no density is asked for."""
        event_dim, origin = len(self.event_shape), Preimage(latent, self.support)
        if masked:
            return Point(bijection(self.support)(latent), 0.0, event_dim, origin)
        value, log_det = self.constrain(latent)
        log_det = sum_rightmost(log_det, log_det.dim() - value.dim() + event_dim)
        return Point(value, -log_det, event_dim, origin)

    def unconstrain(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`constrain`, with the same log-determinant."""
        transform = bijection(self.support)
        if self.support.check(value).all():
            latent = transform.inv(value)
            if latent.isfinite().all():
                return latent, transform.log_abs_det_jacobian(latent, value)
        raise ValueError(
            f"values expects site {self.name!r} strictly inside its support, {self.support}, got "
            "a value outside or on its boundary: there the guide has no density"
        )

    def describe(self, describe: Callable[[Constraint], Any]) -> Description:
        """The site as plain data; ``describe`` does that for a support, or raises ``TypeError``."""
        try:
            support = describe(self.support)
        except TypeError as error:
            raise type(error)(f"{error}, the support of site {self.name!r}") from error
        plates = [
            {
                "name": frame.name,
                "dim": frame.dim,
                "size": int(frame.size),
                "full_size": frame.full_size and int(frame.full_size),
            }
            for frame in self.plates
        ]
        return {
            "name": self.name,
            "batch_shape": list(self.batch_shape),
            "event_shape": list(self.event_shape),
            "unconstrained_shape": list(self.unconstrained_shape),
            "support": support,
            "plates": plates,
        }

    @classmethod
    def restore(
        cls, site: dict[str, Any], build: Callable[[Any], Constraint], like: Tensor
    ) -> LatentSite:
        """What :meth:`describe` gave; the value is any one inside the support."""
        name, support = site["name"], build(site["support"])
        batch, event, shape = (
            Size(site[f"{of}_shape"]) for of in ("batch", "event", "unconstrained")
        )
        value = bijection(support)(like.new_zeros(shape))
        if value.shape != batch + event:
            raise ValueError(f"site {name!r} has values of another shape, {list(value.shape)}")
        plates = tuple(CondIndepStackFrame(counter=0, **plate) for plate in site["plates"])
        for frame in plates:
            if frame.size != batch[frame.dim] or (frame.full_size or 0) > WIDEST_PLATE:
                raise ValueError(f"site {name!r} does not fit its plate {frame.name!r}")
        return cls(name, support, batch, event, shape, plates, value)


def _mapped(held: Any, move: Move) -> Any:
    """What is held, with ``move`` applied to its tensors; the same object if it has none."""
    if isinstance(held, Tensor):
        return move(held)
    if isinstance(held, list | tuple):
        return type(held)(_mapped(part, move) for part in held)
    if isinstance(held, Constraint):
        parts = {name: _mapped(part, move) for name, part in vars(held).items()}
        if any(part is not vars(held)[name] for name, part in parts.items()):
            held = copy.copy(held)
            vars(held).update(parts)
    return held
