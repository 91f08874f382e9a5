"""The rows of a plate: their latents, their data, and which of them are drawn."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.nn import PyroModule
from pyro.poutine import Trace
from torch import Size, Tensor, nn

from pyroflow.guides.refusals import refuse_varying_support
from pyroflow.model.at_hand import Subsampling, with_rows
from pyroflow.model.latents import Latents
from pyroflow.model.sites import LatentSite
from pyroflow.model.supports import bijection

Context = Callable[..., Any] | str | Sequence[str]


class KnownRows:
    """A guide with a table of the latents of all rows.

    Attributes:
        subsampling: the plates that drew a part of their rows when it was set up.
        sparse: whether what rows have of their own gets sparse gradients, from the rows at hand.
        alone: whether there is no model to say which rows are drawn, and so all are.
    """

    latents: Latents
    subsampling = Subsampling({})
    sparse, alone = True, False

    def _in_full(self, latents: Latents) -> Latents:
        """The table with all rows of the plates whose rows it knows, of what a run drew."""
        frames = {frame for site in latents for frame in site.plates if frame.full_size}
        known = [frame for frame in frames if self._knows_rows(frame.name)]
        sizes = {f.name: (f.full_size, f.size) for f in known if f.size < f.full_size}
        self.subsampling = Subsampling(sizes)
        for site in latents:
            if sizes.keys() & {frame.name for frame in site.plates}:
                refuse_varying_support(site)
        return with_rows(latents, {name: N for name, (N, _) in sizes.items()})

    def restore_rows(self, latents: Latents, plates: Mapping[str, Sequence[int]]) -> Latents:
        """The table of a file, with N and B of the plates that drew a part of their rows.

        Raises:
            ValueError: If the sizes are not those of the table.
        """
        full = {f.name: f.size for site in latents for f in site.plates if f.size == f.full_size}
        for name, (N, B) in plates.items():
            if full.get(name) != N or not 0 < B < N:
                raise ValueError(f"its plate {name!r} cannot have drawn {B} of {N} rows")
        self.subsampling = Subsampling({name: (N, B) for name, (N, B) in plates.items()})
        return with_rows(latents, {name: N for name, (N, _) in plates.items()})

    def _knows_rows(self, plate: str) -> bool:
        """Whether it has parameters for all rows of a plate, that may subsample."""
        return False

    def drawn(self, sizes: Subsampling) -> Latents:
        """The table of the latents that a run draws."""
        return with_rows(self.latents, {name: B for name, (_, B) in sizes.plates.items()})

    def check_model(self, model_trace: Trace) -> None:
        """Raise ``ValueError`` by name if a later run of the model has other latents."""
        sizes = Subsampling.of(model_trace).plates
        known = {name: pair for name, pair in sizes.items() if self._knows_rows(name)}
        self.drawn(Subsampling(known)).check(model_trace)


@dataclass
class Rows:
    """The latents that each row of a plate has of its own, D unconstrained numbers a row.

    Attributes:
        latents: the table of one row's.
        init_loc: the mean over rows of the unconstrained start values, shape (D,).
        trailing: how many batch dimensions stand right of the plate's.
        size: N, the rows of the plate in full.
    """

    latents: Latents
    init_loc: Tensor
    trailing: int
    size: int

    @classmethod
    def of(cls, latents: Latents, plate: str) -> Rows:
        """Those of a plate, by its name; raises ``ValueError`` for one that cannot be treated."""
        frames = {frame.name: frame for site in latents for frame in site.plates}
        if not latents.sites:
            raise RuntimeError("AmortizedPlanarGuide found no latent variables; use an empty guide")
        if plate not in frames:
            listed = ", ".join(sorted(map(repr, frames))) or "none; use AutoPlanarFlow"
            raise ValueError(
                f"plate must name a plate that holds latents, got {plate!r}; those of the model "
                f"are in: {listed}"
            )
        frame, starts, sites = frames[plate], {}, []
        for site in latents:
            if plate in [frame.name for frame in site.plates]:
                start = starts[site.name] = _row_starts(site, plate, frame.dim)
                of_row = {"batch_shape": Size(), "unconstrained_shape": start.shape[1:]}
                sites.append(replace(site, **of_row, plates=()))
        table = Latents(sites)
        init_loc = table.pack(starts).mean(0)
        return cls(table, init_loc, -frame.dim - 1, frame.full_size or frame.size)

    def constrain(self, local: Tensor) -> dict[str, Tensor]:
        """Values by site at unconstrained ones (*B, rows, D), with the dimensions right of them."""
        return self.latents.constrain(local.unflatten(-1, (*(1,) * self.trailing, -1)))[0]


def _row_starts(site: LatentSite, plate: str, dim: int) -> Tensor:
    """The unconstrained start values of a local site, shape (B, *event)."""
    others = [frame.name for frame in site.plates if frame.name != plate]
    if others:
        raise ValueError(
            f"site {site.name!r} lies in plate {others[0]!r} as well as in {plate!r}, and "
            "AmortizedPlanarGuide takes latents in one plate each. Use AutoStructuredFlow, which "
            f"has rows inside rows; or in place of plate {others[0]!r} make its dimension one of "
            "the site's event, with .expand([...]).to_event(1)"
        )
    refuse_varying_support(site)
    batch = site.batch_shape
    start = bijection(site.support).inv(site.value)
    return start.reshape(batch[dim], *start.shape[len(batch) :])


class RowContext(PyroModule):
    """The data of the rows of a plate, out of a model's arguments, and features of them.

    Args:
        given: names of the model's arguments, or a function of all of them. The first
            dimension of what they hold counts the rows.
        model: the model that has the arguments.
        encoder: turns the rows' data (B, ...) into features (B, C). Without it they are flattened
            and brought to mean 0 and sd 1.

    Example:
        >>> def model(x, y=None): ...
        >>> RowContext(["x", "y"], model).rows((torch.zeros(5, 3), torch.ones(5)), {}).shape
        torch.Size([5, 4])
    """

    def __init__(self, given: Context, model: Callable, encoder: nn.Module | None = None) -> None:
        super().__init__()
        names = [given] if isinstance(given, str) else given
        several = isinstance(names, Sequence) and len(names) > 0
        if not callable(given) and not (several and all(isinstance(n, str) for n in names)):
            raise TypeError(
                "context must be the name of one of the model's arguments, several names, a "
                f"function of the arguments, or None, got {given!r}"
            )
        self.encoder = encoder
        self.function = (given,) if callable(given) else ()  # a module is not to be registered
        self.positions = {} if callable(given) else positions_in(model, names)

    def rows(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """All rows that the arguments hold, shape (M, ...); several are joined to (M, C)."""
        for function in self.function:
            return _with_rows("context(...)", function(*args, **kwargs))
        found = {}
        for name, at in self.positions.items():
            value = args[at] if at is not None and at < len(args) else kwargs.get(name)
            if value is None:
                raise ValueError(
                    f"context needs the model's argument {name!r}, which this call does not give: "
                    "the guide reads the rows' data from it, so pass it to the guide as well"
                )
            found[name] = _with_rows(repr(name), value)
        if len(found) == 1:
            return next(iter(found.values()))
        if len({len(value) for value in found.values()}) > 1:
            lengths = ", ".join(f"{name!r}: {len(value)}" for name, value in found.items())
            raise ValueError(f"context must have as many rows in each argument, got {lengths}")
        return torch.cat([value.reshape(len(value), -1) for value in found.values()], -1)

    def drawn(self, index: Tensor, size: int, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The rows at the indices that a plate of N drew, out of all N or of just those."""
        rows = self.rows(args, kwargs)
        if len(rows) == size:
            return rows.index_select(0, index.to(rows.device))
        if len(rows) == len(index):
            return rows
        drawn = "" if len(index) == size else f", or the {len(index)} drawn ones"
        raise ValueError(
            f"context must have all {size} rows of the plate{drawn}, got {len(rows)} rows: its "
            "first dimension must count the plate's rows"
        )

    @torch.no_grad()
    def prepare(self, rows: Tensor, like: Tensor) -> int:
        """Set what standardises the rows' data, from those of a first call; return C."""
        if rows.is_floating_point() and not rows.isfinite().all():
            raise ValueError("context must be finite, got NaN or inf in the rows' data")
        if self.encoder is None:
            flat = rows.to(like).reshape(len(rows), -1)
            scale = flat.std(0, unbiased=False)
            self.register_buffer("loc", flat.mean(0))
            self.register_buffer("scale", torch.where(scale > 0, scale, 1.0))
        features = self(rows, like)
        if features.dim() != 2 or len(features) != len(rows):
            raise ValueError(
                f"encoder must return one feature vector a row, shape ({len(rows)}, C), got shape "
                f"{tuple(features.shape)}"
            )
        return features.shape[-1]

    def forward(self, rows: Tensor, like: Tensor) -> Tensor:
        """The features of rows, shape (B, C), with the dtype and device of ``like``."""
        if self.encoder is not None:
            return self.encoder(rows.to(like if rows.is_floating_point() else like.device))
        flat = rows.to(like).reshape(len(rows), -1)
        if flat.shape[-1] != len(self.loc):
            raise ValueError(
                f"context must have {len(self.loc)} numbers a row, as in the first call, got rows "
                f"of shape {tuple(rows.shape[1:])}"
            )
        return (flat - self.loc) / self.scale


def positions_in(model: Callable, names: Sequence[str]) -> dict[str, int | None]:
    """Where the named arguments stand in the model's list of positional ones, if they do."""
    target = model.forward if isinstance(model, nn.Module) else model
    parameters = list(inspect.signature(target).parameters.values())
    keywords = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    placed = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for name in names:
        if name not in known and not keywords:
            listed = ", ".join(map(repr, known)) or "none"
            raise ValueError(
                f"context must name arguments of the model, got {name!r}; it has {listed}"
            )
    return {name: placed.index(name) if name in placed else None for name in names}


def _with_rows(label: str, value: Any) -> Tensor:
    try:
        value = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"context: {label} must be a tensor or array, got {type(value).__name__}"
        ) from error
    if value.dim() == 0:
        raise ValueError(f"context: {label} must have rows, got a single number")
    return value
