"""A model run at given latents: what it computes and predicts, how likely its data are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, Distribution, MaskedDistribution, Unit
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import Independent, biject_to, constraints

from pyroflow.seeds import seeded

PARTICLES = "num_particles_vectorized"  # Pyro's own name for this plate
CHUNK = 1000  # draws side by side, to bound the memory
PROBES = (1.0, -1.0, 3.0)  # factors of the normal moves to where ways to run are compared

# What vmap, tracing and plates raise where a model is not made for them.
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, KeyError)

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

    @property
    def compared(self) -> Tensor:
        """What a run of its own must give as well."""
        return self.values if self.log_prob is None else self.log_prob

    def by_draw(self, dtype: torch.dtype | None = None) -> Tensor:
        """The log density of each draw, shape (S,), summed in ``dtype`` or the model's."""
        return self.log_prob.reshape(len(self.log_prob), -1).sum(1, dtype=dtype)


Sites = dict[str, SiteRuns]


class Runs:
    """A model with its arguments, to be run at many draws of its latents.

    Draws run side by side by torch's ``vmap``, or else in a plate around the model, or else one
    by one: the first way that repeats what three draws get in runs of their own (:func:`differs`).

    Args:
        model: the Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        plates: the depth of its plates; None if it is not to run in a plate.
        predict: whether the observed sites are sampled as well, and not read from the data.
        by_vmap: whether torch's ``vmap`` is tried.

    Attributes:
        subsample: by name, the rows that plates drew, which all runs share; cleared by the owner.
        records: Pyro's records of a run of its own, once runs have been compared.

    Example:
        >>> from pyroflow.targets import eight_schools_noncentered
        >>> runs = Runs(eight_schools_noncentered, plates=1, predict=True)
        >>> sites = runs.evaluate({"mu": torch.zeros(5), "tau": torch.ones(5)}, 5)
        >>> sites["theta"].values.shape, sites["y"].log_prob.shape
        (torch.Size([5, 8]), torch.Size([5, 8]))
    """

    def __init__(
        self,
        model: Callable,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
        plates: int | None = None,
        predict: bool = False,
        by_vmap: bool = True,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs or {}
        self.plates, self.predict = plates, predict
        self.subsample: Values = {}
        self.records: Run = {}
        self._ways = [self.by_vmap] if by_vmap else []
        self._ways += [self.in_plate, self.one_by_one]
        self._chosen = False

    @property
    def sequential(self) -> bool:
        """Whether each draw takes a run of the model."""
        return self._chosen and self._ways[0] == self.one_by_one

    @torch.no_grad()
    def evaluate(self, latents: Values, size: int) -> Sites:
        """Run the model at S draws of its latents; those that are missing are sampled.

        Args:
            latents: by name, values of shape (S, *shape of the site).
            size: S.

        Returns:
            The sites in the model's order, with those of ``pyro.factor``.

        Raises:
            ValueError: If a site is not in every run, or changes its shape.
        """
        few = sorted({0, size // 2, size - 1})
        with seeded(0):  # so that a comparison changes nothing that is drawn later
            self.choose(_rows(latents, few), len(few))
        chunks = [range(i, min(i + CHUNK, size)) for i in range(0, size, CHUNK)]
        return _joined(self._ways[0](_rows(latents, rows), len(rows)) for rows in chunks)

    def log_joint(self, latents: Values, size: int) -> Tensor:
        """The log density of all sites together, shape (S,), with its graph.

        :meth:`choose` must have been called. The latents are taken to be inside their supports.
        """
        return _log_joint(self._ways[0](latents, size, inside=set(latents)))

    def choose(self, latents: Values, size: int) -> None:
        """Choose how to run, by what a few draws get that way and alone; once."""
        if not self._chosen:
            while self._ways[0] != self.one_by_one and self.differs(latents, size) is not None:
                del self._ways[0]
            self._chosen = True

    def differs(self, latents: Values, size: int, way: Callable | None = None) -> str | None:
        """The first site at which draws side by side differ from runs of their own, if any.

        A model that indexes its latents from the left, or reduces over all of a tensor, mixes
        draws that run side by side, often without an error. So, draw by draw and site by site,
        log densities (or the values that follow from others) must agree, and the gradients of the
        log joint; and no draw may have a gradient in another one's latents, which is exactly zero
        otherwise. Two numbers agree if they differ by less than :func:`tolerance` of the
        largest of them among the draws: elementwise, so that it does not grow with the data.

        Returns:
            It in words; "the log joint" if it is not one site, or the runs fail.
        """
        way = way or self._ways[0]
        if self.predict and not self.records:
            self.records = self.single({name: value[0] for name, value in latents.items()})
        try:
            found, slopes = self._with_gradients(way, latents, size)
        except FAILURES:
            return "the log joint"
        given = latents
        if self.predict:
            given = {name: s.values for name, s in found.items() if _is_random(s.record)}
        expected, alone = self._with_gradients(self.one_by_one, given, size)
        self.records = {name: site.record for name, site in expected.items()}
        for name, site in expected.items():
            if name not in found or not agree(found[name].compared, site.compared):
                return f"site {name!r}"
        same = all(agree(*pair) for pair in zip(slopes, alone, strict=True))
        return None if same else "the log joint"

    def _with_gradients(
        self, way: Callable, latents: Values, size: int
    ) -> tuple[Sites, list[Tensor]]:
        """The sites, and gradients in the latents of the log joint of all and of the first draw."""
        if self.predict:
            return way(latents, size), []
        leaves = {name: value.detach().clone() for name, value in latents.items()}
        moving = [v.requires_grad_() for v in leaves.values() if v.is_floating_point()]
        with torch.enable_grad():
            sites = way(leaves, size)
            total = _log_joint(sites)
            whole, first = total.sum(), total[0]
        if not moving or not total.requires_grad:
            return sites, []
        options = {"allow_unused": True, "materialize_grads": True}
        slopes = torch.autograd.grad(whole, moving, retain_graph=True, **options)
        leaks = torch.autograd.grad(first, moving, **options)
        exact = [torch.where((leak[1:] == 0) | leak[1:].isnan(), 0.0, 1.0) for leak in leaks]
        return sites, [*slopes, *exact]

    def by_vmap(self, latents: Values, size: int, inside: Iterable[str] = ()) -> Sites:
        """Side by side, each as if it were alone: by construction, where torch can do it."""

        def single(_: Tensor, values: Values) -> tuple[Values, Values]:
            return _tensors(self._run(self.model, values, inside))

        run = torch.func.vmap(single, randomness="different" if self.predict else "error")
        values, log_probs = run(torch.arange(size), latents)
        return {
            name: SiteRuns(value, log_probs.get(name), self.records.get(name, {}))
            for name, value in values.items()
        }

    def in_plate(self, latents: Values, size: int, inside: Iterable[str] = ()) -> Sites:
        """Side by side in a plate around the model, as Pyro's ELBOs vectorise particles."""
        if self.plates is None:
            raise ValueError("the depth of the model's plates is not known")
        single = self.records = self.records or self.single(
            {name: value[0] for name, value in latents.items()}
        )
        values = {
            name: _outermost(value, single[name]["fn"].event_dim, self.plates)
            for name, value in latents.items()
            if name in single
        }
        plate = pyro.plate(PARTICLES, size, dim=-1 - self.plates)
        run = self._run(plate(self.model), values, inside)
        return {name: _site(run[name], size, record) for name, record in single.items()}

    def one_by_one(self, latents: Values, size: int, inside: Iterable[str] = ()) -> Sites:
        """A run for each draw."""
        first: Run | None = None
        parts = []
        for index in range(size):
            values = {name: value[index] for name, value in latents.items()}
            run = self._run(self.model, values, inside)
            first = first or run
            _check_same_sites(run, first)
            parts.append({name: _site(run[name], 1, record) for name, record in first.items()})
        return _joined(parts)

    def single(self, values: Values) -> Run:
        """Pyro's records of the sites of a run of its own."""
        return self._run(self.model, values)

    def _run(self, model: Callable, values: Values, inside: Iterable[str] = ()) -> Run:
        model = _Unobserve()(model) if self.predict else model
        conditioned = poutine.trace(poutine.condition(model, data=values | self.subsample))
        with quietly(), poutine.block():
            trace = conditioned.get_trace(*self.args, **self.kwargs)
            self._keep_subsample(trace)
            trace = prune_subsample_sites(trace)
            trace.compute_log_prob(site_filter=lambda _, record: not is_deterministic(record))
        sampled = {n: record for n, record in trace.nodes.items() if record["type"] == "sample"}
        if not self.predict:
            _check_latents(sampled, values)
        for name, record in sampled.items():
            if name not in inside and (outside := _outside(record)) is not None:
                record["log_prob"] = record["log_prob"].masked_fill(outside, -torch.inf)
        return sampled

    def _keep_subsample(self, trace: poutine.Trace) -> None:
        for name, record in trace.nodes.items():
            if record["type"] == "sample" and site_is_subsample(record):
                self.subsample[name] = record["value"]


@contextmanager
def quietly() -> Iterator[None]:
    """Runs in which one bad draw is no error: no validation, and no warning of NaN."""
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tolerance(dtype: torch.dtype) -> float:
    """The relative difference of numbers that are equal but for rounding.

    ε^0.4, which is 2e-3 in float32 and 5e-7 in float64: thousands of times the rounding of an
    operation, and far less than what one draw's latents change in another's density.
    """
    return torch.finfo(dtype).eps ** 0.4


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors (S, *) are equal but for rounding, against the largest of S draws."""
    if found.shape != expected.shape:
        return False
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    usual = expected.nan_to_num(0.0, 0.0, 0.0).abs()
    bound = tolerance(expected.dtype) * usual.amax(0, keepdim=True) if len(usual) else usual
    near = (found - expected).abs() <= bound
    same = (found == expected) | (found.isnan() & expected.isnan())
    return bool((near | same).all())


def spread(latents: Values, records: Run) -> Values:
    """Draws (3, *) as widely spread in the unconstrained space as :func:`moves` says."""
    moved = {}
    for name, value in latents.items():
        moved[name] = value
        support = records[name]["fn"].support
        if value.is_floating_point() and not support.is_discrete:
            transform = biject_to(support)
            z = transform.inv(value)
            moved[name] = transform(z[:1] + moves(len(z), z[0]))
    return moved


def _log_joint(sites: Sites) -> Tensor:
    """The log density of all sites together at each draw, shape (S,)."""
    return torch.stack([s.by_draw() for s in sites.values() if s.log_prob is not None]).sum(0)


def moves(num: int, like: Tensor) -> Tensor:
    """Normal moves (num, *shape of ``like``), in groups of one, its opposite and one times 3."""
    groups = -(-num // len(PROBES))
    noise = torch.randn(groups, 2, *like.shape, dtype=like.dtype).to(like)
    factors = torch.tensor(PROBES).to(like).reshape(1, -1, *(1,) * like.dim())
    return (factors * noise[:, [0, 0, 1]]).flatten(0, 1)[:num]


def is_deterministic(record: Record) -> bool:
    """Whether a site's value follows from others: ``pyro.deterministic``, or an observed Delta."""
    return record["is_observed"] and isinstance(_plain(record["fn"]), Delta)


def _is_random(record: Record) -> bool:
    """Whether a site's value is drawn: not a Delta's, as those of an autoguide are."""
    return not isinstance(_plain(record["fn"]), Delta | Unit)


def is_factor(record: Record) -> bool:
    """Whether a site is of ``pyro.factor``, which has no value."""
    return isinstance(_plain(record["fn"]), Unit)


class _Unobserve(UnconditionMessenger):
    """Pyro's, save that sites which follow from others keep their values.

    Sampled, a ``pyro.deterministic`` in a plate would be repeated along the plate once more.
    """

    def _pyro_sample(self, msg: Record) -> None:
        if not (is_deterministic(msg) or is_factor(msg)):
            super()._pyro_sample(msg)


def _plain(fn: Distribution) -> Distribution:
    while isinstance(fn, MaskedDistribution | Independent):
        fn = fn.base_dist
    return fn


def _check_latents(run: Run, values: Values) -> None:
    """A latent of some runs only would be drawn from its prior, and nothing would say so."""
    free = [name for name, record in run.items() if not record["is_observed"]]
    changed = free + [name for name in values if name not in run]
    if changed:
        raise ValueError(
            f"site {changed[0]!r} is a latent in some runs of the model only: the guide needs "
            "the same latents in every run. Let the model sample all of them each time, and "
            "mask or weigh what does not count"
        )


def _check_same_sites(run: Run, first: Run) -> None:
    names = [*first, *(name for name in run if name not in first)]
    changed = [name for name in names if _shape(run, name) != _shape(first, name)]
    if changed:
        raise ValueError(
            f"the model's site {changed[0]!r} is not in every run with the same shape, so its "
            "draws do not form one array: sample it in every run, in one shape"
        )


def _shape(run: Run, name: str) -> torch.Size | None:
    return torch.as_tensor(run[name]["value"]).shape if name in run else None


def _outside(record: Record) -> Tensor | None:
    """Where a value is off its support, if that is a matter of its numbers one by one.

    A simplex or a Cholesky factor is not checked: in float32 a guide's own transforms miss the
    tolerances of torch, by rounding.
    """
    if is_deterministic(record) or is_factor(record):
        return None
    try:
        support = record["fn"].support
    except NotImplementedError:
        return None
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.real or support.event_dim > 0:
        return None
    event_dim, outside = record["fn"].event_dim, ~support.check(record["value"])
    outside = outside.flatten(-event_dim).any(-1) if event_dim else outside
    return outside if record["mask"] is None else outside & record["mask"]


def _rows(values: Values, index: Sequence[int]) -> Values:
    return {name: value[list(index)] for name, value in values.items()}


def _outermost(value: Tensor, event_dim: int, plates: int) -> Tensor:
    """Draws of a site, shape (S, *batch, *event), with S left of all plates."""
    missing = plates - (value.ndim - 1 - event_dim)
    if missing < 0:
        raise ValueError("the site has dimensions outside the plates, where the draws belong")
    return value.reshape(value.shape[:1] + (1,) * missing + value.shape[1:])


def _tensors(run: Run) -> tuple[Values, Values]:
    """The values of a run, and its log densities."""
    values = {name: torch.as_tensor(record["value"]) for name, record in run.items()}
    log_probs = {n: record["log_prob"] for n, record in run.items() if "log_prob" in record}
    return values, log_probs


def _site(record: Record, size: int, single: Record) -> SiteRuns:
    values = _draws_first(record["value"], size, single["value"])
    if "log_prob" not in single:
        return SiteRuns(values, None, single)
    return SiteRuns(values, _draws_first(record["log_prob"], size, single["log_prob"]), single)


def _draws_first(value: Any, size: int, single: Any) -> Tensor:
    """A run's tensor as (S, *shape), without the dimensions that vectorising brings in."""
    value, shape = torch.as_tensor(value), torch.as_tensor(single).shape
    if value.numel() == shape.numel():  # the same for all draws
        return value.reshape(1, *shape).expand(size, *shape)
    if value.shape[0] != size:
        raise ValueError("the draws are not along the first dimension")
    return value.reshape(size, *shape)


def _joined(parts: Iterable[Sites]) -> Sites:
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    joined = {}
    for name, first in parts[0].items():
        values = torch.cat([part[name].values for part in parts])
        scored = first.log_prob is not None
        log_prob = torch.cat([part[name].log_prob for part in parts]) if scored else None
        joined[name] = SiteRuns(values, log_prob, first.record)
    return joined
