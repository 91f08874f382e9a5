"""What of a model's latents is independent, read off its plates and its second derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Transform

from pyroflow.model.comparison import FAILURES
from pyroflow.model.latents import Latents
from pyroflow.model.records import Given, quietly
from pyroflow.model.sites import LatentSite
from pyroflow.seeds import seeded
from pyroflow.transforms import SinhArcsinh
from pyroflow.transforms.kernels.units import softplus

WIDEST_ROW = 30  # numbers of a row, whose factor is a full triangle
SPREADS = (0.1, 0.5, 1.0, 2.0, 0.1)  # of the points that are tried
FEW = 20  # rows, whose signs may agree by chance
ALIKE = 1e-3  # of the largest second derivative, that two of them may differ by

Names = frozenset[str]


def structure_of(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], latents: Latents, z: Tensor
) -> list[Names]:
    """The plates of each kind of rows, which do not interact given the rest.

    Rows are of a plate, or of plates inside each other, whose latents do not interact given the
    globals: a Hessian with a block for each row takes signs ±1 of the rows to the same signs.
    Plates that interact with a larger one, and sites outside plates, are global.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        latents: the table of its latents.
        z: unconstrained latents near which it is run.
    """
    found: dict[Names, Tensor] = {}
    with seeded(0):
        at, gradient = _differentiable(model, args, kwargs, latents, z)
        for names, places in _candidates(latents, z.device) if gradient is not None else []:
            rows = list(found.values())
            free = not any(bool(torch.isin(places, other).any()) for other in rows)
            if free and _independent(gradient, at, places, rows):
                found[names] = places
    return list(found)


def places_of(latents: Latents, kinds: Sequence[Names]) -> tuple[Tensor, list[Tensor]]:
    """The places in z (D,) of global numbers, and those of each kind of rows, (J, d)."""
    rows = [_places(latents, names, torch.device("cpu")) for names in kinds]
    taken = torch.zeros(sum(latents.sizes), dtype=torch.bool, device="cpu")
    for places in rows:
        taken[places] = True
    return (~taken).nonzero().squeeze(-1), rows


def kinds_of(latents: Latents, rows: Sequence[Tensor]) -> list[Names]:
    """The plates of each kind of rows, from the places that :func:`places_of` gave.

    Raises:
        ValueError: If there are no such rows in the table.
    """
    tables, found = _candidates(latents, torch.device("cpu")), []
    for own in rows:
        named = [names for names, places in tables if torch.equal(places, own.cpu())]
        if not named:
            raise ValueError(
                f"its {len(own)} rows of {own.shape[1]} numbers are of none of its plates"
            )
        found.append(named[0])
    return found


def _differentiable(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], latents: Latents, z: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A point near z where the gradient and a product with the Hessian are finite, and the former.

    Where priors are vague, the start that Pyro takes may lie where densities overflow.
    """
    for size in SPREADS:
        at = (z / (1 + size) + size * torch.randn_like(z)).detach().requires_grad_()
        try:
            gradient = _gradient(model, args, kwargs, latents, at)
            options = {"retain_graph": True, "allow_unused": True}
            products = torch.autograd.grad(gradient, at, torch.ones_like(at), **options)
        except FAILURES:
            continue
        if all(t is None or bool(t.isfinite().all()) for t in (gradient, *products)):
            return at, gradient
    return z, None


def _candidates(latents: Latents, device: torch.device) -> list[tuple[Names, Tensor]]:
    """Sets of plates and the places (J, d) of their rows, the one with most numbers first."""
    named = {frozenset(_rows_of(site)) for site in latents} - {frozenset()}
    tables = [(names, _places(latents, names, device)) for names in named]
    tables = [each for each in tables if len(each[1]) > 1 and each[1].shape[1] <= WIDEST_ROW]
    return sorted(tables, key=lambda each: (-each[1].numel(), len(each[1]), sorted(each[0])))


def _rows_of(site: LatentSite) -> dict[str, int]:
    """The plates of a site that make rows of its batch, with their dimensions."""
    batch = site.batch_shape
    return {f.name: f.dim for f in site.plates if -f.dim <= len(batch) and batch[f.dim] > 1}


