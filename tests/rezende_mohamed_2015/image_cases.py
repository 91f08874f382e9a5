"""Small MNIST files for tests: blurred strokes, in the format and under the names of the real."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np


def idx(array: np.ndarray) -> bytes:
    """An array of bytes in the IDX format."""
    return struct.pack(f">{1 + array.ndim}i", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def strokes(count: int, seed: int) -> np.ndarray:
    """Grey images of one bar each, with soft edges; shape (count, 28, 28)."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(28.0), np.arange(28.0))
    angle, shift = rng.uniform(0, np.pi, (count, 1, 1)), rng.uniform(-5, 5, (count, 1, 1))
    across = (x - 13.5) * np.cos(angle) + (y - 13.5) * np.sin(angle) - shift
    inside = np.hypot(x - 13.5, y - 13.5) < 10
    return (255 * inside * np.exp(-((across / 2) ** 2))).astype(np.uint8)


def write_mnist(folder: Path, train: int, test: int) -> Path:
    """The four gzipped files, of so many images."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (part, count) in enumerate({"train": train, "t10k": test}.items()):
        labels = np.arange(count, dtype=np.uint8) % 10
        arrays = {"images-idx3": strokes(count, seed), "labels-idx1": labels}
        for name, array in arrays.items():
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    return folder
