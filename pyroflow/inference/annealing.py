"""Annealing that finds its own pace: β scales the log joint and not the entropy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyroflow.checks import check_count, check_fraction, check_positive


class AdaptiveAnnealing:
    """β rises so that successive targets p^β stay equally far apart.

    The annealed bound (equation 20 of Rezende & Mohamed 2015) is
    E_q[log q(z) − β log p(x, z)]. Raising β by Δβ moves its target by
    KL(p^β ‖ p^{β+Δβ}) ≈ ½ Δβ² Var_{p^β}[log p(x, z)], so

        Δβ = tolerance / sd_q(log p(x, z))

    keeps that divergence at ½ tolerance², with q in the place of the annealed target that it has
    been fitted to. This is the step of AdaAnn (Cobian, Hauenstein, Liu & Schiavazzi 2022,
    "AdaAnn: Adaptive Annealing Scheduler for Probability Density Approximation"). Where the joint
    varies wildly β creeps, and where it is flat β jumps. This may need any number of steps, so
    there is a deadline: β is never below start^(1 − t/max_steps) and hence exactly 1 at
    ``max_steps``. A geometric rise is what the rule itself gives on a Gaussian target in D
    dimensions, where sd_{p^β}(log p) = √(D/2)/β.

    A step of the fit is: β = ``beta``, draw particles, descend, then
    ``update(log_joint)``. The variance is taken over all particles since the last rise.

    Args:
        start: the first β.
        tolerance: √(2 KL) between one target and the next, in (0, ∞); smaller is slower.
        hold: steps of the fit at each β before it rises, so that q can follow.
        max_steps: steps after which β is 1 in any case, such as half of the steps of the fit.

    Attributes:
        beta: β for the next step.
        steps: how many updates there were.

    Raises:
        ValueError: start outside (0, 1), tolerance not positive, hold or max_steps below 1.

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
        self.steps = 0
        self._held = 0
        self._forget()

    def update(self, log_joint: Tensor) -> float:
        """Take the particles' log joint log p(x, z) of one step; return β for the next.

        Args:
            log_joint: of shape (num_particles,), or any other, without β; values that are not
                finite are ignored.

        Raises:
            TypeError: a log_joint that is no tensor.
        """
        if not isinstance(log_joint, Tensor):
            raise TypeError(
                "log_joint must be a tensor with one value a particle, got "
                f"{type(log_joint).__name__}: pass it before averaging over particles"
            )
        self.steps += 1
        self._held += 1
        if self.beta < 1:
            self._remember(log_joint)
            if self._held >= self.hold:
                self._rise()
            self.beta = min(1.0, max(self.beta, self._least()))
        return self.beta

    def state_dict(self) -> dict[str, Any]:
        """What the schedule remembers, as plain numbers and lists."""
        return {
            "settings": [self.start, self.tolerance, self.hold, self.max_steps],
            "beta": self.beta,
            "steps": self.steps,
            "held": self._held,
            "moments": [self._count, self._mean, self._squares],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the schedule that gave this state was.

        Raises:
            ValueError: the state of a schedule with other settings.
        """
        settings = [self.start, self.tolerance, self.hold, self.max_steps]
        if list(state["settings"]) != settings:
            raise ValueError(
                "state must be that of an AdaptiveAnnealing with start, tolerance, hold, "
                f"max_steps = {settings}, got {state['settings']}: make it with the same settings"
            )
        self.beta, self.steps, self._held = state["beta"], state["steps"], state["held"]
        self._count, self._mean, self._squares = state["moments"]

    def _forget(self) -> None:
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    def _remember(self, log_joint: Tensor) -> None:
        """Merge one step's count, mean and sum of squared deviations into the running ones."""
        values = log_joint.detach().double()
        values = values[values.isfinite()]
        count = len(values)
        if not count:
            return
        mean = values.mean().item()
        gap, total = mean - self._mean, self._count + count
        self._squares += (values - mean).square().sum().item()
        self._squares += gap * gap * self._count * count / total
        self._mean += gap * count / total
        self._count = total

    def _rise(self) -> None:
        if self._count < 2:
            return
        sd = math.sqrt(self._squares / (self._count - 1))
        # a joint that does not vary is the same target at any β
        self.beta = self.beta + self.tolerance / sd if sd > 0 else 1.0
        self._held = 0
        self._forget()

    def _least(self) -> float:
        if self.steps >= self.max_steps:
            return 1.0
        return self.start ** (1 - self.steps / self.max_steps)


def described(annealing: Callable[[int], float] | AdaptiveAnnealing | None, steps: int) -> Any:
    """By which a checkpoint knows an annealing again, without running all of it."""
    if isinstance(annealing, AdaptiveAnnealing):
        return annealing.state_dict()["settings"]
    return annealing and [float(annealing(t)) for t in range(0, steps, max(1, steps // 7))]
