"""Guides of simulated data sets, fitted side by side where model and guide allow it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyroflow.guides import AutoFlow, AutoPlanarFlow, AutoSylvesterFlow
from pyroflow.inference.gaussian_start import STEPS as ASCENT
from pyroflow.inference.gaussian_start import Gaussian, initialize, paths_in
from pyroflow.inference.guide import inspected
from pyroflow.inference.guide_fit import RATE, WIDEST_WARM_START
from pyroflow.inference.starts import best_starts
from pyroflow.inference.together import SCORED, FlowsTogether, train
from pyroflow.model.bound import BoundModel
from pyroflow.model.comparison import FAILURES, agree, moves
from pyroflow.model.log_joint_of_data import LogJointOfData
from pyroflow.model.priors import PriorsAtLatents
from pyroflow.model.records import Values
from pyroflow.model.runs import Runs
from pyroflow.seeds import between_draws, seeded
from pyroflow.transforms import Affine, Bijection

MOST = 2**26  # numbers of a kind that fits side by side may hold, to bound the memory


class Simulated(NamedTuple):
    """Latents drawn from the prior, the data that they made, and the model with these data."""

    truth: Values
    data: Values
    model: Callable
    args: tuple
    kwargs: dict[str, Any]


class Batched:
    """Fits of guides to data sets side by side.

    Args:
        simulate: from the number of a data set to what was simulated.
        bound_to: from data to the model that observes them, and its arguments.
        make_guide: of the caller.
        steps: of each fit.
        num_particles: draws of a step.
        num_samples: draws of each fitted guide.

    Attributes:
        why: why data sets were not fitted side by side.
    """

    def __init__(
        self,
        simulate: Callable[[int], Simulated],
        bound_to: Callable[[Values], tuple[Callable, tuple, dict[str, Any]]],
        make_guide: Callable[[Callable], Callable],
        *,
        steps: int,
        num_particles: int,
        num_samples: int,
    ) -> None:
        self.simulate, self.bound_to, self.make_guide = simulate, bound_to, make_guide
        self.steps, self.num_particles, self.num_samples = steps, num_particles, num_samples
        self.why = ""

    def below(self, numbers: Sequence[int], tick: Callable[[int], Any]) -> dict[int, Values]:
        """How many of its guide's draws are below the truth, by site, of each that was fitted.

        Others are left out: those whose fit failed, and where the model with data as inputs does
        not say what it says by itself. ``tick`` is told of how many more are done.
        """
        found: dict[int, Values] = {}
        told = 0
        try:
            with pyro.get_param_store().scope():
                first = self._set_up(numbers[0])
                (model, *arguments), guide = first[0][2:], first[1]
                problem, _ = inspected(model, guide, *arguments)
                self.why = _refusal(problem)
                if self.why:
                    return found
                rest = list(numbers)
                size = self._at_once(problem)
                while rest:
                    some, rest = rest[:size], rest[size:]
                    pairs = [first if i == numbers[0] else self._set_up(i) for i in some]
                    fitted = dict(zip(some, self._fitted(problem, pairs), strict=True))
                    found |= {i: below for i, below in fitted.items() if below is not None}
                    tick(len(found) - told)
                    told = len(found)
        except FAILURES as error:
            self.why = " ".join(str(error).split())[:100] or type(error).__name__
        return found

    def _set_up(self, number: int) -> tuple[Simulated, AutoFlow]:
        simulated = self.simulate(number)
        guide = self.make_guide(simulated.model)
        if type(guide) not in (AutoFlow, AutoPlanarFlow, AutoSylvesterFlow):
            raise ValueError(f"{type(guide).__name__} is no flow over all latents")
        if guide.prototype_trace is not None:
            raise ValueError("make_guide returns guides that were called before")
        return simulated, guide.setup(*simulated.args, **simulated.kwargs)

    def _at_once(self, problem: BoundModel) -> int:
        """Data sets that the memory has room for."""
        dim, parameters = problem.guide.latent_dim, problem.guide.flow.parameters()
        units = max(p.numel() for p in parameters) // dim + 1
        draws = self.num_particles * max(dim, units) ** 2
        own = problem.runs.numbers(observed=True)
        numbers = ASCENT * paths_in(dim) * dim**2, draws, SCORED * dim, self.num_samples * dim, own
        return max(1, MOST // max(numbers))

    def _fitted(
        self, problem: BoundModel, pairs: list[tuple[Simulated, AutoFlow]]
    ) -> list[Values | None]:
        simulated, guides = zip(*pairs, strict=True)
        first = guides[0]
        for guide in guides:
            problem.guide.latents.check(guide.prototype_trace)
            if _form(guide) != _form(problem.guide):
                raise ValueError("make_guide returns guides of several forms")
        layers = [t for guide in guides for t in guide.flow.transforms()]
        if len(set(map(id, layers))) < len(layers):
            raise ValueError("make_guide returns guides with layers that are used twice")
        data = {n: torch.stack([s.data[n] for s in simulated]) for n in simulated[0].data}
        with between_draws(), pyro.validation_enabled(False):
            first.find_coordinates(*simulated[0][3:])
            num = self.num_particles * len(pairs)
            log_joint = LogJointOfData(self._runs, problem.runs, first, data, num)
            start = torch.stack([guide._init_loc() for guide in guides])
            with seeded(0):
                points = start + moves(len(start), start[0])
            models = [self._runs({n: t[i] for n, t in data.items()}) for i in range(len(pairs))]
            same = log_joint.agrees(points, models)
            if not any(same):
                raise ValueError("the model with its data as inputs says something else")
            flows, sound = _started(log_joint, start, guides)
            negative = train(flows, log_joint, self.steps, self.num_particles, RATE)
            # Where a prior depends on the data, so do the coordinates that draws are read in.
            again = log_joint.agrees(flows.draw(1)[0].detach(), models)
            sound = sound & negative.isfinite()
            sound = sound & torch.tensor([same, again], device=start.device).all(0)
            truth = {n: torch.stack([s.truth[n] for s in simulated]) for n in first.latents.sites}
            below = self._below(flows, log_joint, truth)
        if not bool(sound.all()):
            self.why = "their fits failed, or the model with its data as inputs says otherwise"
        return [
            {n: counts[i] for n, counts in below.items()} if good else None
            for i, good in enumerate(sound.tolist())
        ]

    def _runs(self, data: Values) -> Runs:
        model, args, kwargs = self.bound_to(data)
        return Runs(PriorsAtLatents()(model), args, kwargs)

    @torch.no_grad()
    def _below(self, flows: FlowsTogether, log_joint: LogJointOfData, truth: Values) -> Values:
        """By site, how many draws are below the truth, shape (M, *shape of the site)."""
        z, guide = flows.draw(self.num_samples), log_joint.guide
        if guide.coordinates is not None:
            moved = [
                guide.coordinates.move(x, *own)[0]
                for x, *own in zip(z.unbind(1), *log_joint.moved_by, strict=True)
            ]
            z = torch.stack(moved, 1)
        values, _ = guide.latents.constrain(z)
        return {n: (v < truth[n]).double().sum(0) for n, v in values.items()}


def _refusal(problem: BoundModel) -> str:
    """Why a model and its guide are not fitted side by side with others; empty if they are."""
    guide, layers = problem.guide, problem.guide.flow.transforms()
    reasons = {
        "the model has parameters": problem.learns,
        "the model subsamples": bool(problem.subsampled),
        "its data are many": problem.runs.dear,
        "the guide grows": getattr(guide, "grows", False),
        "the guide's centring is given": isinstance(guide.centring_given, dict),
        "the guide has no affine layer": not isinstance(guide.affine, Affine),
        "the latents are many": guide.latent_dim > WIDEST_WARM_START,
        "the guide has transforms of others": not all(isinstance(t, Bijection) for t in layers),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _form(guide: AutoFlow) -> list[object]:
    """What guides that are fitted side by side have in common, beside the sizes of their layers."""
    base = guide.flow.base
    buffers = {n: b.tolist() for n, b in base.named_buffers()}
    parts: list[object] = [guide.centring_given, type(base), buffers]
    for t in guide.flow.transforms():
        activation = getattr(t, "activation", None)
        options = {n: v for n, v in vars(t).items() if isinstance(v, str | int | float)}
        parts += [type(t), options, type(activation), getattr(activation, "negative_slope", None)]
    return parts


def _started(
    log_joint: LogJointOfData, start: Tensor, guides: Sequence[AutoFlow]
) -> tuple[FlowsTogether, Tensor]:
    """The guides' flows at their best Gaussians, and whether each has a sound one."""
    loc, scale, bound = best_starts(log_joint, start)
    sound = bound.isfinite()
    identity = torch.eye(start.shape[1], dtype=start.dtype, device=start.device)
    loc = loc.where(sound[:, None], start)
    scale = scale.where(sound[:, None, None], identity)
    for guide, *place in zip(guides, loc, scale, strict=True):
        initialize(guide, Gaussian(*place, 0.0))
    flows = FlowsTogether([guide.flow for guide in guides])
    with torch.no_grad():
        x = flows.draw(1)
        found = flows().log_prob(x)[0]
        alone = [guide.flow().log_prob(own) for guide, own in zip(guides, x[0], strict=True)]
    if not agree(found, torch.stack(alone)):
        raise ValueError("make_guide returns guides of several forms")
    return flows, sound
