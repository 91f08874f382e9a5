"""What changes over the steps of a fit: the learning rate, and the weight β of the log joint."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyroflow.checks import check_count, check_fraction, check_positive
from pyroflow.inference.stop_rule import StopRule

AVERAGED = 0.25  # the last part of the steps, whose iterates are averaged
SHORTENED = 0.7  # steps of a shortened decay, as a share of the steps before it
SHORTEST = 300  # steps of a shortened decay


class LearningRateSchedule:
    """Linear warm-up over the first thirtieth, cosine decay to 0; shortened once the loss is flat.

    Args:
        steps: the most to take.
        rule: fed with the losses until it fires, which shortens the decay.

    Attributes:
        end: the number of steps to take.
        reason: why the decay was shortened, if it was.
    """

    def __init__(self, steps: int, rule: StopRule | None = None) -> None:
        self.steps, self.rule = steps, rule
        self.fired: int | None = None
        self.end, self.reason = steps, ""

    def rate(self, step: int) -> float:
        """The factor of the learning rate at a step."""
        if self.fired is None:
            warmup = min(1.0, (step + 1) / max(1, self.steps // 30))
            return warmup * _cosine(step / self.steps)
        done = (step - self.fired) / (self.end - self.fired)
        return _cosine(self.fired / self.steps) * _cosine(done)

    def averages(self, step: int) -> bool:
        """Whether the iterate after that many steps belongs to the average."""
        if self.fired is None:
            return step > (1 - AVERAGED) * self.steps
        return step > (self.fired + self.end) / 2

    def update(self, step: int, loss: float) -> None:
        """Take the loss of a step; where the rule fires, the decay starts anew, shortened."""
        if self.rule is None or self.fired is not None or not self.rule.update(loss):
            return
        length = max(SHORTEST, round(SHORTENED * (step + 1)))
        if step + 1 + length < (1 - AVERAGED) * self.steps:
            self.fired, self.reason = step + 1, self.rule.reason
            self.end = self.fired + length

    def state_dict(self) -> dict[str, Any]:
        """The state as plain values."""
        rule = None if self.rule is None else self.rule.state_dict()
        return {"fired": self.fired, "end": self.end, "reason": self.reason, "rule": rule}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.fired, self.end, self.reason = state["fired"], state["end"], state["reason"]
        if self.rule is not None:
            self.rule.load_state_dict(state["rule"])


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def paper_annealing(step: int) -> float:
    """β_t = min(1, 0.01 + t/10000), the schedule of Rezende & Mohamed 2015, equation 20.

    Example:
        >>> paper_annealing(0), paper_annealing(20_000)
        (0.01, 1.0)
    """
    return min(1.0, 0.01 + step / 10_000)


class AdaptiveAnnealing:
    """β rises so that successive targets p^β stay equally far apart.

    The annealed bound (equation 20 of Rezende & Mohamed 2015) is E_q[log q(z) − β log p(x, z)].
    Raising β by Δβ moves its target by KL(p^β ‖ p^{β+Δβ}) ≈ ½ Δβ² Var_{p^β}[log p(x, z)], so

        Δβ = tolerance / sd_q(log p(x, z))

    keeps that divergence at ½ tolerance², with q in the place of p^β. This is the step of AdaAnn
    (Cobian, Hauenstein, Liu & Schiavazzi 2022, "AdaAnn: Adaptive Annealing Scheduler for
    Probability Density Approximation"). There is a deadline: β is at least
    start^(1 − t/max_steps), and hence 1 at ``max_steps``. Such a geometric rise is what the rule
    itself gives on a Gaussian target in D dimensions, where sd_{p^β}(log p) = √(D/2)/β.

    A step of the fit is: β = ``beta``, draw particles, descend, then ``update(log_joint)``. The
    variance is taken over all particles since the last rise.

    Args:
        start: the first β.
        tolerance: √(2 KL) between one target and the next, in (0, ∞); smaller is slower.
        hold: steps of the fit at each β before it rises, so that q can follow.
        max_steps: steps after which β is 1 in any case, such as half of the steps of the fit.

    Attributes:
        beta: β for the next step.
        steps: how many updates there were.

    Raises:
        ValueError: If start is outside (0, 1), tolerance not positive, hold or max_steps below 1.

    Example:
        >>> import torch
        >>> annealing = AdaptiveAnnealing(start=0.1, tolerance=0.2, hold=1)
        >>> annealing.update(torch.tensor([-3.0, -1.0]))  # 0.1 + 0.2 / √2
        0.2414213562373095
    """

    def __init__(
        self,
        start: float = 0.1,
        tolerance: float = 0.05,
        hold: int = 5,
        max_steps: int = 1000,
    ) -> None:
        self.start = check_fraction("start", start)
        self.tolerance = check_positive("tolerance", tolerance)
        self.hold = check_count("hold", hold, minimum=1)
        self.max_steps = check_count("max_steps", max_steps, minimum=1)
        self.beta = float(start)
        self.steps = self._held = 0
        self._moments = (0, 0.0, 0.0)  # count, mean, sum of squared deviations since the last rise

    def update(self, log_joint: Tensor) -> float:
        """Take the particles' log joint log p(x, z) of one step; return β for the next.

        Args:
            log_joint: of shape (num_particles,), or any other, without β; values that are not
                finite are ignored.

        Raises:
            TypeError: If log_joint is no tensor.
        """
        if not isinstance(log_joint, Tensor):
            raise TypeError(
                "log_joint must be a tensor with one value a particle, got "
                f"{type(log_joint).__name__}: pass it before averaging over particles"
            )
        self.steps += 1
        self._held += 1
        if self.beta < 1:
            self._add(log_joint)
            if self._held >= self.hold:
                self._rise()
            done = self.steps / self.max_steps
            least = 1.0 if done >= 1 else self.start ** (1 - done)
            self.beta = min(1.0, max(self.beta, least))
        return self.beta

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain numbers and lists."""
        return {
            "settings": [self.start, self.tolerance, self.hold, self.max_steps],
            "beta": self.beta,
            "steps": self.steps,
            "held": self._held,
            "moments": list(self._moments),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state.

        Raises:
            ValueError: If it is that of a schedule with other settings.
        """
        settings = [self.start, self.tolerance, self.hold, self.max_steps]
        if list(state["settings"]) != settings:
            raise ValueError(
                "state must be that of an AdaptiveAnnealing with start, tolerance, hold, "
                f"max_steps = {settings}, got {state['settings']}: make it with the same settings"
            )
        self.beta, self.steps, self._held = state["beta"], state["steps"], state["held"]
        self._moments = tuple(state["moments"])

    def _add(self, log_joint: Tensor) -> None:
        """Merge one step's moments into the running ones."""
        values = log_joint.detach().double()
        values = values[values.isfinite()]
        added = len(values)
        if not added:
            return
        count, mean, squares = self._moments
        gap, total = values.mean().item() - mean, count + added
        squares += (values - values.mean()).square().sum().item()
        squares += gap * gap * count * added / total
        self._moments = (total, mean + gap * added / total, squares)

    def _rise(self) -> None:
        count, _, squares = self._moments
        if count < 2:
            return
        sd = math.sqrt(squares / (count - 1))
        # a joint that does not vary is the same target at any β
        self.beta = self.beta + self.tolerance / sd if sd > 0 else 1.0
        self._held, self._moments = 0, (0, 0.0, 0.0)


Annealing = Callable[[int], float] | AdaptiveAnnealing | None


def described(annealing: Annealing, steps: int) -> Any:
    """By which a checkpoint knows an annealing again, without running all of it."""
    if isinstance(annealing, AdaptiveAnnealing):
        return annealing.state_dict()["settings"]
    return annealing and [float(annealing(t)) for t in range(0, steps, max(1, steps // 7))]
