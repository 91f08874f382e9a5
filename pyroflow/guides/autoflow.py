"""AutoFlow: a flow over all continuous latents of a Pyro model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from pyroflow.checks import check_choice, check_count, check_positive
from pyroflow.flows import AlongPath, Flow, StandardNormal
from pyroflow.guides.coordinates import Coordinates
from pyroflow.guides.flow_guide import FlowGuide
from pyroflow.guides.recording import spread
from pyroflow.guides.refusals import (
    Centring,
    checked_centring,
    checked_transforms,
    refuse_centring,
    refuse_no_model,
    refuse_sizes,
)
from pyroflow.model.at_hand import Subsampling
from pyroflow.model.latents import started_anywhere
from pyroflow.transforms import Affine, Arrowhead
from pyroflow.transforms.affine import AffineKind

Build = Callable[[int], Transform | Iterable[Transform]]


class StandardStudentT(nn.Module):
    """D independent Student-t variables with location 0, scale 1, and degrees of freedom df.

    Layers of tanh units leave the tails of their base as they are, so heavy-tailed posteriors
    want a heavy-tailed base.

    Raises:
        ValueError: If input_dim < 1, or df is no finite number above 0.
    """

    def __init__(self, input_dim: int, df: float) -> None:
        super().__init__()
        size = check_count("input_dim", input_dim, 1)
        self.register_buffer("loc", torch.zeros(size))
        self.register_buffer("df", torch.full((size,), float(check_positive("df", df))))

    def forward(self) -> Distribution:
        """The distribution, with event shape (D,)."""
        return dist.StudentT(self.df, self.loc, torch.ones_like(self.loc)).to_event(1)


class AutoFlow(FlowGuide):
    """A flow of any transforms as guide for any Pyro model with continuous latents.

    All latents, mapped to the unconstrained space, form one vector z of D numbers with
    distribution: standard normal base, the transforms, affine layer. Pyroflow's own layers start at
    the identity; where all do, the guide starts as the Gaussian that ``init_loc_fn`` and
    ``init_scale`` say. Other transforms start as they are, and the affine layer moves and scales
    what they make of the base.

    See Also:
        :class:`~pyroflow.AutoPlanarFlow` and :class:`~pyroflow.AutoSylvesterFlow`;
        :func:`~pyroflow.fit_guide`, which trains them.

    References:
        Rezende and Mohamed, Variational Inference with Normalizing Flows, 2015,
        https://arxiv.org/abs/1505.05770, section 4 and equation 15.

    Args:
        model: a Pyro model. Discrete latents must be enumerated or blocked.
        transforms: from base to latents, first to last: transforms of pyroflow, Pyro or torch,
            ``t.inv`` to run t backwards, compositions; or a function from D to them, since D
            is only known once the model has run. They are trained in place, and take the
            latents' dtype and device.
        affine: "full" (lower-triangular scale), "diagonal", or None: then z is the output of
            the transforms and ``init_loc_fn`` and ``init_scale`` have no effect.
        init_loc_fn: start of each site, one of Pyro's ``init_to_…`` functions.
        init_scale: diagonal of the affine layer's scale at the start.
        base_df: degrees of freedom of a base of independent Student-t variables with scale 1, for
            posteriors with heavy tails; None for the normal base.
        centring: how latents are written whose prior takes its location or scale from others, as
            in hierarchies: "auto", as :func:`~pyroflow.fit_guide` finds best, and as the model
            writes them until then; None, as the model writes them; or by site c in [0, 1], a
            number or a tensor of the site's unconstrained shape: 1 as written, 0 non-centred, in
            the coordinates of Pyro's ``LocScaleReparam(c)``.

    Attributes:
        flow: after the first call, the :class:`~pyroflow.Flow` over coordinates x of shape (D,).
        affine: after the first call, its affine layer; None if there is none.
        path_derivative: whether gradients of log q go along the path of the sample only
            (:class:`~pyroflow.flows.AlongPath`), in any ELBO.

    Raises:
        TypeError: If ``transforms`` or an entry has another type.
        ValueError: If a transform is conditional, ``affine`` is unknown, init_scale or base_df is
            not positive; at the first call, as :meth:`setup` does.
        RuntimeError: If the model has no latents, at the first call.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.distributions.transforms import affine_coupling
        >>> from pyroflow import Planar
        >>> def model():
        ...     return pyro.sample("scale", dist.LogNormal(0.0, 1.0).expand([3]).to_event(1))
        >>> guide = AutoFlow(model, lambda dim: [affine_coupling(dim), Planar(dim, num_layers=4)])
        >>> guide()["scale"].shape, len(guide.get_transforms())
        (torch.Size([3]), 3)
    """

    _unpickled = ("_model", "_given")

    def __init__(
        self,
        model: Callable,
        transforms: Transform | Iterable[Transform] | Build,
        *,
        affine: AffineKind | None = "full",
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
        base_df: float | None = None,
        centring: Centring = "auto",
    ) -> None:
        refuse_no_model(model)
        self.path_derivative = False
        self.centring_given = checked_centring(centring)
        check_choice("affine", affine, ("full", "diagonal", None))
        self.affine_kind, self.init_scale = affine, check_positive("init_scale", init_scale)
        self.base_df = None if base_df is None else float(check_positive("base_df", base_df))
        is_build = callable(transforms) and not isinstance(transforms, Transform | nn.Module)
        # In a tuple, so as not to be registered.
        self._given = (transforms if is_build else checked_transforms(transforms),)
        super().__init__(model, init_loc_fn=started_anywhere(init_loc_fn))
        self.coordinates = None

    @property
    def affine(self) -> Affine | Arrowhead | None:
        """The affine layer, if there is one."""
        return None if self.affine_kind is None else self.flow.parts[-1]

    def _make_parts(self, *args: Any, **kwargs: Any) -> None:
        self.coordinates = self._fixed_coordinates(args, kwargs)
        init_loc, dim, df = self.start(), self.latent_dim, self.base_df
        with init_loc.device:  # whatever the default
            base = StandardNormal(dim) if df is None else StandardStudentT(dim, df)
            transforms = self._transforms(init_loc)
        refuse_sizes(Flow(base, transforms).to(init_loc), dim)
        if self.affine_kind is not None:
            transforms.append(self._make_affine(init_loc))
        flow = Flow(base, transforms)
        for p in flow.parameters():  # of another stride Pyro's store would keep, and train, a copy
            p.data = p.data.contiguous()
        self.flow = flow

    def _make_affine(self, loc: Tensor) -> Affine | Arrowhead:
        return Affine(len(loc), self.affine_kind, init_loc=loc, init_scale=self.init_scale)

    def _fixed_coordinates(self, args: tuple, kwargs: dict[str, Any]) -> Coordinates | None:
        """Those of the ``centring`` that was given as a dict."""
        given = self.centring_given
        if not isinstance(given, dict):
            return None
        found = self._record(args, kwargs, self.subsampling, given)
        refuse_centring(given, [] if found is None else list(found.centring))
        if found is not None:
            found.c.copy_(spread(found, given))
        return found

    def find_coordinates(self, args: tuple, kwargs: dict[str, Any], *sizes: Subsampling) -> None:
        """Record the model's coordinates, c = 1, for a fit to find c, if it is to be found."""
        if self.centring_given == "auto" and self.coordinates is None:
            self.coordinates = self._record(args, kwargs, *(sizes or [self.subsampling]))

    def _transforms(self, init_loc: Tensor) -> list[Transform]:
        """What lies between the base and the affine layer."""
        (given,) = self._given
        return list(given) if isinstance(given, list) else checked_transforms(given(len(init_loc)))

    def get_base_dist(self) -> dist.TorchDistribution:
        """N(0, I), or independent Student-t variables, with event shape (D,)."""
        return self.flow.base()

    def get_transforms(self) -> list[Transform]:
        """The transforms from the base to the unconstrained latents, in order."""
        moved = [] if self.coordinates is None else [self.coordinates]
        return self.flow.transforms() + moved

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """The transforms as one."""
        return dist.transforms.ComposeTransformModule(self.get_transforms())

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        """The guide's distribution over the unconstrained latents, event shape (D,)."""
        # A list, not a composed transform: torch's would run the stack again to score a sample.
        q = self.over_coordinates()
        moved = self.coordinates
        return q if moved is None else type(q)(q.base_dist, [*q.transforms, moved])

    def over_coordinates(self, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        """The same over the flow's own coordinates x, as :meth:`constrain` takes them."""
        q = self.flow()
        return AlongPath(q.base_dist, q.transforms) if self.path_derivative else q
