"""How far the draws of a guide are from a posterior."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import torch
from torch import Tensor

from pyroflow.diagnostics.psis import pareto_smooth
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw

from .models import Posterior

Found = dict[str, float | int | None]


def judge(
    posterior: Posterior, guide: Callable, num_samples: int, num_weights: int, seed: int
) -> Found:
    """Judge a guide by draws of its own, the same way for every guide.

    ELBO, KL and the moments are of ``num_samples`` draws; k-hat and ESS, the effective share of
    the raw importance weights, of the first ``num_weights`` of them.
    """
    with pyro.validation_enabled(False):  # a guide that is broken is to be judged as well
        problem = BoundModel(posterior.model, guide, posterior.args)
    draws = draw(problem, num_samples, seed=seed)
    columns, raw = posterior.columns(draws.sites), draws.log_weights
    elbo, log_weights = raw.mean().item(), raw.nan_to_num(-torch.inf, posinf=-torch.inf)
    found = {
        "elbo": elbo,
        "elbo_se": raw.std().item() / math.sqrt(num_samples),
        "kl": posterior.log_normalizer - elbo,
        "nonfinite": int((~raw.isfinite()).sum()),
        "ess": effective_share(log_weights[:num_weights]),
        "khat": math.nan,
        **moments(posterior, columns),
    }
    if log_weights.isfinite().sum() > 100:  # k-hat needs a tail
        found["khat"] = pareto_smooth(log_weights[:num_weights])[2]
        smoothed = pareto_smooth(log_weights)[0].exp()
        weighted = moments(posterior, columns, smoothed)
        found |= {f"{name}, weighted": value for name, value in weighted.items()}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def effective_share(log_weights: Tensor) -> float:
    """1 / (S Σ w²) of the normalised weights: 1 where they are equal, 1 / S where one has all."""
    log_weights = log_weights - log_weights.logsumexp(0)
    return (-(2 * log_weights).logsumexp(0)).exp().item() / len(log_weights)


def moments(posterior: Posterior, columns: Tensor, weights: Tensor | None = None) -> Found:
    """Worst |error of a mean| in sds of the reference, and worst |log ratio of sds|, over columns.

    Args:
        posterior: with the reference.
        columns: draws, shape (S, C).
        weights: of the draws, shape (S,); they sum to one.
    """
    if weights is None:
        weights = columns.new_full((len(columns),), 1 / len(columns))
    else:
        columns = columns.masked_fill((weights == 0).unsqueeze(-1), 0.0)  # 0 · inf is not 0
    mean, target = weights @ columns, posterior.reference.mean(0)
    sd, scale = (weights @ (columns - mean).square()).sqrt(), posterior.reference.std(0)
    return {
        "mean error": ((mean - target) / scale).abs().max().item(),
        "sd error": (sd / scale).log().abs().max().item(),
    }
