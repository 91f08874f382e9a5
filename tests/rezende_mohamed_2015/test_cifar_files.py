"""CIFAR-10's files, on small ones of the same format."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from rezende_mohamed_2015.cifar_files import cifar10

NAMES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def pictures(seed: int, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    return images, rng.integers(0, 10, count, dtype=np.uint8)


def batch(images: np.ndarray, labels: np.ndarray) -> bytes:
    """A label, then 1024 bytes of red, of green and of blue, for each image."""
    return b"".join(
        bytes([label]) + b"".join(channel.tobytes() for channel in image)
        for image, label in zip(images, labels, strict=True)
    )


def write_cifar(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate(NAMES):
        (folder / name).write_bytes(batch(*pictures(seed)))
    return folder


@pytest.mark.parametrize("below", ["", "cifar-10-batches-bin"])
def test_cifar10(tmp_path: Path, below: str) -> None:
    write_cifar(tmp_path / below)
    read = cifar10(tmp_path)
    images, labels = (np.concatenate(part) for part in zip(*map(pictures, range(6)), strict=True))
    assert read.train_images.dtype == read.train_labels.dtype == torch.uint8
    assert np.array_equal(torch.cat([read.train_images, read.test_images]), images)
    assert np.array_equal(torch.cat([read.train_labels, read.test_labels]), labels)
    assert len(read.test_images) == 2


def test_cifar10_files_that_are_missing(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no data_batch_4.bin in .*cs\.toronto\.edu"):
        cifar10(tmp_path)


good, fine = pictures(0)
BAD = {
    "nothing": (b"", "got 0 bytes"),
    "half a file": (batch(good, fine)[:4000], "rows of 3073 bytes.*got 4000 bytes.*get https"),
    "a page of the web": (b"<!DOCTYPE html>", "got 15 bytes"),
    "the python version": (pickle.dumps({b"data": good, b"labels": [1, 2]}), "rows of 3073 bytes"),
    "grey": (batch(good[:, :1], fine), "got 2050 bytes"),
    "eleven classes": (batch(good, np.array([1, 10])), "labels from 0 to 9, got 10"),
}


@pytest.mark.parametrize("case", BAD)
def test_cifar10_refuses(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    (write_cifar(tmp_path) / "data_batch_3.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"data_batch_3.*{message}"):
        cifar10(tmp_path)
