"""The bounds that a flow is trained on: of log weights, and of a guide by its model's log joint."""

from __future__ import annotations

import math
from functools import partial

import torch
from pyro.distributions import TransformedDistribution
from torch import Tensor

from pyroflow.flows import draw_from, log_prob_at_fixed
from pyroflow.guides import AutoStructuredFlow
from pyroflow.inference.fit import has_path, trainable
from pyroflow.inference.processes import ALONE, Processes
from pyroflow.inference.schedule import AdaptiveAnnealing
from pyroflow.model.at_hand import Subsampling
from pyroflow.model.bound import BoundModel
from pyroflow.model.log_joint import LogJoint
from pyroflow.seeds import fixed_draws, seeded

OBJECTIVES = ("elbo", "iwae", "dreg")
NEIGHBOURS = 8  # among the draws inside, that a lost one is likened to
LOST = 1.0  # what log q(A) counts beyond its part in the bound, see cut_loss

# Nats that a fit may leave, of each of many numbers and of them together, and by which the log
# weight of a draw may then be off the mean.
LEFT, LEFT_EACH, LEFT_AT_MOST, FARTHEST = 0.002, 1e-5, 0.01, 1.0

# Draws of a step by default, and fixed draws on which states are compared.
DRAWS, SCORED = 128, 2048
DRAWS_ONE_BY_ONE = SCORED_ONE_BY_ONE = 16  # where each draw takes a run of the model
DRAWS_DEAR, SCORED_DEAR = 16, 128  # the fewest where it is of many rows


def bound_loss(log_weights: Tensor, objective: str, group_size: int) -> Tensor:
    r"""The negative bound of S finite log weights log p − log q.

    "elbo" is their mean; "iwae" the importance-weighted bound, log of the mean weight of each
    group, averaged over the groups; "dreg" the same value with the doubly reparametrised gradient
    Σ w² ∇ log w, weights w normalised in each group, for log weights that are differentiated
    along the path of the draws alone.

    References:
        Burda, Grosse and Salakhutdinov, Importance weighted autoencoders, 2016, equation 8,
        https://arxiv.org/abs/1509.00519; Tucker, Lawson, Gu and Maddison, Doubly reparameterized
        gradient estimators, 2019, equation 8, https://arxiv.org/abs/1810.04152.

    Args:
        log_weights: shape (S,); −inf beside another weight of its group is a weight of zero.
        objective: "elbo", "iwae" or "dreg".
        group_size: draws behind each importance-weighted bound; divides S.

    Example:
        >>> bound_loss(torch.tensor([1.0, 3.0]), "elbo", 1)
        tensor(-2.)
    """
    if objective == "elbo":
        return -log_weights.mean()
    grouped = log_weights.reshape(-1, group_size)
    bound = math.log(group_size) - grouped.logsumexp(1).mean()
    if objective == "iwae":
        return bound
    weights = grouped.detach().softmax(1)
    surrogate = -(weights.square() * grouped.masked_fill(weights == 0, 0.0)).sum(1).mean()
    return bound.detach() + surrogate - surrogate.detach()


def cut_loss(
    log_weights: Tensor,
    objective: str,
    group_size: int,
    z: Tensor,
    log_q: Tensor | None,
    *,
    path: bool,
) -> Tensor:
    r"""The negative bound of a guide that is cut to A, where its log weights are finite.

    Outside A the model's density is zero or NaN. Cut to A the guide is q/q(A), with the bound
    E_{q|A}[log p − log q] + log q(A). It can be best where A is q's far tail and nearly all draws
    are lost, so log q(A) counts twice: once for the bound and once for the draws lost. A group of
    draws is in A if one of them is, in the bound.

    Args:
        log_weights: shape (S,).
        objective: as in :func:`bound_loss`.
        group_size: as in :func:`bound_loss`.
        z: the draws, shape (S, D).
        log_q: log q at the draws held fixed, shape (S,), of which the gradient counts. None where
            it is not to be had: the loss then has no gradient for what is lost.
        path: whether ``log_weights`` are differentiated along the path of the draws alone.

    Returns:
        The loss; not finite where no draw is in A.
    """
    size = 1 if objective == "elbo" else group_size
    grouped = _zero_weights(log_weights, size)
    alive = grouped.isfinite().any(1)
    loss = bound_loss(grouped[alive].flatten(), objective, size) - _log_share(grouped)
    if log_q is None or not bool(alive.any()):
        return loss
    jump = (edge_factors(log_weights.detach(), size, z.detach(), path=path) * log_q).sum()
    return loss - jump + jump.detach()


