"""Checks of arguments and of data: name, what was expected, what came."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyroflow.frames import column_names, frame_columns, is_frame, named

T = TypeVar("T")
P = ParamSpec("P")

WORDS_ELSEWHERE = {  # what other libraries call an option
    **dict.fromkeys(["epochs", "max_iter", "iterations", "num_iterations", "num_iters"], "steps"),
    **dict.fromkeys(["n_steps", "num_steps", "max_steps"], "steps"),
    **dict.fromkeys(["learning_rate", "step_size"], "lr"),
    **dict.fromkeys(["validation", "validation_fraction", "val_fraction"], "holdout"),
    **dict.fromkeys(["num_draws", "num_mc_samples", "n_samples", "num_samples"], "num_particles"),
    **dict.fromkeys(["random_state", "rng_seed", "random_seed"], "seed"),
    **dict.fromkeys(["verbose", "progress_bar", "progressbar", "disable_progbar"], "progress"),
    **dict.fromkeys(["patience", "early_stopping"], "early_stop"),
    **dict.fromkeys(["draws", "n_draws"], "num_samples"),
    **dict.fromkeys(["chains", "n_chains"], "num_chains"),
    **dict.fromkeys(["layers", "n_layers", "depth", "flow_length", "K"], "num_layers"),
    **dict.fromkeys(["dim", "features", "D"], "input_dim"),
}


def check_count(name: str, value: int, minimum: int) -> int:
    """Return value as an int if it is an integer of at least minimum, else raise ``ValueError``."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {_brief(value)}")
    return int(value)


def check_positive(name: str, value: float) -> float:
    """Return value if it is a finite number above zero, else raise ``ValueError``."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number above 0, got {_brief(value)}")
    return value


def check_choice(name: str, value: object, choices: Collection) -> None:
    """Raise ``ValueError`` unless value is one of the choices."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}; got {_brief(value)}")


def check_fraction(name: str, value: float) -> float:
    """Return value if it lies strictly between 0 and 1, else raise ``ValueError``."""
    if not isinstance(value, Real) or not 0 < value < 1:
        raise ValueError(f"{name} must be a fraction between 0 and 1, got {_brief(value)}")
    return value


def _brief(value: object) -> str:
    """A value in a message: data by their shape, which would fill the screen."""
    shape = getattr(value, "shape", None)
    return repr(value) if shape is None else f"a {type(value).__name__} of shape {tuple(shape)}"


def check_args(args: object) -> tuple:
    """Return a model's positional arguments as a tuple; ``TypeError`` for a bare tensor, say."""
    if not isinstance(args, tuple | list):
        raise TypeError(f"args must be a tuple, as in args=(y,), got {type(args).__name__}")
    return tuple(args)


def check_device(device: str | torch.device | None) -> None:
    """Raise ``ValueError`` for a name that is no device's, ``RuntimeError`` for one not there."""
    if device is None:
        return
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device must be a device of torch, such as 'cpu', 'cuda' (an NVIDIA GPU) or 'mps', "
            f"got {device!r}"
        ) from error
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise RuntimeError(
            f"device {str(device)!r} is not there, says torch ({error}): look at "
            "torch.cuda.is_available(), or leave device out"
        ) from error


