"""The schedule of the learning rate, and the bounds that a flow is trained on."""

import json
import math
import random

import pytest
import torch
from torch import Tensor

from pyroflow.inference.objectives import LOST, bound_loss, cut_loss
from pyroflow.inference.schedule import LearningRateSchedule
from pyroflow.inference.stop_rule import StopRule


class FiresAt:
    """A rule that fires at one step and, like StopRule, stays fired."""

    def __init__(self, step: int) -> None:
        self.step, self.seen, self.reason = step, 0, ""

    def update(self, loss: float) -> bool:
        self.seen += 1
        if self.seen > self.step:
            self.reason = "flat"
        return bool(self.reason)


def driven(steps: int, fires_at: int) -> LearningRateSchedule:
    schedule = LearningRateSchedule(steps, FiresAt(fires_at))
    step = 0
    while step < schedule.end:
        schedule.update(step, 1.0)
        step += 1
    assert step == schedule.end
    return schedule


def test_rate_warms_up_and_falls_along_a_cosine() -> None:
    schedule = LearningRateSchedule(300)  # ten steps of warm-up
    assert schedule.rate(0) == pytest.approx(0.1)
    assert schedule.rate(4) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 4 / 300)))
    assert schedule.rate(100) == pytest.approx(0.75)
    assert schedule.rate(150) == pytest.approx(0.5)
    assert schedule.rate(200) == pytest.approx(0.25)
    assert schedule.rate(300) == pytest.approx(0.0)
    rates = [schedule.rate(step) for step in range(10, 300)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0
    assert LearningRateSchedule(1).rate(0) == 1.0


def test_last_quarter_is_averaged() -> None:
    schedule = LearningRateSchedule(400)
    assert [schedule.averages(step) for step in (1, 300, 301, 400)] == [False, False, True, True]


def test_without_a_rule_losses_change_nothing() -> None:
    schedule = LearningRateSchedule(50)
    schedule.update(10, 1.0)
    assert (schedule.end, schedule.reason, schedule.fired) == (50, "", None)


@pytest.mark.parametrize(("fires_at", "end"), [(999, 1700), (99, 400)])
def test_decay_is_shortened_once_the_rule_fires(fires_at: int, end: int) -> None:
    schedule = driven(4000, fires_at)
    fired = fires_at + 1
    assert (schedule.fired, schedule.end, schedule.reason) == (fired, end, "flat")
    level = 0.5 * (1 + math.cos(math.pi * fired / 4000))
    third, half = (2 * fired + end) / 3, (fired + end) // 2
    assert schedule.rate(fired) == pytest.approx(level)
    assert schedule.rate(third) == pytest.approx(0.75 * level)
    assert schedule.rate(half) == pytest.approx(0.5 * level)
    assert schedule.rate(end) == pytest.approx(0.0, abs=1e-15)
    assert not schedule.averages(half)
    assert schedule.averages(half + 1)


def test_rate_does_not_jump_where_the_decay_is_shortened() -> None:
    assert driven(4000, 999).rate(1000) == pytest.approx(
        LearningRateSchedule(4000).rate(1000), rel=1e-12
    )


@pytest.mark.parametrize("steps", [1, 40, 400, 1000, 4000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.6, 0.99])
def test_never_longer_than_asked_for(steps: int, share: float) -> None:
    schedule = driven(steps, int(share * steps))
    assert 1 <= schedule.end <= steps
    assert (schedule.reason == "flat") == (schedule.end < steps)
    assert all(0 <= schedule.rate(step) <= 1 for step in range(schedule.end))


def test_rule_that_fires_late_is_ignored() -> None:
    """1,999 + 1 + 1,400 steps would end within the quarter that is averaged anyway."""
    schedule = driven(4000, 1999)
    assert (schedule.end, schedule.reason, schedule.fired) == (4000, "", None)
    assert driven(4000, 1763).end == 1764 + 1235 < 3000


def test_state_goes_on_where_it_was() -> None:
    noise = random.Random(0)
    losses = [20 * 0.98**t + noise.gauss(0, 1) for t in range(3000)]
    whole = LearningRateSchedule(3000, StopRule())
    for step, loss in enumerate(losses):
        whole.update(step, loss)
    assert whole.end < 3000
    for cut in (whole.fired // 2, whole.fired + 10):
        first, second = (LearningRateSchedule(3000, StopRule()) for _ in range(2))
        for step in range(cut):
            first.update(step, losses[step])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for step in range(cut, 3000):
            second.update(step, losses[step])
        assert second.state_dict() == whole.state_dict()
        assert second.rate(whole.fired + 7) == whole.rate(whole.fired + 7)


def test_state_without_a_rule() -> None:
    schedule = LearningRateSchedule(10)
    state = schedule.state_dict()
    assert state["rule"] is None
    schedule.load_state_dict(state)
    assert schedule.state_dict() == state


LOG_WEIGHTS = torch.tensor([0.5, 0.25, 2.0, 1.0], dtype=torch.float64).log()


def test_bounds_by_hand() -> None:
    assert bound_loss(LOG_WEIGHTS, "elbo", 2).item() == pytest.approx(-math.log(0.25) / 4)
    two = -(math.log(0.375) + math.log(1.5)) / 2
    assert bound_loss(LOG_WEIGHTS, "iwae", 2).item() == pytest.approx(two)
    assert bound_loss(LOG_WEIGHTS, "iwae", 4).item() == pytest.approx(-math.log(3.75 / 4))
    of_one = bound_loss(LOG_WEIGHTS, "iwae", 1)
    assert of_one.item() == pytest.approx(bound_loss(LOG_WEIGHTS, "elbo", 1).item())


def gradient(log_weights: Tensor, objective: str, group_size: int) -> list[float]:
    log_weights = log_weights.clone().requires_grad_()
    bound_loss(log_weights, objective, group_size).backward()
    return log_weights.grad.tolist()


def test_gradients_by_hand() -> None:
    """Weights of ELBO 1/S, of IWAE w, of DReG w², each normalised in its group of two."""
    assert gradient(LOG_WEIGHTS, "elbo", 2) == pytest.approx([-1 / 4] * 4)
    w = torch.tensor([2 / 3, 1 / 3, 2 / 3, 1 / 3])
    assert gradient(LOG_WEIGHTS, "iwae", 2) == pytest.approx((-w / 2).tolist())
    assert gradient(LOG_WEIGHTS, "dreg", 2) == pytest.approx((-w.square() / 2).tolist())


def cut(log_weights: Tensor, objective: str) -> tuple[float, list[float]]:
    """The loss of a guide cut to where weights are finite, and its gradient in the weights."""
    log_weights = log_weights.clone().requires_grad_()
    loss = cut_loss(log_weights, objective, 2, torch.zeros(4, 1), None, path=False)
    loss.backward()
    return loss.item(), log_weights.grad.tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_count_as_zero(bad: float) -> None:
    """A draw that is left out counts as weight zero in its group, not as a smaller group."""
    log_weights = LOG_WEIGHTS.clone()
    log_weights[1] = bad
    loss, slopes = cut(log_weights, "elbo")
    kept = -LOG_WEIGHTS[[0, 2, 3]].mean().item()
    assert loss == pytest.approx(kept - (1 + LOST) * math.log(3 / 4))  # of the draws lost
    assert slopes == pytest.approx([-1 / 3, 0, -1 / 3, -1 / 3])
    loss, slopes = cut(log_weights, "iwae")
    kept = -(math.log(0.25) + math.log(1.5)) / 2  # both groups have a weight
    assert loss == pytest.approx(kept - LOST * math.log(3 / 4))
    assert slopes == pytest.approx([-1 / 2, 0, -1 / 3, -1 / 6])
    assert cut(log_weights, "dreg")[1] == pytest.approx([-1 / 2, 0, -2 / 9, -1 / 18])


@pytest.mark.parametrize("objective", ["iwae", "dreg"])
def test_group_without_a_finite_weight_is_lost(objective: str) -> None:
    log_weights = LOG_WEIGHTS.clone()
    log_weights[:2] = torch.tensor([math.nan, -math.inf])
    kept = bound_loss(LOG_WEIGHTS[2:], objective, 2).item()
    loss, slopes = cut(log_weights, objective)
    assert loss == pytest.approx(kept - (1 + LOST) * math.log(1 / 2))
    assert slopes[:2] == [0.0, 0.0]


@pytest.mark.parametrize("objective", ["elbo", "iwae", "dreg"])
def test_nothing_finite_gives_no_finite_loss(objective: str) -> None:
    weights = torch.full((4,), math.nan)
    loss = cut_loss(weights, objective, 2, torch.zeros(4, 1), None, path=False)
    assert not loss.isfinite()


@pytest.mark.parametrize("objective", ["iwae", "dreg"])
def test_huge_log_weights_do_not_overflow(objective: str) -> None:
    plain = gradient(LOG_WEIGHTS, objective, 2)
    assert gradient(LOG_WEIGHTS + 1e5, objective, 2) == pytest.approx(plain, rel=1e-9)
    assert gradient(LOG_WEIGHTS - 1e5, objective, 2) == pytest.approx(plain, rel=1e-9)


def toy_log_weights(theta: Tensor, noise: Tensor, *, path: bool) -> Tensor:
    """Log p − log q of q = N(θ₀, θ₁²) for p = N(0, 1); q's parameters fixed along the path."""
    z = theta[0] + theta[1] * noise
    loc, scale = theta.detach() if path else theta
    log_q = -((z - loc) / scale).square() / 2 - scale.log()
    return -z.square() / 2 - log_q


def test_dreg_has_the_gradient_of_iwae_on_average() -> None:
    theta = torch.tensor([0.8, 0.6], requires_grad=True)
    # The exact gradient of two draws' bound, by quadrature over both.
    nodes = torch.linspace(-9, 9, 601)
    mass = (-nodes.square() / 2).softmax(0)
    log_w = toy_log_weights(theta, nodes, path=False)
    bound = torch.logaddexp(log_w[:, None], log_w) - math.log(2)
    loss = -(mass[:, None] * mass * bound).sum()
    (exact,) = torch.autograd.grad(loss, theta, retain_graph=True)
    (of_elbo,) = torch.autograd.grad(-(mass * log_w).sum(), theta)
    noise = torch.randn(400_000)
    for objective in ("dreg", "iwae"):
        log_weights = toy_log_weights(theta, noise, path=objective == "dreg")
        (found,) = torch.autograd.grad(bound_loss(log_weights, objective, 2), theta)
        assert torch.allclose(found, exact, atol=0.008)
    assert (of_elbo - exact).abs().max() > 0.1
