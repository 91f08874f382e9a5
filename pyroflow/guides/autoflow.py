"""AutoFlow: a flow over all continuous latents of a Pyro model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor
from torch.distributions import Transform

from pyroflow.checks import check_choice, check_positive
from pyroflow.flows import AlongPath, Flow
from pyroflow.guides.bases import base_of
from pyroflow.guides.drop_in import DropIn
from pyroflow.guides.given import Build, check_sizes, check_transforms, transforms_for
from pyroflow.model.latents import started_anywhere, unconstrain
from pyroflow.model.supports import bijection
from pyroflow.seeds import seeded
from pyroflow.transforms import Affine
from pyroflow.transforms.affine import AffineKind

MARGINAL_DRAWS = 10_000  # draws behind median and quantiles


class AutoFlow(DropIn):
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

    Attributes:
        flow: after the first call, the :class:`~pyroflow.Flow` over the unconstrained latents.
        affine: after the first call, its affine layer; None if there is none.
        path_derivative: whether gradients of log q go along the path of the sample only
            (:class:`~pyroflow.flows.AlongPath`), in any ELBO.

    Raises:
        TypeError: ``transforms`` or an entry of another type.
        ValueError: a conditional transform, an unknown ``affine``, init_scale or base_df not
            positive; at the first call, a discrete latent (naming the site and the way out) or a
            transform that does not fit D.
        RuntimeError: at the first call, a model without latents.

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

    def __init__(
        self,
        model: Callable,
        transforms: Transform | Iterable[Transform] | Build,
        *,
        affine: AffineKind | None = "full",
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
        base_df: float | None = None,
    ) -> None:
        self.path_derivative = False
        check_choice("affine", affine, ("full", "diagonal", None))
        self.affine_kind, self.init_scale = affine, check_positive("init_scale", init_scale)
        self.base_df = None if base_df is None else float(check_positive("base_df", base_df))
        self._given = (check_transforms(transforms),)  # in a tuple, so as not to be registered
        super().__init__(model, init_loc_fn=started_anywhere(init_loc_fn))

    @property
    def affine(self) -> Affine | None:
        """The affine layer, if there is one."""
        return None if self.affine_kind is None else self.flow.parts[-1]

    def _make_flow(self, init_loc: Tensor) -> Flow:
        dim = len(init_loc)
        with init_loc.device:  # whatever the default
            base, transforms = base_of(dim, self.base_df), self._transforms(init_loc)
        check_sizes(Flow(base, transforms).to(init_loc), dim)
        if self.affine_kind is not None:
            options = {"init_loc": init_loc, "init_scale": self.init_scale}
            transforms.append(Affine(dim, self.affine_kind, **options))
        flow = Flow(base, transforms)
        for p in flow.parameters():  # of another stride Pyro's store would keep, and train, a copy
            p.data = p.data.contiguous()
        return flow

    def _transforms(self, init_loc: Tensor) -> list[Transform]:
        """What lies between the base and the affine layer."""
        return transforms_for(len(init_loc), self._given[0])

    def _start_state(self) -> dict[str, Any]:
        return super()._start_state() | {"_given": self._given}

    def get_base_dist(self) -> dist.TorchDistribution:
        """N(0, I), or independent Student-t variables, with event shape (D,)."""
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

    def log_prob(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Log density of the guide at points on the supports of the model's sites.

        It is the density with respect to the measures that Pyro's own distributions have on these
        supports, so it can be set beside the log joint of a model.

        Args:
            values: by name, for every site of the guide, shape (*B, *shape of the site). Draws of
                the guide, or of Pyro's ``Predictive``, can be given as they are.
            *args: the model's, used where the guide was never called.
            **kwargs: likewise.

        Returns:
            log q, shape (*B).

        Raises:
            ValueError: a site that is missing or unknown, a shape that does not fit, a value that
                is not inside its support; the message names the site.

        Example:
            >>> import pyro
            >>> def model():
            ...     return pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            >>> guide = AutoFlow(model, [])
            >>> guide.log_prob({"scale": torch.tensor([0.5, 1.0, 2.0])}).shape
            torch.Size([3])
        """
        flow = self.setup(*args, **kwargs).flow
        latents, log_det = unconstrain(self._sites(), values, like=flow.base.loc)
        return flow().log_prob(latents) - log_det

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior median of each latent, by site; see :meth:`quantiles`."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal posterior quantiles of each latent, from 10,000 draws with a fixed seed.

        They are those of the single numbers on the support: medians of a simplex need not sum
        to one.

        Args:
            quantiles: Q probabilities in [0, 1].
            *args: the model's, used where the guide was never called.
            **kwargs: likewise.

        Returns:
            By site name, a tensor of shape (Q, *shape of the site).

        Raises:
            ValueError: quantiles that are no sequence of numbers in [0, 1].
        """
        self.setup(*args, **kwargs)
        with seeded(0):
            latents = self.get_posterior().sample((MARGINAL_DRAWS,))
        draws = self._constrained(latents)
        return {name: marginal_quantiles(draw, quantiles) for name, draw in draws.items()}

    def _constrained(self, latent: Tensor) -> dict[str, Tensor]:
        return {
            site["name"]: bijection(site["fn"].support)(value)
            for site, value in self._unpack_latent(latent)
        }


def marginal_quantiles(draws: Tensor, quantiles: Sequence[float]) -> Tensor:
    """The quantiles of each number over the first dimension of the draws, shape (Q, ...).

    Raises:
        ValueError: quantiles that are no sequence of numbers in [0, 1].
    """
    levels = torch.as_tensor(quantiles, dtype=draws.dtype, device=draws.device)
    if levels.dim() != 1 or not bool(((levels >= 0) & (levels <= 1)).all()):
        raise ValueError(
            f"quantiles must be a sequence of numbers in [0, 1], such as [0.05, 0.95], got "
            f"{quantiles}"
        )
    columns = draws.reshape(len(draws), -1).split(1000, 1)  # torch takes 16 million numbers at most
    found = torch.cat([part.quantile(levels, 0) for part in columns], 1)
    return found.reshape(len(levels), *draws.shape[1:])
