"""The bounds that a flow is trained on, from the log weights of its draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

OBJECTIVES = ("elbo", "iwae", "dreg")
NEIGHBOURS = 8  # among the draws inside, that a lost one is likened to
LOST = 1.0  # what log q(A) counts beyond its part in the bound, see cut_loss


def bound_loss(log_weights: Tensor, objective: str, group_size: int) -> Tensor:
    r"""The negative bound of S finite log weights log p − log q.

    "elbo" is their mean. "iwae" is the importance-weighted bound, log of the mean weight of each
    group, averaged over the groups. "dreg" has its doubly reparametrised gradient, where the
    log weights are differentiated along the path of the draws alone: Σ w² ∇ log w with the
    weights w normalised in each group, and the same value.

    References:
        Burda, Grosse and Salakhutdinov, Importance weighted autoencoders, 2016, equation 8,
        https://arxiv.org/abs/1509.00519; Tucker, Lawson, Gu and Maddison, Doubly reparameterized
        gradient estimators, 2019, equation 8, https://arxiv.org/abs/1810.04152.

    Args:
        log_weights: shape (S,); −inf beside another weight of its group is a weight of zero.
        objective: "elbo", "iwae" or "dreg".
        group_size: draws behind each importance-weighted bound; divides S.

    Example:
        >>> bound_loss(torch.tensor([1.0, 3.0]), "elbo", 1)
        tensor(-2.)
    """
    if objective == "elbo":
        return -log_weights.mean()
    grouped = log_weights.reshape(-1, group_size)
    bound = math.log(group_size) - grouped.logsumexp(1).mean()
    if objective == "iwae":
        return bound
    weights = grouped.detach().softmax(1)
    surrogate = -(weights.square() * grouped.masked_fill(weights == 0, 0.0)).sum(1).mean()
    return bound.detach() + surrogate - surrogate.detach()


def cut_loss(
    log_weights: Tensor,
    objective: str,
    group_size: int,
    z: Tensor,
    log_q: Tensor | None,
    *,
    path: bool,
) -> Tensor:
    r"""The negative bound of a guide that is cut to A, where its log weights are finite.

    Draws outside A, where the model's density is zero or NaN, have no place in a mean. Cut to A
    the guide is q/q(A), with the bound E_{q|A}[log p − log q] + log q(A). It can be best where
    A is q's far tail and nearly all draws are lost, so log q(A) counts twice: once for the bound
    and once for the draws lost. A group of draws is in A if one of them is, in the bound.

    Args:
        log_weights: shape (S,).
        objective: as in :func:`bound_loss`, like the next.
        group_size: draws behind each importance-weighted bound.
        z: the draws, shape (S, D).
        log_q: log q at the draws held fixed, shape (S,), of which the gradient counts. None where
            it is not to be had: the loss then has no gradient for what is lost.
        path: whether ``log_weights`` are differentiated along the path of the draws alone.

    Returns:
        The loss; not finite where no draw is in A.
    """
    size = 1 if objective == "elbo" else group_size
    grouped = _zero_weights(log_weights, size)
    alive = grouped.isfinite().any(1)
    loss = bound_loss(grouped[alive].flatten(), objective, size) - _log_share(grouped)
    if log_q is None or not bool(alive.any()):
        return loss
    jump = (edge_factors(log_weights.detach(), size, z.detach(), path=path) * log_q).sum()
    return loss - jump + jump.detach()


@torch.no_grad()
def edge_factors(log_weights: Tensor, group_size: int, z: Tensor, *, path: bool) -> Tensor:
    """What ∇ log q of each draw counts in the gradient of a bound that is cut to A.

    The path of a draw knows nothing of the jump at the edge of A. Moving mass across it gains what
    a lost draw would gain inside, with the mean log weight of its nearest neighbours there.

    Args:
        log_weights: shape (S,), as in :func:`cut_loss`, like the others.
        group_size: 1 for the plain bound.
        z: shape (S, D).
        path: what ∇ log q counts in ``log_weights`` is zero, and not minus their weight.

    Returns:
        Shape (S,), with sum zero.
    """
    inside = log_weights.isfinite()
    grouped = _zero_weights(log_weights, group_size)
    total = grouped.logsumexp(1, keepdim=True)
    alive = total.isfinite()
    units = z / z[inside].std(0, unbiased=False).clamp(min=torch.finfo(z.dtype).tiny)
    distances = torch.cdist(units[~inside], units[inside])
    nearest = distances.topk(min(NEIGHBOURS, distances.shape[1]), largest=False).indices
    weight = torch.full_like(log_weights, -torch.inf)
    weight[~inside] = log_weights[inside][nearest].mean(1)
    weight = weight.reshape(grouped.shape)
    after = torch.logaddexp(total, weight)
    gain = torch.where(alive, after - total, after - total[alive].mean() + 1)
    gain = gain - (weight - after).exp() if path else gain
    gain = gain.flatten() / alive.sum() + LOST / inside.sum()
    gain = gain.masked_fill(inside, 0.0)
    return gain.mean() - gain


def _zero_weights(log_weights: Tensor, group_size: int) -> Tensor:
    lost = ~log_weights.isfinite()
    return log_weights.masked_fill(lost, -torch.inf).reshape(-1, group_size)


def bound_scores(log_weights: Tensor, group_size: int = 1) -> Tensor:
    """Numbers whose mean is the negative bound of S log weights, one for each group.

    Args:
        log_weights: shape (S,).
        group_size: draws behind each importance-weighted bound, 1 for the plain one.

    Returns:
        Shape (S / group_size,); ∞ if no log weight is finite. The mean is that of
        :func:`cut_loss`.
    """
    grouped = _zero_weights(log_weights, group_size)
    scores = math.log(group_size) - grouped.logsumexp(1)
    alive = scores.isfinite()
    if not bool(alive.any()):
        return torch.full_like(scores, torch.inf)
    return torch.where(alive, scores, scores[alive].mean()) - _log_share(grouped)


def _log_share(grouped: Tensor) -> Tensor:
    """Log q(A) for the bound, of groups, and once more, of draws, for what is lost."""
    inside = grouped.isfinite()
    groups, draws = inside.any(1).to(grouped).mean(), inside.to(grouped).mean()
    return groups.log() + LOST * draws.log()
