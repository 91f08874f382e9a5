"""A stop rule for noisy losses: stop once the loss has been flat for long enough."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import numpy as np

from pyroflow.checks import check_count, check_fraction, check_positive

BLOCK = 10  # losses a block: their mean tames heavy tails and most of the autocorrelation
NOISE_BLOCKS = 40  # the fewest blocks, where there are as many, that the noise is estimated from
HISTORY = 4000  # blocks remembered: 40,000 steps
RISEN = 2.0  # noise sds above the lowest block, beyond which the loss has risen
RISEN_WINDOWS = 5  # windows that a loss that has risen is given to come down again
SD_PER_MAD = 1.4826  # of a normal distribution


class StopRule:
    """Says when a noisy loss has stopped falling.

    Losses are averaged in blocks of ten. Whenever a block is full, the rule looks at a stretch of
    the past: ``share`` of the time since the loss was ``fall`` noise sds above its recent mean,
    and at least ``window`` steps. It stops when Spearman's rank correlation of the block means
    with time is not negative there. A loss that came down slowly must thus have been flat for
    longer than one that dropped, and a fall of noncentrality δ is missed with probability Φ(−δ),
    with δ large as long as about one noise sd is left to gain. A loss that has risen is given
    five windows to come down again.

    Ranks make the rule invariant to the loss's scale and shift, and robust to spikes. The noise
    sd is √5 times the sd of the differences of successive block means, by their median absolute
    deviation, so that a steady fall does not enter it.

    No rule can tell a drift from a plateau before the drift has left the noise: a slope of s
    noise sds a step takes about (12 z²/s²)^(1/3) steps to be seen at z sds, 100 steps for
    s = 0.01 and z = 3. A slower drift that follows a fast fall is stopped.

    PyMC's ``CheckLossConvergence`` is a similar test (a CUSUM, E. S. Page, "Continuous inspection
    schemes", Biometrika 41, 1954). ``python tests/benchmarks/stopping.py`` measures false stops
    and delays of both.

    Args:
        window: the fewest steps that the loss must have been flat.
        share: the share of the time since the loss was ``fall`` noise sds higher that it must
            have been flat.
        fall: how many noise sds to look back for; fewer stop earlier.

    Attributes:
        reason: why the rule stopped, in words; empty before.
        steps: how many losses it has seen, skipped ones included.

    Raises:
        ValueError: If the window is below four blocks, the share outside (0, 1), or the fall not
            positive.

    Example:
        >>> import random
        >>> noise = random.Random(0)
        >>> rule = StopRule()
        >>> losses = (50 * 0.98**t + noise.gauss(0, 1) for t in range(2000))
        >>> next(t for t, loss in enumerate(losses) if rule.update(loss))
        419
    """

    def __init__(self, window: int = 80, share: float = 0.43, fall: float = 4.0) -> None:
        self.window = check_count("window", window, 4 * BLOCK)
        self.share = check_fraction("share", share)
        self.fall = check_positive("fall", fall)
        self.reason = ""
        self.steps = 0
        self._open: list[float] = []  # the block that is filling
        self._means: list[float] = []

    def update(self, loss: float) -> bool:
        """Take the loss of one step; return whether to stop.

        Losses that are not finite, those of skipped steps, are ignored. Once stopped, the rule
        stays stopped.
        """
        self.steps += 1
        if not self.reason and math.isfinite(loss):
            self._open.append(float(loss))
            if len(self._open) == BLOCK:
                self._means.append(math.fsum(self._open) / BLOCK)
                self._open.clear()
                del self._means[:-HISTORY]
                if len(self._means) * BLOCK >= self.window:
                    self._judge(np.asarray(self._means))
        return bool(self.reason)

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain numbers and lists."""
        return {
            "settings": [self.window, self.share, self.fall],
            "steps": self.steps,
            "reason": self.reason,
            "open": list(self._open),
            "means": list(self._means),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state.

        Raises:
            ValueError: If it is that of a rule with other settings.
        """
        if list(state["settings"]) != [self.window, self.share, self.fall]:
            raise ValueError(
                f"state must be that of a StopRule with window, share, fall = {self.window}, "
                f"{self.share}, {self.fall}, got {state['settings']}: make the rule with the same "
                "settings"
            )
        self.steps, self.reason = state["steps"], state["reason"]
        self._open, self._means = list(state["open"]), list(state["means"])

    def _judge(self, means: np.ndarray) -> None:
        least = -(-self.window // BLOCK)
        noise = _noise_sd(means[-max(least, NOISE_BLOCKS) :])
        level = means[-least:].mean()
        higher = np.flatnonzero(means[:-least] > level + self.fall * noise)
        since = len(means) - 1 - higher[-1] if len(higher) else len(means)
        risen = level > means.min() + RISEN * noise
        length = max(least, math.ceil(self.share * since), RISEN_WINDOWS * least if risen else 0)
        stretch = means[-length:]
        if len(stretch) < length or _trend(stretch) < 0:
            return
        half = len(stretch) // 2
        change = stretch[-half:].mean() - stretch[:half].mean()
        self.reason = (
            f"the loss {'has risen' if risen else 'has stopped falling'}: over the last "
            f"{len(stretch) * BLOCK} of {self.steps} steps its mean was {stretch.mean():.6g} and "
            f"changed by {change:+.2g} from the first half to the second (noise sd {noise:.2g})"
        )


def _noise_sd(means: np.ndarray) -> float:
    """The sd of one loss, from the differences of successive block means of shape (n,)."""
    steps = np.diff(means).tolist()
    centre = median(steps)
    return SD_PER_MAD * median([abs(step - centre) for step in steps]) * math.sqrt(BLOCK / 2)


def _trend(values: np.ndarray) -> float:
    """Spearman's correlation of values, of shape (n,), with their order; ties share a rank."""
    ordered = np.sort(values)
    ranks = ordered.searchsorted(values, "left") + ordered.searchsorted(values, "right")
    ranks = ranks - len(values)  # twice the rank less its mean
    time = 2 * np.arange(len(values)) - (len(values) - 1)
    scale = math.sqrt(int(ranks @ ranks) * int(time @ time))
    return int(ranks @ time) / scale if scale else 0.0
