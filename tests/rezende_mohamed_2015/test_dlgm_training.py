"""Training the deep latent Gaussian model: schedule, batches, updates, what is refused."""

from __future__ import annotations

import copy
import math
from itertools import product

import pytest
import torch
from dlgm_cases import IMAGES, LENGTHS, SCHEDULE, parameters, small, trained
from torch import Tensor

from pyroflow.inference.processes import Processes
from rezende_mohamed_2015 import dlgm_objective
from rezende_mohamed_2015.dlgm import Terms
from rezende_mohamed_2015.dlgm_training import Schedule, train

# the schedule


def test_beta_is_equation_20() -> None:
    """β_t = min(1, 0.01 + t/10000), for the paper's 10,000 updates of annealing."""
    schedule = Schedule(500_000, lr=1e-5, flow_lr=1e-5, annealing=10_000)
    steps = (0, 1, 500, 9_899, 9_900, 499_999)
    expected = [0.01, 0.0101, 0.06, 0.9999, 1.0, 1.0]
    assert [schedule.beta(t) for t in steps] == pytest.approx(expected, abs=1e-12)


def test_rates_rise_stay_and_fall() -> None:
    schedule = Schedule(100, lr=1.0, flow_lr=1.0, warm_up=10, cool_down=20)
    found = [schedule.rate(t) for t in (0, 4, 9, 50, 80, 90, 99)]
    assert found == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.05])


@pytest.mark.parametrize(
    "name", ["updates", "warm_up", "cool_down", "annealing", "batch_size", "lr", "flow_lr"]
)
def test_a_schedule_wants_positive_numbers(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Schedule(**{"updates": 5, "lr": 1.0, "flow_lr": 1.0} | {name: 0})


def test_the_flow_has_a_rate_of_its_own() -> None:
    """Adam's first step is of the size of the rate, whatever the gradient."""
    dlgm = small()
    with torch.no_grad():
        for p in dlgm.parts.parameters():  # at the identity, some have no gradient
            p.add_(torch.randn_like(p))
    before = copy.deepcopy(dlgm)
    lengths = LENGTHS | {"warm_up": 1, "cool_down": 1}
    train(dlgm, IMAGES, Schedule(1, lr=0.01, flow_lr=0.0001, **lengths), progress=False)
    pairs = zip(before.named_parameters(), dlgm.parameters(), strict=True)
    for (name, old), new in pairs:
        rate = 0.0001 if name.startswith("parts") else 0.01
        assert (new - old).abs().max().item() == pytest.approx(rate, rel=0.01), name


# what an update does


def test_training_lowers_the_bound() -> None:
    images = (torch.rand(200, 6) < torch.linspace(0.05, 0.95, 6)).to(torch.uint8)
    images[:, 3:] = images[:, :3]
    dlgm = small()
    before = dlgm(images.double(), 50).bound().mean().item()
    done = train(dlgm, images, Schedule(500, lr=0.01, flow_lr=0.005), progress=False)
    after = dlgm(images.double(), 50).bound().mean().item()
    assert after < 0.8 * before
    assert (done.updates, done.skipped) == (500, 0)
    assert done.seconds > 0


def test_every_update_has_its_beta(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the loss; the number that is shown has β = 1."""
    betas: list[float] = []
    bound = Terms.bound

    def noted(terms: Terms, beta: float = 1.0) -> Tensor:
        betas.append(beta)
        return bound(terms, beta)

    monkeypatch.setattr(Terms, "bound", noted)
    trained()
    assert betas[::2] == [0.01, 0.26, 0.51, 0.76, *[1.0] * 8]
    assert betas[1::2] == [1.0] * 12


def test_every_image_once_an_epoch() -> None:
    """All but the rest of 5 that no batch of 10 takes, in another order each time."""
    numbers = torch.arange(35)[:, None]
    batches = dlgm_objective.batches(numbers, 10, 0, Processes())(0)
    epochs = [torch.cat([next(batches) for _ in range(3)]).flatten().tolist() for _ in range(2)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 30
    assert epochs[0] != epochs[1]


def test_processes_share_a_batch() -> None:
    numbers = torch.arange(40)[:, None]
    shares = [dlgm_objective.batches(numbers, 10, 0, Processes(r, 2))(0) for r in range(2)]
    epoch = [torch.cat([next(share) for _ in range(4)]).flatten() for share in shares]
    assert epoch[0].shape == epoch[1].shape == (20,)
    assert torch.equal(torch.cat(epoch).sort().values, torch.arange(40))


@pytest.mark.parametrize("done", [0, 1, 3, 7])
def test_batches_go_on_where_they_were(done: int) -> None:
    numbers = torch.arange(35)[:, None]
    unbroken = dlgm_objective.batches(numbers, 10, 0, Processes())(0)
    for _ in range(done):
        next(unbroken)
    resumed = dlgm_objective.batches(numbers, 10, 0, Processes())(done)
    for _ in range(4):
        assert torch.equal(next(unbroken), next(resumed))


def test_processes_and_updates_have_noise_of_their_own() -> None:
    parts = product(range(3), range(4), range(50))  # seed, rank, update
    assert len({dlgm_objective.noise_seed(*part) for part in parts}) == 600


def test_seeds_differ_and_repeat() -> None:
    first, again, other = (parameters(trained(seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-4


def test_training_leaves_the_callers_generator() -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    trained()
    assert torch.equal(torch.rand(3), expected)


# what is refused, and what is lived through


def test_an_update_without_a_finite_gradient_is_left_out() -> None:
    images = IMAGES.double()
    images[7] = math.nan
    dlgm = small()
    done = train(dlgm, images, SCHEDULE, progress=False)
    assert 0 < done.skipped < 12
    assert parameters(dlgm).isfinite().all()
    assert math.isfinite(done.free_energy)


def test_a_run_that_never_moves_is_given_up() -> None:
    dlgm, schedule = small(), Schedule(200, lr=0.01, flow_lr=0.02, **LENGTHS)
    before = copy.deepcopy(dlgm)
    with pytest.raises(
        FloatingPointError, match="no finite gradient in 100 updates up to 99; lower"
    ):
        train(dlgm, torch.full((35, 6), math.nan), schedule, progress=False)
    assert torch.equal(parameters(dlgm), parameters(before))


def test_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, _=None: norms.append(total(self)))

    def total(adam: torch.optim.Optimizer) -> float:
        grads = [p.grad for group in adam.param_groups for p in group["params"]]
        return torch.cat([g.flatten() for g in grads]).norm().item()

    trained(Schedule(3, lr=0.01, flow_lr=0.01, max_norm=0.5, batch_size=10, annealing=1))
    assert norms == pytest.approx([0.5] * 3, rel=1e-4)


def test_batches_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 10 cannot be shared by 3 processes"):
        trained(processes=Processes(0, 3))
    with pytest.raises(ValueError, match="images must be at least batch_size 10, got 9"):
        train(small(), IMAGES[:9], SCHEDULE, progress=False)
