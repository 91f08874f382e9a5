"""CIFAR-10's files, on small ones of the same format: what is read, and what is never run."""

from __future__ import annotations

import codecs
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rezende_mohamed_2015.cifar_files import cifar10


def short(text: str) -> bytes:
    """A string as Python 2 pickled it, SHORT_BINSTRING."""
    return b"U" + bytes([len(text)]) + text.encode()


def by_python_2(images: np.ndarray, labels: list[int]) -> bytes:
    """A batch byte by byte as cPickle of Python 2 wrote it with protocol 2."""
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + b"K\0\x85" + short("b")
    array += b"\x87R(K\1" + b"K" + bytes([len(images)]) + b"M" + struct.pack("<H", 3072) + b"\x86"
    array += b"cnumpy\ndtype\n" + short("u1") + b"K\0K\1\x87R"
    array += b"(K\3" + short("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    array += b"\x89T" + struct.pack("<i", images.size) + images.tobytes() + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    items = short("batch_label") + short("training batch 1 of 5") + short("labels") + listed
    return b"\x80\2}(" + items + short("data") + array + b"u."


def by_python_3(images: np.ndarray, labels: list[int], protocol: int = 2) -> bytes:
    return pickle.dumps({"data": images, "labels": labels}, protocol=protocol)


def pictures(seed: int, count: int = 2) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), dtype=np.uint8), rng.integers(0, 10, count).tolist()


NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
WRITERS = {
    "Python 2": by_python_2,
    "Python 3": by_python_3,
    "Python 3, protocol 4": lambda *batch: by_python_3(*batch, protocol=4),
    "Python 3, bytes": lambda images, labels: pickle.dumps({b"data": images, b"labels": labels}, 2),
    "by column": lambda images, labels: by_python_3(np.asfortranarray(images), labels),
}


def write_cifar(folder: Path, write: Callable = by_python_2) -> Path:
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate(NAMES):
        (folder / name).write_bytes(write(*pictures(seed)))
    return folder


def test_the_bytes_of_python_2_are_what_pickle_reads() -> None:
    images, labels = pictures(0)
    read = pickle.loads(by_python_2(images, labels), encoding="bytes")
    assert read[b"labels"] == labels
    assert np.array_equal(read[b"data"], images)


@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
@pytest.mark.parametrize("writer", WRITERS)
def test_cifar10(tmp_path: Path, writer: str, below: str) -> None:
    write_cifar(tmp_path / below, WRITERS[writer])
    read = cifar10(tmp_path)
    images = np.stack([pictures(seed)[0] for seed in range(6)]).reshape(12, 3, 32, 32)
    labels = [label for seed in range(6) for label in pictures(seed)[1]]
    assert read.train_images.dtype == read.train_labels.dtype == torch.uint8
    assert np.array_equal(torch.cat([read.train_images, read.test_images]), images)
    assert [*read.train_labels.tolist(), *read.test_labels.tolist()] == labels
    assert len(read.test_images) == 2


def test_cifar10_files_that_are_missing(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    (tmp_path / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="no data_batch_4 in .*cs.toronto.edu.*torchvision"):
        cifar10(tmp_path)


class Calls:
    """Pickles to a call."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call


def touch(path: str) -> None:
    Path(path).touch()


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("within", [lambda call: call, lambda call: {"labels": [1], "data": call}])
def test_no_code_in_a_file_is_run(tmp_path: Path, protocol: int, within: Callable) -> None:
    trace = tmp_path / "trace"
    hostile = pickle.dumps(within(Calls(touch, str(trace))), protocol)
    pickle.loads(hostile)
    assert trace.exists()  # the pickle does run where it is trusted
    trace.unlink()
    (write_cifar(tmp_path) / "data_batch_1").write_bytes(hostile)
    with pytest.raises(ValueError, match=r"data_batch_1 .* \(it asks for .*\.touch,"):
        cifar10(tmp_path)
    assert not trace.exists()


def test_nothing_beside_arrays_is_called(tmp_path: Path) -> None:
    """Not even what looks harmless: eval, file, a codec, an array of any other kind."""
    write_cifar(tmp_path)
    calls = [(eval, "1"), (open, "x"), (getattr, "x", "y"), (np.array, [1]), (codecs.decode, b"x")]
    for call in calls:
        (tmp_path / "test_batch").write_bytes(pickle.dumps(Calls(*call)))
        with pytest.raises(ValueError, match=f"asks for .*{call[0].__name__}, which no array"):
            cifar10(tmp_path)


def test_a_file_cannot_change_the_reader(tmp_path: Path) -> None:
    """BUILD sets attributes of what was called; the stand-ins must not keep them."""
    write_cifar(tmp_path)
    for name in (b"_codecs\nencode", b"numpy\ndtype", b"numpy\nndarray"):
        poison = b"\x80\2c" + name + b"\nN}" + b"X\7\0\0\0__new__Ns\x86b."
        (tmp_path / "data_batch_1").write_bytes(poison)
        with pytest.raises(ValueError, match="cannot be read as a batch"):
            cifar10(tmp_path)
    assert len(cifar10(write_cifar(tmp_path, by_python_3)).train_images) == 10


good, fine = pictures(0)
BAD_CIFAR = {
    "no pickle": (b"<!DOCTYPE html>", "cannot be read as a batch of CIFAR-10"),
    "nothing": (b"", "cannot be read as a batch"),
    "half a file": (by_python_2(good, fine)[:3000], r"cannot be read .*truncated.*get https"),
    "a list": (pickle.dumps([1]), "expects a dictionary, got list"),
    "CIFAR-100": (pickle.dumps({"data": 1, "fine_labels": 2}), r"no labels, but \['data', 'fine_"),
    "grey": (by_python_3(good[:, :1024], fine), r"got shape \(2, 1024\), type 'u1' and 2048 bytes"),
    "floats": (by_python_3(good / 255, fine), r"got shape \(2, 3072\), type 'f8'"),
    "pictures": (by_python_3(good.reshape(2, 3, 32, 32), fine), r"shape \(n, 3072\) of uint8"),
    "none": (by_python_2(good[:0], []), r"got shape \(0, 3072\)"),
    "objects": (by_python_3(good.astype(object), fine), r"shape \(n, 3072\) of uint8"),
    "a list for data": (by_python_3([[1]], fine), "of uint8, got list"),
    "a label less": (by_python_3(good, fine[:1]), "has 2 images, but 1 labels"),
    "eleven classes": (by_python_3(good, [1, 10]), "integers from 0 to 9"),
    "labels in words": (by_python_3(good, ["cat", "dog"]), "integers from 0 to 9"),
    "labels as an array": (by_python_3(good, np.array(fine)), "list of integers from 0 to 9"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CIFAR)
def test_cifar10_refuses(tmp_path: Path, case: str) -> None:
    content, message = BAD_CIFAR[case]
    (write_cifar(tmp_path) / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match=f"data_batch_3.*{message}"):
        cifar10(tmp_path)
