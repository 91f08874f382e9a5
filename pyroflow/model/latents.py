"""The latent sites of a guide: their supports, and values on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch.distributions import register_kl
from torch.distributions.constraints import Constraint, independent

from pyroflow.model.supports import Preimage, bijection, remember

Site = dict[str, Any]
NO_SHAPE = Size()


class Point(dist.Delta):
    """A draw of the guide at its site, with the log Jacobian of the map to the support.

    Pyro's Kullback-Leibler divergence of a ``Delta`` leaves its ``log_density`` out, so that
    ``TraceMeanField_ELBO`` would lose the Jacobian of every constrained site. And its draws
    remember the latents that they come from, for priors to be scored there.
    """

    def __init__(
        self, v: Tensor, log_density: Tensor | float, event_dim: int, origin: Preimage
    ) -> None:
        super().__init__(v, log_density=log_density, event_dim=event_dim)
        self.origin = origin

    def expand(self, batch_shape: Size, _instance: object = None) -> Point:
        """The same point in a larger batch."""
        latent, support = self.origin
        event = latent.shape[len(self.batch_shape) :]
        new = super().expand(batch_shape, _instance=Point.__new__(Point))
        new.origin = Preimage(latent.expand(new.batch_shape + event), support)
        return new

    def rsample(self, sample_shape: Size = NO_SHAPE) -> Tensor:
        """The point, which remembers its latents."""
        value = super().rsample(sample_shape)
        return value if sample_shape else remember(value, *self.origin)


@register_kl(Point, dist.Distribution)
def _kl_point(p: Point, q: dist.Distribution) -> Tensor:
    return p.log_density - q.log_prob(p.v)


def point_at(site: Site, unconstrained: Tensor, masked: bool) -> Point:
    """The distribution of a site at unconstrained values; masked: no density is asked for."""
    support, event_dim = site["fn"].support, site["fn"].event_dim
    transform, origin = bijection(support), Preimage(unconstrained, support)
    value = transform(unconstrained)
    if masked:
        return Point(value, 0.0, event_dim, origin)
    log_det = transform.log_abs_det_jacobian(unconstrained, value)
    log_det = sum_rightmost(log_det, log_det.dim() - value.dim() + event_dim)
    return Point(value, -log_det, event_dim, origin)


def keep_support_only(site: Site) -> None:
    """Replace a site's prior by a stand-in with its shapes and support.

    The prior may hold tensors with a graph, which can neither be copied nor pickled, or data.
    """
    fn = site["fn"]
    site["fn"] = dist.ImproperUniform(
        _moved(fn.support, Tensor.detach), fn.batch_shape, fn.event_shape
    )
    site["value"] = site["value"].detach()


def move_support(site: Site, move: Callable[[Tensor], Tensor]) -> None:
    """Apply ``move`` to the tensors of a site, such as the bounds of an interval."""
    site["fn"]._support = _moved(site["fn"]._support, move)
    site["value"] = move(site["value"])


def _moved(held: Any, move: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(held, Tensor):
        return move(held)
    if isinstance(held, list | tuple):
        return type(held)(_moved(part, move) for part in held)
    if isinstance(held, Constraint) and vars(held):
        moved = copy.copy(held)
        vars(moved).update({name: _moved(part, move) for name, part in vars(held).items()})
        return moved
    return held


def started_anywhere(init_loc_fn: Callable) -> Callable:
    """The init function; and where it asks a sampler that there is not, a start of its own.

    An improper prior has none, or a distribution of the user's: these start near the middle of
    the unconstrained space.

    Args:
        init_loc_fn: one of Pyro's ``init_to_…`` functions, or of that kind.
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


def unconstrain(
    sites: Iterable[Site], values: Mapping[str, Any], like: Tensor
) -> tuple[Tensor, Tensor]:
    """The unconstrained latents at values of all sites.

    Args:
        sites: the guide's, in order.
        values: by site name, shape (*B, *shape of the site). Singleton dimensions between the
            two, such as Pyro's ``Predictive`` puts there, are taken out.
        like: has the dtype and device that the latents shall have.

    Returns:
        The latents, shape (*B, D), and the sum of the sites' log |det d value/d latent|, (*B).

    Raises:
        ValueError: a site that is missing or unknown, a shape that is not the site's, batch
            shapes that differ, values outside the support; each names the site.
    """
    sites = list(sites)
    _check_names([site["name"] for site in sites], values)
    found = {
        site["name"]: torch.as_tensor(values[site["name"]], dtype=like.dtype, device=like.device)
        for site in sites
    }
    batch = _common_batch(sites, found)
    latents, log_dets = [], []
    for site in sites:
        value = found[site["name"]].reshape(batch + site["value"].shape)
        transform = bijection(site["fn"].support)
        latent = _inside(site, transform.inv, value)
        log_det = transform.log_abs_det_jacobian(latent, value)
        latents.append(latent.reshape(*batch, latent[(0,) * len(batch)].numel()))
        log_dets.append(sum_rightmost(log_det, log_det.dim() - len(batch)))
    return torch.cat(latents, -1), torch.stack(log_dets).sum(0)


