"""AmortizedPlanarGuide: a flow over the global latents, and one for those of each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from torch import nn

from pyroflow.checks import check_choice, check_count, check_positive
from pyroflow.guides.base import MARGINAL_DRAWS, ModuleGuide, Values
from pyroflow.guides.layered import AutoPlanarFlow
from pyroflow.guides.local_flow import LocalFlow
from pyroflow.guides.plate_rows import RowsOfPlates
from pyroflow.guides.refusals import refuse_no_model
from pyroflow.guides.rows import Context, RowContext, Rows
from pyroflow.model.at_hand import draws_of
from pyroflow.model.latents import Latents, started_anywhere
from pyroflow.transforms.affine import AffineKind


class AmortizedPlanarGuide(RowsOfPlates, ModuleGuide):
    """A guide for models with latents of their own in each row of a plate, subsampled or not.

    q(g) Π_n q(z_n | x_n, g): the global latents g have one joint planar flow, as in
    :class:`~pyroflow.AutoPlanarFlow`; the latents z_n of row n have a flow whose parameters an
    inference network reads from the row's data x_n, with location and log scale linear in g.
    Rows are those that the model draws, by itself or with indices of its own (``subsample=``);
    the plate scales both sides of the bound. :func:`~pyroflow.fit_guide` starts the network by a
    regression on rows of an :class:`~pyroflow.AutoStructuredFlow`. New rows need no fit.

    Several plates side by side have a network each, and their rows are independent given g. Where
    they do not interact in the model, as the latents of two kinds of units, that is exact; where
    they cross in the data, as persons and items do, it is an approximation.
    (Rezende and Mohamed, 2015, section 4.2, https://arxiv.org/abs/1505.05770.)

    Args:
        model: a Pyro model. Discrete latents must be enumerated or blocked.
        plate: the name of the plate whose rows have latents of their own, or several names.
        context: the rows' data: the name of the model's argument that holds them, several
            names, or a function of all arguments. Their first dimension counts the rows: all N,
            or just the B drawn ones, in their order. With None the parameters of each row are
            learned in a table: no data needed, no new rows. Of several plates, a mapping from
            their names to such.
        num_layers: K, planar layers of the rows' flow; 0 leaves Gaussians.
        global_layers: planar layers of the flow over the global latents.
        affine: "full" (lower-triangular scale) or "diagonal", for both flows.
        hidden_dims: sizes of the inference network's hidden layers.
        encoder: a module that turns the rows' data (B, ...) into features (B, C) for that
            network. Without it they are flattened and standardised, as the first call has them.
            Of several plates, a mapping from their names.
        condition_on_globals: whether the rows' flow depends on the global latents.
        init_loc_fn: as in :class:`~pyroflow.AutoFlow`, like init_scale; rows start at their mean.

    Attributes:
        global_guide: after the first call, the guide of the globals; None if there are none.
        local_flow: after the first call, the flow of the rows; a list of them, in the order of
            the plates, if those were given as several names.

    Raises:
        TypeError: If plate or context has another type.
        ValueError: If an option is out of range; at the first call, if no latent is in the plate,
            or one cannot be treated, such as one in two plates (naming it); at any call, if the
            context does not fit.
        RuntimeError: If the model has no latents, at the first call.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
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
        plate: str | Sequence[str],
        context: Context | Mapping[str, Context | None] | None = None,
        *,
        num_layers: int = 8,
        global_layers: int = 16,
        affine: AffineKind = "full",
        hidden_dims: Sequence[int] = (64, 64),
        encoder: nn.Module | Mapping[str, nn.Module] | None = None,
        condition_on_globals: bool = True,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        refuse_no_model(model)
        plates = _check_plates(plate)
        contexts, encoders = _by_plate(plates, context=context, encoder=encoder)
        check_choice("affine", affine, ("full", "diagonal"))
        super().__init__(InitMessenger(started_anywhere(init_loc_fn))(model))
        self._model += (model,)  # the second one draws no start values
        self.local_plates, self._several = plates, not isinstance(plate, str)
        pairs = zip(contexts, encoders, strict=True)
        self.context = self._held(
            [None if c is None else RowContext(c, model, e) for c, e in pairs]
        )
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
        self.rows = [Rows.of(latents, plate) for plate in self.local_plates]

    def _make_parts(self, *args: Any, **kwargs: Any) -> None:
        names = [name for rows in self.rows for name in rows.latents.sites]
        if len(names) < len(self.latents.sites):
            model = poutine.block(self._model[1], hide=names)
            guide = AutoPlanarFlow(model, **self._global, **self._both)
            self.global_guide = guide.setup(*args, **kwargs)
        self._conditioned = self.condition_on_globals and self.global_guide is not None
        contexts = self.context if self._several else [self.context]
        pairs = zip(self.rows, contexts, strict=True)
        self.local_flow = self._held([self._make_flow(*pair, args, kwargs) for pair in pairs])

    def _make_flow(
        self, rows: Rows, context: RowContext | None, args: tuple, kwargs: dict[str, Any]
    ) -> LocalFlow:
        init_loc, known = rows.init_loc, {"rows": rows.size}
        if context is not None:
            known = {"features": context.prepare(context.rows(args, kwargs), init_loc)}
        known["shared"] = self.global_guide.latent_dim if self._conditioned else 0
        with init_loc.device:
            return LocalFlow(init_loc, **known, **self._local, **self._both)

    def _draw_unconstrained(self, *args: Any, **kwargs: Any) -> tuple[Values, dict[str, Any]]:
        plates, shared, values = self._create_plates(*args, **kwargs), None, {}
        if self.global_guide is not None:
            latent = self.global_guide.sample_latent(*args, **kwargs)
            values = self.global_guide.latents.unpack(latent, particles=True)
            shared = self._shared(latent)
        for part in self.parts:
            with plates[part.plate] as index:
                data = part.drawn(index, plates[part.plate].size, args, kwargs)
                posterior = part.posterior(index, data, shared, part.rows.trailing)
                name = f"_{self._pyro_name}_local_{part.plate}"
                local = pyro.sample(name, posterior, infer={"is_auxiliary": True})
            values |= part.rows.latents.unpack(local)
        return values, plates

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, pyro.plate]:
        if self.master is not None:
            return super()._create_plates(*args, **kwargs)
        drawn = _plate_arguments(self, args, kwargs)
        sizes = {n: {"size": f.size} for n, f in self._prototype_frames.items()} | drawn
        dims = {n: f.dim for n, f in self._prototype_frames.items()}
        return {name: pyro.plate(name, **given, dim=dims[name]) for name, given in sizes.items()}

    def _quantiles(self, levels: Sequence[float], *args: Any, **kwargs: Any) -> Values:
        shared, result, found = None, {}, {}
        if self.global_guide is not None:
            latent = self.global_guide.get_posterior().sample((MARGINAL_DRAWS, 1))
            shared, result = self._shared(latent), self.global_guide.quantiles(levels)
        for part in self.parts:
            found |= part.quantiles(levels, shared, args, kwargs)
        return result | found


