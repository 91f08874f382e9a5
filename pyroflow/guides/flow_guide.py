"""FlowGuide: what the guides share whose latents are one flow in the model's coordinates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyroflow.flows import Flow
from pyroflow.guides.base import MARGINAL_DRAWS, ModuleGuide, Values, marginal_quantiles
from pyroflow.guides.coordinates import Coordinates
from pyroflow.guides.recording import coordinates_of
from pyroflow.model.at_hand import Subsampling
from pyroflow.model.latents import Latents, Site

COORDINATES = "coordinates"  # their key in a state dict


class FlowGuide(ModuleGuide, AutoContinuous):
    """A guide whose unconstrained latents are a :class:`~pyroflow.Flow` in the model's coordinates.

    Attributes:
        flow: after the first call, the flow, over coordinates x of shape (D,).
        coordinates: the map from x to the unconstrained latents z, see
            :class:`~pyroflow.guides.coordinates.Coordinates`; None where z is x.
    """

    flow: Flow
    coordinates: Coordinates | None

    def set_latents(self, latents: Latents) -> None:
        """As in any guide; ``NeuTraReparam`` takes the plates from one that was not called yet."""
        super().set_latents(latents)
        if self.master is None:
            self._create_plates()

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, pyro.plate]:
        """As in Pyro, but unseen by the model, which would take the indices from them.

        A model whose plate has grown would run on a part of its rows and say nothing.
        """
        with poutine.block(hide_fn=site_is_subsample):
            return super()._create_plates(*args, **kwargs)

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Site, Tensor]]:
        """As in Pyro, and for draws of shape (*B, D) too: (*B, *shape of the site)."""
        values = self.latents.unpack(latent, particles=True)
        return ((self.prototype_trace.nodes[name], value) for name, value in values.items())

    def _draw_unconstrained(self, *args: Any, **kwargs: Any) -> tuple[Values, dict[str, Any]]:
        latent = self.sample_latent(*args, **kwargs)
        return self.latents.unpack(latent, particles=True), self._create_plates(*args, **kwargs)

    def _quantiles(self, levels: Sequence[float], *args: Any, **kwargs: Any) -> Values:
        draws, _ = self.latents.constrain(self.get_posterior().sample((MARGINAL_DRAWS,)))
        return marginal_quantiles(draws, levels)

    @property
    def centring(self) -> dict[str, Tensor]:
        """By site, c of each of its unconstrained numbers: 1 as written, 0 non-centred.

        Of the sites whose prior takes its location or scale from other latents; empty where the
        guide leaves all sites as they are written.
        """
        return {} if self.coordinates is None else self.coordinates.centring

    def constrain(self, x: Tensor) -> tuple[Values, Tensor]:
        """Values by site, (*B, *shape), at x (*B, D), and log |det ∂values/∂x|, (*B)."""
        if self.coordinates is None:
            return self.latents.constrain(x)
        z, moved = self.coordinates.forward_and_log_det(x)
        values, log_det = self.latents.constrain(z)
        return values, log_det + moved

    def unconstrain(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`constrain`: x, shape (*B, D), and the same log-determinant."""
        z, log_det = self.latents.unconstrain(values, like=self.flow.base.loc)
        if self.coordinates is None:
            return z, log_det
        x, moved = self.coordinates.inverse_and_log_det(z)
        return x, log_det + moved

    def _record(
        self, args: tuple, kwargs: dict[str, Any], sizes: Subsampling, *centring: Any
    ) -> Coordinates | None:
        """The model's coordinates, where some plates draw a part of their rows."""
        part = (self.drawn(sizes), sizes) if sizes.plates else None
        given = self.model, args, kwargs, self.latents, self._init_loc()
        return coordinates_of(*given, *centring, part=part)

    def start(self) -> Tensor:
        """The coordinates x, shape (D,), of where ``init_loc_fn`` starts the latents."""
        z = self._init_loc()
        return z if self.coordinates is None else self.coordinates.inv(z)

    @property
    def untouched(self) -> bool:
        """Whether the affine layer, if there is one, is still where the set-up put it."""
        if self.affine is None:
            return True
        offset, _, *lower = self.affine.trained()
        start = self.start()  # the coordinates may round it
        at_start = torch.allclose(offset, start, atol=1e-5 * start.abs().max().item())
        return at_start and not any(t.any() for t in (self.affine.centre, *lower))

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
            ValueError: If a site is missing or unknown, a shape does not fit, or a value is not
                inside its support; the message names the site.

        Example:
            >>> import pyro, torch, pyro.distributions as dist
            >>> from pyroflow import AutoFlow
            >>> def model():
            ...     return pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            >>> guide = AutoFlow(model, [])
            >>> guide.log_prob({"scale": torch.tensor([0.5, 1.0, 2.0])}).shape
            torch.Size([3])
        """
        flow = self.setup(*args, **kwargs).flow
        x, log_det = self.unconstrain(values)
        return flow().log_prob(x) - log_det

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """As any module, and the coordinates, which are no parameters but part of the density."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.coordinates is not None:
            destination[prefix + COORDINATES] = self.coordinates.describe()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        described = state_dict.pop(prefix + COORDINATES, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.coordinates = None
        if described is not None:
            like = self.flow.base.loc
            self.coordinates = Coordinates.restore(described).to(like.device, like.dtype)
