"""A flow guide fitted to the log joint of its model: the fast way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.distributions import TransformedDistribution
from torch import Tensor
from tqdm.auto import tqdm

from pyroflow.flows import draw_from, log_prob_at_fixed
from pyroflow.guides import AutoFlow
from pyroflow.inference.annealing import AdaptiveAnnealing
from pyroflow.inference.checkpoint import check_settings, saved_settings
from pyroflow.inference.fit import Fit, trainable
from pyroflow.inference.gaussian_start import TICKS, Gaussian, best_gaussian
from pyroflow.inference.objectives import bound_loss, bound_scores, cut_loss
from pyroflow.inference.stop_rule import StopRule
from pyroflow.inference.traced_guide import (
    FLOW,
    GAUSSIAN,
    GAUSSIAN_PART,
    GROWN,
    ONE_BY_ONE,
    has_path,
    layers_inside,
    path_derivative,
    warn_of_mixing,
)
from pyroflow.inference.trainer import Loop
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw
from pyroflow.model.log_joint import LogJoint
from pyroflow.seeds import between_draws, drawing, quick, seeded

STEPS, PARTICLES = 3000, 128
SCORED = 2048  # draws on which states are compared
EVALUATIONS = 25  # of those scores
WINDOW = 800  # steps that the loss must have been flat; the noise of a bound hides slow gains
WIDEST_WARM_START = 256  # latents, beyond which the Hessians cost more than they save
MOMENT_DRAWS = 4096
LEAST_GAIN = 0.02  # nats, that more layers must have brought
DEEPEST = 64

Annealing = Callable[[int], float] | AdaptiveAnnealing | None


class FlowFit:
    """The fit of one guide; see :func:`~pyroflow.fit_guide` for the options."""

    def __init__(
        self,
        problem: BoundModel,
        *,
        steps: int | None,
        num_particles: int | None,
        objective: str,
        group_size: int,
        annealing: Annealing,
        warm_start: bool,
        early_stop: bool,
        checkpoint: str | Path | None,
        settings: dict[str, Any],
        seed: int | None,
        **shared: Any,
    ) -> None:
        self.problem, self.guide = problem, problem.guide
        # Of what comes before the first step: with much data it takes minutes.
        self.bar = tqdm(total=TICKS, desc="fit_guide, start", disable=not shared["progress"])
        self.log_joint = LogJoint(problem, self.guide, num_particles or PARTICLES)
        costly = self.log_joint.one_by_one
        if costly and num_particles is None:
            self.log_joint.num = _in_groups(ONE_BY_ONE["particles"], group_size)
        self.num_particles = self.log_joint.num
        self.scored = _in_groups(ONE_BY_ONE["scored"] if costly else SCORED, group_size)
        self.evaluations = 10 if costly else EVALUATIONS
        warm_start = warm_start and not costly
        self.objective, self.group_size, self.annealing = objective, group_size, annealing
        self.warm_start, self.steps = warm_start, steps or STEPS
        self.spent = 0  # of the steps, on the affine layer alone
        self.early_stop = early_stop and annealing is None
        self.checkpoint, self.shared = checkpoint, shared
        self.saved = saved_settings(checkpoint)
        self.part = self.saved.get("part")  # that was cut off
        self.settings = settings | {"objective": objective, "group_size": group_size}
        self.settings |= {"num_particles": self.num_particles, "early_stop": self.early_stop}
        self.settings["steps in all"] = self.steps
        self.path = objective != "iwae" and has_path(self.guide)
        self.skipped = torch.zeros((), dtype=torch.long, device="cpu")
        self.scored_draws = quick(self._draw)
        drawn = int(torch.randint(2**31, (), device="cpu")) if seed is None else seed
        self.scored_seed = drawn
        used = isinstance(annealing, AdaptiveAnnealing) and annealing.steps > 0
        if used and self.part in (None, GAUSSIAN):
            raise ValueError(
                "annealing is an AdaptiveAnnealing that another fit has used, and is at its end: "
                "pass a new one"
            )

    @between_draws()
    def run(self) -> Fit:
        """Place the guide, train it, and grow it if it is to grow."""
        untouched, before = _untouched(self.guide), None
        if self.saved:
            check_settings(self.checkpoint, self.saved, self.settings)
        self.guide.flow.fitted = True
        if self.part in (FLOW, GROWN):
            self.spent = self.steps - self.saved["steps"]
            if self.part == GROWN:
                self._grow_to(self.saved["num_layers"])
        elif untouched or self.part == GAUSSIAN:
            before = self._place()
        part = GROWN if self.part == GROWN else FLOW
        fit, gain = self._train(before, part, resume=self.part == part)
        while self._may_grow() and gain >= LEAST_GAIN:
            with drawing():
                self.guide.grow(min(self.guide.num_layers, DEEPEST - self.guide.num_layers))
            fit, gain = self._train(fit, GROWN, resume=False)
        with seeded(0), torch.no_grad():
            warn_of_mixing(self.log_joint.differs(self.guide.get_posterior().sample((3,))))
        return replace(fit, skipped_particles=int(self.skipped))

    def _place(self) -> Fit | None:
        """Set the affine layer to the best Gaussian, found without training or with it."""
        guide = self.guide
        if guide.affine is None:
            return None
        fresh = self.part is None
        if fresh and self.warm_start and guide.latent_dim <= WIDEST_WARM_START:
            found = best_gaussian(self.log_joint, guide._init_loc(), self.bar)
            if found is not None:
                place(guide, found)
                return None
            refuse_nonfinite(self.problem)
        inner = layers_inside(guide)
        if not inner:
            return None
        gaussian = [p for p in guide.affine.parameters() if p.requires_grad]
        self.spent = max(1, round(GAUSSIAN_PART * self.steps))
        options = {"steps": self.spent, "settings": self.settings | {"part": GAUSSIAN}}
        options |= {"label": "fit_guide, Gaussian", "checkpoint": self.checkpoint, **self.shared}
        options["fixed"] = [*guide.buffers(), self.skipped]
        fit = self._run(Loop(gaussian, lambda step: self._loss(1.0), self._score, **options))
        guide.affine.recentre()
        return fit

    def _train(self, before: Fit | None, part: str, *, resume: bool) -> tuple[Fit, float]:
        """Train all parameters; return the fit, and by how much it bettered the one before."""
        guide = self.guide
        settings = self.settings | {"num_layers": getattr(guide, "num_layers", None), "part": part}
        if part == GROWN:
            self.annealing = None  # the flow has found its modes
        adaptive = isinstance(self.annealing, AdaptiveAnnealing)
        loop = Loop(
            trainable(guide),
            lambda step: self._loss(self._beta(step), adapt=adaptive),
            self._score,
            fixed=[*guide.buffers(), self.skipped],
            before=before,
            steps=self.steps - self.spent,
            label="fit_guide",
            checkpoint=self.checkpoint,
            settings=settings,
            stop_rule=StopRule(window=WINDOW) if self.early_stop else None,
            evaluations=self.evaluations,
            stateful=[self.annealing] if adaptive else [],
            resume=resume,
            **self.shared,
        )
        fit = self._run(loop)
        return fit, loop.before["best_loss"] - fit.best_loss if loop.before else math.inf

    def _run(self, loop: Loop) -> Fit:
        self.bar.leave = self.bar.n > 0  # nothing is left of one that was not needed
        self.bar.close()
        # Validation of every distribution would cost as much as the rest of a step.
        with pyro.validation_enabled(False), path_derivative(self.guide, self.path):
            return loop.run()

    def _beta(self, step: int) -> float:
        if isinstance(self.annealing, AdaptiveAnnealing):
            return self.annealing.beta
        return 1.0 if self.annealing is None else self.annealing(step)

    def _loss(self, beta: float, *, adapt: bool = False) -> Tensor:
        q, z = self._draw(self.num_particles)
        log_p = self.log_joint(z)
        if adapt:
            self.annealing.update(log_p)
        log_weights = beta * log_p - q.log_prob(z)

        lost = int((~log_weights.isfinite()).sum())
        if not lost:
            return bound_loss(log_weights, self.objective, self.group_size)
        self.skipped += lost
        log_q = log_prob_at_fixed(q, z)
        options = self.objective, self.group_size, z, log_q
        return cut_loss(log_weights, *options, path=self.path or self.objective == "dreg")

    def _draw(self, num: int) -> tuple[TransformedDistribution, Tensor]:
        q = self.guide.get_posterior()
        return q, draw_from(q, (num,))

    def _score(self) -> Tensor:
        """The loss on fixed draws."""
        with seeded(self.scored_seed), between_draws():
            q, z = self.scored_draws(self.scored)
        log_weights = self.log_joint.values(z) - q.log_prob(z)
        return bound_scores(log_weights, 1 if self.objective == "elbo" else self.group_size)

    def _may_grow(self) -> bool:
        return getattr(self.guide, "grows", False) and self.guide.num_layers < DEEPEST

    def _grow_to(self, num_layers: int) -> None:
        """A fit that is resumed may have grown before it was cut off."""
        if getattr(self.guide, "grows", False) and num_layers > self.guide.num_layers:
            with drawing():
                self.guide.grow(num_layers - self.guide.num_layers)


def refuse_nonfinite(problem: BoundModel) -> None:
    """Say at which sites the density of 32 draws is never finite, if that is so.

    Raises:
        ValueError: it is so.
    """
    with seeded(0), pyro.validation_enabled(False):
        draws = draw(problem, 32)
    if not bool(draws.log_weights.isfinite().any()):
        sites = ", ".join(repr(name) for name in draws.nonfinite) or "its sites together"
        raise ValueError(
            "the model's log density is not finite where the guide starts nor near it: look at "
            f"{sites}. Mend the model or its data there, or let the guide start elsewhere by "
            "init_loc_fn"
        )


def _in_groups(num: int, group_size: int) -> int:
    return max(1, num // group_size) * group_size


@torch.no_grad()
def place(guide: AutoFlow, gaussian: Gaussian) -> None:
    """Set the affine layer so that the guide has the Gaussian's mean and covariance.

    Layers that are not the identity at the start are made up for by their moments; a Student-t
    base keeps its wider tails around the Gaussian.
    """
    loc, scale, affine = gaussian.loc, gaussian.scale, guide.affine
    if affine.diagonal:  # the optimum without correlations has the precision's diagonal
        scale = (torch.cholesky_inverse(scale).diagonal()).rsqrt()
    with seeded(0):
        base = guide.get_base_dist().sample((MOMENT_DRAWS,))
    x = base
    for t in guide.get_transforms()[:-1]:
        x = t(x)
    if layers_inside(guide) and not torch.allclose(x, base, atol=1e-5):
        factor = torch.linalg.cholesky(torch.cov(x.T).reshape(len(loc), len(loc)))
        if affine.diagonal:
            scale = scale / x.std(0)
            loc = loc - scale * x.mean(0)
        else:
            scale = torch.linalg.solve_triangular(factor, scale, upper=False, left=False)
            loc = loc - scale @ x.mean(0)
    affine.start_from(loc, scale)


def _untouched(guide: AutoFlow) -> bool:
    """Whether the affine layer, if there is one, is still where the guide's set-up put it."""
    if guide.affine is None:
        return True
    offset, _, *lower = guide.affine.trained()
    placed = bool(guide.affine.centre.any())
    return not placed and torch.equal(offset, guide._init_loc()) and not any(t.any() for t in lower)
