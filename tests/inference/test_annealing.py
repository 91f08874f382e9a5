"""Adaptive annealing: the steps are the formula's, they end at 1, and they resume."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from pyroflow.inference.schedule import AdaptiveAnnealing

D = 6


def log_joint_of_annealed_gaussian(beta: float, particles: int) -> Tensor:
    """log p of exact draws from p^β, p = N(0, I): its variance is D/(2β²)."""
    return -(torch.randn(particles, D) / math.sqrt(beta)).square().sum(1) / 2


def test_increment_is_tolerance_over_sd() -> None:
    values = torch.tensor([1.0, 4.0, 7.0, 12.0])
    annealing = AdaptiveAnnealing(start=0.2, tolerance=0.3, hold=1, max_steps=10**6)
    sd = math.sqrt(((values - 6) ** 2).sum().item() / 3)
    assert annealing.beta == 0.2
    assert annealing.update(values) == pytest.approx(0.2 + 0.3 / sd, rel=1e-12)
    assert annealing.update(10 * values) == pytest.approx(0.2 + 0.33 / sd, rel=1e-12)
    assert annealing.beta == pytest.approx(0.2 + 0.33 / sd, rel=1e-12)


def test_gaussian_target_rises_geometrically() -> None:
    annealing = AdaptiveAnnealing(start=0.1, tolerance=0.2, hold=1, max_steps=10**6)
    expected = 0.1
    while expected < 1:
        annealing.update(log_joint_of_annealed_gaussian(annealing.beta, 20_000))
        expected = min(1.0, expected * (1 + 0.2 * math.sqrt(2 / D)))
        assert annealing.beta == pytest.approx(expected, rel=0.05)
    assert annealing.steps == math.ceil(math.log(10) / math.log(1 + 0.2 * math.sqrt(2 / D)))


def test_successive_targets_are_equally_far_apart() -> None:
    annealing = AdaptiveAnnealing(start=0.05, tolerance=0.1, hold=1, max_steps=10**6)
    for _ in range(20):
        before = annealing.beta
        ratio = annealing.update(log_joint_of_annealed_gaussian(before, 50_000)) / before
        divergence = D / 2 * (ratio - 1 - math.log(ratio))  # of N(0, I/β) from N(0, I/β')
        assert divergence == pytest.approx(0.1**2 / 2, rel=0.06)


def test_holds_and_pools_the_particles_of_all_held_steps() -> None:
    values = torch.randn(3, 8) * 50 + 7
    annealing = AdaptiveAnnealing(start=0.1, tolerance=1.0, hold=3, max_steps=10**6)
    for row in values[:2]:
        assert annealing.update(row) < 0.1001  # the deadline's pace only
    assert annealing.update(values[2]) == pytest.approx(0.1 + 1 / values.std().item(), rel=1e-4)


def test_single_particles_are_enough() -> None:
    annealing = AdaptiveAnnealing(start=0.5, tolerance=1.0, hold=1, max_steps=10**6)
    assert annealing.update(torch.tensor(3.0)) == pytest.approx(0.5, abs=1e-5)
    assert annealing.update(torch.tensor(13.0)) == pytest.approx(0.5 + 1 / math.sqrt(50), abs=1e-5)


def test_reaches_one_exactly_and_never_falls() -> None:
    for scale in (1e-3, 1.0, 1e3, 1e12):
        annealing, betas = AdaptiveAnnealing(max_steps=400), []
        for _ in range(410):
            betas.append(annealing.update(scale * torch.randn(16)))
        assert all(a <= b for a, b in zip(betas, betas[1:], strict=False))
        assert betas[398] < 1 or scale < 1e3
        assert betas[399:] == [1.0] * 11


def test_deadline_is_geometric() -> None:
    annealing = AdaptiveAnnealing(start=0.01, max_steps=100)
    for _ in range(50):
        annealing.update(1e15 * torch.randn(4))
    assert annealing.beta == pytest.approx(0.1)


def test_joint_that_does_not_vary_ends_at_once() -> None:
    annealing = AdaptiveAnnealing(hold=1)
    assert annealing.update(torch.full((4,), -2.0)) == 1.0


def test_non_finite_values_are_ignored() -> None:
    values = torch.tensor([1.0, 4.0, 7.0])
    bad = torch.tensor([math.nan, math.inf, -math.inf])
    plain, spoiled = AdaptiveAnnealing(hold=1), AdaptiveAnnealing(hold=1)
    assert spoiled.update(torch.cat([bad, values])) == plain.update(values)
    before = AdaptiveAnnealing(max_steps=10**6)
    for _ in range(20):
        before.update(bad)
    assert before.beta == pytest.approx(0.1, abs=1e-5)
    assert math.isfinite(before.beta)


def test_far_from_zero_the_variance_keeps_its_digits() -> None:
    annealing = AdaptiveAnnealing(start=0.1, tolerance=0.1, hold=2, max_steps=10**6)
    annealing.update(torch.tensor([1e9, 1e9 + 1]))
    assert annealing.update(torch.tensor([1e9, 1e9 + 1])) == pytest.approx(
        0.1 + 0.1 / math.sqrt(1 / 3), rel=1e-5
    )


def test_gradients_are_left_alone() -> None:
    values = torch.randn(5, requires_grad=True)
    assert isinstance(AdaptiveAnnealing(hold=1).update(values * 2), float)
    assert values.grad is None


def test_resumes_bit_by_bit() -> None:
    particles = 30 * torch.randn(200, 8)
    whole = AdaptiveAnnealing(max_steps=180)
    betas = [whole.update(row) for row in particles]
    first, second = (AdaptiveAnnealing(max_steps=180) for _ in range(2))
    for row in particles[:73]:
        first.update(row)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.beta == betas[72]
    assert [second.update(row) for row in particles[73:]] == betas[73:]
    assert second.state_dict() == whole.state_dict()


def test_bad_input_is_refused() -> None:
    for wrong in ({"start": 0.0}, {"start": 1.5}, {"tolerance": -1.0}, {"hold": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            AdaptiveAnnealing(**wrong)
    with pytest.raises(ValueError, match="max_steps must be an integer of at least 1"):
        AdaptiveAnnealing(max_steps=0)
    with pytest.raises(TypeError, match="log_joint must be a tensor .* got float"):
        AdaptiveAnnealing().update(-3.0)
    with pytest.raises(ValueError, match="make it with the same settings"):
        AdaptiveAnnealing().load_state_dict(AdaptiveAnnealing(hold=2).state_dict())