def _places(latents: Latents, names: Names, device: torch.device) -> Tensor:
    """The places of all numbers inside the plates, shape (J, d), rows in order of the plates."""
    found, start = [], 0
    for site, size in zip(latents, latents.sizes, strict=True):
        places = torch.arange(start, start + size, device=device)
        places = places.reshape(site.unconstrained_shape)
        start += size
        dims = {frame.name: frame.dim for frame in site.plates}  # of one row at hand as well
        if not names <= dims.keys():
            continue
        batch = len(site.batch_shape)
        first = tuple(batch + dims[name] for name in sorted(names))
        num = math.prod(places.shape[dim] for dim in first)
        found.append(places.movedim(first, tuple(range(len(first)))).reshape(num, -1))
    return torch.cat(found, 1)


def _gradient(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], latents: Latents, z: Tensor
) -> Tensor:
    """That of the log joint at z, with a graph."""
    with torch.enable_grad(), quietly(), poutine.block():
        values, log_det = latents.constrain(z)
        trace = poutine.trace(Given(values)(model)).get_trace(*args, **kwargs)
        # The index of a plate, which has no density, is on the default device.
        value = prune_subsample_sites(trace).log_prob_sum() + log_det
        return torch.autograd.grad(value, z, create_graph=True)[0]


def _independent(gradient: Tensor, z: Tensor, places: Tensor, others: list[Tensor]) -> bool:
    """Whether rows interact neither with each other nor with those of other plates."""
    weights = torch.randn(places.shape[1], dtype=z.dtype, device="cpu").to(z)
    found = []
    for _ in range(2 if len(places) > FEW else 10):
        signs = torch.randint(2, (len(places), 1), device="cpu").to(z) * 2 - 1
        v = torch.zeros_like(z).index_put((places,), signs * weights)
        (product,) = torch.autograd.grad(gradient, z, v, retain_graph=True, allow_unused=True)
        if product is None:
            return True
        if any(bool(product[other].any()) for other in others):
            return False
        found.append(product[places] * signs)
    size = torch.stack(found).abs().amax(0)
    off = torch.stack([other - found[0] for other in found]).abs().amax(0)
    return bool((off <= ALIKE * size.clamp(min=1e-6)).all())


class GivenGlobals:
    """The rows of a structured guide's flow, given its globals: x_j from base numbers ε_j.

    Args:
        transforms: of the flow; the last one is an :class:`~pyroflow.transforms.Arrowhead`, and
            those before it take each number of a row by itself.

    Attributes:
        size: G, how many of the base numbers, the first ones, belong to the globals.
        leading: the places in x of the globals.
        places: those of each kind of rows, (J, d).
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        *before, self.affine = transforms
        self.tails = [t for t in before if isinstance(t, SinhArcsinh)]
        self.leading = self.affine.leading()
        self.size, self.places = len(self.leading), self.affine.rows()

    def base(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The base numbers ε of the rows of x (S, D), with zeros for the globals.

        Also what the affine layer takes for x, for :meth:`at`.
        """
        inner = self.affine.inv(x)
        eps = inner
        for t in reversed(self.tails):
            eps = t.inv(eps)
        return torch.cat([torch.zeros_like(eps[:, : self.size]), eps[:, self.size :]], 1), inner

    def at(self, x: Tensor, inner: Tensor, eps: Tensor) -> Tensor:
        """The x with other base numbers of the rows."""
        for t in self.tails:
            eps = t(eps)
        found = self.affine(torch.cat([inner[:, : self.size], eps[:, self.size :]], 1))
        found[:, self.leading] = x[:, self.leading]
        return found

    def log_det(self, eps: Tensor) -> Tensor:
        """The log |det ∂x_j/∂ε_j| of each row at base numbers (S, D), shape (S, R)."""
        slopes = torch.zeros_like(eps)
        for t in self.tails:
            slopes = slopes + t.log_slopes(eps)
        widths = softplus(self.affine.raw_scale).log()
        units = [getattr(self.affine, f"unit_{p}") for p in range(len(self.affine.shapes))]
        units = [unit.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1) for unit in units]
        return self._by_rows((slopes + widths).double()) + torch.cat(units)

    def log_q(self, eps: Tensor, inner: Tensor) -> Tensor:
        """The log density of each row given the globals, at base numbers (S, D), shape (S, R)."""
        normal = -eps.double().square() / 2 - math.log(2 * math.pi) / 2
        return self._by_rows(normal) - self.log_det(eps)

    def _by_rows(self, numbers: Tensor) -> Tensor:
        """The sums over each row of numbers (S, D) in the order of the base, (S, R)."""
        return torch.cat([part.sum(-1) for part in self.affine._split(numbers)[1:]], -1)
