"""MNIST's files, on small ones of the same format, and what is made of images."""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rezende_mohamed_2015.image_files import binarize, mnist, patches, scale_to_open_interval

# MNIST.


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    """An array of bytes in the IDX format: 0, 0, 8 for bytes, the number of dimensions; sizes."""
    magic = 0x0800 + array.ndim if magic is None else magic
    return struct.pack(f">{1 + array.ndim}i", magic, *array.shape) + array.tobytes()


def digits(count: int, seed: int, side: int = 28) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, side, side), dtype=np.uint8)
    return images, rng.integers(0, 10, count, dtype=np.uint8)


TRAIN, TEST = digits(7, 0), digits(3, 1)


def write_mnist(
    folder: Path, pack: Callable[[bytes], bytes] = gzip.compress, end: str = ".gz"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, (images, labels) in {"train": TRAIN, "t10k": TEST}.items():
        (folder / f"{part}-images-idx3-ubyte{end}").write_bytes(pack(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte{end}").write_bytes(pack(idx(labels)))
    return folder


LAYOUTS = {
    "gzipped": ("", gzip.compress, ".gz"),
    "plain": ("", bytes, ""),
    "torchvision": ("MNIST/raw", bytes, ""),
    "unpacked by the browser": ("", bytes, ".gz"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mnist(tmp_path: Path, layout: str) -> None:
    below, pack, end = LAYOUTS[layout]
    write_mnist(tmp_path / below, pack, end)
    read = mnist(str(tmp_path))
    assert read.train_images.dtype == read.train_labels.dtype == torch.uint8
    assert np.array_equal(read.train_images, TRAIN[0].reshape(7, 784))
    assert np.array_equal(read.train_labels, TRAIN[1])
    assert np.array_equal(read.test_images, TEST[0].reshape(3, 784))
    assert np.array_equal(read.test_labels, TEST[1])


def test_mnist_files_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no train-images-idx3-ubyte.gz .* in .*/nowhere"):
        mnist(tmp_path / "nowhere")
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels.*s3\.amazonaws\.com.*torchvision"):
        mnist(tmp_path)


images7, labels7 = idx(TRAIN[0]), idx(TRAIN[1])
BAD_MNIST = {
    "labels for images": ("images-idx3", labels7, r"begin with 2051, got b'\\x00\\x00\\x08\\x01'"),
    "images for labels": ("labels-idx1", images7, "expected it to begin with 2049"),
    "a web page": ("images-idx3", b"<!DOCTYPE html><html>", "is no IDX file of .*get it from"),
    "nothing": ("images-idx3", b"", "is no IDX file of MNIST"),
    "other pixels": ("images-idx3", idx(digits(7, 0, 32)[0]), r"of \(28, 28\) .* got \(32, 32\)"),
    "a pixel short": ("images-idx3", images7[:-1], "expected 5488 bytes .* 7 items, got 5487"),
    "a byte more": ("labels-idx1", labels7 + b"\0", "expected 7 bytes for its 7 items, got 8"),
    "half a header": ("labels-idx1", labels7[:6], "not whole"),
    "no images": ("images-idx3", idx(TRAIN[0][:0]), "not whole: .* 0 items"),
    "another number": ("labels-idx1", idx(TRAIN[1][:6]), "has 7 images, but .* has 6 labels"),
    "eleven classes": ("labels-idx1", idx(TRAIN[1] * 0 + 10), "labels 0 to 9, got 10"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MNIST)
def test_mnist_refuses(tmp_path: Path, case: str) -> None:
    name, content, message = BAD_MNIST[case]
    file = write_mnist(tmp_path) / f"train-{name}-ubyte.gz"
    file.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=message) as refused:
        mnist(tmp_path)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize("damage", [lambda c: c[:-20], lambda c: c[:60] + b"damaged" + c[67:]])
def test_mnist_refuses_damaged_gzip(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    file = write_mnist(tmp_path) / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"train-images\S* is cut off or damaged \(.*get it from"):
        mnist(tmp_path)


# Binary images.

GREY = torch.arange(256, dtype=torch.uint8)


def test_binarize_has_the_law_of_bernoulli() -> None:
    n = 20_000
    drawn = binarize(GREY.expand(n, 256), seed=3)
    assert drawn.dtype == torch.uint8
    assert drawn.unique().tolist() == [0, 1]
    p = GREY.double() / 255
    error = (drawn.double().mean(0) - p) / (p * (1 - p) / n).sqrt().clamp(min=1e-9)
    assert error[0] == error[-1] == 0  # black stays black, white white
    assert error.abs().max() < 4.5
    assert 0.8 < error[1:-1].square().mean() < 1.2  # variance of a Bernoulli: no smoothing either
    pairs = torch.cov((drawn[:, 100:110].double()).T) - torch.diag(p[100:110] * (1 - p[100:110]))
    assert pairs.abs().max() < 5 * 0.25 / n**0.5


def test_binarize_depends_on_the_seed_alone() -> None:
    images = GREY.expand(10, 256)
    before = torch.get_rng_state()
    first = binarize(images)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(binarize(images, seed=0), first)
    assert not torch.equal(binarize(images, seed=1), first)


def test_binarize_scale_and_dtype_do_not_matter() -> None:
    images = GREY.expand(50, 256)
    drawn = binarize(images)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(binarize(images.to(dtype) / 255), drawn)
    torch.set_default_dtype(torch.float32)
    same = torch.equal(binarize(images), drawn)
    torch.set_default_dtype(torch.float64)
    assert same


WHITE = torch.tensor([0, 255], dtype=torch.uint8)
BAD_IMAGES = {
    "list": ([[0.1]], TypeError, "expected a tensor, got list"),
    "integers": (GREY.long(), TypeError, r"got torch.int64: convert 0 to 255 with .to"),
    "bool": (GREY > 0, TypeError, "got torch.bool"),
    "unscaled": (GREY.double(), ValueError, r"in \[0, 1\] in torch.float64, got 2: divide by"),
    "negative": (torch.tensor([0.5, -0.1]), ValueError, "got -0.1"),
    "nan": (torch.tensor([0.5, torch.nan]), ValueError, "got nan"),
    "binary bytes": (WHITE // 255, ValueError, "up to 255 in uint8, got none above 1"),
}  # fmt: skip


@pytest.mark.parametrize("function", [binarize, scale_to_open_interval])
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_images_out_of_range_are_refused(function: Callable, case: str) -> None:
    images, kind, message = BAD_IMAGES[case]
    with pytest.raises(kind, match=f"{function.__name__}: .*{message}"):
        function(images)


@pytest.mark.parametrize("images", [WHITE, WHITE / 255.0])
def test_binarize_refuses_what_is_binary(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="only black and white: .* start again from the grey"):
        binarize(images)


def test_binarize_takes_black_images() -> None:
    assert binarize(torch.zeros(3, 784, dtype=torch.uint8)).sum() == 0


def test_binarize_refuses_other_seeds() -> None:
    with pytest.raises(ValueError, match="seed must be an integer of at least 0, got -1"):
        binarize(GREY, seed=-1)


# Patches and colours.


def test_patches_are_cut_from_all_places_of_all_images() -> None:
    """Each pixel says where it is, so each patch says where it was cut."""
    image, channel, row, column = torch.meshgrid(*map(torch.arange, (4, 3, 9, 10)), indexing="ij")
    cut = patches(image * 1000 + channel * 100 + row * 10 + column, count=4000, size=8)
    assert cut.shape == (4000, 3, 8, 8)
    first = cut[:, :1, :1, :1]
    inside = 100 * channel[:1, :, :8, :8] + 10 * row[:1, :, :8, :8] + column[:1, :, :8, :8]
    assert torch.equal(cut, first + inside)
    places, counts = first.flatten().unique(return_counts=True)
    assert places.tolist() == [
        1000 * n + 10 * i + j for n in range(4) for i in (0, 1) for j in (0, 1, 2)
    ]
    sd = (4000 / 24) ** 0.5
    assert (counts - 4000 / 24).abs().max() < 4.5 * sd


def test_patches_depend_on_the_seed_alone() -> None:
    images = torch.rand(5, 3, 32, 32)
    before = torch.get_rng_state()
    first = patches(images, 20)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(patches(images, 20, seed=0), first)
    assert not torch.equal(patches(images, 20, seed=1), first)
    assert patches((255 * images).to(torch.uint8), 20).dtype == torch.uint8


@pytest.mark.parametrize("shape", [(3, 32, 32), (5, 3, 7, 32), (0, 3, 32, 32)])
def test_patches_refuses(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(n, c, h, w\) with n >= 1 and h, w >= size = 8"):
        patches(torch.zeros(shape), 10)
    with pytest.raises(ValueError, match="count must be an integer of at least 1"):
        patches(torch.zeros(1, 3, 8, 8), 0)


def test_colours_are_scaled_linearly() -> None:
    scaled = scale_to_open_interval(GREY)
    assert scaled.dtype == torch.float64
    assert scaled[[0, 51, 255]].tolist() == pytest.approx([1e-4, 0.20006, 0.9999], abs=1e-15)
    assert torch.allclose(scaled.diff(), torch.full((255,), 0.9998 / 255), rtol=1e-12, atol=0)
    assert torch.equal(scale_to_open_interval(GREY / 255.0), scaled)
    single = scale_to_open_interval(GREY.float() / 255, eps=2e-7)
    assert single.dtype == torch.float32
    assert single.logit().isfinite().all()


@pytest.mark.parametrize("eps", [0, 0.5, -1e-4, torch.nan])
def test_eps_out_of_range(eps: float) -> None:
    with pytest.raises(ValueError, match="eps must be"):
        scale_to_open_interval(GREY, eps)


def test_eps_that_rounds_away() -> None:
    with pytest.raises(ValueError, match="1 - eps to differ from 1 in torch.float32, got 1e-08"):
        scale_to_open_interval(GREY.float() / 255, 1e-8)


def test_the_true_model_scores_drawn_pixels_at_their_entropy_and_cut_ones_above() -> None:
    """Of uniform greys the true model has −ln p = 1/2 nat a pixel, and thresholded 1 − ln 2."""
    grey = torch.arange(256, dtype=torch.uint8).expand(2000, 256)
    p = grey / 255
    drawn, cut = binarize(grey), (p > 0.5).to(torch.uint8)
    losses = [-torch.where(x == 1, p, 1 - p).log().mean().item() for x in (drawn, cut)]
    assert losses[0] == pytest.approx(0.5, abs=0.01)
    assert losses[1] == pytest.approx(1 - math.log(2), abs=0.005)
    with pytest.raises(ValueError, match="cut at a threshold"):
        binarize(255 * cut)