@torch.no_grad()
def edge_factors(log_weights: Tensor, group_size: int, z: Tensor, *, path: bool) -> Tensor:
    """What ∇ log q of each draw counts in the gradient of a bound that is cut to A.

    The path of a draw knows nothing of the jump at the edge of A. Moving mass across it gains what
    a lost draw would gain inside, with the mean log weight of its nearest neighbours there.

    Args:
        log_weights: shape (S,).
        group_size: 1 for the plain bound.
        z: the draws, shape (S, D).
        path: whether ∇ log q counts nothing in ``log_weights``, and not minus their weight.

    Returns:
        Shape (S,), with sum zero.
    """
    inside = log_weights.isfinite()
    grouped = _zero_weights(log_weights, group_size)
    total = grouped.logsumexp(1, keepdim=True)
    alive = total.isfinite()
    units = z / z[inside].std(0, unbiased=False).clamp(min=torch.finfo(z.dtype).tiny)
    distances = torch.cdist(units[~inside], units[inside])
    nearest = distances.topk(min(NEIGHBOURS, distances.shape[1]), largest=False).indices
    weight = torch.full_like(log_weights, -torch.inf)
    weight[~inside] = log_weights[inside][nearest].mean(1)
    weight = weight.reshape(grouped.shape)
    after = torch.logaddexp(total, weight)
    gain = torch.where(alive, after - total, after - total[alive].mean() + 1)
    gain = gain - (weight - after).exp() if path else gain
    gain = gain.flatten() / alive.sum() + LOST / inside.sum()
    gain = gain.masked_fill(inside, 0.0)
    return gain.mean() - gain


def _zero_weights(log_weights: Tensor, group_size: int) -> Tensor:
    lost = ~log_weights.isfinite()
    return log_weights.masked_fill(lost, -torch.inf).reshape(-1, group_size)


def bound_scores(log_weights: Tensor, group_size: int = 1) -> Tensor:
    """One number for each group of S log weights, whose mean is :func:`cut_loss`.

    They are ∞ if no log weight is finite. A group of 1 is for the plain bound.
    """
    grouped = _zero_weights(log_weights, group_size)
    scores = math.log(group_size) - grouped.logsumexp(1)
    alive = scores.isfinite()
    if not bool(alive.any()):
        return torch.full_like(scores, torch.inf)
    return torch.where(alive, scores, scores[alive].mean()) - _log_share(grouped)


def mean_scores(log_weights: Tensor) -> Tensor:
    """The mean of :func:`bound_scores`, in groups of 1, of each column of (S, C); ∞ if all lost."""
    inside = log_weights.isfinite()
    share = inside.to(log_weights).mean(0)
    mean = log_weights.where(inside, 0.0).sum(0) / inside.sum(0)
    return (-mean - (1 + LOST) * share.log()).nan_to_num(torch.inf, torch.inf)


def nothing_left(scores: Tensor, dim: int = 1) -> str:
    """Why a fit may end with these negative log weights, shape (S,); empty while it may not.

    The mean of log weights falls short of the log of their mean by KL(q ‖ p), and no draw has a
    weight that is far from the others'. Among ``dim`` numbers of rows errors add up.
    """
    left = max(LEFT, min(LEFT_EACH * dim, LEFT_AT_MOST))
    log_weights = -scores
    mean = log_weights.mean()
    gap = log_weights.logsumexp(0) - math.log(len(scores)) - mean
    if not (gap <= left and (log_weights - mean).abs().max() <= FARTHEST):
        return ""
    return f"nothing is left to gain: the weights are equal but for {max(gap.item(), 0.0):.1g} nats"


def _log_share(grouped: Tensor) -> Tensor:
    """Log q(A) for the bound, of groups, and once more, of draws, for what is lost."""
    inside = grouped.isfinite()
    groups, draws = inside.any(1).to(grouped).mean(), inside.to(grouped).mean()
    return groups.log() + LOST * draws.log()


