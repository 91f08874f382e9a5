"""AmortizedPlanarGuide: a flow over the global latents, and one for those of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn

from pyroflow.checks import check_choice, check_count, check_positive
from pyroflow.guides.autoflow import MARGINAL_DRAWS, marginal_quantiles
from pyroflow.guides.layered import AutoPlanarFlow
from pyroflow.guides.local_flow import LocalFlow, check_sizes
from pyroflow.guides.local_sites import LocalSites
from pyroflow.guides.own_name import take_own_name
from pyroflow.guides.row_context import Context, Draw, RowContext, draw_of, pick_rows
from pyroflow.guides.set_up_guide import SetUpGuide
from pyroflow.model.supports import bijection
from pyroflow.seeds import seeded
from pyroflow.transforms.affine import AffineKind

EMBEDDING = 8  # numbers learned of each row, where its flow also depends on the globals
AT_ONCE = 100_000  # draws times rows that quantiles hold in memory


class AmortizedPlanarGuide(SetUpGuide):
    """A guide for models with latents of their own in each row of a plate, subsampled or not.

    q(g) Π_n q(z_n | x_n, g): the global latents g have one joint planar flow, as in
    :class:`~pyroflow.AutoPlanarFlow`; the latents z_n of row n have a flow whose parameters an
    inference network reads from the row's data x_n and from g (:class:`LocalFlow`). Rows are
    those that the model draws, by itself or with indices of its own (``subsample=``); the plate
    scales both sides of the bound, so it is unbiased for that of all rows. New rows need no
    fit: call the guide with their data.

    See Also:
        :class:`~pyroflow.AutoPlanarFlow`, where no plate with latents is subsampled.

    References:
        Rezende and Mohamed, Variational Inference with Normalizing Flows, 2015,
        https://arxiv.org/abs/1505.05770, section 4.2 and algorithm 1.

    Args:
        model: a Pyro model. Discrete latents must be enumerated or blocked.
        plate: the name of the plate whose rows have latents of their own.
        context: the rows' data: the name of the model's argument that holds them, several
            names, or a function of all arguments. Their first dimension counts the rows: all N of
            them, of which those that the plate draws are picked, or just the B drawn ones, in
            their order. With None the parameters of each row are learned in a table: no data
            needed, no new rows.
        num_layers: K, planar layers of the rows' flow; 0 leaves Gaussians.
        global_layers: planar layers of the flow over the global latents.
        affine: "full" (lower-triangular scale) or "diagonal", for both flows.
        hidden_dims: sizes of the inference network's hidden layers.
        encoder: a module that turns the rows' data (B, ...) into features (B, C) for that
            network, such as a convolutional one. Without it they are flattened and brought to
            mean 0 and sd 1, as the first call has them.
        condition_on_globals: whether the rows' flow depends on the global latents.
        init_loc_fn: start of each site, one of Pyro's ``init_to_…`` functions; all rows start at
            their mean.
        init_scale: standard deviation of each unconstrained latent at the start.

    Attributes:
        global_guide: after the first call, the guide of the globals; None if there are none.
        local_flow: after the first call, the :class:`LocalFlow`.

    Raises:
        TypeError: plate or context of another type.
        ValueError: an option out of range, a context that the model has no argument for; at the
            first call, a plate without latents (listing those with), a latent that also lies in
            another plate or in another subsampled one, one that is discrete or whose
            support differs between rows; at any call, a context with another number of rows, or
            that is not given.
        RuntimeError: at the first call, a model without latents.

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
        super().__init__(model, init_loc_fn)
        self.plate = plate
        self.context = None if context is None else RowContext(context, model)
        self.encoder = encoder
        self.condition_on_globals = condition_on_globals
        check_choice("affine", affine, ("full", "diagonal"))
        self._shared = {"affine": affine, "init_scale": check_positive("init_scale", init_scale)}
        self._local = {"num_layers": check_count("num_layers", num_layers, 0)}
        self._local["hidden_dims"] = check_sizes("hidden_dims", hidden_dims)
        self._global = {"num_layers": check_count("global_layers", global_layers, 0)}
        self._global["init_loc_fn"] = init_loc_fn
        self.global_guide = None

    def _make_parts(self, *args: Any, **kwargs: Any) -> None:
        self.sites = LocalSites.split(self.prototype_trace, self.plate)
        self.global_guide = self._make_global_guide(*args, **kwargs)
        self.local_flow = self._make_local_flow(*args, **kwargs)

    def _make_global_guide(self, *args: Any, **kwargs: Any) -> AutoPlanarFlow | None:
        if not self.sites.global_names:
            return None
        model = poutine.block(self._plain_model[0], hide=self.sites.names)
        return AutoPlanarFlow(model, **self._global, **self._shared).setup(*args, **kwargs)

    def _make_local_flow(self, *args: Any, **kwargs: Any) -> LocalFlow:
        init_loc = self.sites.init_loc
        features, size = 0, self.sites.size if self.context is None else 0
        if self.context is not None:
            features = self._prepare_features(self.context.rows(args, kwargs), init_loc)
        with init_loc.device:
            if self._conditioned:
                if self.context is None:
                    features = EMBEDDING
                    self.embedding = nn.Parameter(torch.randn(size, EMBEDDING).to(init_loc))
                features += self.global_guide.latent_dim
            return LocalFlow(init_loc, features=features, rows=size, **self._local, **self._shared)

    @torch.no_grad()
    def _prepare_features(self, rows: Tensor, like: Tensor) -> int:
        """Set what standardises the rows' data, from those of a first call; return C."""
        if rows.is_floating_point() and not rows.isfinite().all():
            raise ValueError("context must be finite, got NaN or inf in the rows' data")
        if self.encoder is None:
            flat = rows.to(like).reshape(len(rows), -1)
            scale = flat.std(0, unbiased=False)
            self.register_buffer("context_loc", flat.mean(0))
            self.register_buffer("context_scale", torch.where(scale > 0, scale, 1.0))
        features = self._features(rows, like)
        if features.dim() != 2 or len(features) != len(rows):
            raise ValueError(
                f"encoder must return one feature vector a row, shape ({len(rows)}, C), got shape "
                f"{tuple(features.shape)}"
            )
        return features.shape[-1]

    def _features(self, rows: Tensor, like: Tensor) -> Tensor:
        if self.encoder is not None:
            return self.encoder(rows.to(like) if rows.is_floating_point() else rows)
        flat = rows.to(like).reshape(len(rows), -1)
        if flat.shape[-1] != len(self.context_loc):
            raise ValueError(
                f"context must have {len(self.context_loc)} numbers a row, as in the first call, "
                f"got rows of shape {tuple(rows.shape[1:])}"
            )
        return (flat - self.context_loc) / self.context_scale

    @property
    def _conditioned(self) -> bool:
        return self.condition_on_globals and self.global_guide is not None

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample all latents, as Pyro's guides do; takes what the model takes."""
        self.setup(*args, **kwargs)
        take_own_name(self)
        plates, latent, values = self._create_plates(*args, **kwargs), None, {}
        if self.global_guide is not None:
            latent = self.global_guide.sample_latent(*args, **kwargs)
            values = {s["name"]: v for s, v in self.global_guide._unpack_latent(latent)}
        with plates[self.plate] as index:
            rows = self._drawn_rows(index, plates[self.plate].size, args, kwargs)
            posterior = self._local_posterior(rows, index, latent, self.sites.trailing)
            name = f"_{self._pyro_name}_local"
            local = pyro.sample(name, posterior, infer={"is_auxiliary": True})
        values |= self.sites.unpack(local)
        return self._sample_sites(values, plates)

    def _drawn_rows(
        self, index: Tensor, size: int, args: tuple, kwargs: dict[str, Any]
    ) -> Tensor | None:
        if self.context is not None:
            return pick_rows(self.context.rows(args, kwargs), index, size)
        if size != self.sites.size:
            raise ValueError(
                f"plate {self.plate!r} has {size} rows, and with context=None the guide learned "
                f"those of {self.sites.size}: new rows need a context, such as "
                "context='name of the argument with their data'"
            )
        return None

    def _local_posterior(
        self, rows: Tensor | None, index: Tensor, latent: Tensor | None, trailing: int
    ) -> dist.TransformedDistribution:
        """q(z | rows, g) with batch shape (*g, B, 1, ..., 1), the ones as many as ``trailing``."""
        flow, ones = self.local_flow, (1,) * trailing
        like = flow.base.loc
        index = index.to(like.device)
        parts = []
        if rows is not None:
            parts.append(self._features(rows.to(like.device), like))
        if self._conditioned and rows is None:
            parts.append(self.embedding[index])
        parts = [part.reshape(len(index), *ones, part.shape[-1]) for part in parts]
        if self._conditioned:
            # In the units of their own posterior: what the affine layer gets.
            parts.append(self.global_guide.affine.inv(latent))
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        features = torch.cat([p.expand(*batch, p.shape[-1]) for p in parts], -1) if parts else None
        index = index.reshape(-1, *ones)
        return flow(features, index)

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, pyro.plate]:
        if self.master is not None:
            return super()._create_plates(*args, **kwargs)
        frames = self._prototype_frames.items()
        plates = {n: pyro.plate(n, f.size, dim=f.dim) for n, f in frames if n != self.plate}
        draw = self._draw(args, kwargs)
        plates[self.plate] = pyro.plate(self.plate, **draw._asdict(), dim=self.sites.dim)
        return plates

    def _draw(self, args: tuple, kwargs: dict[str, Any]) -> Draw:
        if self._plain_model is None:  # a copy that came without its model uses all rows
            known = self.context is None
            size = self.sites.size if known else len(self.context.rows(args, kwargs))
            return Draw(size, None, None)
        nodes = self.prototype_trace.nodes
        values = {name: nodes[name]["value"] for name in self.sites.global_names}
        return draw_of(self._plain_model[0], self.plate, values, args, kwargs)

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
            *args: the model's; all rows of the context are used, whatever the model draws. With
                context=None they may be left out after the first call.
            **kwargs: likewise.

        Returns:
            By site name, a tensor of shape (Q, *shape of the site), N rows for local ones.

        Raises:
            ValueError: quantiles that are no sequence of numbers in [0, 1].
        """
        self.setup(*args, **kwargs)
        rows = None if self.context is None else self.context.rows(args, kwargs)
        size = self.sites.size if rows is None else len(rows)
        like = self.local_flow.base.loc
        with seeded(0):
            latent, numbers = self._global_draws(), torch.arange(size, device=like.device)
            parts = numbers.split(max(1, AT_ONCE // MARGINAL_DRAWS))
            draws = (self._local_draws(rows, index, latent) for index in parts)
            found = [{n: marginal_quantiles(v, quantiles) for n, v in d.items()} for d in draws]
        result = {} if latent is None else self.global_guide.quantiles(quantiles)
        return result | {name: torch.cat([f[name] for f in found], 1) for name in self.sites.names}

    def _global_draws(self) -> Tensor | None:
        if self.global_guide is None:
            return None
        return self.global_guide.get_posterior().sample((MARGINAL_DRAWS, 1))

    def _local_draws(
        self, rows: Tensor | None, index: Tensor, latent: Tensor | None
    ) -> dict[str, Tensor]:
        """Draws of the rows by site, on the support, the draws first."""
        picked = None if rows is None else rows[index.to(rows.device)]
        q = self._local_posterior(picked, index, latent, trailing=0)
        local = q.sample(() if self._conditioned else (MARGINAL_DRAWS,))
        values = self.sites.unpack(self.sites.with_trailing_dims(local))
        nodes = self.prototype_trace.nodes
        return {name: bijection(nodes[name]["fn"].support)(v) for name, v in values.items()}
