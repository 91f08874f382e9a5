"""Fresh draws of grey images, and updates as launches: those of a GPU are played on the CPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import slow
from dlgm_cases import IMAGES, LENGTHS, SCHEDULE, parameters, small
from played import played
from torch import Tensor

from pyroflow.inference import launches
from pyroflow.inference.launches import ONE_LAUNCH, READ
from pyroflow.inference.processes import ALONE
from pyroflow.seeds import seeded
from pyroflow.transforms.kernels import autograd
from rezende_mohamed_2015 import dlgm_training, mnist, sylvester
from rezende_mohamed_2015.dlgm import DLGM
from rezende_mohamed_2015.dlgm_objective import AnnealedBound, batch_indices, batches, noise_seed
from rezende_mohamed_2015.dlgm_training import Progress, Schedule, train

GREY = (torch.rand(35, 6, generator=torch.Generator().manual_seed(6)) * 256).to(torch.uint8)
LONGER = Schedule(2 * READ + 7, lr=0.01, flow_lr=0.02, **LENGTHS)
KINDS = [pytest.param(False, id="static"), pytest.param(True, id="fresh")]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates are launches; the planar kernels look at weights on the CPU alone."""
    monkeypatch.setattr(autograd, "_constrain_rows", lambda w, u: None)
    monkeypatch.setattr(launches, "capture", played)
    monkeypatch.setattr(launches, "_is_one_gpu", lambda devices: True)


def images(fresh: bool) -> Tensor:
    return GREY if fresh else IMAGES


# fresh draws


def seen_by(dlgm: DLGM) -> list[Tensor]:
    """Fills with the batches that the inference network gets."""
    seen: list[Tensor] = []
    dlgm.encoder.register_forward_hook(lambda _, x, __: seen.append(x[0].detach() + dlgm.centre))
    return seen


@pytest.mark.slow
def test_fresh_draws_are_binary_and_have_the_law_of_their_grey_values() -> None:
    grey = torch.tensor([0, 1, 51, 128, 254, 255], dtype=torch.uint8).expand(50, -1)
    dlgm = small()
    seen = seen_by(dlgm)
    schedule = Schedule(400, lr=1e-3, flow_lr=1e-3, **LENGTHS | {"batch_size": 50})
    train(dlgm, grey.contiguous(), schedule, fresh=True, progress=False)
    drawn, p = torch.stack(seen), grey[0] / 255.0
    assert drawn.shape == (400, 50, 6)
    assert drawn.unique().tolist() == [0, 1]
    error = (p * (1 - p) / (400 * 50)).sqrt()
    assert ((drawn.mean((0, 1)) - p).abs() <= 4 * error).all()
    assert len({tuple(batch.flatten().tolist()) for batch in drawn}) == 400


@pytest.mark.parametrize("stopped", [4, 8])
def test_a_resumed_run_has_the_draws_of_an_unbroken_one(tmp_path: Path, stopped: int) -> None:
    """To the last bit."""
    options = {"fresh": True, "every": 4, "progress": False}
    unbroken, broken, resumed = small(), small(), small(seed=9)
    expected = seen_by(unbroken)
    train(unbroken, GREY, SCHEDULE, **options)
    count = 0

    def interrupt(*_: object) -> None:
        nonlocal count
        count += 1
        if count > stopped + 1:
            raise KeyboardInterrupt

    broken.encoder.register_forward_hook(interrupt)
    options["checkpoint"] = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(broken, GREY, SCHEDULE, **options)
    seen = seen_by(resumed)
    train(resumed, GREY, SCHEDULE, **options)
    assert len(seen) == 12 - stopped
    assert all(map(torch.equal, seen, expected[stopped:]))
    assert torch.equal(parameters(resumed), parameters(unbroken))


def test_a_checkpoint_of_other_draws_is_refused(tmp_path: Path) -> None:
    options = {"checkpoint": tmp_path / "run.pt", "progress": False}
    train(small(), GREY, SCHEDULE, **options)
    with pytest.raises(ValueError, match=r"of a fit with fresh=False \(now True\)"):
        train(small(), GREY, SCHEDULE, fresh=True, **options)


def test_fresh_draws_want_grey_values_in_bytes() -> None:
    with pytest.raises(ValueError, match=r"images must be grey values .* got torch\.float64"):
        train(small(), GREY / 255.0, SCHEDULE, fresh=True, progress=False)


def test_a_schedule_in_other_batches_has_the_same_images() -> None:
    schedule = mnist.SCHEDULES["fresh"].in_batches_of(mnist.GPU_BATCH)
    assert (schedule.updates, schedule.cool_down, schedule.batch_size) == (60_000, 40_500, 200)
    kept = ("lr", "flow_lr", "warm_up", "annealing", "max_norm")
    assert all(getattr(schedule, k) == getattr(mnist.SCHEDULES["fresh"], k) for k in kept)


# the steady loss


@pytest.mark.parametrize("updates", [1, 3, 10])
def test_indices_are_those_of_the_batches(updates: int) -> None:
    numbers = torch.arange(35)[:, None]
    running = batches(numbers, 10, 4, ALONE)(0)
    found = batch_indices(35, 10, 4, updates)
    assert found.shape == (updates, 10)
    for indices in found:
        assert torch.equal(indices, next(running).flatten())


@pytest.mark.parametrize("fresh", KINDS)
@pytest.mark.parametrize("t", [0, 2, 11])
def test_the_steady_loss_is_that_of_the_update(t: int, fresh: bool) -> None:
    """The same images, β and noise: the same value and gradients, in other operations."""
    found = []
    for steady in (False, True):
        bound = AnnealedBound(small(), images(fresh), SCHEDULE, seed=2, fresh=fresh)
        running = batches(images(fresh), 10, 2, ALONE)(t)
        with seeded(5):
            if steady:
                loss = bound.steady(torch.tensor(float(t)))
            else:
                loss = bound._at(next(running), SCHEDULE.beta(t))
        loss.backward()
        gradients = [p.grad for p in bound.dlgm.parameters()]
        found.append(torch.cat([g.flatten() for g in (loss, bound.free_energy, *gradients)]))
    torch.testing.assert_close(*found)


