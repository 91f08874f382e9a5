"""The stop rule: false stops and delays on simulated losses, invariance, resuming."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from benchmarks.stopping import FALLS, NOISES, first_stop, judge, our_stops, simulate
from scipy.stats import spearmanr

from pyroflow.inference.stop_rule import StopRule, _noise_sd, _trend

EACH = 20


def noisy_decay(seed: int, length: int = 2000) -> np.ndarray:
    return 60 * 0.985 ** np.arange(length) + np.random.default_rng(seed).standard_normal(length)


def test_false_stops_and_delays_hold_the_bars() -> None:
    rng, found = np.random.default_rng(1), []
    for fall in FALLS:
        for noise in NOISES:
            losses, rest = simulate(fall, noise, EACH, rng, length=3000)
            found.append(judge(rest, our_stops(losses)))
    false, delays = (np.concatenate(column) for column in zip(*found, strict=True))
    assert false.sum() <= 0.01 * len(false) + 2 * math.sqrt(0.01 * len(false))
    # as many delays are above the median's bar as a fair coin gives, and two sds
    assert (delays > 100).sum() <= len(delays) / 2 + math.sqrt(len(delays))
    assert (delays < -1000).sum() == 0


@pytest.mark.parametrize("slope", [0.02, 1.0, 100.0])
@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
def test_falling_loss_is_never_stopped(slope: float, unit: float) -> None:
    noise = np.random.default_rng(3).standard_normal(3000)
    losses = unit * (noise - slope * np.arange(3000))
    rule = StopRule()
    assert not any(rule.update(loss) for loss in losses)
    assert rule.reason == ""


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
def test_flat_loss_is_stopped_early(unit: float) -> None:
    stops = [
        first_stop((unit * (1e3 + np.random.default_rng(seed).standard_normal(2000))).tolist())
        for seed in range(20)
    ]
    assert min(stops) == 80
    assert np.median(stops) <= 200
    assert max(stops) < 1500


def test_stops_where_it_did_in_other_units() -> None:
    for seed in range(10):
        losses = noisy_decay(seed)
        step = first_stop(losses.tolist())
        assert 100 < step < 1500
        assert first_stop((2.0**30 * losses).tolist()) == step
        assert first_stop((3e-7 * losses - 5e-4).tolist()) == step
        assert first_stop((losses + 4e6).tolist()) == step


def test_slow_decay_has_to_be_flat_for_longer() -> None:
    noise = np.random.default_rng(4).standard_normal((2, 6000))
    flat = [50 * np.maximum(0, 1 - np.arange(6000) / length) for length in (200, 3000)]
    fast, slow = (first_stop((n + f).tolist()) for n, f in zip(noise, flat, strict=True))
    assert 200 + 70 < fast < 400
    assert 3000 + 100 < slow < 3600


def test_constant_loss_stops_after_the_window() -> None:
    assert first_stop([2.5] * 500) == 80
    rule = StopRule(window=200)
    assert [rule.update(2.5) for _ in range(200)].index(True) == 199
    assert rule.reason.startswith("the loss has stopped falling: over the last 200 of 200 steps")
    assert "mean was 2.5" in rule.reason


def test_lasting_rise_is_stopped_and_named() -> None:
    rule = StopRule()
    losses = np.random.default_rng(5).standard_normal(500) + 0.1 * np.arange(500)
    assert [rule.update(loss) for loss in losses].index(True) == 399
    assert rule.reason.startswith("the loss has risen: over the last 400 of 400 steps")


def test_rise_at_the_beginning_is_waited_for() -> None:
    t = np.arange(3000)
    course = np.where(t < 200, 0.1 * t, 20 - 0.1 * (t - 200)).clip(min=-60)
    losses = np.random.default_rng(9).standard_normal(3000) + course
    assert 1000 < first_stop(losses.tolist()) < 1300


def test_spike_does_not_stop_a_falling_loss() -> None:
    losses = np.random.default_rng(6).standard_normal(1500) - 0.05 * np.arange(1500)
    losses[700:712] += 1e6
    assert first_stop(losses.tolist()) == 1500


def test_skipped_steps_are_ignored() -> None:
    losses = noisy_decay(0).tolist()
    plain = first_stop(losses)
    rule, taken = StopRule(), 0
    for t, loss in enumerate(losses):
        if t % 7 == 0:
            assert not rule.update([math.nan, math.inf, -math.inf][t % 3])
        taken += 1
        if rule.update(loss):
            break
    assert taken == plain
    assert rule.steps == plain + math.ceil(plain / 7)


def test_resumes_bit_by_bit() -> None:
    losses = noisy_decay(1).tolist()
    whole = StopRule()
    stop = next(t for t, loss in enumerate(losses) if whole.update(loss))
    for cut in (3, 10, 157, stop - 1, stop + 1):
        first, second = StopRule(), StopRule()
        for loss in losses[:cut]:
            first.update(loss)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for loss in losses[cut : stop + 1]:
            second.update(loss)
        assert second.state_dict() == whole.state_dict()
        assert second.reason == whole.reason != ""


def test_state_is_a_copy() -> None:
    rule = StopRule()
    for loss in range(25):
        rule.update(-loss)
    state = rule.state_dict()
    other = StopRule()
    other.load_state_dict(state)
    other.update(0.0)
    assert rule.state_dict() == state


def test_trend_is_spearmans() -> None:
    rng = np.random.default_rng(7)
    for values in (rng.standard_normal(31), rng.integers(0, 5, 40).astype(float)):
        rank_correlation = spearmanr(values, np.arange(len(values))).statistic
        assert _trend(values) == pytest.approx(rank_correlation, abs=1e-12)


def test_noise_sd_is_that_of_one_loss_whatever_the_trend() -> None:
    losses = 3 * np.random.default_rng(8).standard_normal(100_000)
    blocks = losses.reshape(-1, 10).mean(1)
    assert _noise_sd(blocks) == pytest.approx(3, rel=0.03)
    assert _noise_sd(blocks - 5.0 * np.arange(len(blocks))) == pytest.approx(3, rel=0.03)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="window must be an integer of at least 40, got 10"):
        StopRule(window=10)
    with pytest.raises(ValueError, match="share must be a fraction"):
        StopRule(share=1.0)
    with pytest.raises(ValueError, match="fall must be a finite number above 0"):
        StopRule(fall=0.0)
    with pytest.raises(ValueError, match=r"StopRule with window, share, fall = 80, .*make the"):
        StopRule().load_state_dict(StopRule(window=100).state_dict())
