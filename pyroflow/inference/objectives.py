"""The bounds that a flow is trained on, from the log weights of its draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

OBJECTIVES = ("elbo", "iwae", "dreg")


def bound_loss(log_weights: Tensor, objective: str, group_size: int) -> Tensor:
    """The negative bound of S log weights log p − log q.

    Weights that are not finite are left out; with none left the loss is NaN. "elbo" is their
    mean. "iwae" is the importance-weighted bound, log of the mean weight of each group, averaged
    over the groups. "dreg" has its doubly reparametrised gradient, where the log weights are
    differentiated along the path of the draws alone: Σ w² ∇ log w with the weights w
    normalised in each group, and the same value.

    References:
        Burda, Grosse and Salakhutdinov, Importance weighted autoencoders, 2016, equation 8,
        https://arxiv.org/abs/1509.00519; Tucker, Lawson, Gu and Maddison, Doubly reparameterized
        gradient estimators, 2019, equation 8, https://arxiv.org/abs/1810.04152.

    Args:
        log_weights: shape (S,).
        objective: "elbo", "iwae" or "dreg".
        group_size: draws behind each importance-weighted bound; divides S.

    Example:
        >>> bound_loss(torch.tensor([1.0, 3.0]), "elbo", 1)
        tensor(-2.)
    """
    finite = log_weights.isfinite()
    if objective == "elbo":
        return -log_weights[finite].mean()
    grouped = log_weights.masked_fill(~finite, -torch.inf).reshape(-1, group_size)
    grouped = grouped[finite.reshape(-1, group_size).any(1)]
    bound = -(grouped.logsumexp(1) - math.log(group_size)).mean()
    if objective == "iwae":
        return bound
    weights = grouped.detach().softmax(1)
    surrogate = -(weights.square() * grouped.masked_fill(weights == 0, 0.0)).sum(1).mean()
    return bound.detach() + surrogate - surrogate.detach()
