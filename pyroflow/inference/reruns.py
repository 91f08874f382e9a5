"""A model run again at given latents: what it computes and predicts, how likely its data are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, Distribution, MaskedDistribution, Unit
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Independent

from pyroflow.inference.draws import CHUNK

Values = dict[str, Tensor]
Run = dict[str, dict[str, Any]]  # Pyro's records of the sites of one run


@dataclass
class Site:
    """A site of a model at S draws.

    Attributes:
        values: shape (S, *shape of the site in a run of its own).
        log_prob: shape (S, *batch shape), with the model's masks and scales; None where the value
            follows from other sites.
        record: Pyro's record of the site in a run of its own: its plates, distribution, value.
    """

    values: Tensor
    log_prob: Tensor | None
    record: dict[str, Any]


@dataclass
class Reruns:
    """A model with its arguments, to be run at many latents.

    Attributes:
        model: the Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        plates: the depth of its plates. The runs go side by side where that gives what runs of
            their own give, and one by one otherwise or where this is None.
        predict: whether the observed sites are sampled as well, and not read from the data.

    Example:
        >>> from pyroflow.targets import eight_schools_noncentered
        >>> reruns = Reruns(eight_schools_noncentered, plates=1, predict=True)
        >>> sites = reruns.sites({"mu": torch.zeros(5), "tau": torch.ones(5)}, 5)
        >>> sites["theta"].values.shape, sites["y"].log_prob.shape
        (torch.Size([5, 8]), torch.Size([5, 8]))
    """

    model: Callable
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    plates: int | None = None
    predict: bool = False

    @torch.no_grad()
    def sites(self, latents: Values, size: int) -> dict[str, Site]:
        """Run the model at S draws of some of its latents, and sample the others.

        Args:
            latents: by name, values of shape (S, *shape of the site).
            size: S.

        Returns:
            The sites in the model's order, without those of ``pyro.factor``, which have no value.

        Raises:
            ValueError: a site that is not in every run, or changes its shape.
        """
        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NaN, which stay visible in the result
            single = self._run(self.model, _row(latents, 0))
            together = None if self.plates is None else self._side_by_side(latents, size, single)
            if together is not None and self._confirmed(together, size):
                return together
            return _joined(self._alone(_row(latents, index), single) for index in range(size))

    def _run(self, model: Callable, values: Values) -> Run:
        model = _Unobserve()(model) if self.predict else model
        conditioned = poutine.trace(poutine.condition(model, data=values))
        trace = prune_subsample_sites(conditioned.get_trace(*self.args, **self.kwargs))
        trace.compute_log_prob(site_filter=lambda _, record: not follows(record))
        return {name: record for name, record in trace.nodes.items() if _has_value(record)}

    def _side_by_side(self, latents: Values, size: int, single: Run) -> dict[str, Site] | None:
        """The runs in a plate of their own; None where the model does not go into one."""
        chunks = [slice(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK)]
        try:
            return _joined(self._chunk(latents, chunk, single) for chunk in chunks)
        except (RuntimeError, ValueError, IndexError, KeyError, NotImplementedError):
            return None

    def _chunk(self, latents: Values, chunk: slice, single: Run) -> dict[str, Site]:
        size = chunk.stop - chunk.start
        values = {
            name: _outermost(value[chunk], single[name]["fn"].event_dim, self.plates)
            for name, value in latents.items()
            if name in single
        }
        plate = pyro.plate("num_particles_vectorized", size, dim=-1 - self.plates)
        run = self._run(plate(self.model), values)
        return {name: _site(run[name], size, record) for name, record in single.items()}

    def _confirmed(self, sites: dict[str, Site], size: int) -> bool:
        """Whether the first and the last of the runs are what runs of their own give.

        A model that indexes from the left, or sums over all of a tensor, mixes the draws that run
        side by side, often without an error.
        """
        values = {name: site.values for name, site in sites.items() if site.log_prob is not None}
        for index in {0, size - 1}:
            single = self._run(self.model, _row(values, index))
            if not all(_close(site, index, single[name]) for name, site in sites.items()):
                return False
        return True

    def _alone(self, latents: Values, single: Run) -> dict[str, Site]:
        run = self._run(self.model, latents)
        changed = [name for name in single if _shape(run, name) != _shape(single, name)]
        if changed:
            raise ValueError(
                f"the model's site {changed[0]!r} is not in every run with the same shape, so its "
                "draws do not form one array: sample it in every run, in one shape"
            )
        return {name: _site(run[name], 1, record) for name, record in single.items()}


class _Unobserve(UnconditionMessenger):
    """Pyro's, save that sites which follow from others keep their values.

    Sampled, a ``pyro.deterministic`` in a plate would be repeated along the plate once more.
    """

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not follows(msg):
            super()._pyro_sample(msg)


def follows(record: dict[str, Any]) -> bool:
    """Whether a site's value follows from others: ``pyro.deterministic``, or an observed Delta."""
    return record["is_observed"] and isinstance(_plain(record["fn"]), Delta)


def _has_value(record: dict[str, Any]) -> bool:
    return record["type"] == "sample" and not isinstance(_plain(record["fn"]), Unit)


def _plain(fn: Distribution) -> Distribution:
    while isinstance(fn, MaskedDistribution | Independent):
        fn = fn.base_dist
    return fn


def _row(values: Values, index: int) -> Values:
    return {name: value[index] for name, value in values.items()}


def _shape(run: Run, name: str) -> torch.Size | None:
    return run[name]["value"].shape if name in run else None


def _outermost(value: Tensor, event_dim: int, plates: int) -> Tensor:
    """Draws of a site, shape (S, *batch, *event), with S left of all plates."""
    missing = plates - (value.ndim - 1 - event_dim)
    if missing < 0:
        raise ValueError("the site has dimensions outside the plates, where the draws belong")
    return value.reshape(value.shape[:1] + (1,) * missing + value.shape[1:])


def _site(record: dict[str, Any], size: int, single: dict[str, Any]) -> Site:
    values = _draws_first(record["value"], size, single["value"].shape)
    if follows(single):
        return Site(values, None, single)
    log_prob = _draws_first(record["log_prob"], size, single["log_prob"].shape)
    return Site(values, log_prob, single)


def _draws_first(value: Tensor, size: int, shape: torch.Size) -> Tensor:
    """A run's tensor as (S, *shape), without the dimensions that vectorising brings in."""
    if value.numel() == shape.numel():  # the same for all draws
        return value.reshape(1, *shape).expand(size, *shape)
    if value.shape[0] != size:
        raise ValueError("the draws are not along the first dimension")
    return value.reshape(size, *shape)


def _joined(parts: Iterable[dict[str, Site]]) -> dict[str, Site]:
    parts = list(parts)
    joined = {}
    for name, first in parts[0].items():
        values = torch.cat([part[name].values for part in parts])
        scored = first.log_prob is not None
        log_prob = torch.cat([part[name].log_prob for part in parts]) if scored else None
        joined[name] = Site(values, log_prob, first.record)
    return joined


def _close(site: Site, index: int, single: dict[str, Any]) -> bool:
    """Whether a draw's log density, or its value if that follows from others, is the single's."""
    given = site.log_prob is None
    found = (site.values if given else site.log_prob)[index].double()
    expected = single["value" if given else "log_prob"].double()
    largest = expected.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * largest, equal_nan=True)
