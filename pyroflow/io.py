"""Files: written whole or not at all, and read as plain data, whatever is in them."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor

# What torch calls the parts of a file, by what is in them. Quantized ones crash the process.
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Write a file whole or not at all, in a folder that exists.

    The content goes to the disk under a name of its own and is then moved, in one step, to its
    place. A link stays a link, and an existing file keeps its permissions.

    Raises:
        OSError: If the file cannot be written; then nothing of it is left, and an older file stays.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a file: name one to write to")
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all; its folder is made if need be."""
    text = json.dumps(report, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())


def write_data(path: str | os.PathLike, data: Any) -> None:
    """Write plain data and tensors as ``torch.save`` does, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(data, buffer)
    write_whole(path, buffer.getvalue())


def read_data(path: str | os.PathLike, device: torch.device | str = "cpu") -> Any:
    """The plain data and tensors that ``torch.save`` wrote, and nothing else.

    Where ``torch.load`` compares no checksum and believes the sizes that a file claims, here each
    part is checked, none may be compressed, and all tensors together take no more memory than the
    file. A call that the file asks for is never made.

    Raises:
        OSError: If there is no such file, or it cannot be read; the message says why.
        ValueError: If it is of another kind, not whole, damaged or hostile.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise type(error)(f"{path} cannot be read ({error.strerror}): name a file") from error
    try:
        records = _records(content)
        data = _Reader(records, device).load()
        for _ in walk(data, len(records["data.pkl"])):
            pass
    except Exception as error:  # other bytes may end in any of them
        raise ValueError(f"{path} is not whole, or no file of tensors: {error}") from error
    return data


def _records(content: bytes) -> dict[str, bytearray]:
    """The parts of an archive by name, without its folder; reading one compares its checksum."""
    with ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        stored = all(member.compress_type == ZIP_STORED for member in members)
        if not stored or sum(member.file_size for member in members) > len(content):
            raise ValueError("its parts claim more than the file holds")
        names = [member.filename.partition("/")[2] for member in members]
        if len(set(names)) < len(names):
            raise ValueError("two parts have one name")
        return {n: bytearray(archive.read(m)) for n, m in zip(names, members, strict=True)}


class _Reader(pickle._Unpickler):
    """A pickle of plain data and tensors, by the reader in Python, whose memory follows the file.

    Whatever it asks to be called is looked up here, and tensors are copies of parts of the file,
    all together no larger than these.
    """

    def __init__(self, records: dict[str, bytearray], device: torch.device | str) -> None:
        super().__init__(io.BytesIO(records["data.pkl"]))
        if records.get("byteorder", b"little") != sys.byteorder.encode():
            raise pickle.UnpicklingError("it is of a machine with another order of bytes")
        self.records, self.device = records, device
        self.left = sum(len(part) for name, part in records.items() if name.startswith("data/"))

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name in the file."""
        known = {"collections.OrderedDict": dict, "torch._utils._rebuild_tensor_v2": self.tensor}
        known |= {f"torch.{storage}": dtype for storage, dtype in _STORAGES.items()}
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no tensor needs")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: tuple) -> Tensor:
        """All the numbers of one part, as a vector."""
        _, dtype, key, _, _ = pid
        record = self.records[f"data/{key}"]
        return (
            torch.frombuffer(record, dtype=dtype)
            if record
            else torch.empty(0, dtype=dtype, device="cpu")
        )

    def tensor(self, vector: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
        """A tensor of the numbers of one part."""
        self.left -= math.prod(size) * vector.element_size()
        if self.left < 0:
            raise pickle.UnpicklingError("its tensors claim more than the file holds")
        view = vector.as_strided(size, stride, offset)
        return view.clone(memory_format=torch.contiguous_format).to(self.device)

    def load_build(self) -> None:
        """Leave out what is to be set on an object, such as the notes on an ordered dict."""
        self.stack.pop()

    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: load_build}


def walk(data: Any, most: float = math.inf) -> Iterator[Any]:
    """All that plain data are made of, themselves included, however deep.

    Raises:
        ValueError: If there are more than ``most``, as in lists of lists that are written once and
            repeated.
    """
    pending, seen = [data], 0
    while pending:
        yield (part := pending.pop())
        seen += 1
        if isinstance(part, dict | list | tuple):
            pending.extend(part.values() if isinstance(part, dict) else part)
        if seen + len(pending) > most:
            raise ValueError("its lists claim more than the file holds")
