"""How far draws are from a known posterior, on the unconstrained scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyroflow.model.supports import bijection
from pyroflow.seeds import seeded

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
LOST = 0.01  # part of the draws that may lie on an edge of the support

Draws = Mapping[str, Tensor]


@dataclass(frozen=True)
class Reference:
    """What is known of a posterior, a column a free number, sites in the order of ``supports``.

    Attributes:
        supports: of each latent site.
        mean: of each column, shape (C,).
        sd: the same.
        kurtosis: the same, 3 for a Gaussian.
        quantiles: at the ``LEVELS``, shape (5, C); NaN where they are not known.
        heavy: of each column, whether it is judged by its quantiles: its moments do not exist,
            or those of some thousand draws stray from them.
    """

    supports: Mapping[str, Constraint]
    mean: Tensor
    sd: Tensor
    kurtosis: Tensor
    quantiles: Tensor
    heavy: Tensor


def supports(model: Callable, args: tuple) -> dict[str, Constraint]:
    """The supports of a model's latent sites, in its order."""
    with seeded(0):
        trace = poutine.trace(model).get_trace(*args)
    sites = {n: s for n, s in trace.iter_stochastic_nodes() if not site_is_subsample(s)}
    return {name: site["fn"].support for name, site in sites.items()}


def columns(draws: Draws, supports: Mapping[str, Constraint]) -> Tensor:
    """Draws {site: (S, *site)} as unconstrained numbers, shape (S, C), in float64.

    The log of what is positive, the logit of the unit interval, atanh of the correlation in a
    2 x 2 Cholesky factor: the maps of ``biject_to``.
    """
    parts = []
    for name, support in supports.items():
        unconstrained = bijection(support).inv(draws[name].detach().double())
        parts.append(unconstrained.reshape(len(unconstrained), -1))
    return torch.cat(parts, -1)


def sizes(draws: Draws, supports: Mapping[str, Constraint]) -> dict[str, int]:
    """The number of columns of each site."""
    first = {name: draws[name][:1] for name in supports}
    return {name: columns(first, {name: known}).shape[-1] for name, known in supports.items()}


def labels(draws: Draws, supports: Mapping[str, Constraint]) -> list[str]:
    """The site of each column, with a number where it has several."""
    found = []
    for name, size in sizes(draws, supports).items():
        found += [name] if size == 1 else [f"{name}[{i}]" for i in range(size)]
    return found


def quantiles(x: Tensor) -> Tensor:
    """Those at the ``LEVELS`` of draws x (S, C), shape (5, C)."""
    ordered = x.T.contiguous().sort(-1).values
    return torch.stack([ordered[:, round(level * (len(x) - 1))] for level in LEVELS])


def from_draws(
    draws: Draws, supports: Mapping[str, Constraint], heavy: tuple[str, ...] = ()
) -> Reference:
    """The reference that a large exact sample is; ``heavy`` are the sites judged by quantiles."""
    x = columns(draws, supports)
    marked = [torch.full((size,), name in heavy) for name, size in sizes(draws, supports).items()]
    mean, sd = x.mean(0), x.std(0)
    kurtosis = ((x - mean) / sd).square().square().mean(0)
    return Reference(supports, mean, sd, kurtosis, quantiles(x), torch.cat(marked))


def judge(draws: Draws, reference: Reference) -> dict[str, float | str]:
    """The worst column of draws {site: (S, *site)}.

    Returns:
        "mean error", the worst |error of a mean| in sds of the reference; "sd error", the worst
        |sd / reference − 1|; where they are; "sd noise", the standard error that the latter has
        in as many independent draws. A heavy column is judged by how many draws lie below
        the median, between the quartiles and between the 5 and 95 % quantiles of the reference:
        by the shift and the two sds (the worse counts) that a Gaussian would need for that.
        Both are infinite where a draw is NaN or more than 1 % lie on an edge of the support.
    """
    x, names = columns(draws, reference.supports), labels(draws, reference.supports)
    infinite = x.isinf()
    x = _at_the_edge(x, infinite)
    off = (x.mean(0) - reference.mean).abs() / reference.sd
    wide = (x.std(0) / reference.sd - 1).abs()
    if reference.heavy.any():
        shift, widest = _by_ranks(x, reference.quantiles)
        off, wide = shift.where(reference.heavy, off), widest.where(reference.heavy, wide)
    lost = x.isnan().any(0) | (infinite.double().mean(0) > LOST)
    off, wide = (
        t.nan_to_num(torch.inf, posinf=torch.inf).masked_fill(lost, torch.inf) for t in (off, wide)
    )
    worst = int(wide.argmax())
    return {
        "mean error": off.max().item(),
        "sd error": wide.max().item(),
        "mean at": names[int(off.argmax())],
        "sd at": names[worst],
        "sd noise": _noise(reference, worst, len(x)),
    }


def least_ess(chain: Draws, reference: Reference) -> float:
    """The smallest bulk ESS of a chain's columns, ArviZ's; NaN if one is constant or infinite."""
    import arviz  # takes seconds, and most judges need none

    x = columns(chain, reference.supports)
    if not x.isfinite().all() or (x == x[0]).all(0).any():  # ArviZ has all of these effective
        return math.nan
    return float(arviz.ess({"x": x.unsqueeze(0).numpy()}, method="bulk")["x"].min())


def _noise(reference: Reference, column: int, num: int) -> float:
    """Of the sd of so many draws, by the kurtosis; by the quartiles in a heavy column."""
    if reference.heavy[column]:
        return 1.17 / num**0.5  # of the width between the quartiles of a Gaussian
    return ((reference.kurtosis[column].item() - 1) / (4 * num)) ** 0.5


def _by_ranks(x: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """|Shift| and worse |sd − 1| of the Gaussian that draws x (S, C) are, by known quantiles."""
    shift = torch.special.ndtri((x < known[2]).double().mean(0)).abs()
    wide = []
    for i, j in ((1, 3), (0, 4)):
        inside = ((x > known[i]) & (x < known[j])).double().mean(0)
        exact = torch.tensor(LEVELS[j], dtype=torch.float64)
        wide.append(torch.special.ndtri(exact) / torch.special.ndtri((1 + inside) / 2) - 1)
    return shift, torch.stack(wide).abs().amax(0)


def _at_the_edge(x: Tensor, infinite: Tensor) -> Tensor:
    """With the farthest finite numbers of a column in place of its infinite ones."""
    low = x.masked_fill(infinite, torch.inf).amin(0)
    high = x.masked_fill(infinite, -torch.inf).amax(0)
    return torch.minimum(torch.maximum(x, low), high)
