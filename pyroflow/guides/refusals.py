"""What no guide of ours can treat: latents, refused at set-up by name, and transforms.

Each function raises ``ValueError``, but where it says so, with the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor
from torch.distributions import Distribution, Transform, VonMises
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import _InverseTransform

from pyroflow.flows import Flow
from pyroflow.model.latents import Latents
from pyroflow.model.sites import LatentSite
from pyroflow.model.supports import base_of, bijection, same_support
from pyroflow.seeds import seeded

# They say that they are on the real line, where each turn of the circle counts once more.
_CIRCULAR = (VonMises, dist.SineBivariateVonMises, dist.SineSkewed)
Centring = Literal["auto"] | Mapping[str, float | Tensor] | None
_CONSTANT = [value for value in vars(constraints).values() if isinstance(value, Constraint)]
_LARGEST_TRIED = 1000  # of the sizes that are offered to a transform which refuses the latents


def refuse_no_model(model: object) -> None:
    """For what cannot be called as a model is; raises ``TypeError``."""
    if not callable(model):
        raise TypeError(
            f"model must be a Pyro model, a callable, got {type(model).__name__}: give the "
            "function itself, model, and not what it returns, model(...)"
        )


def refuse_subsampled(latents: Latents, plates: Sequence[str]) -> None:
    """For a latent in a plate that subsamples, other than those whose rows the guide knows.

    A vector of all latents has no place for those of rows that were not drawn.
    """
    pairs = [(site, frame) for site in latents for frame in site.plates if frame.name not in plates]
    for site, frame in pairs:
        if frame.full_size is not None and frame.size < frame.full_size:
            reason = (
                f"the guide has local latents for plate {', '.join(map(repr, plates))} only. Name "
                f"it too, plate={[*plates, frame.name]}, if its rows have latents of their own; or "
                "run"
            )
            if not plates:
                reason = (
                    f"the guide would use the same {frame.size} latents for whichever rows are "
                    "drawn. Use pyroflow.AutoStructuredFlow, which knows all rows, or "
                    "AmortizedPlanarGuide, which makes them from the data of the rows drawn; or run"
                )
            raise ValueError(
                f"site {site.name!r} is a latent in plate {frame.name!r}, which subsamples "
                f"{frame.size} of {frame.full_size} rows: {reason} the plate in full, or integrate "
                "the site out of the model"
            )


def refuse_varying_support(site: LatentSite) -> None:
    """For a latent whose support is another one in each row of a plate."""
    transform, batch = bijection(site.support), len(site.batch_shape)
    one = transform.inv(site.value).flatten(0, batch - 1)[0]
    if transform(one).dim() > len(site.event_shape):
        raise ValueError(
            f"site {site.name!r} has a support that differs between rows, which a guide cannot "
            "know of rows that were not drawn: sample it on a fixed support and move it in the "
            "model"
        )


def refuse_bound_rows(
    latents: Latents, kinds: Iterable[frozenset[str]], sizes: Mapping[str, tuple[int, int]]
) -> None:
    """For a latent in a plate that subsamples, whose rows are not those of one of the kinds."""
    for site in latents:
        for name in {frame.name for frame in site.plates} & sizes.keys():
            if not any(name in names for names in kinds):
                N, B = sizes[name]
                reason = (
                    "and its rows depend on each other given the other latents, or are inside rows "
                    "of another plate: run this plate in full, or let the outer one subsample"
                )
                if B == 1:
                    reason = "and one row does not show whether rows interact: draw two or more"
                raise ValueError(
                    f"site {site.name!r} is a latent in plate {name!r}, which subsamples {B} of "
                    f"{N} rows, {reason}"
                )


def refuse_unsupported(trace: poutine.Trace | None, error: NotImplementedError) -> None:
    """For the site that Pyro had no guide for, where it can be told."""
    if trace is None:  # the run itself failed
        return
    for name, site in trace.iter_stochastic_nodes():
        for frame in site["cond_indep_stack"]:
            if not frame.vectorized:
                raise ValueError(
                    f"site {name!r} is a latent in the sequential plate {frame.name!r}: guides "
                    "know vectorised plates only; write `with pyro.plate(...)`, or a loop over "
                    "range"
                ) from error
        try:
            bijection(site["fn"].support)
        except NotImplementedError:
            raise ValueError(
                f"site {name!r} has the support {site['fn'].support}, which no bijection of torch "
                "maps from unconstrained numbers: build it from parts that have one, a covariance "
                "from scales and an LKJCholesky"
            ) from error


def refuse_circular(trace: poutine.Trace) -> None:
    """For a latent angle.

    On the real line the evidence has a part for every turn, and on an interval the mass on one
    side of the cut is lost as soon as the posterior lies across it.
    """
    for name, site in trace.iter_stochastic_nodes():
        if _is_circular(site["fn"]):
            raise ValueError(
                f"site {name!r} is a latent angle: no map without a cut takes the real line of a "
                "guide to the circle. Sample a direction for each angle, and give it the prior of "
                "the angle: v = pyro.sample('v', dist.Normal(0.0, 1.0).expand([2]).to_event(1)), "
                f"angle = pyro.deterministic({name!r}, torch.atan2(v[..., 1], v[..., 0])), "
                "pyro.factor('prior', prior.log_prob(angle) + math.log(2 * math.pi))"
            )


def _is_circular(fn: Distribution) -> bool:
    """Whether a distribution, or one that it is made of, is of angles."""
    inner = [part for part in vars(fn).values() if isinstance(part, Distribution)]
    return isinstance(fn, _CIRCULAR) or any(map(_is_circular, inner))


def refuse_moving_supports(
    model: Callable, latents: Latents, args: tuple, kwargs: dict[str, Any]
) -> None:
    """For a latent whose support another latent moves, or chance.

    Where a support has bounds, the model runs once more, at values of its latents beside the
    present ones: a bound may come by way of ``.item()``, which leaves no graph.
    """
    if all(any(base_of(site.support) is c for c in _CONSTANT) for site in latents):
        return
    with seeded(0), torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
        run = poutine.condition(model, data={site.name: _beside(site) for site in latents})
        nodes = poutine.trace(run).get_trace(*args, **kwargs).nodes
    for name in latents.sites.keys() & nodes.keys():
        if not same_support(latents.sites[name].support, nodes[name]["fn"].support):
            raise ValueError(
                f"site {name!r} has a support that another latent moves, or chance: its bounds are "
                "others in a second run of the model. A guide maps to those of the first, and "
                "would cut off the rest. Sample the site on a fixed support and move it in the "
                "model: u = pyro.sample('u', dist.Uniform(0.0, 1.0)), "
                f"x = pyro.deterministic({name!r}, low + (high - low) * u); or low + u, u positive"
            )


def _beside(site: LatentSite) -> Tensor:
    to_support = bijection(site.support)
    latent = to_support.inv(site.value)
    return to_support(latent + 0.01 * (1 + latent.abs()) * torch.randn_like(latent))


def checked_transforms(transforms: Any) -> list[Transform]:
    """The transforms as a list; ``TypeError`` for what is none."""
    if isinstance(transforms, Transform | ConditionalTransform):
        transforms = [transforms]
    if not isinstance(transforms, Iterable):
        raise TypeError(
            "transforms must be a sequence of transforms, or a function from the number of latents "
            f"to one, got {type(transforms).__name__}"
        )
    transforms = list(transforms)
    for t in transforms:
        if isinstance(t, ConditionalTransform):
            raise ValueError(
                f"transforms must not be conditional, got {type(t).__name__}: a guide has no "
                "context to give; pass t.condition(context) or the unconditional transform"
            )
        if not isinstance(t, Transform):
            raise TypeError(f"transforms must hold transforms, got {type(t).__name__}")
    return transforms


@torch.no_grad()
def refuse_sizes(flow: Flow, latent_dim: int) -> None:
    """For a transform of another size: a draw is sent through, as nothing else tells it."""
    with seeded(0):
        value = flow.base().sample()
        for t in flow.transforms():
            value = _image(t, value, latent_dim)
    if value.shape != (latent_dim,):
        raise ValueError(
            f"transforms end in shape {tuple(value.shape)}, and the model has {latent_dim} "
            "unconstrained latents: the last transform must return a vector of them"
        )


def _image(t: Transform, x: Tensor, latent_dim: int) -> Tensor:
    name = f"{type(t.inv).__name__}.inv" if isinstance(t, _InverseTransform) else type(t).__name__
    if t.domain.event_dim > x.dim():
        raise ValueError(
            f"transforms: {name} acts on events of {t.domain.event_dim} dimensions, and the "
            f"model's {latent_dim} unconstrained latents are a vector: put it between two of "
            f"torch's ReshapeTransform, from ({latent_dim},) to the shape it takes and back"
        )
    try:
        return _accepted(t, x)
    except Exception as error:
        size = _size_taken(t, x) if x.dim() == 1 else None
        expected = f"expects a vector of {size}" if size else "does not take them"
        raise ValueError(
            f"transforms: the model has {latent_dim} unconstrained latents, and {name} "
            f"{expected} ({error}): give transforms as a function of their number, such as "
            "AutoFlow(model, lambda latent_dim: [Planar(latent_dim)])"
        ) from error


def _accepted(t: Transform, x: Tensor) -> Tensor:
    y = t(x)
    log_det = t.log_abs_det_jacobian(x, y)
    batch = x.shape[: x.dim() - t.domain.event_dim]
    # Parameters of another size may broadcast with x, and only the shapes tell.
    if y.shape != t.forward_shape(x.shape) or log_det.shape != batch:
        raise ValueError(f"shape {tuple(x.shape)} became {tuple(y.shape)}")
    if x.dim() == 1 and getattr(t, "input_dim", len(x)) != len(x):
        raise ValueError(f"its input_dim is {t.input_dim}")
    return y


def _size_taken(t: Transform, like: Tensor) -> int | None:
    for size in range(1, _LARGEST_TRIED + 1):
        try:
            _accepted(t, like.new_zeros(size))
        except Exception:
            continue
        return size
    return None


def checked_centring(centring: Centring) -> Centring:
    """The argument of a guide, a mapping as a dict of its own.

    Raises:
        ValueError: If it is neither "auto", None nor a mapping, or a c is outside [0, 1].
    """
    if centring is None or centring == "auto":
        return centring
    if not isinstance(centring, Mapping):
        raise ValueError(f"centring must be 'auto', None, or c by site, got {centring!r}")
    for name, c in centring.items():
        values = torch.as_tensor(c, device=None if isinstance(c, Tensor) else "cpu")
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(
                f"centring expects c in [0, 1] for site {name!r}, 1 as written and 0 non-centred, "
                f"got {c}"
            )
    return dict(centring)


def refuse_centring(centring: Mapping[str, Any], movable: list[str]) -> None:
    """For a site that c is given for, and that cannot be moved."""
    wrong = [name for name in centring if name not in movable]
    if wrong:
        raise ValueError(
            f"centring has site {wrong[0]!r}, which cannot be moved: it may name sites whose prior "
            "takes its location or scale from other latents, of a location and scale family, "
            f"here {movable or 'none'}. Leave it out"
        )