def _plate_arguments(
    guide: AmortizedPlanarGuide, args: tuple, kwargs: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """By plate its size, and the rows that the model draws; all in a copy without its model."""
    if guide._model is not None and not guide.alone:
        return draws_of(guide._model[1], guide.local_plates, guide.latents, args, kwargs)
    known = [(part.context, part.rows.size) for part in guide.parts]
    sizes = [size if c is None else len(c.rows(args, kwargs)) for c, size in known]
    return {name: {"size": size} for name, size in zip(guide.local_plates, sizes, strict=True)}


def _check_plates(plate: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names, else raise ``TypeError``, or ``ValueError`` for none or one twice."""
    names = [plate] if isinstance(plate, str) else plate
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"plate must be the name of a plate, or a list of names, got {plate!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"plate must name one plate or several different ones, got {plate!r}")
    return tuple(names)


def _by_plate(plates: tuple[str, ...], **arguments: Any) -> list[list[Any]]:
    """The values of arguments for each plate, None where a mapping has none."""
    found = []
    for name, given in arguments.items():
        by_name = given
        if given is None or (len(plates) == 1 and not isinstance(given, Mapping)):
            by_name = dict.fromkeys(plates, given)
        if not isinstance(by_name, Mapping) or by_name.keys() - set(plates):
            listed = ", ".join(f"{plate!r}: ..." for plate in plates)
            raise ValueError(
                f"{name} must be a mapping from the guide's plates, such as {{{listed}}}, got "
                f"{sorted(given) if isinstance(given, Mapping) else repr(given)}"
            )
        found.append([by_name.get(plate) for plate in plates])
    for plate, context, encoder in zip(plates, *found, strict=True):
        if encoder is not None and context is None:
            raise ValueError(
                f"encoder needs the rows' data, got context=None for plate {plate!r}: name the "
                "context"
            )
    return found


def _check_sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of hidden layers, none or some of at least 1, else raise ``ValueError``."""
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        raise ValueError(f"{name} must be a sequence such as (64, 64), got {sizes!r}")
    return tuple(check_count(name, size, 1) for size in sizes)
