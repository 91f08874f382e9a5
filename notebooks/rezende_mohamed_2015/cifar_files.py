"""The binary version of CIFAR-10: bytes without code, one row an image."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TRAINING = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
SHAPE = (3, 32, 32)
ROW = 1 + 3 * 32 * 32  # bytes: the label, then red, green and blue, each row by row
SOURCE = "get https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz and unpack it"


class Cifar10(NamedTuple):
    """The images and labels of CIFAR-10.

    Attributes:
        train_images: shape (50000, 3, 32, 32), uint8: red, green, blue.
        train_labels: shape (50000,), uint8, 0 to 9.
        test_images: shape (10000, 3, 32, 32), uint8.
        test_labels: shape (10000,), uint8.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def cifar10(folder: str | PathLike[str]) -> Cifar10:
    """Read CIFAR-10 from the six files of its binary version.

    Args:
        folder: the folder of ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``,
            or the one above, with the files in ``cifar-10-batches-bin``.

    Returns:
        Images and labels, as many as the files hold.

    Raises:
        FileNotFoundError: If a file is missing; the message says where to get it.
        ValueError: If a file is not made of whole rows with a label from 0 to 9 each.

    References:
        Krizhevsky, Learning multiple layers of features from tiny images, 2009,
        https://www.cs.toronto.edu/~kriz/cifar.html, which describes the format.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        ...     _ = (folder / name).write_bytes(bytes(2 * 3073))
        >>> cifar10(folder).train_images.shape
        torch.Size([10, 3, 32, 32])
    """
    folder = Path(folder)
    training = np.concatenate([_rows(_find(folder, name)) for name in TRAINING])
    test = _rows(_find(folder, "test_batch.bin"))
    return Cifar10(*_images_and_labels(training), *_images_and_labels(test))


def _find(folder: Path, name: str) -> Path:
    for place in (folder, folder / "cifar-10-batches-bin"):
        if (place / name).is_file():
            return place / name
    raise FileNotFoundError(
        f"cifar10: there is no {name} in {folder} or its cifar-10-batches-bin: {SOURCE}"
    )


def _rows(file: Path) -> np.ndarray:
    content = np.fromfile(file, np.uint8)
    if not content.size or content.size % ROW:
        raise ValueError(
            f"{file} expects rows of {ROW} bytes, a label and 3 × 32 × 32 colours each, got "
            f"{content.size} bytes: {SOURCE}"
        )
    rows = content.reshape(-1, ROW)
    if (largest := rows[:, 0].max()) > 9:
        raise ValueError(f"{file} expects labels from 0 to 9, got {largest}: {SOURCE}")
    return rows


def _images_and_labels(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    table = torch.from_numpy(rows)
    return table[:, 1:].reshape(-1, *SHAPE), table[:, 0].clone()
