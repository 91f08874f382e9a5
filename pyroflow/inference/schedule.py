"""The course of Adam's learning rate over a fit."""

from __future__ import annotations

import math
from typing import Any

from pyroflow.inference.stop_rule import StopRule

AVERAGED = 0.25  # the last part of the steps, whose iterates are averaged
HURRIED = 0.7  # steps that a hurried fall takes, as a share of the steps before it
LEAST_HURRIED = 300  # steps


class Course:
    """Warm-up over the first thirtieth, and a cosine from 1 to 0.

    With a stop rule the fall is hurried once the rule finds that the loss has stopped falling:
    what a lower rate still gains is small and quickly gained.

    Args:
        steps: the most to take.
        rule: fed with the losses until it has fired.

    Attributes:
        end: the number of steps that are taken.
        reason: why the fall was hurried, if it was.
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
        """Take the loss of a step; where that is enough, let the rate fall at once."""
        if self.rule is None or self.fired is not None or not self.rule.update(loss):
            return
        length = max(LEAST_HURRIED, round(HURRIED * (step + 1)))
        if step + 1 + length < (1 - AVERAGED) * self.steps:
            self.fired, self.reason = step + 1, self.rule.reason
            self.end = self.fired + length

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, as plain values."""
        rule = None if self.rule is None else self.rule.state_dict()
        return {"fired": self.fired, "end": self.end, "reason": self.reason, "rule": rule}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the course that gave this state was."""
        self.fired, self.end, self.reason = state["fired"], state["end"], state["reason"]
        if self.rule is not None:
            self.rule.load_state_dict(state["rule"])


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))
