"""Location and scale that a latent's prior takes from other latents."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch import distributions as td
from torch.distributions.transforms import AffineTransform, ExpTransform

from pyroflow.model.centring import WIDE, Prior
from pyroflow.model.latents import Latents
from pyroflow.model.priors import AtLatent
from pyroflow.model.sites import LatentSite
from pyroflow.model.supports import base_of, is_real, plain_bijection

Total = Callable[[LatentSite, Tensor], Tensor]


def prior_of(fn: td.Distribution) -> Prior | None:
    """Location and scale of a distribution in terms of its unconstrained numbers.

    Of a positive one they are those of the logarithm: of Gamma variables its mean and standard
    deviation, of half-normal and half-Cauchy ones the log scale, and one. None for families that
    have none, and where a mask hides the prior.
    """
    while isinstance(fn, td.Independent | ExpandedDistribution | AtLatent):
        fn = fn.base_dist
    for family, read in _FAMILIES.items():
        if isinstance(fn, family):
            return read(fn)
    if isinstance(fn, td.TransformedDistribution):
        return _transformed(fn)
    return None


def _located(information: Callable[[Any], Tensor | float]) -> Callable[[Any], Prior]:
    return lambda fn: Prior(fn.loc, fn.scale, information(fn))


def _positive(information: float) -> Callable[[Any], Prior]:
    """Of a scale family: its logarithm is shifted by that of the scale."""
    return lambda fn: Prior(fn.scale.log(), torch.ones_like(fn.scale), information)


def _gamma(fn: td.Gamma, sign: float = 1.0) -> Prior:
    a = fn.concentration
    spread = torch.polygamma(1, a).sqrt()
    return Prior(sign * (a.digamma() - fn.rate.log()), spread, a * spread.square())


def _weibull(fn: td.Weibull) -> Prior:
    return Prior(fn.scale.log(), fn.concentration.reciprocal())


def _exponential(fn: td.Exponential) -> Prior:
    return Prior(-fn.rate.log(), torch.ones_like(fn.rate))


def _multivariate(fn: Any) -> Prior:
    return Prior(fn.loc, fn._unbroadcasted_scale_tril, 1.0, matrix=True)


def _transformed(fn: td.TransformedDistribution) -> Prior | None:
    """A location and scale family behind affine maps, and the exponential of positive latents."""
    *moves, last = fn.transforms
    support = base_of(fn.support)
    if is_real(support):
        moves, last = fn.transforms, None
    elif not (isinstance(last, ExpTransform) and last == plain_bijection(support)):
        return None
    prior = prior_of(fn.base_dist) if is_real(fn.base_dist.support) else None
    if prior is None or prior.matrix or not all(isinstance(t, AffineTransform) for t in moves):
        return None
    loc, scale = prior.loc, prior.scale
    for t in moves:
        width = torch.as_tensor(t.scale, dtype=loc.dtype, device=loc.device)
        loc, scale = t.loc + width * loc, width.abs() * scale
    return Prior(loc, scale, prior.information)


_FAMILIES: dict[type, Callable[[Any], Prior]] = {
    td.Normal: _located(lambda fn: 1.0),
    td.StudentT: _located(lambda fn: (fn.df + 1) / (fn.df + 3)),
    td.Cauchy: _located(lambda fn: 0.5),
    td.Laplace: _located(lambda fn: 1.0),
    td.Gumbel: _located(lambda fn: 1.0),
    dist.Logistic: _located(lambda fn: 1 / 3),
    td.HalfNormal: _positive(2.0),
    td.HalfCauchy: _positive(0.5),
    td.Exponential: _exponential,
    td.Weibull: _weibull,
    td.Gamma: _gamma,
    dist.InverseGamma: lambda fn: _gamma(fn.base_dist, sign=-1.0),
    td.MultivariateNormal: _multivariate,
    dist.MultivariateStudentT: _multivariate,
}


def is_wide(site: LatentSite) -> bool:
    """Whether a site has too many numbers to move others by each of them, or may have."""
    return site.local or site.unconstrained_shape.numel() > WIDE


class Filled(Messenger):
    """Gives the latents of a model values that may depend on their priors, as their sites come up.

    Args:
        latents: the table of the sites; others are left alone.
        number: of a site's name and prior, its unconstrained numbers.
        total: what is kept of the parts of a site's log-determinant; by default all of them.

    Attributes:
        log_dets: of each site so far, what is kept of the parts of log |det ∂values/∂numbers|.
    """

    def __init__(
        self,
        latents: Latents,
        number: Callable[[str, Prior | None], Tensor],
        total: Total = lambda _, parts: parts,
    ) -> None:
        super().__init__()
        self.latents, self.number, self.total = latents, number, total
        self.log_dets: list[Tensor] = []

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        site = self.latents.sites.get(msg["name"])
        if site is None or msg["is_observed"]:
            return
        hidden = msg["mask"] is not None and msg["mask"] is not True
        prior = None if hidden else prior_of(msg["fn"])
        msg["value"], log_det = site.constrain(self.number(site.name, prior))
        self.log_dets.append(self.total(site, log_det))


class Moves:
    """The numbers z of a model's latents at coordinates x, as their sites come up in a run.

    Args:
        latents: the table of the sites.
        counts: by name, how many tensors each site has that is moved.
        x: coordinates, shape (D,).
        c: the same shape.
        tensors: of all sites that are moved.
        total: as in :class:`Filled`.
    """

    def __init__(
        self,
        latents: Latents,
        counts: Mapping[str, int],
        x: Tensor,
        c: Tensor,
        *tensors: Tensor,
        total: Total = lambda _, parts: parts,
    ) -> None:
        self.total = total
        left = iter(tensors)
        self.tensors = {n: list(itertools.islice(left, k)) for n, k in counts.items()}
        self.latents = latents
        self.x, self.c = latents.unpack(x), latents.unpack(c)
        self.z: dict[str, Tensor] = {}
        self.log_dets: list[Tensor] = []
        self.lost: list[Tensor] = []

    def __call__(self, name: str, prior: Prior | None) -> Tensor:
        """Of the next site, by its prior."""
        z = self.x[name]
        if name in self.tensors:
            first = itertools.takewhile(lambda site: site.name != name, self.latents)
            parts = [self.z[site.name].reshape(-1) for site in first if not is_wide(site)]
            u = torch.cat([z.new_zeros(0), *parts])
            z, log_det, lost = prior.forth(z, u, self.c[name], *self.tensors[name])
            self.log_dets.append(self.total(self.latents.sites[name], log_det))
            self.lost.append(lost)
        self.z[name] = z
        return z

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """All z (D,), log |det ∂z/∂x|, and how far z is rounded, in sds of a prior."""
        lost = torch.stack([t.amax() for t in self.lost]).amax()
        log_det = torch.stack([t.sum() for t in self.log_dets]).sum()
        return self.latents.pack(self.z), log_det, lost
