"""Files of flows and guides: written whole or not at all, read without running code."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pyroflow.checks import check_device
from pyroflow.distribution import VERSION
from pyroflow.flows import Flow
from pyroflow.io import read_data, walk, write_data
from pyroflow.saving.guides import (
    GUIDES,
    SavedGuide,
    describe_flow,
    describe_guide,
    restore_flow,
    restore_guide,
)
from pyroflow.saving.model_check import check_model
from pyroflow.saving.table import UndescribedError

# Raised when an older pyroflow would no longer read, or would misread, what this one writes.
# Format 1 had another bound on the diagonals of Sylvester layers.
FORMAT = 2


def save(obj: Flow | SavedGuide, path: str | os.PathLike) -> None:
    """Write a flow or a guide to one file, which :func:`load` opens without running any code.

    The file holds a plain description, the parameters and, for a guide, names, shapes, supports
    and plates of its latents: neither the model nor its data. A bound of a support that depends
    on data is a number in the file. An existing file is replaced at once, when the new one is
    complete.

    Args:
        obj: A :class:`~pyroflow.Flow`, or a guide that was called once: any of this package, also
            a mixture as :func:`~pyroflow.posterior` may return.
        path: Of the file.

    Raises:
        TypeError: If it is another object, or one with a base, transform, support, encoder or
            context that a file cannot describe; the message names it and the way out.
        ValueError: If a guide was never set up.
        FileNotFoundError: If the folder does not exist.
        OSError: If the file cannot be written; an older one stays as it is.

    Example:
        >>> import os, tempfile
        >>> from pyroflow import load, planar_flow, save
        >>> path = os.path.join(tempfile.mkdtemp(), "flow.pt")
        >>> save(planar_flow(2), path)
        >>> load(path)().sample((3,)).shape
        torch.Size([3, 2])
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"path must be the name of a file, got {type(path).__name__}: call save(obj, path)"
        )
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path {path} is in a folder that does not exist: make it first")
    content = {"pyroflow": VERSION, "format": FORMAT} | _described(obj)
    write_data(path, content)


_WAY_OUT = (
    "Else save the numbers alone, torch.save(obj.state_dict(), path), and load them into an object "
    "that your code makes anew, obj.load_state_dict(torch.load(path))"
)


def _described(obj: Any) -> dict[str, Any]:
    """The kind and the content, or an error that says what to do instead."""
    try:
        if type(obj) is Flow:
            return {"kind": "flow", "content": describe_flow(obj)}
        if type(obj) in GUIDES:
            return {"kind": "guide", "content": describe_guide(obj)}
    except UndescribedError as error:
        raise TypeError(
            f"obj holds {error}, which a file cannot describe without code. {_WAY_OUT}"
        ) from error
    names = ", ".join(guide.__name__ for guide in GUIDES)
    way_out = "save the flow or guide itself, which was fitted"
    if isinstance(obj, torch.nn.Module | torch.distributions.Transform):
        way_out = f"a transform goes into a Flow first. {_WAY_OUT}"
    raise TypeError(
        f"obj must be a Flow or one of the guides {names}, got {type(obj).__name__}: {way_out}"
    )