class LogJointBound:
    """The bound of a guide by the log joint of its model as a plain function: the fast way.

    It needs a guide of the AutoFlow family, and a model without parameters and subsampled plates.
    ``seed`` is that of the draws on which states are compared.
    """

    keep_last = False
    cut = False  # whether the last score left draws out
    slower = 1.0  # than others it learns, as rows at random make gradients of globals noisy

    def __init__(
        self,
        problem: BoundModel,
        objective: str,
        group_size: int,
        num_particles: int | None,
        *,
        seed: int | None,
        processes: Processes = ALONE,
    ) -> None:
        self.problem, self.guide, self.processes = problem, problem.guide, processes
        self.objective, self.group_size = objective, group_size
        self.together = 1 if objective == "elbo" else group_size  # draws that no share divides
        at = problem.args, problem.kwargs
        self.guide.find_coordinates(*at, Subsampling.of(problem.model_trace))
        draws, scored = map(self._in_groups, self._sizes())
        self.num_particles = num_particles or draws
        own = partial(processes.most, unit=self.together)
        self.log_joint = self._make_log_joint(own(self.num_particles))
        costly = self.log_joint.one_by_one
        if costly and num_particles is None:
            self.num_particles = self._in_groups(DRAWS_ONE_BY_ONE)
            self.log_joint.num = own(self.num_particles)
        self.scored = self._in_groups(SCORED_ONE_BY_ONE) if costly else scored
        self.evaluations = problem.runs.few(10 if costly else 25, 8)
        self.path = objective != "iwae" and has_path(self.guide)
        self.skipped = torch.zeros((), dtype=torch.long, device="cpu")
        drawn = int(torch.randint(2**31, (), device="cpu")) if seed is None else seed
        self._draw_fixed = fixed_draws(drawn, lambda: self._draw(self.scored))

    def _in_groups(self, num: int) -> int:
        return max(1, num // self.group_size) * self.group_size

    def _sizes(self) -> tuple[int, int]:
        """Draws of a step, and fixed draws."""
        few = partial(self.problem.runs.few, rows=isinstance(self.guide, AutoStructuredFlow))
        return few(DRAWS, DRAWS_DEAR), few(SCORED, SCORED_DEAR)

    def _make_log_joint(self, num: int) -> LogJoint:
        return LogJoint(self.problem, self.guide, num)

    def distribution(self) -> TransformedDistribution:
        """The guide's, over the coordinates of its flow."""
        return self.guide.over_coordinates(*self.problem.args, **self.problem.kwargs)

    def _draw(self, num: int) -> tuple[TransformedDistribution, Tensor]:
        q = self.distribution()
        return q, self._drawn(q, num)

    def _drawn(self, q: TransformedDistribution, num: int) -> Tensor:
        return draw_from(q, (num,), self.processes.share(num, self.together))

    def _step(self) -> tuple[TransformedDistribution, Tensor, Tensor]:
        """The guide's distribution, draws of it, and their log joint."""
        q, z = self._draw(self.num_particles)
        return q, z, self.log_joint(z)

    def parameters(self) -> list[Tensor]:
        """All that is trained."""
        return trainable(self.guide)

    def buffers(self) -> list[Tensor]:
        """What a checkpoint restores beside it."""
        return [*self.guide.buffers(), self.skipped]

    def loss(self, beta: float, annealing: AdaptiveAnnealing | None = None) -> Tensor:
        """The loss of fresh draws, or of this process's share, with weight β of the log joint."""
        q, z, log_p = self._step()
        if annealing is not None:
            annealing.update(self.processes.joined(log_p))
        log_weights = beta * log_p - q.log_prob(z)
        lost = int((~log_weights.isfinite()).sum())
        self.skipped += self.processes.total(lost)
        if lost:
            log_q = log_prob_at_fixed(q, z)
            cut = cut_loss(log_weights, self.objective, self.group_size, z, log_q, path=self.path)
            return self._weighted(cut)
        return self._weighted(bound_loss(log_weights, self.objective, self.group_size))

    def _weighted(self, loss: Tensor) -> Tensor:
        return self.processes.weighted(loss, self.num_particles, self.together)

    def steady(self, beta: Tensor) -> Tensor:
        """The same where no draw is lost, else NaN, without a look at the draws."""
        q, z = self._draw(self.num_particles)
        log_weights = beta * self.log_joint(z) - q.log_prob(z)
        loss = bound_loss(log_weights, self.objective, self.group_size)
        return loss.where(log_weights.isfinite().all(), torch.nan)

    def score(self) -> Tensor:
        """The loss on fixed draws."""
        q, z = self._draw_fixed()
        log_weights = self.processes.joined(self.log_joint.values(z) - q.log_prob(z))
        self.cut = not bool(log_weights.isfinite().all())
        return bound_scores(log_weights, self.together)

    @torch.no_grad()
    def mixing(self) -> str | None:
        """Where draws that run side by side differ from runs alone, at the fitted guide's own."""
        with seeded(0):
            return self.log_joint.differs(self.distribution().sample((3,)))
