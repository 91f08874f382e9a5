"""AutoStructuredFlow: globals by a flow, and rows of plates given them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor

from pyroflow.flows import AlongPath, CountedNormal
from pyroflow.flows.flow import FlowDistribution
from pyroflow.guides.base import Values
from pyroflow.guides.layered import AutoSylvesterFlow, Depth
from pyroflow.guides.refusals import Centring, refuse_bound_rows
from pyroflow.guides.structure import places_of, structure_of
from pyroflow.model.at_hand import Rows, dims_of, draws_of, places_at_hand, with_rows
from pyroflow.transforms import Arrowhead, Leading, SinhArcsinh
from pyroflow.transforms.rowwise import at_rows, rows_of

MOST_GLOBAL = 256  # numbers of a structured guide


class AutoStructuredFlow(AutoSylvesterFlow):
    r"""A guide for hierarchies of any size: globals by a flow, rows of plates given the globals.

    Sylvester layers bend the G global numbers alone; a layer of tails and skews may follow for all
    numbers; last comes an :class:`~pyroflow.transforms.Arrowhead`, an affine layer with a Gaussian
    of the globals and one of each row given them. It costs O(J (d² + d G)) for J rows of d numbers.
    Rows are read off the plates: a plate is local if its rows do not interact given the rest, of
    plates that interact with each other only the largest one. Where a plate subsamples, the guide
    knows all of its rows, and :func:`~pyroflow.fit_guide` moves those at hand.

    Args:
        model: the Pyro model.
        num_layers: L, of the globals' flow; "auto" as in :class:`AutoPlanarFlow`.
        num_units: M, at most G.
        init_loc_fn: as in :class:`AutoFlow`, like init_scale and centring.
        tails: as in :class:`AutoPlanarFlow`, but on: rows that are a little skewed move the globals
            where they are many.

    Raises:
        ValueError: As :class:`AutoSylvesterFlow`; at the first call if more than 256 numbers are
            global, or a plate subsamples whose rows interact.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        ...     with pyro.plate("groups", len(y)):
        ...         theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        ...         pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
        >>> guide = AutoStructuredFlow(model)
        >>> guide(torch.zeros(1000))["theta"].shape
        torch.Size([1000])
    """

    def __init__(
        self,
        model: Callable,
        num_layers: Depth = 4,
        num_units: int | None = None,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
        *,
        centring: Centring = "auto",
        tails: bool = True,
    ) -> None:
        options = {"init_loc_fn": init_loc_fn, "init_scale": init_scale, "centring": centring}
        super().__init__(model, num_units, num_layers, tails=tails, **options)

    def _knows_rows(self, plate: str) -> bool:
        return True

    def _make_parts(self, *args: Any, **kwargs: Any) -> None:
        start = self._init_loc()
        sizes, drawn = self.subsampling.plates, self.drawn(self.subsampling)
        first = {name: torch.arange(B, device="cpu") for name, (_, B) in sizes.items()}
        at = start[places_at_hand(self.latents, first)]  # as which those of a draw start
        self.kinds = structure_of(self.model, args, kwargs, drawn, at)
        refuse_bound_rows(drawn, self.kinds, sizes)
        found = places_of(self.latents, self.kinds)
        if len(found[0]) > MOST_GLOBAL:
            raise ValueError(
                f"{len(found[0])} of the latents are global, as they are in no plate or interact "
                f"with other rows of theirs, and AutoStructuredFlow takes at most {MOST_GLOBAL}: "
                "use AutoPlanarFlow, or write independent rows in a plate"
            )
        self._found = found
        if not len(found[0]):
            self.num_layers = 0
        super()._make_parts(*args, **kwargs)

    def _make_affine(self, loc: Tensor) -> Arrowhead:
        return Arrowhead(*self._found, init_loc=loc, init_scale=self.init_scale)

    def _make_stack(self, init_loc: Tensor) -> Leading:
        found = vars(self).get("_found")
        size = len(self.affine.lower if found is None else found[0])
        return Leading(super()._make_stack(init_loc[:size]), len(init_loc))

    def _draw_unconstrained(self, *args: Any, **kwargs: Any) -> tuple[Values, dict[str, Any]]:
        """A draw of all rows, of which those that the model draws are kept."""
        values, plates = super()._draw_unconstrained(*args, **kwargs)
        alone = self.alone or self._model is None
        if not self.subsampling.plates or alone or self.master is not None:
            return values, plates
        index, names = {}, list(self.subsampling.plates)
        for name, drawn in draws_of(self.model, names, self.latents, args, kwargs).items():
            plates[name] = pyro.plate(name, **drawn, dim=self._prototype_frames[name].dim)
            index[name] = plates[name].indices
        for site in self.latents:
            shape = site.unconstrained_shape
            for dim, name in dims_of(site.plates, len(site.batch_shape), index):
                value = values[site.name]
                rows = index[name].to(value.device)
                values[site.name] = value.index_select(dim - len(shape), rows)
        return values, plates

    def at_hand(self, rows: Rows, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        """The distribution over the coordinates of some rows and of the globals.

        Its log density counts each row as often as its weight says, and its gradients in what
        each row has of its own are sparse.
        """
        like = self.flow.base.loc
        places = places_at_hand(self.latents, rows.index).to(like.device)
        found = [self._of_kind(names, rows) for names in self.kinds]
        sizes = {name: len(own) for name, own in rows.index.items()}
        affine = Arrowhead(*places_of(with_rows(self.latents, sizes), self.kinds)).to(like)
        per_row = [
            weights.repeat_interleave(d)
            for (_, weights), (_, d) in zip(found, affine.shapes, strict=True)
        ]
        affine.counts = torch.cat([like.new_ones(len(affine.lower)), *per_row]).to(like)
        which = [index.to(like.device) for index, _ in found]
        last = at_rows(self.affine, affine, which, places, sparse=self.sparse)
        first = [Leading(self.stack.inner, len(places))] if self.num_layers else []
        if self.tails:
            whole, base = self.flow.parts[-2], self.affine.place[places[affine.order]]
            tails = SinhArcsinh(len(places)).to(like)
            tails.counts = affine.counts
            first.append(tails.at(*(rows_of(t, base, self.sparse) for t in whole.trained())))
        made = AlongPath if self.path_derivative else FlowDistribution
        return made(CountedNormal(affine.counts).to_event(1), [*first, last])

    def _of_kind(self, names: frozenset[str], rows: Rows) -> tuple[Tensor, Tensor]:
        """The numbers of the rows at hand among all rows of some plates, and their weights."""
        index, weights = torch.zeros(1, dtype=torch.long, device="cpu"), torch.ones(1, device="cpu")
        for name in sorted(names):
            size = self._prototype_frames[name].size
            own = rows.index.get(name, torch.arange(size, device="cpu")).cpu()
            share = rows.weights.get(name, torch.ones(size, device="cpu")).cpu()
            index = (index.unsqueeze(1) * size + own).flatten()
            weights = (weights.unsqueeze(1) * share).flatten()
        return index, weights
