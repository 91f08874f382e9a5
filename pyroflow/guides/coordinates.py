"""Coordinates that the model dictates: partial centring of its latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor

from pyroflow.model.centring import (
    Downstream,
    Prior,
    conditionals,
    nothing_downstream,
    turned,
)
from pyroflow.model.recorded import Recorded
from pyroflow.transforms import Bijection
from pyroflow.transforms.bijection import Pair, Parameters

Description = dict[str, Any]

CHUNK, MOST = 500, 2**22  # points side by side, as each may take a matrix; and their numbers
# Tensors of a site: of Pyro's form, of numbers, and of vectors whose coordinates were found.
POWERS, NUMBERS, VECTORS = 1, 5, 6


class Coordinates(Bijection, TransformModule):
    r"""The map from a flow's coordinates x to the unconstrained latents z, both shape (D,).

    For a latent whose prior has a location m and a scale s that depend on other latents it is one
    of two maps, elementwise, in the order of the model's sites. c = 1 leaves a site as it is
    written, c = 0 is its non-centred form. Where c is given, it is that of Pyro's
    ``LocScaleReparam``, :func:`~pyroflow.model.centring.powers`:

    z = m + s^{1 − c} (x − c m),   log |∂z/∂x| = (1 − c) log s.

    Where it is found, :func:`~pyroflow.model.centring.conditionals`, the latent is standardised
    given the others, with c the part of its precision that comes from the data:

    z = μ + (σ/σ₀)(x − μ₀),   σ² = 1/((1 − c) (s₀/s)² + c) σ₀²,   μ = m + c (σ/σ₀)² (t(u) − m),

    where t is linear in the latents u before it. At the neck of a funnel, where s vanishes, the
    second is the non-centred form for any c < 1. m and s are functions of u, recorded from the
    model: later neither it nor its data are needed.

    References:
        Papaspiliopoulos, Roberts and Sköld, A general framework for the parametrization of
        hierarchical models, 2007; Gorinova, Moore and Hoffman, Automatic reparameterisation of
        probabilistic programs, 2020, equation 3, https://arxiv.org/abs/1906.03028.

    Args:
        sites: of each site that is moved, its name, the place of its numbers in z and of those
            before it that move its mean, their shape, and whether its scale is a matrix.
        to_z: (x, c, *tensors) ↦ z, the log-determinant, and by how much z is rounded.
        priors: z ↦ location, scale and information of each site in turn.
        c: shape (D,), 1 for all other sites.
        tensors: of each site those of its map.
    """

    fixed: tuple[str, ...]

    def __init__(
        self,
        sites: list[Description],
        to_z: Recorded,
        priors: Recorded,
        c: Tensor,
        tensors: list[list[Tensor]],
    ) -> None:
        Bijection.__init__(self)
        self.sites, self.to_z, self.priors = sites, to_z, priors
        self.counts = {site["name"]: len(own) for site, own in zip(sites, tensors, strict=True)}
        numbered = enumerate(t for own in tensors for t in own)
        kept = {"c": c} | {f"tensor_{i}": t for i, t in numbered}
        for name, tensor in kept.items():
            self.register_buffer(name, tensor, persistent=False)
        self.event_dims = {name: tensor.dim() for name, tensor in kept.items()}
        self.fixed = tuple(kept)

    @property
    def centring(self) -> dict[str, Tensor]:
        """The part of each number's precision that comes from the data, by site."""
        kept = [self.own_tensors(i) for i in range(len(self.sites))]
        pairs = zip(self.by_site(self.c).items(), kept, strict=True)
        # Of numbers whose coordinates were found, c is along the axes.
        return {n: turned(c, t[-1].square()) if len(t) == NUMBERS else c for (n, c), t in pairs}

    def by_site(self, numbers: Tensor) -> dict[str, Tensor]:
        """The parts of a vector (D,) that belong to the sites, in their shapes."""
        return {site["name"]: self.part(numbers, i) for i, site in enumerate(self.sites)}

    @torch.no_grad()
    def set(self, c: Tensor, z: Tensor, downstream: Mapping[str, Downstream] | None = None) -> None:
        """Set c where the priors are those at z, (D,) both, by what follows from each site."""
        self.c.copy_(c)
        for i, (site, prior) in enumerate(zip(self.sites, self.read(z), strict=True)):
            at, piece, u = self.part(c, i), self.part(z, i), _before(z, site)
            known = (downstream or {}).get(site["name"]) or nothing_downstream(prior, len(u))
            found = conditionals(prior, at, piece, u, known)
            for kept, tensor in zip(self.own_tensors(i), found, strict=True):
                kept.copy_(tensor)

    def read(self, z: Tensor) -> list[Prior]:
        """The priors of the sites at z (*B, D), each part with the shape (*B, *shape of site)."""
        found = torch.func.vmap(self.priors, chunk_size=_chunk(z))(z.reshape(-1, z.shape[-1]))
        found = [t.reshape((*z.shape[:-1], *t.shape[1:])) for t in found]
        parts = zip(found[0::3], found[1::3], found[2::3], self.sites, strict=True)
        return [Prior(*three, site["matrix"]) for *three, site in parts]

    def own_tensors(self, index: int) -> list[Tensor]:
        """Those of a site."""
        counts = list(self.counts.values())
        start = sum(counts[:index])
        return [getattr(self, f"tensor_{start + i}") for i in range(counts[index])]

    def describe(self, stored: Callable[[Tensor], Tensor] = Tensor.clone) -> Description:
        """As plain data, each tensor as ``stored`` gives it."""
        maps = {"to_z": self.to_z, "priors": self.priors}
        kept = [self.own_tensors(i) for i in range(len(self.sites))]
        return {
            "sites": self.sites,
            "c": stored(self.c),
            "tensors": [[stored(t) for t in own] for own in kept],
        } | {name: recorded.to(stored).describe() for name, recorded in maps.items()}

    @classmethod
    def restore(cls, described: Description) -> Coordinates:
        """What :meth:`describe` gave."""
        if any(len(own) not in (POWERS, NUMBERS, VECTORS) for own in described["tensors"]):
            raise ValueError("its coordinates are of another version of pyroflow: fit anew")
        maps = {name: Recorded(**described[name]) for name in ("to_z", "priors")}
        return cls(described["sites"], **maps, c=described["c"], tensors=described["tensors"])

    def part(self, numbers: Tensor, index: int) -> Tensor:
        """The numbers of a site, (*B, *its shape), of (*B, D)."""
        site = self.sites[index]
        return numbers[..., _slice(site)].reshape((*numbers.shape[:-1], *site["shape"]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Coordinates:
        super()._apply(fn, recurse)
        self.to_z, self.priors = self.to_z.to(fn), self.priors.to(fn)
        return self

    def tensors(self) -> Parameters:
        """The c and the sites' tensors, which :meth:`set` changes in place."""
        return self._map_parameters()

    def move(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The z at x (*B, D), log |det ∂z/∂x|, and how far z is rounded, in sds of a prior."""
        if not x.numel():
            return x, x.sum(-1), x.sum(-1)
        run = torch.func.vmap(self.to_z, (0, *(None for _ in tensors)), chunk_size=_chunk(x))
        z, log_det, lost = run(x.reshape(-1, x.shape[-1]), *tensors)
        batch = x.shape[:-1]
        return z.reshape(x.shape), log_det.reshape(batch), lost.reshape(batch)

    def _forward(self, x: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
        return self.move(x, *parameters)[:2]

    def _invert(
        self, y: Tensor, parameters: Parameters, cached: Pair | None
    ) -> tuple[Tensor, Tensor]:
        given, x, end = iter(parameters[1:]), [], 0
        total = torch.zeros_like(y[..., 0])
        for i, (site, prior) in enumerate(zip(self.sites, self.read(y), strict=True)):
            own = [next(given) for _ in range(self.counts[site["name"]])]
            u, c = _before(y, site), self.part(parameters[0], i)
            moved, log_det = prior.back(self.part(y, i), u, c, *own)
            x += [y[..., end : site["start"]], moved.reshape((*y.shape[:-1], -1))]
            total = total + log_det.reshape((*y.shape[:-1], -1)).sum(-1)
            end = site["stop"]
        return torch.cat([*x, y[..., end:]], -1), total

    def _log_det(self, intermediates: Tensor) -> Tensor:
        return intermediates


def _before(z: Tensor, site: Description) -> Tensor:
    """The numbers of the sites before one that are not wide."""
    return torch.cat([z[..., :0], *(z[..., start:stop] for start, stop in site["before"])], -1)


def _chunk(points: Tensor) -> int:
    return max(1, min(CHUNK, MOST // max(1, points.shape[-1])))


def _slice(site: Description) -> slice:
    return slice(site["start"], site["stop"])
