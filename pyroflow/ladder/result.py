"""What one call found: draws, a verdict, and how it was reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from pyroflow.arviz import to_arviz
from pyroflow.chains import Chains
from pyroflow.diagnostics import Report
from pyroflow.diagnostics.report import Level
from pyroflow.guides import AutoFlow
from pyroflow.guides.mixture import MixtureGuide
from pyroflow.shown import Shown

if TYPE_CHECKING:
    from arviz import InferenceData
    from xarray import DataTree


class Rung(NamedTuple):
    """What was tried, the seconds that it took with its checks, and their verdict."""

    name: str
    seconds: float
    verdict: str


@dataclass(repr=False)
class Posterior(Shown):
    """The result of :func:`~pyroflow.posterior`.

    Attributes:
        draws: {site: tensor of shape (S, *site)}, on the sites' own supports.
        level: "good": the draws can be used as they are. "resample": they are the guide's draws
            resampled, and repeat where its weights vary. "bad": they cannot be trusted.
        verdict: the same in words, with the reason.
        log_evidence: from the guide's importance weights, in nats.
        error: the largest Monte Carlo standard error of a mean, in standard deviations; infinite
            where the draws cannot be trusted.
        guide: the fitted guide, or a mixture of several.
        report: of the last :func:`~pyroflow.diagnose`, on draws of its own.
        chains: of :func:`~pyroflow.mcmc`, where it came to that: the draws are theirs if their
            level is "good".
        rungs: what was tried, in order.
        seconds: wall-clock time.
        model, args, kwargs: the model and its arguments, for :meth:`to_arviz`.
    """

    draws: dict[str, Tensor]
    level: Level
    verdict: str
    log_evidence: float
    error: float
    guide: AutoFlow | MixtureGuide
    report: Report
    chains: Chains | None
    rungs: list[Rung]
    seconds: float
    model: Callable = field(repr=False)
    args: tuple = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)

    def to_arviz(
        self,
        num_samples: int | None = None,
        *,
        predictions_args: tuple | None = None,
        predictions_kwargs: dict[str, Any] | None = None,
    ) -> InferenceData | DataTree:
        """The draws for ArviZ: the chains, or so many resampled draws of the guide (all).

        With arguments for predictions, as :func:`~pyroflow.to_arviz` takes them, the sites that
        the model samples at them, such as those of new rows, are in the group ``predictions``.
        """
        new = {"predictions_args": predictions_args, "predictions_kwargs": predictions_kwargs}
        if self.chains is not None and self.chains.level == "good":
            return self.chains.to_arviz(**new)
        num = num_samples or len(next(iter(self.draws.values())))
        return to_arviz(self.model, self.guide, self.args, self.kwargs, num, resample=True, **new)

    def _shown(self) -> tuple[str, list[tuple[str, str]]]:
        rows = {
            "verdict": self.verdict,
            "error": f"{self.error:.3f} sd, the largest standard error of a mean",
            "log evidence": f"{self.log_evidence:.3f} nats",
            "draws": f"{len(next(iter(self.draws.values())))}",
            "seconds": f"{self.seconds:.1f}",
        }
        tried = [f"{rung.name}, {rung.seconds:.1f} s: {rung.verdict}" for rung in self.rungs]
        labels = ["tried"] + [""] * len(tried)
        return "", [*rows.items(), *zip(labels, tried, strict=False)]