def by_hand(dlgm: DLGM, fresh: bool, schedule: Schedule, seed: int) -> float:
    """The updates one after the other, by one generator; the running mean of the bound."""
    optimiser = torch.optim.Adam(dlgm_training._groups(dlgm, schedule), fused=True)
    running, mean = batches(images(fresh), schedule.batch_size, seed, ALONE)(0), math.nan
    with seeded(noise_seed(seed, 0)):
        for t in range(schedule.updates):
            for group in optimiser.param_groups:
                group["lr"] = schedule.rate(t) * group["peak"]
            optimiser.zero_grad()
            x = next(running).to(dlgm.centre)
            terms = dlgm((x / 255).bernoulli() if fresh else x)
            terms.bound(schedule.beta(t)).mean().backward()
            torch.nn.utils.clip_grad_norm_(dlgm.parameters(), schedule.max_norm)
            optimiser.step()
            torch.autograd.graph.increment_version(list(dlgm.parameters()))
            value = terms.bound().mean().item()
            mean = value if math.isnan(mean) else mean + 0.002 * (value - mean)
    return mean


def compared(device: str, fresh: bool) -> Progress:
    dlgm = small().to(device)
    expected = copy.deepcopy(dlgm)
    mean = by_hand(expected, fresh, LONGER, 3)
    start = parameters(dlgm)
    done = train(dlgm, images(fresh), LONGER, fresh=fresh, seed=3, progress=False)
    # The rate of a launch is in float32.
    torch.testing.assert_close(parameters(dlgm), parameters(expected), rtol=1e-3, atol=1e-4)
    assert (parameters(dlgm) - start).abs().max() > 0.1
    assert done.free_energy == pytest.approx(mean, rel=1e-4)
    assert (done.updates, done.skipped) == (LONGER.updates, 0)
    return done


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("fresh", [pytest.param(False, id="static"), slow(True, id="fresh")])
def test_launches_are_the_updates_that_they_replace(fresh: bool) -> None:
    """The steps before the capture leave no trace, neither in the draws nor in the mean."""
    assert compared("cpu", fresh).launches == ONE_LAUNCH


@CUDA
@pytest.mark.parametrize("fresh", KINDS)
def test_launches_of_a_graph_are_the_updates_that_they_replace(fresh: bool) -> None:
    assert compared("cuda", fresh).launches == ONE_LAUNCH


FLOWS: dict[str, Callable[[], list]] = {
    "K = 0": lambda: [],
    "planar": partial(mnist.layers, "planar", 2),
    "NICE": partial(mnist.layers, "NICE", 2),
    **{kind: partial(sylvester.layers, kind, M, 2) for kind, M in sylvester.UNITS.items()},
}


@pytest.mark.usefixtures("launched", "float32")
@pytest.mark.parametrize("name", FLOWS)
def test_the_host_reads_nothing_of_the_real_model(name: str) -> None:
    """Else an update could be no launch."""
    grey = (torch.rand(20, 784) * 256).to(torch.uint8)
    dlgm = mnist.model(grey.float().mean(0) / 255, FLOWS[name]())
    schedule = Schedule(3, lr=1e-3, flow_lr=1e-3, **LENGTHS)
    done = train(dlgm, grey, schedule, fresh=True, progress=False)
    assert (done.launches, done.skipped) == (ONE_LAUNCH, 0)
    assert math.isfinite(done.free_energy)


@CUDA
@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("name", FLOWS)
def test_an_update_of_the_real_model_is_one_launch(name: str) -> None:
    grey = (torch.rand(20, 784) * 256).to(torch.uint8)
    dlgm = mnist.model(grey.float().mean(0) / 255, FLOWS[name]()).to("cuda")
    schedule = Schedule(3, lr=1e-3, flow_lr=1e-3, **LENGTHS)
    done = train(dlgm, grey, schedule, fresh=True, progress=False)
    assert (done.launches, done.skipped) == (ONE_LAUNCH, 0)


@pytest.mark.usefixtures("launched")
def test_launches_go_on_after_an_update_without_a_finite_gradient() -> None:
    """As it is left out either way, and the others are to be as fast as before."""
    broken = IMAGES.double()
    broken[7] = math.nan
    dlgm = small()
    done = train(dlgm, broken, LONGER, progress=False)
    assert done.launches == ONE_LAUNCH
    epochs = LONGER.updates / 3  # of 30 of 35 images, one of which is broken
    assert 0.5 * epochs < done.skipped < epochs + 1
    assert parameters(dlgm).isfinite().all()
    assert math.isfinite(done.free_energy)


@pytest.mark.usefixtures("launched")
def test_launches_that_never_move_are_given_up() -> None:
    """When eight at a time have been taken."""
    dlgm, schedule = small(), Schedule(500, lr=0.01, flow_lr=0.02, **LENGTHS)
    start = parameters(dlgm)
    with pytest.raises(FloatingPointError, match="no finite gradient in 100 updates up to 103;"):
        train(dlgm, torch.full((35, 6), math.nan), schedule, progress=False)
    assert torch.equal(parameters(dlgm), start)


@pytest.mark.usefixtures("launched")
def test_with_a_checkpoint_updates_are_no_launches(tmp_path: Path) -> None:
    done = train(small(), GREY, SCHEDULE, checkpoint=tmp_path / "run.pt", progress=False)
    assert done.launches == ""
