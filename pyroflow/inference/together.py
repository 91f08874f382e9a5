"""The guides of many data sets, fitted side by side: one flow whose tensors are stacked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroflow.flows import AlongPath, Flow, draw_from, log_prob_at_fixed
from pyroflow.inference.fit import copy_tensors
from pyroflow.inference.objectives import cut_loss, mean_scores
from pyroflow.inference.phases import ROLLED_BACK_AFTER
from pyroflow.inference.row_adam import RowAdam
from pyroflow.inference.schedule import LearningRateSchedule
from pyroflow.model.log_joint_of_data import LogJointOfData
from pyroflow.seeds import between_draws
from pyroflow.transforms.bijection import Conditioned

SCORED = 512  # fixed draws on which states are compared
EVALUATIONS = 12  # of states
AT_ONCE = 2**18  # numbers of fixed draws


class FlowsTogether:
    """M flows of one form as a single one with the batch shape M.

    Args:
        flows: of pyroflow's own layers, all that is in a flow alike but for the numbers.

    Attributes:
        trained: the stacked tensors that are trained, shape (M, *) each.
    """

    def __init__(self, flows: Sequence[Flow]) -> None:
        first, self.trained, stacks = flows[0], [], []
        for own in zip(*(flow.transforms() for flow in flows), strict=True):
            stacked = {}
            for name in own[0].event_dims:
                each = [getattr(t, name) for t in own]
                stacked[name] = torch.stack([t.detach() for t in each])
                if isinstance(each[0], nn.Parameter) and each[0].requires_grad:
                    self.trained.append(stacked[name].requires_grad_())
            stacks.append(Conditioned(own[0], stacked))
        self.transforms, self.base = stacks, first.base()

    def __call__(self) -> AlongPath:
        """The distribution, of batch shape (M,), scored along the path of a draw."""
        return AlongPath(self.base, self.transforms)

    def draw(self, num: int) -> Tensor:
        """Draws of each, shape (num, M, D)."""
        return draw_from(self(), (num,))


def train(
    flows: FlowsTogether, log_joint: LogJointOfData, steps: int, num_particles: int, lr: float
) -> Tensor:
    """Train M flows by as many bounds at once, each as :class:`Trainer` would.

    All end in the states with the best bounds on fixed draws. A gradient that is not finite counts
    as zero, for its own flow alone.

    Args:
        flows: where they start.
        log_joint: of the data set of each.
        steps: of Adam.
        num_particles: draws of a step.
        lr: highest learning rate.

    Returns:
        The negative bounds in the end, shape (M,); ∞ where many gradients in a row were not finite.
    """
    return _Training(flows, log_joint, LearningRateSchedule(steps), num_particles, lr).run()


class _Training:
    def __init__(
        self,
        flows: FlowsTogether,
        log_joint: LogJointOfData,
        schedule: LearningRateSchedule,
        num_particles: int,
        lr: float,
    ) -> None:
        self.flows, self.log_joint, self.schedule = flows, log_joint, schedule
        self.parameters, self.num, self.lr = flows.trained, num_particles, lr
        self.q = flows()
        with between_draws():
            self.fixed = draw_from(type(self.q)(self.q.base_dist, []), (SCORED,))
        self.best, self.average, self.averaged = [], [], 0
        self.scores = self.fixed.new_full(self.q.batch_shape, torch.inf)
        fused = {p.device.type for p in self.parameters} <= {"cpu", "cuda"}
        self.adam = RowAdam(self.parameters, lr=lr, fused=fused)
        self.lost = torch.zeros_like(self.scores, dtype=torch.long)

    @between_draws()
    def run(self) -> Tensor:
        steps, failed = self.schedule.steps, torch.zeros_like(self.lost, dtype=torch.bool)
        self.evaluate()
        for step in range(steps):
            self.adam.param_groups[0]["lr"] = self.lr * self.schedule.rate(step)
            self.step()
            failed |= self.lost >= ROLLED_BACK_AFTER
            if self.schedule.averages(step + 1):
                self._average()
            if (step + 1) % max(1, steps // EVALUATIONS) == 0 or step + 1 == steps:
                self.evaluate()
        copy_tensors(self.best, self.parameters)
        return self.scores.where(~failed, torch.inf)

    def step(self) -> None:
        """One step of all; gradients that are not finite become zero."""
        losses = self.losses()
        gradients = torch.autograd.grad(losses.where(losses.isfinite(), 0.0).sum(), self.parameters)
        finite = losses.detach().isfinite()
        for gradient in gradients:
            finite = finite & gradient.isfinite().flatten(1).all(1)
        self.lost = torch.where(finite, 0, self.lost + 1)
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient.where(finite.reshape(-1, *[1] * (p.dim() - 1)), 0.0).contiguous()
        self.adam.step()

    def losses(self) -> Tensor:
        """The negative bounds of fresh draws, shape (M,)."""
        x = draw_from(self.q, (self.num,))
        log_weights = self.log_joint(x) - self.q.log_prob(x)
        whole = log_weights.isfinite().all(0)
        losses = torch.where(whole, -log_weights.mean(0), 0.0)
        if bool(whole.all()):
            return losses
        log_q, cut = log_prob_at_fixed(self.q, x), torch.zeros_like(losses)
        for i in (~whole).nonzero().flatten().tolist():
            own = log_weights[:, i], "elbo", 1, x[:, i], log_q[:, i]
            cut = cut.index_put((torch.tensor(i, device=x.device),), cut_loss(*own, path=True))
        return losses + cut

    @torch.no_grad()
    def evaluate(self) -> None:
        """Keep of each flow the average, or the iterate while there is none, if it is best."""
        current = [p.detach().clone() for p in self.parameters]
        candidate = self.average or current
        copy_tensors(candidate, self.parameters)
        log_weights = []
        at_once = max(self.num, AT_ONCE // self.fixed[0].numel())
        for x in self.fixed.split(at_once):
            for t in self.q.transforms:
                x = t(x)
            log_weights.append(self.log_joint(x) - self.q.log_prob(x))
        scores = mean_scores(torch.cat(log_weights))
        copy_tensors(current, self.parameters)
        better = scores < self.scores
        self.scores = torch.minimum(scores, self.scores)
        kept = zip(candidate, self.best or candidate, strict=True)
        self.best = [t.where(better.reshape(-1, *[1] * (t.dim() - 1)), old) for t, old in kept]

    @torch.no_grad()
    def _average(self) -> None:
        now = [p.detach() for p in self.parameters]
        self.averaged += 1
        self.average = torch._foreach_lerp(self.average or now, now, 1 / self.averaged)
