"""False stops and delays of the stop rule on simulated losses, beside PyMC's.

python tests/benchmarks/stopping.py prints the table. A series is a mean that falls to a
plateau plus noise whose sd is 1 on the plateau. The rest is the fall of the mean that is still
to come, in sds of the noise at that step. A stop is false while the rest is above one sd. The
plateau begins when the rest is below 0.05 sd; a stop before that has a negative delay, and a
series that is never stopped counts as stopped at its end. PyMC's rule waits for 1000 steps,
which is most of its delay, and means to stop once the loss falls by less than a fifth of a sd a
step, which is most of its false stops here.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from pyroflow.inference.stop_rule import StopRule

LENGTH = 4000
MATERIAL = 1.0
PLATEAU = 0.05
FALLS = ("exponential", "power law", "line", "drift")
NOISES = ("normal", "heteroscedastic", "heavy-tailed", "autocorrelated")


def simulate(
    fall: str, noise: str, count: int, rng: np.random.Generator, length: int = LENGTH
) -> tuple[np.ndarray, np.ndarray]:
    """Losses and the rest of their fall in noise sds, both of shape (count, length)."""
    rest = _fall(fall, count, rng, np.arange(length))
    errors, sd = _noise(noise, rest, rng)
    return rest + errors, rest / sd


def _between(low: float, high: float, count: int, rng: np.random.Generator) -> np.ndarray:
    return np.exp(rng.uniform(np.log(low), np.log(high), (count, 1)))


def _fall(kind: str, count: int, rng: np.random.Generator, t: np.ndarray) -> np.ndarray:
    def draw(low: float, high: float) -> np.ndarray:
        return _between(low, high, count, rng)

    if kind == "exponential":
        return draw(5, 500) * np.exp(-t / draw(20, 300))
    if kind == "power law":
        tau, power, end = draw(3, 50), -draw(0.5, 1.5), draw(200, 2000)
        fall = (1 + t / tau) ** power - (1 + end / tau) ** power
        return draw(20, 1000) * np.maximum(fall, 0)
    if kind == "line":
        return draw(0.02, 0.5) * np.maximum(draw(200, 2000) - t, 0)
    # the slow drift is below what can be told from a plateau in time
    slope = draw(0.001, 0.005) if kind == "slow drift" else draw(0.02, 0.2)
    return draw(5, 500) * np.exp(-t / draw(10, 100)) + slope * np.maximum(draw(300, 2000) - t, 0)


def _noise(kind: str, rest: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    sd = np.ones_like(rest)
    if kind == "heavy-tailed":
        return rng.standard_t(3, rest.shape) / np.sqrt(3), sd
    errors = rng.standard_normal(rest.shape)
    if kind == "heteroscedastic":
        sd = 1 + 2 * rest / (rest + 10)
    if kind == "autocorrelated":
        memory = rng.uniform(0.2, 0.6, len(rest))
        fresh = np.sqrt(1 - memory**2)
        for t in range(1, rest.shape[1]):
            errors[:, t] = memory * errors[:, t - 1] + fresh * errors[:, t]
    return errors * sd, sd


def our_stops(losses: np.ndarray) -> np.ndarray:
    """The number of steps until the rule stops each of the losses of shape (count, length)."""
    return np.array([first_stop(series.tolist()) for series in losses])


def first_stop(losses: list[float]) -> int:
    """The number of steps until the rule stops, or all of them."""
    rule = StopRule()
    return next((t for t, loss in enumerate(losses, 1) if rule.update(loss)), len(losses))


def cusum_stops(losses: np.ndarray) -> np.ndarray:
    """The same of PyMC's rule with its settings, written anew for many series at once."""
    count, length = losses.shape
    gains = losses[:, :-1] - losses[:, 1:]
    scale = np.abs(gains[:, 1] - gains[:, 0])
    total, stops = np.zeros(count), np.full(count, length)
    keep = 0.5 ** (1 / 200)
    for t in range(2, length - 1):
        sd = scale * np.sqrt(np.pi) / 2 + 1e-12
        jump = np.abs(gains[:, t] - gains[:, t - 1])
        scale = keep * scale + (1 - keep) * np.minimum(jump, 4 * sd)
        if t + 1 >= 1000:
            z = np.clip(gains[:, t] / sd, 0, 4)
            total = np.maximum(0, total + 0.5 - z)
            stops = np.where((total > 10) & (stops == length), t + 2, stops)
    return stops


def judge(rest: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which stops are false, and the delays."""
    left = rest[np.arange(len(rest)), stops - 1]
    stopped = stops < rest.shape[1]
    return stopped & (left > MATERIAL), stops - (rest > PLATEAU).sum(1)


def _row(name: str, false: np.ndarray, delays: np.ndarray) -> str:
    late = np.quantile(delays, 0.9)
    return f"{name:32s} {false.mean():9.2%} {np.median(delays):9.0f} {late:9.0f}"


def main(count: int) -> None:
    """Print false stops, and the median and 90 % quantile of the delay, for every kind."""
    rng, began = np.random.default_rng(0), time.perf_counter()
    print(f"{count} series a line, rule: false stops, delay at 50 % and 90 %")
    for rule in (our_stops, cusum_stops):
        found = []
        for fall in FALLS:
            for noise in NOISES:
                losses, rest = simulate(fall, noise, count, rng)
                found.append(judge(rest, rule(losses)))
                print(_row(f"{rule.__name__}: {fall}, {noise}", *found[-1]), flush=True)
        print(_row(f"{rule.__name__}: all", *(np.concatenate(x) for x in zip(*found, strict=True))))
        losses, rest = simulate("slow drift", "normal", count, rng)
        print(_row(f"{rule.__name__}: too slow a drift", *judge(rest, rule(losses))))
    falling = (rng.standard_normal(20_000) - 0.2 * np.arange(20_000)).tolist()
    start = time.perf_counter()
    first_stop(falling)
    per_step = 1e6 * (time.perf_counter() - start) / len(falling)
    print(f"a step of the rule: {per_step:.1f} µs; all: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 250)
