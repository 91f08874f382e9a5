"""A model run at given latents: what it computes and predicts, how likely its data are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyroflow.model.comparison import Way, differs
from pyroflow.model.records import (
    Record,
    Run,
    SiteRuns,
    Sites,
    Values,
    check_latents,
    check_same_sites,
    is_deterministic,
    is_factor,
    log_joint,
    outside_support,
    tensor_of,
    tensors_of,
)
from pyroflow.model.supports import concatenated, moved, preimage, remember
from pyroflow.seeds import seeded

PARTICLES = "num_particles_vectorized"  # Pyro's own name for this plate
CHUNK = 1000  # draws side by side, to bound the memory


class Runs:
    """A model with its arguments, to be run at many draws of its latents.

    Draws run side by side by torch's ``vmap``, or else in a plate around the model, or else one
    by one: the first way that repeats what three draws get in runs of their own
    (:func:`~pyroflow.model.comparison.differs`).

    Args:
        model: the Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        plates: the depth of its plates; None if it is not to run in a plate.
        predict: whether the observed sites are sampled as well, and not read from the data.
        by_vmap: whether torch's ``vmap`` is tried.
        compared: whether ways to run are compared with runs of their own; else the first that
            runs is taken.

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
        compared: bool = True,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs or {}
        self.plates, self.predict, self.compared = plates, predict, compared
        self.subsample: Values = {}
        self.records: Run = {}
        self._ways = [self.by_vmap] if by_vmap else []
        self._ways += [self.in_plate, self.one_by_one]
        self._chosen = False

    @property
    def sequential(self) -> bool:
        """Whether each draw takes a run of the model."""
        return self._chosen and self.way == self.one_by_one

    @property
    def way(self) -> Way:
        """How draws run."""
        return self._ways[0]

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
        return _joined(self.way(_rows(latents, rows), len(rows)) for rows in chunks)

    def log_joint(self, latents: Values, size: int) -> Tensor:
        """The log density of all sites together, shape (S,), with its graph.

        :meth:`choose` must have been called. The latents are taken to be inside their supports.
        """
        return log_joint(self.way(latents, size, inside=set(latents)))

    def choose(self, latents: Values, size: int) -> None:
        """Choose how to run, by what a few draws get that way and alone; once."""
        if not self._chosen:
            while self._ways[1:] and differs(self, latents, size, self.way) is not None:
                del self._ways[0]
            self._chosen = True

    def keep_records(self, latents: Values) -> None:
        """Make a run of its own, at the first draw, and keep its records."""
        if not self.records:
            self.records = self._run(self.model, _rows(latents, 0))

    def by_vmap(self, latents: Values, size: int, inside: Iterable[str] = ()) -> Sites:
        """Side by side, each as if it were alone: by construction, where torch can do it."""
        origins = {name: o for name, value in latents.items() if (o := preimage(value))}

        def alone(_: Tensor, values: Values, z: Values) -> tuple[Values, Values]:
            for name, latent in z.items():
                remember(values[name], latent, origins[name].support)
            return tensors_of(self._run(self.model, values, inside))

        run = torch.func.vmap(alone, randomness="different" if self.predict else "error")
        z = {name: origin.latent for name, origin in origins.items()}
        values, log_probs = run(torch.arange(size, device="cpu"), latents, z)
        return {
            name: SiteRuns(value, log_probs.get(name), self.records.get(name, {}))
            for name, value in values.items()
        }

    def in_plate(self, latents: Values, size: int, inside: Iterable[str] = ()) -> Sites:
        """Side by side in a plate around the model, as Pyro's ELBOs vectorise particles."""
        if self.plates is None:
            raise ValueError("the depth of the model's plates is not known")
        self.keep_records(latents)
        values = {
            name: moved(value, self._outermost, self.records[name]["fn"].event_dim)
            for name, value in latents.items()
            if name in self.records
        }
        plate = pyro.plate(PARTICLES, size, dim=-1 - self.plates)
        run = self._run(plate(self.model), values, inside)
        return {name: _site(run[name], size, record) for name, record in self.records.items()}

    def one_by_one(self, latents: Values, size: int, inside: Iterable[str] = ()) -> Sites:
        """A run for each draw."""
        first: Run | None = None
        parts = []
        for index in range(size):
            values = _rows(latents, index)
            run = self._run(self.model, values, inside)
            first = first or run
            check_same_sites(run, first)
            parts.append({name: _site(run[name], 1, record) for name, record in first.items()})
        return _joined(parts)

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
            check_latents(sampled, values)
        for name, record in sampled.items():
            outside = outside_support(record, inside=name in inside)
            if outside is not None:
                record["log_prob"] = record["log_prob"].masked_fill(outside, -torch.inf)
        return sampled

    def _outermost(self, value: Tensor, event_dim: int) -> Tensor:
        """Draws of a site, shape (S, *batch, *event), with S left of all plates."""
        missing = self.plates - (value.ndim - 1 - event_dim)
        if missing < 0:
            raise ValueError("the site has dimensions outside the plates, where the draws belong")
        return value.reshape(value.shape[:1] + (1,) * missing + value.shape[1:])

    def _keep_subsample(self, trace: poutine.Trace) -> None:
        for name, record in trace.nodes.items():
            if record["type"] == "sample" and site_is_subsample(record):
                self.subsample[name] = record["value"]


class _SingularIsNaN(TorchFunctionMode):
    """A matrix without a Cholesky factor is one bad draw among others, and no error."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.linalg.cholesky:
            return func(*args, **(kwargs or {}))
        factor, failed = torch.linalg.cholesky_ex(*args, **(kwargs or {}))
        return factor.masked_fill((failed > 0)[..., None, None], torch.nan)


@contextmanager
def quietly() -> Iterator[None]:
    """Runs in which one bad draw is no error: no validation, and no warning of NaN."""
    with pyro.validation_enabled(False), warnings.catch_warnings(), _SingularIsNaN():
        warnings.simplefilter("ignore")
        yield


class _Unobserve(UnconditionMessenger):
    """Pyro's, save that sites which follow from others keep their values.

    Sampled, a ``pyro.deterministic`` in a plate would be repeated along the plate once more.
    """

    def _pyro_sample(self, msg: Record) -> None:
        if not (is_deterministic(msg) or is_factor(msg)):
            super()._pyro_sample(msg)


def _rows(values: Values, index: Sequence[int] | int) -> Values:
    def move(t: Tensor, _: int) -> Tensor:
        whole = isinstance(index, int)
        return t[index] if whole else t[torch.tensor(list(index), device=t.device)]

    return {name: moved(value, move) for name, value in values.items()}


def _site(record: Record, size: int, single: Record) -> SiteRuns:
    values = _draws_first(record["value"], size, single["value"], single["fn"].event_dim)
    if "log_prob" not in single:
        return SiteRuns(values, None, single)
    return SiteRuns(values, _draws_first(record["log_prob"], size, single["log_prob"]), single)


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


def _joined(parts: Iterable[Sites]) -> Sites:
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    joined = {}
    for name, first in parts[0].items():
        values = concatenated([part[name].values for part in parts])
        scored = first.log_prob is not None
        log_prob = torch.cat([part[name].log_prob for part in parts]) if scored else None
        joined[name] = SiteRuns(values, log_prob, first.record)
    return joined
