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
from pyroflow.flows import StandardNormal
from pyroflow.guides.base import MARGINAL_DRAWS, ModuleGuide, Values, marginal_quantiles
from pyroflow.guides.layered import AutoPlanarFlow
from pyroflow.guides.rows import Context, RowContext, Rows, draw_of
from pyroflow.model.latents import Latents, started_anywhere
from pyroflow.transforms import Affine, Planar
from pyroflow.transforms.affine import AffineKind
from pyroflow.transforms.conditional import Hypernet

EMBEDDING = 8  # numbers learned of each row, where its flow also depends on the globals
AT_ONCE = 100_000  # draws times rows that quantiles hold in memory

# How fast the planar parameters learn, beside location and scale. As fast, they would take part
# in the long way from the start to the posterior, and keep what they bent on it.
GAIN = 0.05


class LocalFlow(nn.Module):
    """q(z | row): standard normal base, K planar layers, an affine layer; base to latents.

    The parameters are start values that the rows share, plus what a network and a linear map of
    the features add, plus what a table has for the row. Network, map and table start at zero, so
    the flow starts as one Gaussian for all rows. The linear map goes to the location: where the
    posterior mean is linear in the features, as in Gaussian models, it is found exactly.

    Args:
        init_loc: the location at the start, shape (D,); its dtype and device are the flow's.
        num_layers: K; 0 leaves a Gaussian.
        features: C, numbers that are known of each row.
        shared: G, numbers that all rows depend on.
        rows: N, rows whose parameters are learned in a table; 0 for no table.
        affine: "full" or "diagonal".
        init_scale: standard deviation of each latent at the start.
        hidden_dims: sizes of the network's hidden layers.
    """

    def __init__(
        self,
        init_loc: Tensor,
        num_layers: int,
        *,
        features: int = 0,
        shared: int = 0,
        rows: int = 0,
        affine: AffineKind = "full",
        init_scale: float = 0.1,
        hidden_dims: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__()
        D, embedded = len(init_loc), EMBEDDING if rows and shared else 0
        self.embedding = nn.Parameter(torch.randn(rows, embedded)) if embedded else None
        self.base = StandardNormal(D)
        planar = Planar(D, num_layers)
        self._planar = (planar,)  # within a tuple, so that it is neither trained nor saved
        for name in ("w", "u", "b"):  # where every row starts; not trained
            self.register_buffer(name, getattr(planar, name).detach())
        self.affine = Affine(D, affine, init_loc=init_loc, init_scale=init_scale)
        shapes, known = [t.shape for t in self._start()], features + embedded + shared
        self.net = Hypernet(known, hidden_dims, shapes) if known else None
        self.linear = Hypernet(known, (), [init_loc.shape]) if known else None
        tables = [torch.zeros(rows, *shape) for shape in shapes] if rows else []
        self.tables = nn.ParameterList(nn.Parameter(t) for t in tables)
        self.to(init_loc)

    def forward(
        self,
        index: Tensor,
        features: Tensor | None = None,
        shared: Tensor | None = None,
        trailing: int = 0,
    ) -> dist.TransformedDistribution:
        """The distribution over the latents of B rows, batch shape (*S, B, 1, ..., 1).

        Args:
            index: their numbers in the table, shape (B,).
            features: shape (B, C).
            shared: shape (*S, 1, ..., 1, G).
            trailing: how many ones stand at the end.
        """
        ones, start = (1,) * trailing, self._start()
        known = [features] if self.embedding is None else [self.embedding[index]]
        known = [t.reshape(len(index), *ones, t.shape[-1]) for t in known if t is not None]
        known += [] if shared is None else [shared]
        added = [torch.zeros_like(value) for value in start]
        if known:
            batch = torch.broadcast_shapes(*(t.shape[:-1] for t in known))
            inputs = torch.cat([t.expand(*batch, t.shape[-1]) for t in known], -1)
            # Adam moves all weights of a sum by its rate at once. Divided by their number, the sum
            # moves by that rate too, so one rate suits networks of any width.
            width = self.net.hidden_dims[-1] if self.net.hidden_dims else inputs.shape[-1]
            added = [t / width for t in self.net(inputs, added)]
            (shift,) = self.linear(inputs, [torch.zeros_like(start[3])])
            added[3] = added[3] + shift / inputs.shape[-1]  # the affine layer's offset
        if len(self.tables):
            index = index.reshape(-1, *ones)
            added = [a + table[index] for a, table in zip(added, self.tables, strict=True)]
        gains = (GAIN, GAIN, GAIN, 1.0, 1.0, 1.0)
        values = [v + gain * a for v, a, gain in zip(start, added, gains, strict=False)]
        planar = self._planar[0].at(*values[:3])
        return dist.TransformedDistribution(self.base(), [planar, self.affine.at(*values[3:])])

    def _start(self) -> list[Tensor]:
        return [self.w, self.u, self.b, *self.affine.trained()]


class AmortizedPlanarGuide(ModuleGuide):
    """A guide for models with latents of their own in each row of a plate, subsampled or not.

    q(g) Π_n q(z_n | x_n, g): the global latents g have one joint planar flow, as in
    :class:`~pyroflow.AutoPlanarFlow`; the latents z_n of row n have a flow whose parameters an
    inference network reads from the row's data x_n and from g. Rows are those that the model
    draws, by itself or with indices of its own (``subsample=``); the plate scales both sides of
    the bound, so it is unbiased for that of all rows. New rows need no fit: call the guide with
    their data. Quantiles are those of all rows. (Rezende and Mohamed, 2015, section 4.2 and
    algorithm 1, https://arxiv.org/abs/1505.05770.)

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
