"""A toy Bayesian model whose posterior is the paper's second energy, made proper."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

TOY_LOG_EVIDENCE: float = -1.690889541
"""Log evidence of :func:`toy_model`, by quadrature."""


def toy_model() -> None:
    r"""A two-dimensional Pyro model with a banded, wavy posterior and known evidence.

    The site ``z`` is drawn from N(0, 2² I) and the site ``obs``, observed to be 0, from
    N(z2 - sin(π z1 / 2), 0.4²): the wave of the paper's U2 with a Gaussian prior that makes it
    proper. Its log joint density is :func:`toy_log_joint`, its log evidence
    :data:`TOY_LOG_EVIDENCE`.

    Example:
        >>> from pyro import poutine
        >>> from pyroflow.targets import toy_model
        >>> poutine.trace(toy_model).get_trace().nodes["z"]["value"].shape
        torch.Size([2])
    """
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    wave = torch.sin(math.pi * z[..., 0] / 2)
    pyro.sample("obs", dist.Normal(z[..., 1] - wave, 0.4), obs=torch.tensor(0.0))


def toy_log_joint(z: Tensor) -> Tensor:
    r"""Log joint density of :func:`toy_model` at its site ``z`` and its observation.

    Args:
        z: Points of shape :math:`(*, 2)`.

    Returns:
        Log densities of shape :math:`(*,)`.

    Raises:
        ValueError: If the last dimension of ``z`` is not 2.

    Example:
        >>> import torch
        >>> from pyroflow.targets import toy_log_joint
        >>> toy_log_joint(torch.zeros(5, 2)).shape
        torch.Size([5])
    """
    if z.shape[-1:] != (2,):
        raise ValueError(f"toy_log_joint: z expects last dimension 2, got shape {tuple(z.shape)}.")
    constant = 1.5 * math.log(2 * math.pi) + math.log(2.0 * 2.0 * 0.4)
    wave = torch.sin(math.pi * z[..., 0] / 2)
    return -((z[..., 1] - wave) / 0.4).square() / 2 - (z / 2).square().sum(-1) / 2 - constant
