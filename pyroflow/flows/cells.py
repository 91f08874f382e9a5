"""Columns of few values: why a density has no score there, and noise that gives it one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroflow.frames import named, places
from pyroflow.seeds import seeded

Cells = tuple[tuple[float, float], ...]  # of each column (lowest, step), with step 0 for none
Dequantize = bool | int | str | Sequence[int | str]

# A flow of K layers narrows down on some ten values, given a few hundred rows, and on 25 given ten
# thousand, to a held-out score that no density of whole cells could have; on others it does not.
FEWEST, MOST, ROWS_PER_SQUARE = 10, 25, 10
ROWS_PER_VALUE = 5  # below which values hardly repeat
LEAST_SHARE, LEAST_EXCESS = 0.05, 2.0  # of the rows in one value; that share times its excess
NEIGHBOURS = 3  # values on each side that a repeated one is compared with
MARGIN = 1e-6  # of a cell, that noise keeps from its ends
POINTS = 64  # of a cell, over which its probability is averaged


def distinct(values: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct values of a column (N,), up to rounding, in double, and how often each is."""
    ordered = values.double().sort().values
    rounding = 8 * torch.finfo(values.dtype).eps * ordered.abs().max()
    at = torch.cat([ordered[:1] * 0, (ordered.diff() > rounding).double()]).cumsum(0).long()
    counts = at.bincount()
    return ordered[counts.cumsum(0) - counts], counts


def few_valued(values: Tensor) -> str:
    """Why a density of a column (N,) can have no finite score, in words; empty if it can.

    Its values are few if their effective number, the exponential of their entropy, is: of rounded
    measurements it is some four sds over the step. Or one value may stand out from those beside it,
    as zeros do that are no measurements.
    """
    found, counts = distinct(values)
    num, shares = len(values), counts / len(values)
    effective = (-(shares * shares.log()).sum()).exp().item()
    few = min(MOST, max(FEWEST, math.sqrt(num / ROWS_PER_SQUARE)))
    if effective < few and num >= ROWS_PER_VALUE * effective:
        return f"{len(found)} values in {num} rows"
    top = int(counts.argmax())
    around = torch.cat([counts[max(0, top - NEIGHBOURS) : top], counts[top + 1 :][:NEIGHBOURS]])
    share, excess = shares[top].item(), (counts[top] / around.double().mean()).item()
    if share >= LEAST_SHARE and share * excess >= LEAST_EXCESS:
        return f"{found[top].item():g} in {100 * share:.0f} % of {num} rows"
    return ""


def find_cells(data: Tensor, dequantize: Dequantize, columns: Sequence[str] | None) -> Cells | None:
    """The cells of each column of data (N, D), or None where none is to have any.

    Raises:
        ValueError: If a column of few values is to have no cells, with the ways out, or if
            ``dequantize`` names no column.
    """
    given = () if isinstance(dequantize, bool) else dequantize
    wanted = set(places("dequantize", given, data.shape[1], columns, "True, or "))
    reasons = {j: few_valued(data[:, j]) for j in range(data.shape[1]) if j not in wanted}
    reasons = {j: reason for j, reason in reasons.items() if reason}
    if dequantize is True:
        wanted, reasons = set(reasons), {}
    if reasons:
        found = ", ".join(f"{named(j, columns)} ({reason})" for j, reason in reasons.items())
        names = [j if columns is None else columns[j] for j in reasons]
        raise ValueError(
            f"data expects columns of real numbers, got few or often repeated values in {found}: a "
            "density rises without end where values repeat, so that its held-out score would mean "
            f"nothing. Pass dequantize={names} for the probabilities of such values (with a "
            "support of the flow where they have bounds, as counts have), make the columns the "
            "context of a conditional flow (context_dim=), or leave them out"
        )
    if not wanted:
        return None
    return tuple(_cell(data[:, j]) if j in wanted else (0.0, 0.0) for j in range(data.shape[1]))


def noise(steps: Tensor, num: int) -> Tensor:
    """Uniform noise (num, D) of one cell, from its lower end on; 0 for columns without cells."""
    drawn = torch.rand(num, len(steps), dtype=steps.dtype, device=steps.device)
    return steps * drawn.clamp(MARGIN, 1 - MARGIN)


def cell_log_prob(q: Distribution, x: Tensor, steps: Tensor) -> Tensor:
    """Log probability of the cells at x (*, D), by the mean density over fixed points of each."""
    with seeded(0):
        points = [x + noise(steps, 1)[0] for _ in range(POINTS)]
    total = torch.stack([q.log_prob(point) for point in points]).logsumexp(0)
    return total - math.log(POINTS) + steps[steps > 0].log().sum()


def rounded_down(x: Tensor, cells: Cells) -> Tensor:
    """Draws (*, D) as the lowest values of the cells that they are in."""
    lowest, steps = x.new_tensor(cells).T
    counts = ((x - lowest) / steps.where(steps > 0, 1.0)).floor()
    return (lowest + counts * steps).where(steps > 0, x)


def _cell(values: Tensor) -> tuple[float, float]:
    """The lowest value and the smallest difference, more exactly where all are multiples of it."""
    found, _ = distinct(values)
    step, spread = found.diff().min().item(), (found[-1] - found[0]).item()
    exact = spread / round(spread / step)
    return found[0].item(), exact if abs(exact / step - 1) < 1e-4 else step
