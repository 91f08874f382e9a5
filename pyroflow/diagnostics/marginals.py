"""Means and standard deviations of each unconstrained latent, and whether weights can give them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflow.diagnostics.psis import COLUMNS, pareto_smooth, shapes_of, tail_shapes
from pyroflow.model.records import Record, Values
from pyroflow.model.supports import bijection, preimage

LIMIT = 0.1  # of a standard deviation in a mean, and of itself in a standard deviation
SURE, SURE_OF = 2.0, 256  # standard errors, of so many latents at most; more where these are more
# What the k-hats of weight times a latent or its square may exceed the threshold by, where two
# kinds of draws are compared: the largest of many is high by its noise, and the square adds to
# any tail.
MARGIN = 0.1
HEAVY = 0.7  # k-hat of the squares, from which plain draws do not give a standard deviation
EXCESS = 0.1  # of a k-hat over that of the draws without weights
LOOKED_AT = 1000  # draws, for the middle of them
UNSMOOTHED = 0.5  # k-hat up to which the weights of a single latent are left as they are


class Moments(NamedTuple):
    """Mean and sd of D latents, shape (D,) each, with standard errors in units of the sd."""

    mean: Tensor
    sd: Tensor
    mean_error: Tensor
    sd_error: Tensor


class Columns(NamedTuple):
    """The unconstrained latents of S draws as columns.

    ``own`` are log weights of each latent, shape (S, D), where rows are weighed by themselves, and
    None where all latents of a draw have one weight.

    A latent whose squares have such a tail that no number of draws gives its standard deviation
    is taken as asinh((z − centre) / spread).
    """

    z: Tensor  # shape (S, D), float64
    names: list[str]
    own: Tensor | None = None

    def bent(self, which: Tensor, centre: Tensor, spread: Tensor) -> Columns:
        """With some of the columns (D,) in terms of the asinh."""
        if not bool(which.any()):
            return self
        return self._replace(z=torch.where(which, ((self.z - centre) / spread).asinh(), self.z))

    def some(self, which: Tensor) -> Columns:
        """Some of the columns (D,), without their names."""
        return Columns(self.z[:, which], [], None if self.own is None else self.own[:, which])


@dataclass
class Marginals:
    """What S weighted draws say of each of D latents.

    Attributes:
        names: of the latents, as "theta[3]".
        khat: shape (D,), the larger k-hat of weight × |z − centre| and weight × (z − centre)².
        plain: moments of the draws as they are.
        smoothed: moments under the Pareto smoothed weights.
        moved: standard errors of the difference of the two, in units of the sd.
        heavy: shape (D,), whether the latent is taken by its asinh.
        centre, spread: shape (D,), what the asinh is taken with.
    """

    names: list[str]
    khat: Tensor
    plain: Moments
    smoothed: Moments
    moved: tuple[Tensor, Tensor]
    heavy: Tensor
    centre: Tensor
    spread: Tensor

    def of(self, columns: Columns) -> Columns:
        """The latents of other draws in the same terms."""
        return columns.bent(self.heavy, self.centre, self.spread)

    @property
    def worst(self) -> tuple[float, str]:
        """The largest k-hat, and whose it is."""
        index = int(self.khat.argmax())
        return self.khat[index].item(), self.names[index]

    def uncertain(self) -> str | None:
        """The latent whose weighted moments have too large a Monte Carlo error, if one has."""
        # A tail that leaves plain draws as uncertain is no fault of the weights.
        mean = self.smoothed.mean_error / (2 * self.plain.mean_error).clamp(min=LIMIT)
        sd = self.smoothed.sd_error / (2 * self.plain.sd_error).clamp(min=LIMIT)
        worst, index = torch.maximum(mean, sd).max(0)
        return self.names[int(index)] if worst > 1 else None


def columns_of(values: Values, records: dict[str, Record]) -> Columns:
    """Values by site (S, *shape) as unconstrained latents, side by side.

    Those of a support without an unconstrained space, such as a sphere, stay as they are.
    """
    found, names = [], []
    for name, value in values.items():
        if origin := preimage(value):
            latent = origin.latent
        else:
            try:
                latent = bijection(records[name]["fn"].support).inv(value)
            except NotImplementedError:
                latent = value
        latent = latent.detach().double().cpu().reshape(len(value), latent[0].numel())
        edge = latent.where(latent.isfinite(), 0.0).abs().amax(0)  # rounded to an edge
        latent = latent.nan_to_num(0.0).clamp(-edge, edge)
        found.append(latent)
        names += numbered(name, latent.shape[1])
    return Columns(torch.cat(found, 1), names)


def numbered(name: str, size: int) -> list[str]:
    """Names of the numbers of a site."""
    return [name] if size == 1 else [f"{name}[{i}]" for i in range(size)]


def join_columns(parts: list[Columns]) -> Columns:
    """Those of several sets of draws."""
    own = [part.own for part in parts if part.own is not None]
    z = torch.cat([part.z for part in parts])
    return Columns(z, parts[0].names, torch.cat(own) if own else None)


@torch.no_grad()
def marginals(
    sets: list[Columns], log_weights: list[Tensor], like: Marginals | None = None
) -> Marginals:
    """What sets of draws with log weights (S,) say of each latent; in the terms of others."""
    whole = join_columns(sets)
    smoothed = _weights(whole, torch.cat(log_weights))
    if like is None:
        centre, spread = _middle(whole.z)
        khat = _khats(sets, log_weights, centre)
        suspect = khat > khat.new_tensor(HEAVY) * 0.9
        heavy = torch.zeros_like(suspect)
        if bool(suspect.any()):
            plain = [torch.zeros_like(w) for w in log_weights]
            bare = torch.full_like(khat, -torch.inf)
            alone = [part.some(suspect)._replace(own=None) for part in sets]
            bare[suspect] = _khats(alone, plain, centre[suspect])
            heavy = bare >= HEAVY
            # Exact draws have the tail of the latent itself, which no weight has caused.
            khat = khat.where(khat > bare + EXCESS, khat.new_tensor(-torch.inf))
        bent = [part.bent(heavy, centre, spread) for part in sets]
        if bool(heavy.any()):
            some = [part.some(heavy) for part in bent]
            khat[heavy] = _khats(some, log_weights, torch.zeros_like(centre[heavy]))
    else:
        heavy, centre, spread = like.heavy, like.centre, like.spread
        bent = [like.of(part) for part in sets]
        khat = _khats(bent, log_weights, torch.where(heavy, 0.0, centre))
    z = whole.bent(heavy, centre, spread).z
    even = torch.full_like(smoothed, 1 / len(smoothed))
    plain, found = _moments(z, even), _moments(z, smoothed)
    moved = _errors(z, smoothed - even, found.mean, found.sd)
    return Marginals(whole.names, khat, plain, found, moved, heavy, centre, spread)


def disagreement(
    names: list[str], one: Moments, other: Moments, errors: tuple[Tensor, Tensor]
) -> tuple[float, str]:
    """The largest difference of two sets of moments, and its words; above 1 it is too large.

    In units of ``LIMIT`` above what standard errors of the differences (D,) explain. Of more than
    256 latents it is so many errors that one is exceeded by chance as often as with 256.
    """
    mean = (one.mean - other.mean) / other.sd
    sd = (one.sd / other.sd).log()
    chance = torch.special.ndtr(mean.new_tensor(-SURE)) * min(1.0, SURE_OF / len(names))
    sure = -torch.special.ndtri(chance)
    over = torch.stack([mean.abs() - sure * errors[0], sd.abs() - sure * errors[1]]) / LIMIT
    over = over.nan_to_num(torch.inf)
    index = int(over.max(0).values.argmax())
    worst = over[:, index].max().item()
    if over[0, index] >= over[1, index]:
        return worst, f"the mean of {names[index]} by {abs(mean[index]):.2f} sd"
    return worst, f"the sd of {names[index]} by a factor of {sd[index].abs().exp():.2f}"


def effect(found: Marginals, there: Columns, shares: list[float]) -> float:
    """What masses at other points (M, D) change in the smoothed moments, in units of ``LIMIT``."""
    off = (found.of(there).z - found.smoothed.mean) / found.smoothed.sd
    share = torch.tensor(shares, dtype=off.dtype, device=off.device)
    mean = share @ off
    sd = (1 - share.sum() + share @ off.square() - mean.square()).sqrt()
    return torch.maximum(mean.abs(), sd.log().abs()).max().item() / LIMIT


def _weights(columns: Columns, log_weights: Tensor) -> Tensor:
    """Weights that sum to one, shape (S, 1) or (S, D), smoothed where they have a heavy tail."""
    if columns.own is None:
        return pareto_smooth(log_weights)[0].exp().unsqueeze(1)
    found = columns.own.double().softmax(0).nan_to_num(0.0)
    khat = shapes_of(columns.own)
    for index in (khat > UNSMOOTHED).nonzero().flatten().tolist():
        found[:, index] = pareto_smooth(columns.own[:, index])[0].exp()
    return found


def _middle(z: Tensor) -> tuple[Tensor, Tensor]:
    """The median and half the interquartile range of each column, from a part of the draws."""
    ordered = z[:: max(1, len(z) // LOOKED_AT)].sort(0).values
    low, middle, high = (ordered[int(part * (len(ordered) - 1))] for part in (0.25, 0.5, 0.75))
    spread = (high - low) / 2
    return middle, spread.where(spread > 0, spread.new_tensor(1.0))


def _khats(sets: list[Columns], log_weights: list[Tensor], centre: Tensor) -> Tensor:
    """The larger of the k-hats of w |z − centre| and w (z − centre)², means over sets, (D,)."""
    found = []
    for part in range(0, len(centre), COLUMNS):
        columns, sums = slice(part, part + COLUMNS), 0.0
        for one, weights in zip(sets, log_weights, strict=True):
            size = (one.z[:, columns] - centre[columns]).abs().log().mT
            own = (weights if one.own is None else one.own[:, columns].mT).double().cpu()
            rows = torch.cat([own + size, own + 2 * size])
            sums = sums + tail_shapes(rows)
        found.append((sums / len(sets)).reshape(2, -1).amax(0))
    return torch.cat(found)


def _moments(z: Tensor, weights: Tensor) -> Moments:
    """Under weights (S, 1) or (S, D)."""
    z, weights = torch.where(weights > 0, z, 0.0), weights / weights.sum(0)
    mean = (weights * z).sum(0)
    sd = (weights * (z - mean).square()).sum(0).sqrt().clamp(min=torch.finfo(z.dtype).tiny)
    return Moments(mean, sd, *_errors(z, weights, mean, sd))


def _errors(z: Tensor, weights: Tensor, mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    """Standard errors by the delta method, of the mean in units of sd and of log sd."""
    unit = (z - mean) / sd
    mean_error = (weights * unit).square().sum(0).sqrt()
    return mean_error, (weights * (unit.square() - 1)).square().sum(0).sqrt() / 2


def combined(*errors: Tensor) -> Tensor:
    """Standard error of a difference of independent estimates."""
    return torch.stack(errors).square().sum(0).sqrt()


def is_sound(found: Marginals, khat: float, threshold: float) -> bool:
    """Whether weights with this k-hat give all means and standard deviations."""
    fine = max(khat, found.worst[0]) <= threshold
    return fine and found.uncertain() is None
