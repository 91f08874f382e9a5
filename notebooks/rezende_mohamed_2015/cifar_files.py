"""The python version of CIFAR-10, read without running what its pickles ask for."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from operator import index
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Cifar10", "cifar10"]

_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_SHAPE = (3, 32, 32)
_WIDTH = 3 * 32 * 32
_CLASSES = range(10)
_SOURCE = (
    "get https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz and unpack it, or use"
    " torchvision.datasets.CIFAR10(root, download=True)"
)


@dataclass(frozen=True, eq=False)
class Cifar10:
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
    """Reads CIFAR-10 from the six batches of its python version.

    The batches are pickles. They are read as data: what they ask to be called is recorded and
    looked at, and never called, so a file that was tampered with cannot run anything.

    Args:
        folder: The folder of ``data_batch_1`` to ``data_batch_5`` and ``test_batch``, or the one
            above, with the files in ``cifar-10-batches-py``.

    Returns:
        Images and labels, as many as the files hold.

    Raises:
        FileNotFoundError: A file is missing; the message says where to get it.
        ValueError: A file is no pickle, asks for more than an array needs, or holds no images of
            3 × 32 × 32 bytes with a label from 0 to 9 for each.

    References:
        Krizhevsky, Learning multiple layers of features from tiny images, 2009,
        https://www.cs.toronto.edu/~kriz/cifar.html, which describes the format.

    Example:
        >>> import pathlib, pickle, tempfile
        >>> import numpy as np
        >>> from rezende_mohamed_2015.cifar_files import cifar10
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [3, 7]}
        >>> for name in ["test_batch", *(f"data_batch_{i}" for i in range(1, 6))]:
        ...     _ = (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
        >>> cifar10(folder).train_images.shape
        torch.Size([10, 3, 32, 32])
    """
    folder = Path(folder)
    parts = [_read_batch(_find(folder, name)) for name in _BATCHES]
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return Cifar10(images, labels, *_read_batch(_find(folder, "test_batch")))


def _find(folder: Path, name: str) -> Path:
    for place in (folder, folder / "cifar-10-batches-py"):
        if (place / name).is_file():
            return place / name
    raise FileNotFoundError(
        f"cifar10: there is no {name} in {folder} or its cifar-10-batches-py: {_SOURCE}"
    )


def _read_batch(file: Path) -> tuple[Tensor, Tensor]:
    batch = _load(file)
    if not isinstance(batch, dict):
        raise ValueError(f"{file} expects a dictionary, got {type(batch).__name__}: {_SOURCE}")
    named = {_text(key): value for key, value in batch.items()}
    missing = {"data", "labels"} - named.keys()
    if missing:
        raise ValueError(
            f"{file} has no {' and no '.join(sorted(missing))}, but {list(named)}: {_SOURCE}"
        )
    images, labels = _images(file, named["data"]), _labels(file, named["labels"])
    if len(images) != len(labels):
        raise ValueError(f"{file} has {len(images)} images, but {len(labels)} labels: {_SOURCE}")
    return images, labels


class _Recorded:
    """A call that a pickle asks for: its arguments, and the state that the result is to have.

    NumPy itself is not called: it would trust the state that a hostile file sets.
    """

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Encoded(_Recorded):
    """Bytes as Python 3 writes them in protocol 2: the text whose code points they are."""

    def __new__(cls, text: str, encoding: str) -> bytes:
        return text.encode("latin1")


# All that a pickled array calls, in NumPy 1 and 2.
_STAND_INS = {
    "numpy.core.multiarray._reconstruct": _Recorded,
    "numpy._core.multiarray._reconstruct": _Recorded,
    "numpy.ndarray": _Recorded,
    "numpy.dtype": _Recorded,
    "_codecs.encode": _Encoded,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Recorded]:
        if f"{module}.{name}" not in _STAND_INS:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which no array of numbers needs"
            )
        return _STAND_INS[f"{module}.{name}"]


def _load(file: Path) -> Any:
    """The objects of a pickle by Python 2 or 3, with calls recorded in the place of arrays."""
    with file.open("rb") as stream:
        try:
            return _Reader(stream, encoding="bytes").load()
        except Exception as error:  # damaged pickles raise nearly anything
            raise ValueError(
                f"{file} cannot be read as a batch of CIFAR-10 ({error}): {_SOURCE}"
            ) from error


def _images(file: Path, array: Any) -> Tensor:
    wanted = f"{file}: data expects an array of shape (n, {_WIDTH}) of uint8"
    try:
        _, shape, dtype, by_column, content = array.state
        rows, width = map(index, shape)
        kind, pixels = _text(dtype.arguments[0]), memoryview(content)
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{wanted}, got {type(array).__name__} ({error}): {_SOURCE}") from error
    if (width, kind) != (_WIDTH, "u1") or rows < 1 or len(pixels) != rows * width:
        raise ValueError(
            f"{wanted}, got shape {shape}, type {kind!r} and {len(pixels)} bytes: {_SOURCE}"
        )
    values = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
    values = values.reshape(width, rows).T if by_column else values.reshape(rows, width)
    return values.reshape(rows, *_SHAPE)


def _labels(file: Path, labels: Any) -> Tensor:
    if not isinstance(labels, list) or any(label not in _CLASSES for label in labels):
        raise ValueError(f"{file}: labels expects a list of integers from 0 to 9: {_SOURCE}")
    return torch.tensor(labels, dtype=torch.uint8)


def _text(value: Any) -> Any:
    """Python 2's strings come as bytes."""
    return value.decode("latin1") if isinstance(value, bytes) else value
