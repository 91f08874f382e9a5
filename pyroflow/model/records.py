"""Pyro's records of the sites of a run, and what can be asked of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pyro
import torch
from pyro.distributions import Delta, Distribution, MaskedDistribution, Unit
from pyro.poutine.messenger import Messenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor
from torch.distributions import Independent, TransformedDistribution, constraints
from torch.distributions.constraints import Constraint
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, softplus
from torch.overrides import TorchFunctionMode

from pyroflow.model.supports import base_of, concatenated, moved

SLACK = 1e-6  # by which a parameter may pass the bound of its constraint
MANY, PLAIN = 5000, {"reduction": "none"}  # numbers, from which the time of operations counts

Values = dict[str, Tensor]
Record = dict[str, Any]  # Pyro's, of a site
Run = dict[str, Record]


@dataclass
class SiteRuns:
    """A site of a model at S draws.

    Attributes:
        values: shape (S, *shape of the site in a run of its own).
        log_prob: shape (S, *batch shape), with the model's masks and scales, −inf off the support;
            None where the value follows from other sites.
        record: Pyro's record of the site in a run of its own: its plates, distribution, value.
    """

    values: Tensor
    log_prob: Tensor | None
    record: Record

    @classmethod
    def of(cls, record: Record, size: int, single: Record) -> SiteRuns:
        """From the record of a run of S draws; ``single``: of one draw in a run of its own."""
        values = _draws_first(record["value"], size, single["value"], single["fn"].event_dim)
        log_prob = single.get("log_prob")
        if log_prob is not None:
            log_prob = _draws_first(record["log_prob"], size, log_prob)
        return cls(values, log_prob, single)

    @property
    def compared(self) -> Tensor:
        """What a run of its own must give as well."""
        return self.values if self.log_prob is None else self.log_prob

    def by_draw(self, dtype: torch.dtype | None = None) -> Tensor:
        """The log density of each draw, shape (S,), summed in ``dtype`` or the model's."""
        return self.log_prob.reshape(len(self.log_prob), -1).sum(1, dtype=dtype)

    def at(self, rows: Tensor) -> SiteRuns:
        """Some of the draws."""
        log_prob = self.log_prob
        log_prob = None if log_prob is None else log_prob[rows.to(log_prob.device)]
        return SiteRuns(self.values[rows.to(self.values.device)], log_prob, self.record)


Sites = dict[str, SiteRuns]


def is_deterministic(record: Record) -> bool:
    """Whether a site's value follows from others: ``pyro.deterministic``, or an observed Delta."""
    return record["is_observed"] and isinstance(_plain(record["fn"]), Delta)


def is_random(record: Record) -> bool:
    """Whether a site's value is drawn: not a Delta's, as those of an autoguide are."""
    return not isinstance(_plain(record["fn"]), Delta | Unit)


def is_factor(record: Record) -> bool:
    """Whether a site is of ``pyro.factor``, which has no value."""
    return isinstance(_plain(record["fn"]), Unit)


def _plain(fn: Distribution) -> Distribution:
    while isinstance(fn, MaskedDistribution | Independent):
        fn = fn.base_dist
    return fn


def outside_support(record: Record, *, inside: bool = False) -> Tensor | None:
    """Where a value has no density: off the support, or with a parameter that is none.

    Runs are not validated, and there torch's distributions go on with their formula. Simplices
    and Cholesky factors are not checked: in float32 a guide's own transforms miss the tolerances
    of torch, by rounding. ``inside``: the value is known to be inside the declared support.
    """
    if is_deterministic(record) or is_factor(record):
        return None
    fn = record["fn"]
    found = [part for part in (_off(fn, record["value"], inside), _unfit(fn)) if part is not None]
    if not found:
        return None
    outside = reduce(torch.logical_or, found)
    return outside if record["mask"] is None else outside & record["mask"]


def _off(fn: Distribution, value: Tensor, inside: bool = False) -> Tensor | None:
    """Where a value is off the support, batch dimensions alone; None if nothing can be."""
    if isinstance(fn, Independent):
        return _any(_off(fn.base_dist, value, inside), fn.reinterpreted_batch_ndims)
    composed = isinstance(fn, TransformedDistribution)
    if not composed and hasattr(fn, "base_dist"):  # masked, expanded
        return _off(fn.base_dist, value, inside)
    if composed and type(fn).support is TransformedDistribution.support:
        # Its support is the last transform's codomain, whatever the ones before make of the base.
        off = _off_base(fn, value)
        return off if inside or off is not None else _off_declared(fn, value)
    return None if inside else _off_declared(fn, value)


def _off_base(fn: TransformedDistribution, value: Tensor) -> Tensor | None:
    support = _support(fn.base_dist)
    if support is None or isinstance(support, type(constraints.real)):
        return None
    for t in reversed(fn.transforms):
        value = t.inv(value)
    return _off(fn.base_dist, value)


def _off_declared(fn: Distribution, value: Tensor) -> Tensor | None:
    support = _support(fn)
    if support is None or support is constraints.real or support.event_dim > 0:
        return None
    return _any(~support.check(value), fn.event_dim)


def _support(fn: Distribution) -> Constraint | None:
    try:
        return base_of(fn.support)
    except NotImplementedError:
        return None


