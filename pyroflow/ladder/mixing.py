"""The growth of a mixture: a part at each mode that is found, and one for what is wider."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import torch
from torch import Tensor

from pyroflow.diagnostics import Report
from pyroflow.diagnostics.wider import wider
from pyroflow.guides import AutoFlow, AutoPlanarFlow
from pyroflow.guides.mixture import MixtureGuide
from pyroflow.inference.census import Mode, merged
from pyroflow.inference.gaussian_start import Gaussian, lower_factor
from pyroflow.inference.guide_fit import fit_flow
from pyroflow.inference.mixture import Part, fit_part, mixed
from pyroflow.model.bound import BoundModel
from pyroflow.model.log_joint import LogJoint

MOST_PARTS = 12
PART_STEPS = 300
WIDE_DRAWS = 20_000  # among which mass is looked for that a guide has too little of
TWICE = 0.7  # log of the ratio of the densities there
LEAST_SHARE = 1e-3  # of the mass, for a part
WIDER = 1.2  # times the standard deviations of those draws
FREEDOM = 5.0  # of the wide part's base
POINTS = 128  # at which the log joint is evaluated at a time


class Mixing:
    """A mixture that grows by what the checks of a guide find.

    Args:
        problem: the model, bound to the flow.
        flow: the guide that was fitted, with its bound; in its coordinates are all modes.
        make: a new guide for a part.
        seed: of the fits.
    """

    def __init__(
        self, problem: BoundModel, flow: Part, make: Callable[[], AutoFlow], seed: int
    ) -> None:
        self.problem, self.flow, self.make, self.seed = problem, flow, make, seed
        self.modes: list[Mode] = []
        self.parts: list[Part] = []
        self.wide: Part | None = None
        self.latest: MixtureGuide | None = None

    def add(self, report: Report) -> bool:
        """Parts for the modes that the report of the latest guide misses, or else a wider one."""
        flow, bound = self.flow
        number = len(self.parts)
        if report.missed and len(self.parts) < MOST_PARTS:
            found = [mode if self.latest is None else _moved(flow, mode) for mode in report.modes]
            for mode in found:
                known = [*self.modes, mode]
                if len(self.parts) < MOST_PARTS and len(merged(bound.log_joint, known)) == len(
                    known
                ):
                    self._add_mode(mode)
        if len(self.parts) > number:
            return len(self.parts) > 1
        if self.wide is not None or report.missed:
            return False
        self.wide = self._wide_part(report)
        return self.wide is not None

    def train(self, steps: int) -> None:
        """Fit the parts at the modes further."""
        for _, bound in self.parts:
            fit_flow(bound, steps, self.seed, progress=False)

    def mixture(self) -> MixtureGuide:
        """The parts with their weights."""
        wide = [] if self.wide is None else [self.wide]
        self.latest = mixed(self.flow[0].model, (self.parts or [self.flow]) + wide)
        return self.latest

    def _add_mode(self, mode: Mode) -> None:
        start = Gaussian(mode.loc, mode.scale, mode.bound)
        part = fit_part(self.problem, self.flow[0], start, self.make(), PART_STEPS, self.seed)
        self.modes.append(mode)
        self.parts.append(part)

    @torch.no_grad()
    def _wide_part(self, report: Report) -> Part | None:
        """A Student-t where the guide has too little mass, as wider draws say; None if nowhere."""
        guide = self.latest or self.flow[0]
        with pyro.validation_enabled(False):
            log_joint = LogJoint(self.problem.with_guide(guide), guide, POINTS)
            q = guide.flow()
            x, log_m = wider(guide, WIDE_DRAWS)
            log_p = log_joint.values_and_gradients(x)[0].double()
            missing = log_p - q.log_prob(x).double() - report.log_evidence > TWICE
        log_weights = (log_p - log_m).nan_to_num(-torch.inf, -torch.inf, -torch.inf)
        weights = log_weights.softmax(0)
        weights = weights.where(missing & log_weights.isfinite(), 0.0)
        share, least = weights.sum().item(), 2 * x.shape[-1]
        if share < LEAST_SHARE or share**2 / weights.square().sum().item() < least:
            return None
        loc, scale = _moments(x, (weights / share).to(x))
        if self.latest is not None:
            loc, scale = _gaussian_in(self.flow[0], loc, scale)
        start = Gaussian(loc, WIDER * scale, -math.inf)
        part = AutoPlanarFlow(self.flow[0].model, num_layers=0, base_df=FREEDOM)
        return fit_part(self.problem, self.flow[0], start, part, 0, self.seed)


def _moments(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and lower factor of the covariance of weighted points (S, D)."""
    kept = weights > 0
    x, weights = x[kept], weights[kept].unsqueeze(-1)
    loc = (weights * x).sum(0)
    return loc, lower_factor((weights.sqrt() * (x - loc)).mT)


def _moved(flow: AutoFlow, mode: Mode) -> Mode:
    """A mode in the unconstrained latents, as one in the flow's coordinates."""
    loc, scale = _gaussian_in(flow, mode.loc, mode.scale)
    coordinates = flow.coordinates
    peak = mode.peak if coordinates is None else coordinates.inv(mode.peak)
    return mode._replace(loc=loc, scale=scale, peak=peak)


def _gaussian_in(flow: AutoFlow, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    if flow.coordinates is None:
        return loc, scale
    x = flow.coordinates.inv(loc)
    slopes = torch.autograd.functional.jacobian(flow.coordinates, x)
    return x, lower_factor(torch.linalg.solve(slopes, scale))
