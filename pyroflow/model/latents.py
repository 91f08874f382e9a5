"""The latents of a model: a table of its sites, and one vector of unconstrained numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch.distributions.constraints import Constraint

from pyroflow.model.sites import Description, LatentSite
from pyroflow.model.supports import base_of, bijection, same_support

Site = dict[str, Any]  # a node of a trace
Values = Mapping[str, Tensor]


class Latents:
    """The latent sites of a model, in its order; together D unconstrained numbers z.

    Attributes:
        sites: a :class:`~pyroflow.model.sites.LatentSite` by name.
        sizes: how many of the D numbers belong to each.
    """

    def __init__(self, sites: Iterable[LatentSite]) -> None:
        self.sites = {site.name: site for site in sites}
        self.sizes = [site.unconstrained_shape.numel() for site in self]

    def __iter__(self) -> Iterator[LatentSite]:
        return iter(self.sites.values())

    @classmethod
    def of(cls, trace: Trace) -> Latents:
        """Those of a run of the model; raises ``ValueError`` by name if one is discrete."""
        return cls(LatentSite.of(site) for _, site in trace.iter_stochastic_nodes())

    def to(self, move: Callable[[Tensor], Tensor]) -> Latents:
        """With ``move`` applied to their tensors, such as the bounds of an interval."""
        return Latents(site.to(move) for site in self)

    def trace(self) -> Trace:
        """A trace of the sites alone, for Pyro's guides."""
        trace = Trace()
        for site in self:
            fn = dist.ImproperUniform(site.support, site.batch_shape, site.event_shape)
            node = {"type": "sample", "name": site.name, "fn": fn, "value": site.value}
            node |= {"is_observed": False, "cond_indep_stack": site.plates}
            node |= {"args": (), "kwargs": {}, "infer": {}, "scale": 1.0, "mask": None}
            trace.add_node(site.name, **node)
        return trace

    def pack(self, latents: Values) -> Tensor:
        """One vector z (*B, D) from unconstrained values by site, (*B, *unconstrained shape)."""
        parts = []
        for site, size in zip(self, self.sizes, strict=True):
            value = latents[site.name]
            batch = value.shape[: value.dim() - len(site.unconstrained_shape)]
            parts.append(value.reshape(*batch, size))
        return torch.cat(parts, -1)

    def unpack(self, z: Tensor, *, particles: bool = False) -> dict[str, Tensor]:
        """Unconstrained values by site, (*B, *unconstrained shape), from z (*B, D).

        With ``particles``, where B ends in as many ones as there are plates, it is that of Pyro's
        vectorised particles: a site's own batch takes the place of the last ones.
        """
        batch, depth = z.shape[:-1], max(len(site.batch_shape) for site in self)
        particles = particles and len(batch) > depth > 0 and all(n == 1 for n in batch[-depth:])
        found = {}
        for site, piece in zip(self, z.split(self.sizes, -1), strict=True):
            kept = len(batch) - len(site.batch_shape) if particles else len(batch)
            found[site.name] = piece.reshape(batch[:kept] + site.unconstrained_shape)
        return found

    def constrain(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Values by site, (*B, *shape), at z (*B, D), and log |det ∂values/∂z|, (*B)."""
        values, log_dets = {}, []
        for name, latent in self.unpack(z).items():
            values[name], log_det = self.sites[name].constrain(latent)
            log_dets.append(log_det)
        return values, _summed(log_dets, z.dim() - 1)

    def unconstrain(self, values: Values, like: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`constrain`: z, shape (*B, D), and the same log-determinant.

        Args:
            values: by site name, shape (*B, *shape of the site). Singleton dimensions between the
                two, such as Pyro's ``Predictive`` puts there, are taken out.
            like: has the dtype and device that z shall have.

        Raises:
            ValueError: If a site is missing or unknown, a shape is not the site's, batch shapes
                differ, or a value is outside its support; each names the site.
        """
        _check_names(list(self.sites), values)
        options = {"dtype": like.dtype, "device": like.device}
        found = {name: torch.as_tensor(values[name], **options) for name in self.sites}
        batch, latents, log_dets = _common_batch(self, found), {}, []
        for site in self:
            value = found[site.name].reshape(batch + site.value.shape)
            latents[site.name], log_det = site.unconstrain(value)
            log_dets.append(log_det)
        return self.pack(latents), _summed(log_dets, len(batch))

    def check(self, trace: Trace) -> None:
        """Compare them with the continuous latents of a later run of the model.

        Raises:
            ValueError: If a site is new, gone, of another shape or on another support, by name.
        """
        now = {n: site["fn"] for n, site in trace.nodes.items() if _is_continuous_latent(site)}
        for name in [*now, *self.sites]:
            fn, then = now.get(name), self.sites.get(name)
            if then is None:
                found = f"the model samples site {name!r}, which was not there when the guide was "
                found += f"set up with the sites {sorted(self.sites)}"
            elif fn is None:
                found = f"the guide samples site {name!r}, which the model does not: its latent "
                found += f"sites are {sorted(now)}"
            else:
                shapes = tuple(fn.batch_shape + fn.event_shape), tuple(then.value.shape)
                supports = base_of(fn.support), base_of(then.support)
                pair = shapes if shapes[0] != shapes[1] else supports
                if pair is supports and same_support(*supports):
                    continue
                kind = "shape" if pair is shapes else "support"
                found = f"site {name!r} has {kind} {pair[0]} in the model, and had {pair[1]} when "
                found += "the guide was set up"
            raise ValueError(
                f"{found}. A guide needs the same latents in every call: make a new guide for this "
                "model and these arguments, or let the model sample all of them each time"
            )

    def describe(self, describe: Callable[[Constraint], Any]) -> list[Description]:
        """The sites as plain data, for a file. ``describe`` does that for a support."""
        return [site.describe(describe) for site in self]

    @classmethod
    def restore(
        cls, sites: list[Description], build: Callable[[Any], Constraint], like: Tensor
    ) -> Latents:
        """What :meth:`describe` gave, and a file that may be damaged.

        Args:
            sites: the plain data.
            build: makes a support of its plain data.
            like: has the dtype and device of z, and its D.

        Raises:
            ValueError: If two sites have one name, or shapes and plates do not fit D: a guide would
                make room for them.
        """
        if len({site["name"] for site in sites}) < len(sites):
            raise ValueError("two of its sites have one name")
        claimed = sum(math.prod(site["unconstrained_shape"]) for site in sites)
        if claimed != len(like):
            raise ValueError(f"its sites have {claimed} latents, and its flow {len(like)}")
        return cls(LatentSite.restore(site, build, like) for site in sites)


def _summed(log_dets: Iterable[Tensor], batch_dim: int) -> Tensor:
    """The sum over sites of log-determinants, each summed to its first dimensions."""
    return torch.stack([sum_rightmost(t, t.dim() - batch_dim) for t in log_dets]).sum(0)


def _check_names(names: list[str], values: Values) -> None:
    if not isinstance(values, Mapping):
        raise TypeError(f"values must map site names to tensors, got {type(values).__name__}")
    missing = [name for name in names if name not in values]
    unknown = [name for name in values if name not in names]
    if missing or unknown:
        wrong = f"lacks {missing}" if missing else f"has {unknown}, which the guide does not know"
        raise ValueError(
            f"values {wrong}: give a value for each of the guide's sites, {names}, and no other"
        )


def _common_batch(sites: Iterable[LatentSite], values: Values) -> Size:
    """The batch shape B that the values have before the shape of their site."""
    batches = {}
    for site in sites:
        shape, own = values[site.name].shape, site.value.shape
        cut = len(shape) - len(own)
        if cut < 0 or shape[cut:] != own:
            raise ValueError(
                f"values expects site {site.name!r} with shape (*B, *{tuple(own)}), "
                f"got {tuple(shape)}"
            )
        batches[site.name] = shape[:cut]
    shortest = min(batches, key=lambda name: len(batches[name]))
    common = batches[shortest]
    for name, batch in batches.items():
        if batch[: len(common)] != common or batch[len(common) :].numel() != 1:
            raise ValueError(
                f"values expects one batch shape B for all sites, got {tuple(common)} at "
                f"{shortest!r} and {tuple(batch)} at {name!r}"
            )
    return common


def _is_continuous_latent(site: Site) -> bool:
    latent = site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    return latent and not site["fn"].support.is_discrete


def started_anywhere(init_loc_fn: Callable) -> Callable:
    """The init function; near the middle of the unconstrained space where it fails.

    It asks for a sampler, which an improper prior does not have, nor some of the user's own.
    """

    def start(site: Site) -> Tensor:
        try:
            return init_loc_fn(site)
        except NotImplementedError as error:
            try:
                to_support = bijection(site["fn"].support)
            except NotImplementedError:
                raise error from None
            shape = to_support.inverse_shape(site["fn"].shape())
            return to_support(0.1 * torch.randn(shape))

    return start