def known_options(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function name the option that was meant, where a keyword is none."""
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        check_option_names(function.__name__, options, known)
        return function(*args, **options)

    return call


def check_option_names(
    function: str, options: Iterable[str], known: list[str], of_model: Collection[str] = ()
) -> None:
    """Raise ``TypeError`` for a keyword that a function does not take, with the way out."""
    for name in options:
        if name in known:
            continue
        close = get_close_matches(name, known, n=1)
        if name in of_model and "kwargs" in known:
            way_out = f"it is an argument of the model: give kwargs={{{name!r}: ...}}"
        elif name in ("optim", "optimizer", "loss", "elbo"):
            way_out = "its optimiser and loss are its own: set lr= and steps=, or take Pyro's SVI"
        elif WORDS_ELSEWHERE.get(name) in known:
            way_out = f"did you mean {WORDS_ELSEWHERE[name]}?"
        elif close:
            way_out = f"did you mean {close[0]}?"
        else:
            way_out = f"it takes {', '.join(known)}"
        raise TypeError(f"{function} has no option {name!r}: {way_out}")


def check_data(
    data: object,
    *,
    width: int | None = None,
    name: str = "data",
    varying: bool = True,
    dtype: torch.dtype | None = None,
    columns: Sequence[str] | None = None,
    rows: int = 2,
) -> Tensor:
    r"""Data of shape :math:`(n, d)`, n >= ``rows``, as a float tensor of finite numbers.

    Float32 and float64 are kept where no ``dtype`` is given; integers, other floats and lists
    become torch's default dtype. ``varying`` data have no constant columns. The columns of a frame
    are put in the order of ``columns``, which errors name.

    Raises:
        ValueError: If the data are not numbers, have another shape, hold NaN or inf, if a column
            is constant up to the rounding of its values, or if the dtype cannot hold them; if a
            frame has other columns or missing values.
    """
    tensor = to_tensor(data, name, dtype, columns)
    check_shape(tensor, width, name, rows)
    columns = column_names(data) if columns is None else columns
    wrong = ~tensor.isfinite()
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name} expects finite numbers, got {tensor[row, column].item()} in row {row}, "
            f"{named(column, columns)}; {int(wrong.any(dim=1).sum())} of {len(tensor)} rows hold"
            " NaN or inf. Drop them with data[data.isfinite().all(1)] or fill them in."
        )
    rounding = 8 * torch.finfo(tensor.dtype).eps * tensor.abs().amax(dim=0)
    constant = (tensor.amax(dim=0) - tensor.amin(dim=0) <= rounding).nonzero().flatten().tolist()
    if varying and constant:
        found = constant if columns is None else [columns[column] for column in constant]
        raise ValueError(
            f"{name} expects columns that vary, got constant column(s) {found} (from 0, first"
            f" value {tensor[0, constant[0]].item():g}), where no density exists. Drop the column,"
            " or add noise to it. A large offset hides small changes: subtract it, in float64."
        )
    return tensor


def to_tensor(
    data: object,
    name: str,
    dtype: torch.dtype | None = None,
    columns: Sequence[str] | None = None,
) -> Tensor:
    """The data as a tensor of any shape in ``dtype``, or as :func:`check_data` says."""
    if is_frame(data):
        found = frame_columns(data, name, columns).items()
        parts = [to_tensor(values[:, None], name, dtype, [label]) for label, values in found]
        return torch.cat(parts, 1) if parts else torch.zeros(len(data), 0, device="cpu")
    if not isinstance(data, Tensor):
        data, kept = _array_to_tensor(data, name)
    elif data.is_complex() or data.dtype == torch.bool:
        raise _not_numeric(name, str(data.dtype))
    else:
        data = data.detach() if data.requires_grad else data
        kept = data.dtype in (torch.float32, torch.float64)
    return narrow(data, dtype or (data.dtype if kept else torch.get_default_dtype()), name, columns)


def _array_to_tensor(data: object, name: str) -> tuple[Tensor, bool]:
    """A tensor of int64 or floats, and whether it already has a dtype to be kept."""
    try:
        array = np.asanyarray(data)
    except ValueError as error:
        raise ValueError(
            f"{name} expects rows of equal length, shape (n, d), got a ragged {type(data).__name__}"
            f" ({error}); give every row the same number of values."
        ) from error
    if array.dtype.kind not in "iuf" or array.dtype.itemsize > 8:
        raise _not_numeric(name, str(array.dtype))
    if np.ma.isMaskedArray(array):
        array = array.astype(np.float64).filled(np.nan)
    native = array.dtype.newbyteorder("=")
    kept = hasattr(data, "__array__") and native in (np.float32, np.float64)
    whole = native.kind in "iu" and native != np.uint64
    # A copy: torch takes neither read-only, nor reversed, nor byte-swapped memory.
    wide = native if kept else np.int64 if whole else np.float64
    return torch.from_numpy(np.array(array, dtype=wide, order="C")), kept


def narrow(
    data: Tensor, dtype: torch.dtype, name: str, columns: Sequence[str] | None = None
) -> Tensor:
    """The data, of any shape, in a floating-point ``dtype`` that must be able to hold them.

    Raises:
        ValueError: If a number becomes infinite or 0, or if values of a column become equal that
            are different integers, or that an offset leaves only five digits of their spread.
    """
    if data.dtype == dtype:
        return data
    found = data.to(dtype)
    remedy = "keep float64 (for a fit: flow.double()), or subtract an offset or scale the column"
    lost = (data.isfinite() & ~found.isfinite()) | ((data != 0) & (found == 0))
    if lost.any():
        place = lost.nonzero()[0].tolist()
        raise ValueError(
            f"{name} expects numbers that {dtype} can hold, got {data[tuple(place)].item()!r} in"
            f" row {place[0]}, {named(place[-1], columns)}; {remedy}."
        )
    pairs = zip(data.T, found.T, strict=True) if data.ndim == 2 else ()
    for column, (values, rounded) in enumerate(pairs):
        finite = rounded.isfinite()
        if _merged(values[finite], rounded[finite]):
            raise ValueError(
                f"{name} expects values that stay apart in {dtype}, but different ones of "
                f"{named(column, columns)} become equal, such as those near"
                f" {values[finite].max().item()!r}; {remedy}."
            )
    return found


def _merged(values: Tensor, found: Tensor) -> bool:
    """Whether values became equal that are integers, or whose offset has eaten their digits."""
    if not len(found):
        return False
    spread, size = found.max() - found.min(), found.abs().max()
    if values.is_floating_point() and torch.finfo(found.dtype).eps * size <= 1e-5 * spread:
        return False
    return len(values.unique()) > len(found.unique())


def _not_numeric(name: str, dtype: str) -> ValueError:
    return ValueError(
        f"{name} expects real numbers, got dtype {dtype}; encode it as numbers and convert it,"
        " e.g. with data.astype(float) or data.float()."
    )


def check_shape(data: Tensor, width: int | None, name: str, rows: int = 2) -> None:
    """Raise ``ValueError`` unless the shape is (n, width) with at least so many rows."""
    expected = f"{name} expects shape (n, {width or 'd'}) with n >= {rows}"
    got = f"got shape {tuple(data.shape)}"
    if data.numel() == 0 or (data.ndim == 2 and len(data) < rows):
        raise ValueError(f"{expected}, {got}; pass at least {rows} row(s) of numbers.")
    if data.ndim == 1:
        raise ValueError(f"{expected}, {got}; use data[:, None] for n values of one quantity.")
    if data.ndim != 2:
        raise ValueError(f"{expected}, {got}; reshape it to one row per observation.")
    if width is not None and data.shape[1] != width:
        raise ValueError(
            f"{expected}, {got}; select {width} columns, or build the flow for {data.shape[1]}."
        )


def differing(found: Mapping[str, Any], expected: Mapping[str, Any], label: str) -> str:
    """The settings that are not as expected, with both values, in words; empty if all are.

    Example:
        >>> differing({"steps": 10}, {"steps": 20}, "now")
        'steps=10 (now 20)'
    """
    names = [name for name in expected if found.get(name) != expected[name]]
    return ", ".join(f"{n}={found.get(n)!r} ({label} {expected[n]!r})" for n in names)
