"""Base distributions of guides."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import Distribution

from pyroflow.checks import check_count, check_positive
from pyroflow.flows import StandardNormal


class StandardStudentT(nn.Module):
    """D independent Student-t variables with location 0 and scale 1, on their module's device.

    Layers of tanh units leave the tails of their base as they are, so heavy-tailed posteriors
    want a heavy-tailed base.

    Args:
        input_dim: D.
        df: degrees of freedom; they are not trained.

    Raises:
        ValueError: input_dim < 1, or df that is not a finite number above 0.

    Example:
        >>> StandardStudentT(3, df=10.0)().event_shape
        torch.Size([3])
    """

    def __init__(self, input_dim: int, df: float) -> None:
        super().__init__()
        size = check_count("input_dim", input_dim, 1)
        self.register_buffer("loc", torch.zeros(size))
        self.register_buffer("df", torch.full((size,), float(check_positive("df", df))))

    def forward(self) -> Distribution:
        """The distribution, with event shape (D,)."""
        return dist.StudentT(self.df, self.loc, torch.ones_like(self.loc)).to_event(1)


def base_of(latent_dim: int, df: float | None) -> StandardNormal | StandardStudentT:
    """The base with df degrees of freedom; the normal one for None."""
    return StandardNormal(latent_dim) if df is None else StandardStudentT(latent_dim, df)