def load(
    path: str | os.PathLike,
    model: Callable | None = None,
    device: torch.device | str = "cpu",
) -> Flow | SavedGuide:
    """Read what :func:`save` wrote, with the dtype that it had.

    A guide that is loaded without its model samples as before: ``guide()``, ``guide.median()``,
    ``guide.quantiles(...)``, ``guide.log_prob(...)`` and Pyro's ``Predictive``.

    Args:
        path: Of the file.
        model: For a guide, to train on: the model that it was trained with, whose latents are
            compared with the file, here if it takes no arguments, else at the first call with
            its arguments outside ``torch.no_grad``.
        device: Where the tensors go, wherever they were when they were saved.

    Returns:
        The flow or the guide.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it is a folder, or a file that must not be read.
        ValueError: If the file is not of :func:`save`, is damaged (a checksum tells), claims more
            than it holds, or is of a later version; if the model has other latents, by site; if
            torch has no such device.
        TypeError: If the model is not callable, or is given for a flow.
        RuntimeError: If the device is not there.

    Example:
        >>> import os, pyro, pyro.distributions as dist, tempfile
        >>> from pyroflow import AutoPlanarFlow, load, save
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> guide = AutoPlanarFlow(model)
        >>> _ = guide(torch.tensor(2.0))
        >>> path = os.path.join(tempfile.mkdtemp(), "guide.pt")
        >>> save(guide, path)
        >>> with pyro.plate("draws", 5):
        ...     print(load(path)()["scale"].shape)
        torch.Size([5])
    """
    if model is not None and not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    check_device(device)
    path, device = Path(path), torch.empty(0, device=device).device  # "cuda" has a number then
    file = _read(path, device)
    if file["kind"] == "flow" and model is not None:
        raise TypeError(f"path {path} holds a flow, which takes no model: leave model out")
    try:
        content = file["content"]
        with Bounded(sum(part.numel() for part in walk(file) if isinstance(part, Tensor))):
            restored = (
                restore_flow(content) if file["kind"] == "flow" else restore_guide(content, model)
            )
    except Exception as error:  # a hostile description may end in any of them
        raise ValueError(f"path {path} is a damaged file of pyroflow: {error}") from error
    if model is not None:
        check_model(restored)
    return restored


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    """What is in a file, in a format that this version knows."""
    if not path.exists():
        raise FileNotFoundError(f"path {path} does not exist")
    try:
        file = read_data(path, device)
        kind, written = file["kind"], operator.index(file["format"])
        if kind not in ("flow", "guide") or written < 1:
            raise ValueError(f"it has kind {kind!r} and format {written}")
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"path {path} is not a file of pyroflow.save; nothing in it was run ({error}). If it "
            "was one, copy it anew from where it is whole; a checkpoint goes to the fit_ function "
            "that wrote it, and a state dict to load_state_dict"
        ) from error
    if written > FORMAT:
        raise ValueError(
            f"path {path} has format {written}, written by pyroflow {file.get('pyroflow')}; this "
            f"is {VERSION}, which reads up to {FORMAT}: install that version or a "
            "later one"
        )
    described = (part for part in walk(file) if isinstance(part, dict))
    if written == 1 and any("Sylvester" in str(part.get("kind")) for part in described):
        raise ValueError(
            f"path {path} has Sylvester layers in format 1, which bound their diagonals in another "
            "way: fit anew, as this version would give them another density"
        )
    return file


# The start values of modules, which the file's then replace, may take so many numbers.
FACTOR, ALLOWANCE = 32, 10_000


class Bounded(TorchDispatchMode):
    """Refuses, before it is done, what takes far more memory than the numbers that a file holds.

    What an operation makes is asked of torch's "meta" device, which makes nothing.
    """

    def __init__(self, held: int) -> None:
        super().__init__()
        self.held, self.left = held, ALLOWANCE + FACTOR * held

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler first, for seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do the operation if it may be done."""
        kwargs = dict(kwargs or {})
        if _at_most(args, kwargs) > self.left and _wanted(func, args, kwargs) > self.left:
            raise ValueError(f"it claims sizes far beyond the {self.held} numbers that it holds")
        made = func(*args, **kwargs)
        if all(returned.alias_info is None for returned in func._schema.returns):
            self.left -= _size(made)
        return made


def _at_most(args: tuple, kwargs: dict[str, Any]) -> int:
    """A quick bound on the numbers that an operation makes."""
    leaves = tree_leaves((args, kwargs))
    sizes = (value.numel() if isinstance(value, Tensor) else value for value in leaves)
    return prod(max(1, abs(size)) for size in sizes if isinstance(size, int))


def _wanted(func: Any, args: tuple, kwargs: dict[str, Any]) -> int:
    """The numbers that an operation makes."""
    args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs = kwargs | {"device": "meta"}
    try:
        return _size(func(*args, **kwargs))
    except NotImplementedError:  # what depends on values makes no more than it is given
        return 0


def _size(made: Any) -> int:
    return sum(value.numel() for value in tree_leaves(made) if isinstance(value, Tensor))