def _unfit(fn: Distribution) -> Tensor | None:
    """Where a distribution's parameters break its constraints; NaN is not, for it shows itself."""
    if isinstance(fn, Independent):
        base = _unfit(fn.base_dist)
        base = None if base is None else base.expand(fn.base_dist.batch_shape)
        return _any(base, fn.reinterpreted_batch_ndims)
    if hasattr(fn, "base_dist"):
        return _unfit(fn.base_dist)
    found = []
    for name, constraint in fn.arg_constraints.items():
        value, plain = vars(fn).get(name), base_of(constraint)
        if not isinstance(value, Tensor) or constraints.is_dependent(plain):
            continue
        if plain is constraints.simplex:
            found.append((value < 0).any(-1))
        elif plain is not constraints.real and plain.event_dim == 0:
            near = plain.check(value) | plain.check(value * (1 - SLACK)) | value.isnan()
            # Some declare the constraint of a number for a parameter of more dimensions.
            beyond = near.dim() - constraint.event_dim - len(fn.batch_shape)
            found.append(_any(~near, constraint.event_dim + max(0, beyond)))
    return reduce(torch.logical_or, found) if found else None


def _any(off: Tensor | None, dims: int) -> Tensor | None:
    return off.flatten(-dims).any(-1) if off is not None and dims else off


def tensor_of(value: Any) -> Tensor:
    """A site's value, which may be a number; torch's ``as_tensor`` would also move a tensor."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def tensors_of(run: Run) -> tuple[Values, Values]:
    """The values of a run, and its log densities."""
    values = {name: tensor_of(record["value"]) for name, record in run.items()}
    log_probs = {n: record["log_prob"] for n, record in run.items() if "log_prob" in record}
    return values, log_probs


def check_latents(run: Run, values: Values) -> None:
    """A latent of some runs only would be drawn from its prior, and nothing would say so."""
    free = [n for n, record in run.items() if not record["is_observed"] and n not in values]
    changed = free + [name for name in values if name not in run]
    if changed:
        raise ValueError(
            f"site {changed[0]!r} is a latent in some runs of the model only: the guide needs "
            "the same latents in every run. Let the model sample all of them each time, and "
            "mask or weigh what does not count"
        )


def check_same_sites(run: Run, first: Run) -> None:
    """A site that is not in every run, or changes its shape, forms no array of draws."""
    names = [*first, *(name for name in run if name not in first)]
    changed = [name for name in names if _shape(run, name) != _shape(first, name)]
    if changed:
        raise ValueError(
            f"the model's site {changed[0]!r} is not in every run with the same shape, so its "
            "draws do not form one array: sample it in every run, in one shape"
        )


def _shape(run: Run, name: str) -> torch.Size | None:
    return tensor_of(run[name]["value"]).shape if name in run else None


def log_joint(sites: Sites) -> Tensor:
    """The log density of all sites together at each draw, shape (S,)."""
    return torch.stack([s.by_draw() for s in sites.values() if s.log_prob is not None]).sum(0)


def joined(parts: Sequence[Sites]) -> Sites:
    """The draws of several parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    found = {}
    for name, first in parts[0].items():
        values = concatenated([part[name].values for part in parts])
        scored = first.log_prob is not None
        log_prob = torch.cat([part[name].log_prob for part in parts]) if scored else None
        found[name] = SiteRuns(values, log_prob, first.record)
    return found


def _draws_first(value: Any, size: int, single: Any, event_dim: int = 0) -> Tensor:
    """A run's tensor as (S, *shape), without the dimensions that vectorising brings in."""
    single = tensor_of(single)
    batch = single.shape[: single.dim() - event_dim]

    def move(t: Tensor, event_dim: int) -> Tensor:
        event = t.shape[t.dim() - event_dim :]
        if t.shape[: t.dim() - event_dim].numel() == batch.numel():  # the same for all draws
            return t.reshape(1, *batch, *event).expand(size, *batch, *event)
        if t.shape[0] != size:
            raise ValueError("the draws are not along the first dimension")
        return t.reshape(size, *batch, *event)

    return moved(tensor_of(value), move, event_dim)


class _ManyDraws(TorchFunctionMode):
    """A matrix without a Cholesky factor is one bad draw among others, and no error.

    Of many numbers log-sigmoids are taken by fewer operations, with simple derivatives.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (binary_cross_entropy_with_logits, logsigmoid) and args[0].numel() > MANY:
            if func is logsigmoid:
                return -softplus(-args[0], threshold=40.0)
            if {key: held for key, held in kwargs.items() if held is not None} == PLAIN:
                return softplus(args[0], threshold=40.0) - args[1] * args[0]
        if func is not torch.linalg.cholesky:
            return func(*args, **kwargs)
        factor, failed = torch.linalg.cholesky_ex(*args, **kwargs)
        return factor.masked_fill((failed > 0)[..., None, None], torch.nan)


@contextmanager
def quietly() -> Iterator[None]:
    """Runs in which one bad draw is no error: no validation, and no warning of NaN."""
    with pyro.validation_enabled(False), warnings.catch_warnings(), _ManyDraws():
        warnings.simplefilter("ignore")
        yield


class Given(Messenger):
    """Lets latents, and the rows of plates, take given values; they stay latents."""

    def __init__(self, values: Values) -> None:
        self.values = values

    def _pyro_sample(self, msg: Record) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]


class Unobserve(UnconditionMessenger):
    """Pyro's, save that sites which follow from others keep their values.

    Sampled, a ``pyro.deterministic`` in a plate would be repeated along the plate once more.
    """

    def _pyro_sample(self, msg: Record) -> None:
        if not (is_deterministic(msg) or is_factor(msg)):
            super()._pyro_sample(msg)
