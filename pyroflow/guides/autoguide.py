"""AutoFlow: a flow over all continuous latents of a Pyro model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor
from torch.distributions import Transform, biject_to

from pyroflow.checks import check_choice, check_count, check_positive
from pyroflow.flows import Flow, StandardNormal
from pyroflow.guides.given_transforms import Build, check_sizes, check_transforms, transforms_for
from pyroflow.path_derivative import AlongPath
from pyroflow.seeds import seeded
from pyroflow.transforms import Affine, Planar
from pyroflow.transforms.affine import AffineKind

MARGINAL_DRAWS = 10_000  # draws behind median and quantiles


class AutoFlow(AutoContinuous):
    """A flow of any transforms as guide for any Pyro model with continuous latents.

    All latents, mapped to the unconstrained space, form one vector z of D numbers with
    posterior: standard normal base, the transforms, affine layer. Pyroflow's own layers start at
    the identity; where all do, the guide starts as the Gaussian that ``init_loc_fn`` and
    ``init_scale`` say. Other transforms start as they are, and the affine layer moves and scales
    what they make of the base.

    See Also:
        :class:`AutoPlanarFlow`; :func:`~pyroflow.fit_guide`, which trains it.

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

    Attributes:
        flow: after the first call, the :class:`~pyroflow.Flow` over the unconstrained latents.
        affine: after the first call, its affine layer; None if there is none.
        path_derivative: whether gradients of log q go along the path of the sample only
            (:class:`~pyroflow.path_derivative.AlongPath`), in any ELBO.

    Raises:
        TypeError: ``transforms`` or an entry of another type.
        ValueError: a conditional transform, an unknown ``affine``, init_scale not positive; at
            the first call, a discrete latent (naming the site and the way out) or a transform
            that does not fit D.
        RuntimeError: at the first call, a model without latents.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.distributions.transforms import affine_coupling
        >>> def model():
        ...     return pyro.sample("scale", dist.LogNormal(0.0, 1.0).expand([3]).to_event(1))
        >>> guide = AutoFlow(model, lambda dim: [affine_coupling(dim), Planar(dim, num_layers=4)])
        >>> guide()["scale"].shape, len(guide.get_transforms())
        (torch.Size([3]), 3)
    """

    def __init__(
        self,
        model: Callable,
        transforms: Transform | Iterable[Transform] | Build,
        *,
        affine: AffineKind | None = "full",
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        self.path_derivative = False
        check_choice("affine", affine, ("full", "diagonal", None))
        self.affine_kind, self.init_scale = affine, check_positive("init_scale", init_scale)
        self._given = (check_transforms(transforms),)  # in a tuple, so as not to be registered
        super().__init__(model, init_loc_fn=init_loc_fn)

    @property
    def affine(self) -> Affine | None:
        """The affine layer, if there is one."""
        return None if self.affine_kind is None else self.flow.parts[-1]

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._setup_prototype(*args, **kwargs)
            self._refuse_local_latents()
            self.flow = self._make_flow()
        except Exception:
            self.prototype_trace = None  # so that the next call says the same
            raise
        self._take_own_name()

    def _make_flow(self) -> Flow:
        dim, loc = self.latent_dim, self._init_loc()
        base, transforms = StandardNormal(dim), transforms_for(dim, self._given[0])
        check_sizes(Flow(base, transforms).to(loc), dim)
        if self.affine_kind is not None:
            transforms.append(
                Affine(dim, self.affine_kind, init_loc=loc, init_scale=self.init_scale)
            )
        return Flow(base, transforms)

    def __getstate__(self) -> dict[str, Any]:
        """As Pyro, which drops the model: a copy is never set up again, and functions may stay."""
        return super().__getstate__() | {"_given": None}

    def _refuse_local_latents(self) -> None:
        """A vector of all latents has no place for those of rows that were not drawn."""
        for name, stack in self._cond_indep_stacks.items():
            for frame in stack:
                if frame.full_size is not None and frame.size < frame.full_size:
                    raise ValueError(
                        f"site {name!r} is a latent in plate {frame.name!r}, which subsamples "
                        f"{frame.size} of {frame.full_size} rows: the guide would use the same "
                        f"{frame.size} latents for whichever rows are drawn. Run the plate in "
                        "full, or integrate the site out of the model"
                    )

    def _take_own_name(self) -> None:
        """Share no names in Pyro's parameter store with an earlier guide.

        Pyro would train the tensors that the store has under the name, which are the earlier
        guide's, and this guide would stay as it is.
        """
        taken, name, count = set(pyro.get_param_store().keys()), self._pyro_name, 1
        while any(key.startswith(f"{self._pyro_name}.") for key in taken):
            count += 1
            self._pyro_name = f"{name}_{count}"

    def get_base_dist(self) -> dist.TorchDistribution:
        """N(0, I), with event shape (D,)."""
        return self.flow.base()

    def get_transforms(self) -> list[Transform]:
        """The transforms from the base to the unconstrained latents, in order."""
        return self.flow.transforms()

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """The transforms as one."""
        return dist.transforms.ComposeTransformModule(self.get_transforms())

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        """The guide's distribution over the unconstrained latents, event shape (D,)."""
        # A list, not a composed transform: torch's would run the stack again to score a sample.
        q = self.flow()
        return AlongPath(q.base_dist, q.transforms) if self.path_derivative else q

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior median of each latent, by site; see :meth:`quantiles`."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal posterior quantiles of each latent, from 10,000 draws with a fixed seed.

        As in Pyro, they are taken of the unconstrained latents and then mapped to the support.

        Args:
            quantiles: Q probabilities in [0, 1].
            *args: the model's, used where the guide was never called.
            **kwargs: likewise.

        Returns:
            By site name, a tensor of shape (Q, *shape of the site).
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        with seeded(0):
            latents = self.get_posterior().sample((MARGINAL_DRAWS,))
        levels = torch.as_tensor(quantiles, dtype=latents.dtype, device=latents.device)
        rows = [self._constrained(latent) for latent in latents.quantile(levels, dim=0)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _constrained(self, latent: Tensor) -> dict[str, Tensor]:
        return {
            site["name"]: biject_to(site["fn"].support)(value)
            for site, value in self._unpack_latent(latent)
        }


class AutoPlanarFlow(AutoFlow):
    """A planar flow as guide for any Pyro model with continuous latents.

    :class:`AutoFlow` with K planar layers: they start at the identity, so the guide starts as the
    Gaussian that ``init_loc_fn`` and ``init_scale`` say. With K = 0 it stays one and is, step by
    step, Pyro's ``AutoDiagonalNormal`` (affine "diagonal") or ``AutoMultivariateNormal`` ("full").

    Args:
        model: a Pyro model. Discrete latents must be enumerated or blocked.
        num_layers: K.
        affine: as in :class:`AutoFlow`, like the arguments that follow.
        init_loc_fn: start of each site.
        init_scale: standard deviation of each unconstrained latent at the start.

    Attributes:
        planar: after the first call, the :class:`~pyroflow.Planar` stack; None if K = 0.

    Raises:
        ValueError: num_layers < 0, and what :class:`AutoFlow` refuses.
        RuntimeError: at the first call, a model without latents.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     return pyro.sample("scale", dist.LogNormal(0.0, 1.0).expand([3]).to_event(1))
        >>> guide = AutoPlanarFlow(model, num_layers=4)
        >>> guide()["scale"].shape, guide.median()["scale"].shape
        (torch.Size([3]), torch.Size([3]))
    """

    def __init__(
        self,
        model: Callable,
        num_layers: int = 16,
        affine: AffineKind | None = "full",
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        self.num_layers = check_count("num_layers", num_layers, 0)
        options = {"affine": affine, "init_loc_fn": init_loc_fn, "init_scale": init_scale}
        super().__init__(model, partial(_planar_layers, num_layers=num_layers), **options)

    @property
    def planar(self) -> Planar | None:
        """The planar stack, if there is one."""
        return None if self.num_layers == 0 else self.flow.parts[0]


def _planar_layers(latent_dim: int, num_layers: int) -> list[Transform]:
    return [Planar(latent_dim, num_layers)] if num_layers > 0 else []
