"""Checkpoints of the deep latent Gaussian model: going on, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dlgm_cases import IMAGES, LENGTHS, SCHEDULE, parameters, small, trained

from pyroflow.inference.processes import ALONE, Processes
from rezende_mohamed_2015.dlgm import DLGM
from rezende_mohamed_2015.dlgm_training import Schedule, digest, train


@pytest.mark.parametrize("stopped", [4, 8])
def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path, stopped: int) -> None:
    """To the last bit, whichever update the interruption came after."""
    checkpoint = tmp_path / "run.pt"
    broken, count = small(), 0

    def interrupt(*_: object) -> None:
        nonlocal count
        count += 1
        if count > stopped + 1:
            raise KeyboardInterrupt

    broken.encoder.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(broken, IMAGES, SCHEDULE, checkpoint=checkpoint, every=4, progress=False)
    kept = torch.load(checkpoint, weights_only=True)["state"]
    assert kept["step"] == stopped
    resumed = small(seed=9)
    done = train(resumed, IMAGES, SCHEDULE, checkpoint=checkpoint, every=4, progress=False)
    assert torch.equal(parameters(resumed), parameters(trained()))
    assert done.updates == 12
    assert done.seconds > kept["seconds"]
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_a_finished_run_is_read_and_not_repeated(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.pt"
    first = trained(checkpoint=checkpoint)
    again = small(seed=9)
    done = train(again, IMAGES, SCHEDULE, checkpoint=checkpoint, progress=False)
    assert done.updates == 12
    assert torch.equal(parameters(again), parameters(first))


class First(Processes):
    """Rank 0 of two, without the other."""

    def agree(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value] * 2


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.pt"
    trained(checkpoint=checkpoint)
    longer = Schedule(13, lr=0.01, flow_lr=0.02, **LENGTHS)
    for schedule, seed in ((longer, 0), (SCHEDULE, 1)):
        with pytest.raises(ValueError, match=r"run\.pt is of a fit with .*Remove it or name"):
            trained(schedule, seed, checkpoint=checkpoint)
    others = ((1 - IMAGES, ALONE), (IMAGES, First(0, 2)))
    for images, processes in others:
        options = {"checkpoint": checkpoint, "processes": processes, "progress": False}
        with pytest.raises(ValueError, match=r"run\.pt is of a fit with .*Remove it or name"):
            train(small(), images, SCHEDULE, **options)


def test_a_checkpoint_without_its_settings_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.pt"
    trained(checkpoint=checkpoint)
    kept = torch.load(checkpoint)
    del kept["settings"]
    torch.save(kept, checkpoint)
    with pytest.raises(ValueError, match=r"run\.pt is not a checkpoint .*Remove it"):
        trained(checkpoint=checkpoint)


def test_a_digest_tells_images_by_their_bytes() -> None:
    other = IMAGES.clone()
    other[3, 2] ^= 1
    same = IMAGES.T.contiguous().T
    assert not same.is_contiguous()
    assert digest(same) == digest(IMAGES) != digest(other)
    assert len({digest(images) for images in (IMAGES, other, IMAGES.float())}) == 3


@pytest.mark.parametrize("damage", [b"", b"no checkpoint", None])
def test_a_damaged_checkpoint_is_refused_and_kept(tmp_path: Path, damage: bytes | None) -> None:
    checkpoint = tmp_path / "run.pt"
    trained(checkpoint=checkpoint)
    whole = checkpoint.read_bytes()
    damaged = whole[: len(whole) // 2] if damage is None else damage
    checkpoint.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"run\.pt .*Remove it"):
        trained(checkpoint=checkpoint)
    assert checkpoint.read_bytes() == damaged


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.pt"
    trained(checkpoint=checkpoint)
    other = DLGM(6, latent_dim=3, hidden_dim=8)
    with pytest.raises(ValueError, match=r"run\.pt is of a fit with shapes="):
        train(other, IMAGES, SCHEDULE, checkpoint=checkpoint, progress=False)
