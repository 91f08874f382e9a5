"""MNIST's files, and what the experiments make of images: binary pixels, patches, colours."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from pyroflow.checks import check_count, check_fraction

__all__ = ["Mnist", "binarize", "mnist", "patches", "scale_to_open_interval"]

_SIDE = 28
_IMAGES, _LABELS = 2051, 2049  # magic numbers: bytes in three dimensions, bytes in one
_SOURCE = (
    "get it from https://ossci-datasets.s3.amazonaws.com/mnist/ or by"
    " torchvision.datasets.MNIST(root, download=True)"
)


@dataclass(frozen=True, eq=False)
class Mnist:
    """The images and labels of MNIST.

    Attributes:
        train_images: shape (60000, 784), uint8, row by row, 0 background to 255.
        train_labels: shape (60000,), uint8, 0 to 9.
        test_images: shape (10000, 784), uint8.
        test_labels: shape (10000,), uint8.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def mnist(folder: str | PathLike[str]) -> Mnist:
    """Reads MNIST from its four IDX files, gzipped or not.

    Args:
        folder: The folder of ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
            ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte``, with or without ``.gz``; or
            the root that torchvision has downloaded to, with the files in ``MNIST/raw``.

    Returns:
        Images and labels, as many as the files hold.

    Raises:
        FileNotFoundError: A file is missing; the message says where to get it.
        ValueError: A file is cut off or not what its name says, images are not of 28 × 28
            pixels, or images and labels differ in number.

    References:
        LeCun, Cortes and Burges, The MNIST database of handwritten digits,
        http://yann.lecun.com/exdb/mnist/, which describes the format.

    Example:
        >>> import pathlib, struct, tempfile
        >>> from rezende_mohamed_2015.image_files import mnist
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> images = struct.pack(">4i", 2051, 5, 28, 28) + bytes(5 * 28 * 28)
        >>> labels = struct.pack(">2i", 2049, 5) + bytes(5)
        >>> for part in ("train", "t10k"):
        ...     _ = (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        ...     _ = (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
        >>> mnist(folder).train_images.shape
        torch.Size([5, 784])
    """
    folder = Path(folder)
    return Mnist(*_labelled(folder, "train"), *_labelled(folder, "t10k"))


