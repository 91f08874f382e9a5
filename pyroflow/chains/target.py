"""A posterior in the base space of a guide's flow."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroflow.guides import AutoFlow
from pyroflow.model.bound import BoundModel
from pyroflow.model.log_joint import LogJoint
from pyroflow.seeds import quick

AT_ONCE = 2048  # points that the model takes at once, to bound the memory


@dataclass
class Points:
    """N points u in base space, in float64, and what the posterior is there.

    Attributes:
        u: shape (N, D).
        x: their images T(u), the guide's coordinates, shape (N, D), in the model's dtype.
        log_joint: log p at x, shape (N,), in float64.
        log_target: log p(T(u)) + log |det T'(u)|, shape (N,), in float64; −inf where that is no
            number.
        gradient: of the log target in u, shape (N, D); None where it was not asked for.
    """

    u: Tensor
    x: Tensor
    log_joint: Tensor
    log_target: Tensor
    gradient: Tensor | None = None

    def __len__(self) -> int:
        return len(self.u)

    def at(self, rows: Tensor) -> Points:
        """Some of the points, without gradients."""
        return Points(self.u[rows], self.x[rows], self.log_joint[rows], self.log_target[rows])

    def replaced(self, where: Tensor, other: Points) -> Points:
        """With the other points in some places (N,); gradients where both have them."""
        column = where.unsqueeze(-1)
        found = []
        for part in fields(self):
            old, new = getattr(self, part.name), getattr(other, part.name)
            if old is None or new is None:
                found.append(None)
            else:
                found.append(torch.where(column if old.dim() == 2 else where, new, old))
        return Points(*found)


class Image(NamedTuple):
    """T(u) and log |det T'(u)|."""

    x: Tensor
    log_det: Tensor


class Target:
    """log p(T(u)) + log |det T'(u)| for the transforms T of a fitted guide's flow.

    The flow runs in float64, as a copy that is not trained; the model in its own dtype.

    Args:
        bound: model and guide, without a subsampled plate.
        guide: the guide, set up.
        num: the number of points whose gradients are asked for at once.
    """

    def __init__(self, bound: BoundModel, guide: AutoFlow, num: int) -> None:
        self.log_joint = LogJoint(bound, guide, num)
        self.like = guide.flow.base.loc
        self.flow = copy.deepcopy(guide.flow).double().requires_grad_(False)
        self.base: Distribution = self.flow.base()
        self._values = quick(self.log_joint.values)

    @property
    def dim(self) -> int:
        """D."""
        return len(self.like)

    def image(self, u: Tensor) -> Image:
        """T at u (N, D)."""
        x, log_det = u, u.new_zeros(len(u))
        for t in self.flow.transforms():
            y = t(x)
            log_det = log_det + t.log_abs_det_jacobian(x, y)
            x = y
        return Image(x, log_det)

    @torch.no_grad()
    def at(self, u: Tensor) -> Points:
        """The posterior at u (N, D)."""
        parts = [self._at(part) for part in u.split(AT_ONCE)]
        return Points(*(torch.cat(found) for found in zip(*parts, strict=True)))

    def _at(self, u: Tensor) -> tuple[Tensor, ...]:
        x, log_det = self.image(u)
        x = x.to(self.like)
        value = self._values(x).double()
        return u, x, value, _number(value + log_det)

    def with_gradients(self, u: Tensor) -> Points:
        """The same with gradients."""
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            x, log_det = self.image(u)
            x = x.to(self.like)
            value = self.log_joint(x).double()
            log_target = value + log_det
            (gradient,) = torch.autograd.grad(log_target.sum(), u)
        # Any field of forces leaves a leapfrog step reversible: what is no number pulls nowhere.
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        found = u, x, value, _number(log_target), gradient
        return Points(*(tensor.detach() for tensor in found))


def _number(log_density: Tensor) -> Tensor:
    """−inf for NaN and +inf, so that no chain ever goes there."""
    return log_density.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
