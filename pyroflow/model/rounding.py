"""Draws so near an edge of their support that the model sees a rounded value of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyroflow.model.records import Values
from pyroflow.model.supports import bijection, preimage, remember

LOST = 0.01  # of an unconstrained latent, by which rounding may move it
ALLOWED = 0.05  # nats, by which it may change what the rest of the model says of a draw

Scores = dict[str, Tensor]  # log density by site of the model, shape (S,) each


def rounded_draws(
    latents: Values, scores: Scores, rescore: Callable[[Values], Scores]
) -> dict[str, int]:
    """Count, by site, the draws whose value the model cannot see well enough.

    A prior is scored at the unconstrained latents, whatever their value is rounded to; a
    likelihood has the value alone, and needs not mind. Each value that lost its latents is moved
    by one of their units, away from the edge. By how much the log density changes, times the
    units lost, is what rounding may have cost.

    Args:
        latents: by site, values of shape (S, *shape of the site).
        scores: what the model says of them.
        rescore: the same at other values of some sites.
    """
    lost, moved = {}, {}
    for name, value in latents.items():
        if (origin := preimage(value)) is None:
            continue
        latent, support = origin
        kept = bijection(support).inv(value)
        off = torch.where((latent - kept).abs() > LOST, latent - kept, 0.0)
        if off.any():
            lost[name] = off.double().abs().reshape(len(off), -1).amax(1)
            moved[name] = remember(bijection(support)(kept - off.sign()), latent, support)
    if not moved:
        return {}
    change = _change(scores, rescore(moved), torch.finfo(latent.dtype).eps)
    counts = {name: int((off * change > ALLOWED).sum()) for name, off in lost.items()}
    return {name: count for name, count in counts.items() if count}


def _change(before: Scores, after: Scores, eps: float) -> Tensor:
    """By how much the sites' log densities change, beyond the rounding of their sums."""
    total = 0.0
    for name, score in before.items():
        change = (after[name] - score).abs() - 8 * eps * score.abs()
        total = total + change.nan_to_num(0.0, torch.inf).clamp(min=0)
    return total