def _labelled(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    image_file = _find(folder, f"{part}-images-idx3-ubyte")
    label_file = _find(folder, f"{part}-labels-idx1-ubyte")
    images = _read_idx(image_file, _IMAGES, (_SIDE, _SIDE)).flatten(1)
    labels = _read_idx(label_file, _LABELS, ())
    if len(images) != len(labels):
        raise ValueError(
            f"{image_file} has {len(images)} images, but {label_file} has {len(labels)} labels:"
            " take both from the same source"
        )
    if labels.max() > 9:
        raise ValueError(f"{label_file}: expected labels 0 to 9, got {int(labels.max())}")
    return images, labels


def _find(folder: Path, name: str) -> Path:
    for place in (folder, folder / "MNIST" / "raw"):
        for file in (place / f"{name}.gz", place / name):
            if file.is_file():
                return file
    raise FileNotFoundError(
        f"mnist: there is no {name}.gz nor {name} in {folder} or its MNIST/raw: {_SOURCE}"
    )


def _read_idx(file: Path, magic: int, item: tuple[int, ...]) -> Tensor:
    """The bytes of an IDX file: big-endian magic number and sizes, then the items."""
    content = _unpacked(file)
    if int.from_bytes(content[:4], "big") != magic:
        raise ValueError(
            f"{file} is no IDX file of MNIST: expected it to begin with {magic}, got"
            f" {content[:4]!r}: {_SOURCE}"
        )
    start = 8 + 4 * len(item)
    count, *sizes = (int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    if tuple(sizes) != item:
        raise ValueError(f"{file}: expected images of {item} pixels, got {tuple(sizes)}: {_SOURCE}")
    expected, got = count * math.prod(item), max(0, len(content) - start)
    if count < 1 or got != expected:
        raise ValueError(
            f"{file} is not whole: expected {expected} bytes for its {count} items, got {got}:"
            f" {_SOURCE}"
        )
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start)
    return values.reshape(count, *item)


def _unpacked(file: Path) -> bytes:
    """A file's content; browsers unpack a download and keep its name, so the name says nothing."""
    content = file.read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{file} is cut off or damaged ({error}): {_SOURCE}") from error


def binarize(images: Tensor, seed: int = 0) -> Tensor:
    r"""Draws binary images, once: each pixel is 1 with its grey value as probability.

    x ~ Bernoulli(grey/255), the static binarisation of Larochelle and Murray 2011 and
    Salakhutdinov and Murray 2008: the same law as their published files, in another draw. Keep
    the result, and train and test on it. A threshold is another, easier data set: its -ln p is
    lower by 15 to 20 nats and compares with nothing that is published.

    The draws depend on the seed alone: they come from a generator of their own on the CPU,
    whatever the device, and the global random state stays as it is. Equal seeds give equal
    noise, so training and test images want two seeds.

    Args:
        images: Any shape: uint8, 0 to 255, or floating-point, 0 to 1.
        seed: Seed of the generator.

    Returns:
        Zeros and ones with the shape and device of ``images``, uint8.

    Raises:
        TypeError: If ``images`` is no tensor, or one of another type.
        ValueError: If values are out of range, the images are binary already, or uint8 in
            the wrong scale.

    Example:
        >>> import torch
        >>> from rezende_mohamed_2015.image_files import binarize
        >>> grey = torch.full((1000, 784), 51, dtype=torch.uint8)
        >>> round(binarize(grey).double().mean().item(), 2)
        0.2
    """
    probability = _unit_interval("binarize", images, torch.float32).to("cpu", torch.float32)
    grey = (probability > 0) & (probability < 1)
    if bool(probability.any()) and not bool(grey.any()):
        raise ValueError(
            "binarize: expected grey values, got only black and white: they are binary"
            " already. Use them as they are if they were drawn; if they were cut at a threshold,"
            " start again from the grey images"
        )
    generator = torch.Generator().manual_seed(check_count("seed", seed, 0))
    uniform = torch.rand(probability.shape, generator=generator, dtype=torch.float32, device="cpu")
    return (uniform < probability).to(images.device, torch.uint8)


def patches(images: Tensor, count: int, size: int = 8, seed: int = 0) -> Tensor:
    r"""Cuts square patches out of images, at random places of random images.

    Images and places are drawn uniformly, with replacement, from a generator of their own; the
    global random state stays as it is.

    Args:
        images: Shape :math:`(n, c, h, w)`, of any type.
        count: Number of patches.
        size: Their side in pixels.
        seed: Seed of the generator.

    Returns:
        Patches of shape :math:`(count, c, size, size)`, of the images' type and on their device.

    Raises:
        TypeError: If ``images`` is no tensor.
        ValueError: If ``images`` has another shape, or is smaller than a patch.

    Example:
        >>> import torch
        >>> from rezende_mohamed_2015.image_files import patches
        >>> patches(torch.rand(10, 3, 32, 32), count=100).shape
        torch.Size([100, 3, 8, 8])
    """
    _check_tensor("patches", images)
    count, size = check_count("count", count, 1), check_count("size", size, 1)
    if images.ndim != 4 or len(images) < 1 or min(images.shape[2:]) < size:
        raise ValueError(
            f"patches: images expects shape (n, c, h, w) with n >= 1 and h, w >= size = {size},"
            f" got {tuple(images.shape)}"
        )
    generator = torch.Generator().manual_seed(check_count("seed", seed, 0))
    n, c, h, w = images.shape
    limits = (n, h - size + 1, w - size + 1)
    on_cpu = {"generator": generator, "device": "cpu"}
    draws = (torch.randint(limit, (count, 1, 1, 1), **on_cpu) for limit in limits)
    image, top, left = (t.to(images.device) for t in draws)
    offset = torch.arange(size, device=images.device)
    channel = torch.arange(c, device=images.device)[:, None, None]
    return images[image, channel, top + offset[:, None], left + offset]


def scale_to_open_interval(x: Tensor, eps: float = 1e-4) -> Tensor:
    r"""Scales colours from [0, 1] or {0, …, 255} to [ε, 1 − ε]: ε + (1 − 2ε) x.

    So logit(x) is finite, as the logit-normal likelihood of section 6.3 of Rezende & Mohamed
    2015 needs. No noise is added: the colours of a file stay 256 separate values.

    Args:
        x: Any shape: uint8, 0 to 255, or floating-point, 0 to 1.
        eps: ε, in (0, 1/2).

    Returns:
        Colours of the same shape: in torch's default dtype for uint8, else in that of ``x``.

    Raises:
        TypeError: If ``x`` is no tensor, or one of another type.
        ValueError: If values are out of range, uint8 in the wrong scale, or ``eps`` is not
            below 1/2 or so small that 1 - ε rounds to 1.

    Example:
        >>> import torch
        >>> from rezende_mohamed_2015.image_files import scale_to_open_interval
        >>> scale_to_open_interval(torch.tensor([0, 255], dtype=torch.uint8)).logit().isfinite()
        tensor([True, True])
    """
    unit = _unit_interval("scale_to_open_interval", x, torch.get_default_dtype())
    check_fraction("eps", eps)
    if eps >= 0.5 or eps < torch.finfo(unit.dtype).eps:
        raise ValueError(
            f"eps must be below 1/2, and at least {torch.finfo(unit.dtype).eps:.1g} for 1 - eps to"
            f" differ from 1 in {unit.dtype}, got {eps!r}"
        )
    return (eps + (1 - 2 * eps) * unit).clamp(eps, 1 - eps)


def _unit_interval(function: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Grey values or colours in [0, 1]: uint8 scaled to ``dtype``, floats as they are."""
    _check_tensor(function, x)
    if x.dtype == torch.uint8:
        if x.numel() and int(x.max()) == 1:
            raise ValueError(
                f"{function}: expected values up to 255 in uint8, got none above 1: they"
                " are binary, or scaled, already. Pass values in [0, 1] as floats"
            )
        return x.to(dtype) / 255
    if not x.is_floating_point():
        raise TypeError(
            f"{function}: expected uint8 or floating-point values, got {x.dtype}: convert"
            " 0 to 255 with .to(torch.uint8)"
        )
    outside = ~((x >= 0) & (x <= 1))
    if bool(outside.any()):
        raise ValueError(
            f"{function}: expected values in [0, 1] in {x.dtype}, got"
            f" {x[outside][0].item():g}: divide by the white value, such as 255"
        )
    return x


def _check_tensor(function: str, images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(
            f"{function}: expected a tensor, got {type(images).__name__}: torch.from_numpy"
            " makes one of an array"
        )
