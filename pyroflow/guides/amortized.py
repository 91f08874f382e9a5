"""AmortizedPlanarGuide: a flow over the global latents, and one for those of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from torch import Tensor, nn

from pyroflow.checks import check_choice, check_count, check_positive
from pyroflow.flows import AlongPath, CountedNormal
from pyroflow.flows.flow import FlowDistribution
from pyroflow.guides.base import MARGINAL_DRAWS, ModuleGuide, Values, marginal_quantiles
from pyroflow.guides.layered import AutoPlanarFlow
from pyroflow.guides.local_flow import LocalFlow
from pyroflow.guides.rows import Context, KnownRows, RowContext, Rows, draw_of
from pyroflow.guides.structure import places_of
from pyroflow.model.at_hand import Rows as AtHand
from pyroflow.model.at_hand import with_rows
from pyroflow.model.latents import Latents, started_anywhere
from pyroflow.transforms import Leading
from pyroflow.transforms.affine import AffineKind
from pyroflow.transforms.rowwise import Reordered, RowsGiven

AT_ONCE = 100_000  # draws times rows that quantiles hold in memory


class RowsOfPlate(KnownRows):
    """A guide of one plate's rows, given the globals, as fits take it.

    Attributes:
        path_derivative: whether gradients of log q go along the path of the sample only.
    """

    plate: str
    rows: Rows
    context: RowContext | None
    local_flow: LocalFlow
    global_guide: ModuleGuide | None
    path_derivative = False
    coordinates = affine = None

    def _knows_rows(self, plate: str) -> bool:
        return plate == self.plate

    def rows_given(
        self, index: Tensor, counts: Tensor, args: tuple, kwargs: dict[str, Any], *, sparse: bool
    ) -> RowsGiven:
        """The map of some rows given the globals in units of their own posterior.

        Args:
            index: which rows, shape (B,).
            counts: how often each counts in the log-determinant.
            args: the model's.
            kwargs: likewise.
            sparse: whether gradients in a table are sparse tensors.

        Raises:
            ValueError: If the context has not all rows.
        """
        flow, features = self.local_flow, None
        d, (B,), like = len(flow.base.loc), index.shape, flow.base.loc
        if self.context is not None:
            rows = self.context.rows(args, kwargs)
            if len(rows) != self.rows.size:
                raise ValueError(f"context must have all {self.rows.size} rows, got {len(rows)}")
            features = self.context(rows[index.to(rows.device)], like)
        values = flow.parameters_of(index, features, sparse=sparse)
        if len(values) < len(RowsGiven.event_dims):  # a diagonal layer has no triangle
            values.insert(5, like.new_zeros(B, d, d))
        if self.global_guide is not None and not self._conditioned:
            values[-2:] = [like.new_zeros(B, d, self.global_guide.latent_dim)] * 2
        return RowsGiven(flow.planar[0], values, counts)

    def at_hand(self, rows: AtHand, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        """The distribution over the unconstrained latents of some rows and the globals.

        Its log density counts each row as often as its weight says. The arguments are the model's.
        """
        like, size, above = self.local_flow.base.loc, self.rows.size, self.global_guide
        index = rows.index.get(self.plate, torch.arange(size, device="cpu")).to(like.device)
        counts = rows.weights.get(self.plate, like.new_ones(size)).to(like)
        given = self.rows_given(index, counts, args, kwargs, sparse=self.sparse)
        G = given.size
        dim = G + len(index) * len(like)
        layers = [] if above is None else [Leading(t, dim) for t in above.get_transforms()]
        table = with_rows(self.latents, {self.plate: len(index)})
        first, (places,) = places_of(table, [frozenset([self.plate])])
        place = torch.cat([first, places.flatten()]).argsort().to(like.device)
        counted = CountedNormal(torch.cat([like.new_ones(G), counts.repeat_interleave(len(like))]))
        made = AlongPath if self.path_derivative else FlowDistribution
        return made(counted.to_event(1), [*layers[:-1], given, *layers[-1:], Reordered(place)])

    @property
    def untouched(self) -> bool:
        """Whether all rows still have one Gaussian."""
        flow = self.local_flow
        last = [] if flow.linear is None else [flow.linear.nn.weight]
        return not any(bool(t.any()) for t in (flow.shift, flow.stretch, *flow.tables, *last))

    def find_coordinates(self, *_: Any) -> None:
        """Nothing: its coordinates are the unconstrained latents."""

    def constrain(self, z: Tensor) -> tuple[Values, Tensor]:
        """Values by site at z (*B, D), and log |det ∂values/∂z|, (*B)."""
        return self.latents.constrain(z)

    def over_coordinates(self, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        """The same of all rows."""
        return self.at_hand(AtHand({}, {}), *args, **kwargs)


class AmortizedPlanarGuide(RowsOfPlate, ModuleGuide):
    """A guide for models with latents of their own in each row of a plate, subsampled or not.

    q(g) Π_n q(z_n | x_n, g): the global latents g have one joint planar flow, as in
    :class:`~pyroflow.AutoPlanarFlow`; the latents z_n of row n have a flow whose parameters an
    inference network reads from the row's data x_n, with location and log scale linear in g.
    Rows are those that the model draws, by itself or with indices of its own (``subsample=``);
    the plate scales both sides of the bound. :func:`~pyroflow.fit_guide` starts the network by a
    regression on rows of an :class:`~pyroflow.AutoStructuredFlow`. New rows need no fit.
    (Rezende and Mohamed, 2015, section 4.2, https://arxiv.org/abs/1505.05770.)

    Args:
        model: a Pyro model. Discrete latents must be enumerated or blocked.
        plate: the name of the plate whose rows have latents of their own.
        context: the rows' data: the name of the model's argument that holds them, several
            names, or a function of all arguments. Their first dimension counts the rows: all N,
            or just the B drawn ones, in their order. With None the parameters of each row are
            learned in a table: no data needed, no new rows.
        num_layers: K, planar layers of the rows' flow; 0 leaves Gaussians.
        global_layers: planar layers of the flow over the global latents.
        affine: "full" (lower-triangular scale) or "diagonal", for both flows.
        hidden_dims: sizes of the inference network's hidden layers.
        encoder: a module that turns the rows' data (B, ...) into features (B, C) for that
            network. Without it they are flattened and standardised, as the first call has them.
        condition_on_globals: whether the rows' flow depends on the global latents.
        init_loc_fn: as in :class:`~pyroflow.AutoFlow`, like init_scale; rows start at their mean.

    Attributes:
        global_guide: after the first call, the guide of the globals; None if there are none.
        local_flow: after the first call, the flow of the rows.

    Raises:
        TypeError: If plate or context has another type.
        ValueError: If an option is out of range; at the first call, if no latent is in the plate,
            or one cannot be treated (naming it); at any call, if the context does not fit.
        RuntimeError: If the model has no latents, at the first call.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(x), subsample_size=5) as index:
        ...         z = pyro.sample("z", dist.Normal(loc, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])
        >>> guide = AmortizedPlanarGuide(model, "rows", context="x")
        >>> x = torch.randn(20)
        >>> guide(x)["z"].shape, guide.median(x)["z"].shape, guide.median(x[:3])["z"].shape
        (torch.Size([5]), torch.Size([20]), torch.Size([3]))
    """

    def __init__(
        self,
        model: Callable,
        plate: str,
        context: Context | None = None,
        *,
        num_layers: int = 8,
        global_layers: int = 16,
        affine: AffineKind = "full",
        hidden_dims: Sequence[int] = (64, 64),
        encoder: nn.Module | None = None,
        condition_on_globals: bool = True,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        if not isinstance(plate, str):
            raise TypeError(f"plate must be the name of a plate, got {type(plate).__name__}")
        if encoder is not None and context is None:
            raise ValueError("encoder needs the rows' data, got context=None: name the context")
        check_choice("affine", affine, ("full", "diagonal"))
        super().__init__(InitMessenger(started_anywhere(init_loc_fn))(model))
        self._model += (model,)  # the second one draws no start values
        self.plate = plate
        self.context = None if context is None else RowContext(context, model, encoder)
        self.condition_on_globals = condition_on_globals
        self._both = {"affine": affine, "init_scale": check_positive("init_scale", init_scale)}
        self._local = {"num_layers": check_count("num_layers", num_layers, 0)}
        self._local["hidden_dims"] = _check_sizes("hidden_dims", hidden_dims)
        self._global = {"num_layers": check_count("global_layers", global_layers, 0)}
        self._global["init_loc_fn"] = init_loc_fn
        self.global_guide = None

    def set_latents(self, latents: Latents) -> None:
        """As in any guide; and the table of what each row has of its own."""
        super().set_latents(latents)
        self.rows = Rows.of(latents, self.plate)

    def _make_parts(self, *args: Any, **kwargs: Any) -> None:
        init_loc, names = self.rows.init_loc, list(self.rows.latents.sites)
        if len(names) < len(self.latents.sites):
            model = poutine.block(self._model[1], hide=names)
            guide = AutoPlanarFlow(model, **self._global, **self._both)
            self.global_guide = guide.setup(*args, **kwargs)
        self._conditioned = self.condition_on_globals and self.global_guide is not None
        known = {"shared": self.global_guide.latent_dim if self._conditioned else 0}
        known |= {"rows": self.rows.size} if self.context is None else {}
        if self.context is not None:
            known["features"] = self.context.prepare(self.context.rows(args, kwargs), init_loc)
        with init_loc.device:
            self.local_flow = LocalFlow(init_loc, **known, **self._local, **self._both)

    def _draw_unconstrained(self, *args: Any, **kwargs: Any) -> tuple[Values, dict[str, Any]]:
        plates, latent, values = self._create_plates(*args, **kwargs), None, {}
        if self.global_guide is not None:
            latent = self.global_guide.sample_latent(*args, **kwargs)
            values = self.global_guide.latents.unpack(latent, particles=True)
        with plates[self.plate] as index:
            rows, size = None, plates[self.plate].size
            if self.context is None:
                self.rows.check_size(size, self.plate)
            else:
                rows = self.context.drawn(index, size, args, kwargs)
            posterior = self._local_posterior(index, rows, latent, self.rows.trailing)
            auxiliary = {"is_auxiliary": True}
            local = pyro.sample(f"_{self._pyro_name}_local", posterior, infer=auxiliary)
        return values | self.rows.latents.unpack(local), plates

    def _local_posterior(
        self, index: Tensor, rows: Tensor | None, latent: Tensor | None, trailing: int
    ) -> dist.TransformedDistribution:
        """q(z | rows, g), of batch shape (*g, B, 1, ..., 1)."""
        flow = self.local_flow  # once: Pyro registers its parameters each time it is read
        like = flow.base.loc
        features = None if rows is None else self.context(rows, like)
        # In the units of their own posterior: what the affine layer gets.
        shared = self.global_guide.affine.inv(latent) if self._conditioned else None
        return flow(index.to(like.device), features, shared, trailing)

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, pyro.plate]:
        if self.master is not None:
            return super()._create_plates(*args, **kwargs)
        frames = self._prototype_frames
        plates = {n: pyro.plate(n, f.size, dim=f.dim) for n, f in frames.items() if n != self.plate}
        plate = _plate_arguments(self, args, kwargs)
        plates[self.plate] = pyro.plate(self.plate, **plate, dim=frames[self.plate].dim)
        return plates

    def _quantiles(self, levels: Sequence[float], *args: Any, **kwargs: Any) -> Values:
        rows = None if self.context is None else self.context.rows(args, kwargs)
        size, latent, found = self.rows.size if rows is None else len(rows), None, []
        if self.global_guide is not None:
            latent = self.global_guide.get_posterior().sample((MARGINAL_DRAWS, 1))
        numbers = torch.arange(size, device=self.local_flow.base.loc.device)
        for index in numbers.split(max(1, AT_ONCE // MARGINAL_DRAWS)):
            picked = None if rows is None else rows[index.to(rows.device)]
            q = self._local_posterior(index, picked, latent, trailing=0)
            local = q.sample(() if self._conditioned else (MARGINAL_DRAWS,))
            found.append(marginal_quantiles(self.rows.constrain(local), levels))
        result = {} if latent is None else self.global_guide.quantiles(levels)
        return result | {name: torch.cat([f[name] for f in found], 1) for name in found[0]}


def _plate_arguments(
    guide: AmortizedPlanarGuide, args: tuple, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Size of the plate, and the rows that the model draws; all in a copy without its model."""
    if guide._model is None:
        known = guide.context is None
        return {"size": guide.rows.size if known else len(guide.context.rows(args, kwargs))}
    values = {site.name: site.value for site in guide.latents}
    return draw_of(guide._model[1], guide.plate, values, args, kwargs)


def _check_sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of hidden layers, none or some of at least 1, else raise ``ValueError``."""
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        raise ValueError(f"{name} must be a sequence such as (64, 64), got {sizes!r}")
    return tuple(check_count(name, size, 1) for size in sizes)
