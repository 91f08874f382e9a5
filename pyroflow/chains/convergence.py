"""R-hat, effective sample sizes and Monte Carlo errors of many columns of draws.

The numbers are ArviZ's, at a fraction of its time where chains are many: it ranks the draws anew
for each number, and transforms every chain back to autocovariances of which only a mean is used.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

LEAST_DRAWS = 4  # of a chain
TAILS = (0.05, 0.95)  # the quantiles whose effective sample sizes are those of the tail


def summarise(chains: Tensor) -> dict[str, Tensor]:
    """The numbers of each column.

    Args:
        chains: draws, shape (C, N, E), for C chains.

    Returns:
        By name, shape (E,): ``rhat``, rank-normalised split R-hat, the larger of that of the draws
        and that of their distances from the median; ``ess_bulk`` and ``ess_tail``; ``mean``,
        ``sd``, and ``mcse``, the Monte Carlo error of the mean. The first three and the error are
        NaN for columns that are constant or not finite, and for chains of fewer than 4 draws.

    References:
        Vehtari, Gelman, Simpson, Carpenter and Bürkner, Rank-normalization, folding, and
        localization: An improved R-hat, 2021, https://arxiv.org/abs/1903.08008, sections 3 and 4.

    Example:
        >>> numbers = summarise(torch.randn(4, 100, 3))
        >>> numbers["rhat"].shape, bool((numbers["rhat"] < 1.1).all())
        (torch.Size([3]), True)
    """
    found = [_of_column(column.double().cpu().contiguous()) for column in chains.unbind(2)]
    names = ("rhat", "ess_bulk", "ess_tail", "mean", "sd", "mcse")
    stacked = torch.tensor(found, dtype=torch.float64, device="cpu").reshape(-1, len(names))
    return dict(zip(names, stacked.unbind(1), strict=True))


def mean_and_error(chains: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each column of draws (C, N, E), and its Monte Carlo error, shape (E,) each."""
    columns = [column.double().cpu() for column in chains.unbind(2)]
    errors = [_error(column, _ess([split(column)])[0]) for column in columns]
    means = torch.stack([column.mean() for column in columns])
    return means, torch.tensor(errors, dtype=torch.float64, device="cpu")


def split(column: Tensor) -> Tensor:
    """Each chain (C, N) as its halves, (2C, N // 2), without the middle draw of an odd N."""
    half = column.shape[1] // 2
    return torch.cat([column[:, :half], column[:, column.shape[1] - half :]])


def _of_column(column: Tensor) -> list[float]:
    mean, sd = column.mean().item(), column.std().item()
    constant = bool((column == column[0, 0]).all())
    if constant or not column.isfinite().all() or column.shape[1] < LEAST_DRAWS:
        return [math.nan, math.nan, math.nan, mean, sd, math.nan]
    halves = split(column)
    order = _sorted(halves)
    scores = _normal_scores(order, halves.shape)
    # As numpy's median does, and torch's does not.
    values = order[0]
    middle = values[[(len(values) - 1) // 2, len(values) // 2]].mean()
    folded = _normal_scores(_sorted((halves - middle).abs()), halves.shape)
    whole = halves.numel() == column.numel()  # else the middle draws are missing
    ordered = values if whole else column.flatten().sort().values
    tails = [(halves <= q).double() for q in _quantiles(ordered)]
    bulk, *tail, plain = _ess([scores, *tails, halves])
    rhat = max(_rhat(scores), _rhat(folded))
    return [rhat, bulk, min(tail), mean, sd, _error(column, plain)]


def _error(column: Tensor, ess: float) -> float:
    return column.std().item() / math.sqrt(ess) if ess > 0 else math.nan


def _quantiles(ordered: Tensor) -> list[Tensor]:
    """Those of the tail, linear between sorted draws; torch's function takes too few numbers."""
    places = [q * (len(ordered) - 1) for q in TAILS]
    lows = [min(math.floor(place), len(ordered) - 2) for place in places]
    pairs = zip(places, lows, strict=True)
    return [torch.lerp(ordered[low], ordered[low + 1], place - low) for place, low in pairs]


def _sorted(draws: Tensor) -> tuple[Tensor, Tensor]:
    """All draws in order, and where they were; NumPy's sort takes a tenth of torch's time."""
    flat = draws.flatten()
    index = torch.from_numpy(np.argsort(flat.numpy()))
    return flat[index], index


def _normal_scores(order: tuple[Tensor, Tensor], shape: torch.Size) -> Tensor:
    """Normal quantiles of the ranks of sorted draws; equal draws share their mean rank."""
    values, index = order
    num = len(values)
    first = torch.ones_like(values, dtype=torch.bool)
    first[1:] = values[1:] != values[:-1]
    group = first.cumsum(0) - 1
    starts = first.nonzero().flatten()
    ends = torch.cat([starts[1:], starts.new_tensor([num])])
    mean_ranks = (starts + 1 + ends).double() / 2
    scores = torch.special.ndtri((mean_ranks - 3 / 8) / (num + 1 / 4))
    return torch.empty_like(values).index_copy_(0, index, scores[group]).reshape(shape)


def _rhat(halves: Tensor) -> float:
    """Of chains (M, N): the whole variance over that within chains, as a ratio of scales."""
    num = halves.shape[1]
    between = num * halves.mean(1).var()
    within = halves.var(1).mean()
    return ((between / within + num - 1) / num).sqrt().item()


def _ess(series: list[Tensor]) -> list[float]:
    """Effective sample sizes of several series of split chains, (M, N) each."""
    stacked = torch.stack(series)
    num = stacked.shape[2]
    means = stacked.mean(2, keepdim=True)
    # Autocovariances are needed as means over the chains alone, which commute with the transform.
    transformed = torch.fft.rfft(stacked - means, n=2 * num)
    spectrum = (transformed.real.square() + transformed.imag.square()).mean(1)
    covariances = torch.fft.irfft(spectrum, n=2 * num)[:, :num] / num
    spread = means.squeeze(2).var(1) if stacked.shape[1] > 1 else means.new_zeros(len(series))
    size = stacked.shape[1] * num
    pairs = zip(covariances.tolist(), spread.tolist(), strict=True)
    return [_ess_of(covariance, between, size) for covariance, between in pairs]


def _ess_of(covariance: list[float], between: float, size: int) -> float:
    """From the mean autocovariance by lag, with Geyer's initial monotone sequence."""
    num = len(covariance)
    within = covariance[0] * num / (num - 1)
    total = covariance[0] + between
    if total <= 0:
        return math.nan
    rho = [1.0] + [1 - (within - c) / total for c in covariance[1:]]
    sums, even = [rho[0] + rho[1]], 1.0  # of pairs, as long as they are positive
    for lag in range(2, num - 2, 2):
        even = rho[lag]
        if even + rho[lag + 1] < 0:
            break
        sums.append(min(even + rho[lag + 1], sums[-1]))
    else:
        sums.pop()  # of the last pair only the first lag counts, and once
    time = -1 + 2 * sum(sums) + max(even, 0.0)
    return size / max(time, 1 / math.log10(size))
