"""Files of flows and guides: written whole or not at all, read without running code."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyroflow.flows import Flow
from pyroflow.guides import AutoFlow
from pyroflow.io import packed, read_data, write_whole
from pyroflow.saving.description import Bounded, UndescribedError
from pyroflow.saving.flows import describe_flow, restore_flow
from pyroflow.saving.guides import GUIDES, describe_guide, restore_guide
from pyroflow.saving.model_check import check_model

# Raised when an older pyroflow would no longer read, or would misread, what this one writes.
# Format 1 had another bound on the diagonals of Sylvester layers.
FORMAT = 2


def save(obj: Flow | AutoFlow, path: str | os.PathLike) -> None:
    """Write a flow or a guide to one file, which :func:`load` opens without running any code.

    The file holds a plain description, the parameters and, for a guide, names, shapes, supports
    and plates of its latents: neither the model nor its data. A bound of a support that depends
    on data is a number in the file. An existing file is replaced at once, when the new one is
    complete.

    Args:
        obj: a :class:`~pyroflow.Flow`, or a guide that was called once: an
            :class:`~pyroflow.AutoFlow`, ``AutoPlanarFlow`` or ``AutoSylvesterFlow``.
        path: of the file.

    Raises:
        TypeError: another object, or one with a base, transform or support that a file cannot
            describe; the message names it and the way out.
        ValueError: a guide that was never set up.
        FileNotFoundError: a folder that does not exist.
        OSError: a file that cannot be written; an older one stays as it is.

    Example:
        >>> import os, tempfile
        >>> from pyroflow import load, planar_flow, save
        >>> path = os.path.join(tempfile.mkdtemp(), "flow.pt")
        >>> save(planar_flow(2), path)
        >>> load(path)().sample((3,)).shape
        torch.Size([3, 2])
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path {path} is in a folder that does not exist: make it first")
    content = {"pyroflow": version("pyroflow"), "format": FORMAT} | _described(obj)
    write_whole(path, packed(content))


def load(
    path: str | os.PathLike,
    model: Callable | None = None,
    device: torch.device | str = "cpu",
) -> Flow | AutoFlow:
    """Read what :func:`save` wrote, with the dtype that it had.

    A guide that is loaded without its model samples as before: ``guide()``, ``guide.median()``,
    ``guide.quantiles(...)``, ``guide.log_prob(...)`` and Pyro's ``Predictive``.

    Args:
        path: of the file.
        model: for a guide, to train on: the model that it was trained with, whose latents are
            compared with the file, here if it takes no arguments, else at the first call with
            its arguments outside ``torch.no_grad``.
        device: where the tensors go, wherever they were when they were saved.

    Returns:
        The flow or the guide.

    Raises:
        FileNotFoundError: no such file.
        OSError: a folder, or a file that must not be read.
        ValueError: a file that is not of :func:`save`, is damaged (a checksum tells), claims more
            than it holds, or is of a later version; a model with other latents, by site.
        TypeError: a model that is not callable, or is given for a flow.
        RuntimeError: a device that is not there.

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
    path, device = Path(path), torch.empty(0, device=device).device  # fails on one that is not here
    content = _read(path, device)
    if content["kind"] == "flow" and model is not None:
        raise TypeError(f"path {path} holds a flow, which takes no model: leave model out")
    obj = _restored(content, path, model)
    if model is not None:
        check_model(obj, content["content"]["sites"])
    return obj


def _restored(content: dict[str, Any], path: Path, model: Callable | None) -> Flow | AutoFlow:
    try:
        with Bounded(sum(part.numel() for part in _parts(content) if isinstance(part, Tensor))):
            if content["kind"] == "flow":
                return restore_flow(content["content"])
            return restore_guide(content["content"], model)
    except Exception as error:  # a hostile description may end in any of them
        raise ValueError(f"path {path} is a damaged file of pyroflow: {error}") from error


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
    raise TypeError(
        f"obj must be a Flow or one of the guides {names}, got {type(obj).__name__}: a transform "
        f"goes into a Flow first. {_WAY_OUT}"
    )


_WAY_OUT = (
    "Else save the numbers alone, torch.save(obj.state_dict(), path), and load them into an object "
    "that your code makes anew, obj.load_state_dict(torch.load(path))"
)


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    """The content of a file, in a format that this version knows."""
    if not path.exists():
        raise FileNotFoundError(f"path {path} does not exist")
    try:
        content = read_data(path, device)
        kind, written = content["kind"], operator.index(content["format"])
        if kind not in ("flow", "guide") or written < 1:
            raise ValueError(f"it has kind {kind!r} and format {written}")
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"path {path} is not a file of pyroflow.save; nothing in it was run ({error}). If it "
            "was one, copy it anew from where it is whole; a checkpoint goes to the fit_ function "
            "that wrote it, and a state dict to load_state_dict"
        ) from error
    if content["format"] > FORMAT:
        raise ValueError(
            f"path {path} has format {content['format']}, written by pyroflow "
            f"{content.get('pyroflow')}; this is {version('pyroflow')}, which reads up to "
            f"{FORMAT}: install that version or a later one"
        )
    if content["format"] == 1 and any(
        isinstance(part, dict) and "Sylvester" in str(part.get("kind")) for part in _parts(content)
    ):
        raise ValueError(
            f"path {path} has Sylvester layers in format 1, which bound their diagonals in another "
            "way: fit anew, as this version would give them another density"
        )
    return content


def _parts(content: Any) -> Iterator[Any]:
    """All that a content is made of, itself included."""
    pending = [content]
    while pending:
        yield (part := pending.pop())
        if isinstance(part, dict | list | tuple):
            pending.extend(part.values() if isinstance(part, dict) else part)
