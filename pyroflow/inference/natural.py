"""Natural gradients: the last steps of a bound whose flow has few parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Normal, Transform, TransformedDistribution

from pyroflow.flows import AlongPath, log_prob_at_fixed
from pyroflow.guides import AmortizedPlanarGuide, AutoStructuredFlow
from pyroflow.inference.fit import copy_tensors
from pyroflow.inference.objectives import LogJointBound, bound_scores, cut_loss
from pyroflow.inference.phases import Phase
from pyroflow.seeds import drawing, quick
from pyroflow.transforms import Bijection

if TYPE_CHECKING:
    from pyroflow.inference.schedule import Annealing
    from pyroflow.inference.trace_bound import TraceBound
    from pyroflow.inference.trainer import Trainer

PART, MOST_STEPS = 15, 100  # one for so many steps in all, and the most
MOST_PARAMETERS = 1024  # whose matrix is solved in every step
DRAWS = 4096  # of a step; the gradients of one half are taken one by one
FORGET = 0.5  # the share of a step's own rows in the matrix
DAMPING, LEAST_DAMPING, MOST_DAMPING = 1e-2, 1e-3, 1e4  # at first, and ever
RAISED, EASED = 10.0, 1.5  # by which a step that is taken back, or kept, changes it
TRUST = 0.05  # nats, twice the divergence that a step may cover
CLEARLY = 3.0  # standard errors, by which a step must not have raised the loss
SCORED_EVERY = 5  # steps
EVEN = 0.02  # variance of log weights that are nearly equal
COOL = 1 / 3  # the last part of the steps, which get shorter


class Natural(Phase):
    r"""θ ← θ − (M + λ diag M)⁻¹ g for a bound E_q[log p − log q], from the best state so far.

    g is the bound's negative gradient along the paths of the draws z = T_θ(ε), with ε from
    quasi-random numbers where the base is normal. M is the covariance of the draws' own gradients
    ∇_θ (log q(z) − log p(z)): where q = p the Fisher information, and the step a natural gradient
    step. A step that clearly raises the loss is taken back, and λ raised tenfold; it falls slowly
    again.

    References:
        Amari, Natural gradient works efficiently in learning, 1998; Martens, New insights and
        perspectives on the natural gradient method, 2020, https://arxiv.org/abs/1412.1193;
        Buchholz, Wenzel and Mandt, Quasi-Monte Carlo variational inference, 2018,
        https://arxiv.org/abs/1807.01604.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.parameters = trainer, trainer.parameters
        self.steps = trainer.total - trainer.schedule.steps
        self.distribution, log_density = trainer.objective.natural
        self.log_density = quick(log_density)
        (dim,) = self.distribution().event_shape
        sobol = torch.quasirandom.SobolEngine(dim, scramble=True, seed=0)
        self.points = sobol.draw(DRAWS, dtype=torch.float64)
        self.taken, self.damping, self.over = 0, DAMPING, False
        self.matrix = self.gradient = self.flat = torch.empty(0, dtype=torch.float64, device="cpu")
        self.loss, self.error = math.inf, 0.0
        if not trainer.state.polishing:
            copy_tensors(trainer.state.best, self.parameters)
            trainer.state.average, trainer.state.polishing = [], True

    def step(self) -> None:
        """Look at where the last step led, and take one from there or from where it began."""
        trainer, state = self.trainer, self.trainer.state
        x = self._draws()
        x = x[trainer.objective.processes.share(len(x))]
        losses, gradient, slope = self._along_path(x)
        loss, error = losses.mean().item(), losses.std().item() / len(losses) ** 0.5
        kept = loss <= self.loss + CLEARLY * self.error
        if kept:
            self.flat, self.gradient = self._flat(), gradient
            self.loss, self.error = min((self.loss, self.error), (loss, error))
            self.damping = max(self.damping / EASED, LEAST_DAMPING)
            self._learn(x, slope)
        else:
            self.damping *= RAISED
        self.over = not len(self.flat)
        if self.over:  # no draw has a finite weight
            return
        self.taken += 1
        state.step += 1
        state.losses.append(loss if kept else self.loss)
        self.over = self.taken >= self.steps or self.damping > MOST_DAMPING
        self._move()
        if self.taken % SCORED_EVERY == 0 or self.over:
            trainer.evaluate()

    def better(self, score: Tensor, best: Tensor) -> bool:
        """Whether the bound is better, or by chance alone not, as log weights vary by half.

        The best state falls short by about half the variance of its log weights, if that is small.
        """
        if not best.var() < EVEN:
            return super().better(score, best)
        excess = score - best
        noise = 2 * excess.std() / len(excess) ** 0.5
        tied = excess.mean() < torch.minimum(noise, best.var() / 2)
        return bool(excess.mean() < 0 or (tied and 2 * score.std() < best.std()))

    def state_dict(self) -> dict[str, Any]:
        """The state as plain values and tensors."""
        names = ("taken", "damping", "over", "matrix", "gradient", "flat", "loss", "error")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        vars(self).update(state)

    def _draws(self) -> Tensor:
        """Draws of the base, shape (DRAWS, D): of points that a random shift moves, mod 1."""
        base = self.distribution().base_dist
        normal = getattr(base, "base_dist", None)
        with drawing():
            if not isinstance(normal, Normal):
                return base.rsample((DRAWS,))
            shift = torch.rand(self.points.shape[1], dtype=torch.float64, device="cpu")
        u = ((self.points + shift) % 1).clamp(1e-9, 1 - 1e-9)
        return normal.loc + normal.scale * torch.special.ndtri(u).to(normal.loc)

    def _along_path(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The losses log q − log p of all draws, the gradient of their mean, ∇ log p at z(x)."""
        ours, q = self.trainer.objective.processes, self.distribution()
        z, _ = _forward(q.transforms, x)
        at = z.detach().requires_grad_()
        log_p = self.log_density(at)
        (slope,) = torch.autograd.grad(log_p.sum(), at)
        along = ((z - at.detach()) * slope.nan_to_num()).sum(-1)
        log_weights = log_p.detach() + along - AlongPath(q.base_dist, q.transforms).log_prob(z)
        if bool(log_weights.isfinite().all()):
            loss = -log_weights.mean()
        else:
            loss = cut_loss(log_weights, "elbo", 1, z, log_prob_at_fixed(q, z), path=True)
        mean = ours.weighted(loss, DRAWS)
        found = torch.autograd.grad(mean, self.parameters, materialize_grads=True)
        gradient = ours.total(torch.cat([g.flatten() for g in found])).cpu().double() / ours.count
        losses = bound_scores(ours.joined(log_weights.detach()).cpu())
        return losses.double(), gradient, slope

    def _learn(self, x: Tensor, slope: Tensor) -> None:
        """Take the covariance of the gradients of single draws, one half of x, into the matrix."""
        ours, first = self.trainer.objective.processes, slice(-(len(x) // -2))
        inside = slope[first].isfinite().all(-1)
        rows = self._rows(x[first][inside], slope[first][inside])
        num = ours.total(len(rows))
        rows = rows - ours.total(rows.sum(0)) / num
        found = ours.total(rows.mT @ rows).cpu().double() / num
        self.matrix = torch.lerp(self.matrix, found, FORGET) if len(self.matrix) else found

    def _rows(self, x: Tensor, slope: Tensor) -> Tensor:
        """The gradient of log q(z) − log p(z) of each draw, shape (S, P): each has parameters."""
        own, transforms = {}, []
        for t in self.distribution().transforms:
            given = t.trained()
            for p in given:
                own[id(p)] = p.detach().expand(len(x), *p.shape).clone().requires_grad_()
            transforms.append(t.at(*(own[id(p)] for p in given)))
        z, log_det = _forward(transforms, x)
        losses = -log_det - (z * slope).sum(-1)
        leaves = [own[id(p)] for p in self.parameters]
        found = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
        return torch.cat([g.reshape(len(x), -1) for g in found], 1)

    def _move(self) -> None:
        diagonal = self.matrix.diagonal()
        damped = self.matrix + self.damping * (diagonal + 1e-6 * diagonal.mean()).diag()
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            self.over = True
            return
        step = torch.cholesky_solve(self.gradient.unsqueeze(-1), factor).squeeze(-1)
        length = min(1.0, (1 - (self.taken - 1) / self.steps) / COOL)
        covered = (step @ self.matrix @ step).item() * length**2
        length *= min(1.0, math.sqrt(TRUST / covered)) if covered > 0 else 1.0
        sizes = [p.numel() for p in self.parameters]
        parts = zip((self.flat - length * step).split(sizes), self.parameters, strict=True)
        copy_tensors([part.view_as(p) for part, p in parts], self.parameters)

    def _flat(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters]).cpu().double()


def _forward(transforms: Sequence[Transform], x: Tensor) -> tuple[Tensor, Tensor]:
    """The image z of x, and log |det dz/dx|."""
    log_det = x.new_zeros(len(x))
    for t in transforms:
        x, step = t.forward_and_log_det(x)
        log_det = log_det + step
    return x, log_det


def natural_steps(bound: LogJointBound | TraceBound, steps: int, annealing: Annealing) -> int:
    """How many of so many steps of a guide's fit are natural gradient steps.

    Each takes as many draws as 32 of Adam's: too many where a draw is dear.
    """
    if not isinstance(bound, LogJointBound) or bound.objective != "elbo" or annealing is not None:
        return 0
    by_rows = isinstance(bound.guide, AutoStructuredFlow | AmortizedPlanarGuide)
    if by_rows or bound.log_joint.one_by_one or bound.problem.runs.dear:
        return 0
    with torch.no_grad():
        return steps_within(bound.distribution(), bound.parameters(), steps)


def steps_within(q: TransformedDistribution, parameters: Sequence[Tensor], steps: int) -> int:
    """The same of a flow's; 0 where q allows none.

    q must consist of pyroflow's own layers, each once, that hold the parameters, and these be few.
    """
    if q.batch_shape or not all(isinstance(t, Bijection) for t in q.transforms):
        return 0
    within = [id(p) for t in q.transforms for p in t.trained() if p.requires_grad]
    many = sum(p.numel() for p in parameters) > MOST_PARAMETERS
    if many or sorted(within) != sorted(map(id, parameters)):
        return 0
    return min(steps // PART, MOST_STEPS)