def _inside(site: Site, inverse: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    support = site["fn"].support
    if support.check(value).all():
        latent = inverse(value)
        if latent.isfinite().all():
            return latent
    raise ValueError(
        f"values expects site {site['name']!r} strictly inside its support, {support}, got a value "
        "outside or on its boundary: there the guide has no density"
    )


def _check_names(names: list[str], values: Mapping[str, Any]) -> None:
    if not isinstance(values, Mapping):
        raise TypeError(f"values must map site names to tensors, got {type(values).__name__}")
    missing = [name for name in names if name not in values]
    unknown = [name for name in values if name not in names]
    if missing or unknown:
        wrong = f"lacks {missing}" if missing else f"has {unknown}, which the guide does not know"
        raise ValueError(
            f"values {wrong}: give a value for each of the guide's sites, {names}, and no other"
        )


def _common_batch(sites: list[Site], values: dict[str, Tensor]) -> Size:
    """The batch shape B that the values have before the shape of their site."""
    batches = {}
    for site in sites:
        shape, own = values[site["name"]].shape, site["value"].shape
        cut = len(shape) - len(own)
        if cut < 0 or shape[cut:] != own:
            raise ValueError(
                f"values expects site {site['name']!r} with shape (*B, *{tuple(own)}), "
                f"got {tuple(shape)}"
            )
        batches[site["name"]] = shape[:cut]
    shortest = min(batches, key=lambda name: len(batches[name]))
    common = batches[shortest]
    for name, batch in batches.items():
        if batch[: len(common)] != common or batch[len(common) :].numel() != 1:
            raise ValueError(
                f"values expects one batch shape B for all sites, got {tuple(common)} at "
                f"{shortest!r} and {tuple(batch)} at {name!r}"
            )
    return common


def check_structure(sites: Iterable[Site], model_trace: Trace) -> None:
    """Compare a later run of a model with the sites that its guide was set up with.

    Discrete sites of the model are not the guide's, and are let pass.

    Raises:
        ValueError: a latent site that is new, gone, of another shape or on another support, by
            name.
    """
    sites = list(sites)
    then = {site["name"]: site["value"].shape for site in sites}
    now = {
        name: site["fn"].batch_shape + site["fn"].event_shape
        for name, site in model_trace.nodes.items()
        if _is_continuous_latent(site)
    }
    way_out = (
        "A guide needs the same latents in every call: make a new guide for this model and these "
        "arguments, or let the model sample all of them each time"
    )
    for name in [*now, *then]:
        if name not in then:
            raise ValueError(
                f"the model samples site {name!r}, which was not there when the guide was set up "
                f"with the sites {sorted(then)}. {way_out}"
            )
        if name not in now:
            raise ValueError(
                f"the guide samples site {name!r}, which the model does not: its latent sites are "
                f"{sorted(now)}. {way_out}"
            )
        if now[name] != then[name]:
            raise ValueError(
                f"site {name!r} has shape {tuple(now[name])} in the model, and had "
                f"{tuple(then[name])} when the guide was set up. {way_out}"
            )
    for site in sites:
        pair = (site, model_trace.nodes[site["name"]])
        before, after = (base_of(one["fn"].support) for one in pair)
        if not same_support(before, after):
            raise ValueError(
                f"site {site['name']!r} has support {after} in the model, and had {before} when "
                f"the guide was set up. {way_out}"
            )


def same_support(one: Constraint, other: Constraint) -> bool:
    """Whether two supports are of one kind and have the same bounds, up to their rounding."""
    pairs = zip_longest(_numbers(base_of(one)), _numbers(base_of(other)))
    return _kind(one) == _kind(other) and all(
        a is not None and b is not None and a.shape == b.shape and torch.allclose(a, b, 1e-6, 0.0)
        for a, b in pairs
    )


def base_of(support: Constraint) -> Constraint:
    """The support of the single numbers or vectors that an independent one repeats."""
    while isinstance(support, independent):
        support = support.base_constraint
    return support


def _numbers(held: Any) -> Iterator[Tensor]:
    """The bounds of a support, and whatever else it says in numbers, in float64 on the CPU."""
    if isinstance(held, Tensor | float | int):
        yield torch.as_tensor(held, dtype=torch.float64, device="cpu")
    parts = vars(held).values() if isinstance(held, Constraint) else held
    if not isinstance(held, Tensor | str) and isinstance(parts, Collection):
        for part in parts:
            yield from _numbers(part)


def _kind(support: Constraint) -> str:
    """The type of a support, apart from its bounds and batches."""
    return type(base_of(support)).__name__.strip("_").lower()


def _is_continuous_latent(site: Site) -> bool:
    latent = site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    return latent and not site["fn"].support.is_discrete
