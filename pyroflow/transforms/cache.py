"""The pair cache: a transform's own samples cost no root search, and nothing is ever stale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Transform
from torch.utils.weak import WeakTensorKeyDictionary

# Beside the tensors and not on them: an attribute would travel into files and copies.
_ORIGINS = WeakTensorKeyDictionary()

Parameters = tuple[Tensor, ...]
Cached = tuple[Tensor, Any] | None  # an image and its intermediates


class _Pair(NamedTuple):
    """One (x, y) with the intermediate results of the call that made it."""

    x: Tensor
    y: Tensor
    intermediates: Any
    recorded: bool
    parameters: Parameters  # kept alive, so that no other tensor gets one of their ids
    stamp: list


class CachedTransform(Transform):
    """A transform with parameters, and a cache that is never stale.

    Two pairs are remembered. The pair of the last *forward* call lets a sample be scored without a
    root search, in a chain of transforms as well. The pair of the last *inverse* call only hands
    its intermediate results on to ``log_abs_det_jacobian``. A pair serves the very tensors it was
    made with, as long as they and the parameters are unchanged: neither an optimiser step nor an
    in-place edit leaves a wrong answer behind (pyro issues #2718 and #2564). Only an edit in place
    through ``.data`` escapes, as it escapes autograd. Copies and pickles start with an empty cache.

    As with torch's cached transforms, the x found for a sample that carries its graph is the x
    it was made from: gradients flow on to the parameters, and not into the sample as such. For
    the latter clone the sample, or use :class:`~pyroflow.flows.AlongPath`.
    """

    def __init__(self) -> None:
        super().__init__(cache_size=1)
        self._forward_pair: _Pair | None = None
        self._inverse_pair: _Pair | None = None

    def _map_parameters(self) -> Parameters:
        """The tensors that decide the map."""
        raise NotImplementedError

    def _check(self, name: str, value: Tensor, parameters: Parameters) -> None:
        """Refuse an input that does not fit the parameters."""
        raise NotImplementedError

    def _forward(self, x: Tensor, parameters: Parameters) -> tuple[Tensor, Any]:
        """Return y and the intermediate results that the other methods reuse."""
        raise NotImplementedError

    def _invert(self, y: Tensor, parameters: Parameters, cached: Cached) -> tuple[Tensor, Any]:
        """Return x and the intermediates; ``cached`` holds them where they were found before."""
        raise NotImplementedError

    def _log_det(self, intermediates: Any) -> Tensor:
        """Return log |det dy/dx|, shape (*B)."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        """Return y = t(x) for x of shape (*B, D), and remember the pair."""
        return self._image(x)[0]

    def _inv_call(self, y: Tensor) -> Tensor:
        return self._preimage(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log |det dy/dx|, shape (*B), for y = t(x)."""
        parameters = self._map_parameters()
        compiling = torch.compiler.is_compiling()
        for pair in () if compiling else (self._forward_pair, self._inverse_pair):
            if pair is not None and _serves(pair, x, y, parameters):
                return self._log_det(pair.intermediates).to(x.dtype)
        self._check("x", x, parameters)
        return self._log_det(precisely(self._forward, x, parameters)[1]).to(x.dtype)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return t(x) and log |det dy/dx|, reading the parameters once."""
        y, intermediates = self._image(x)
        return y, self._log_det(intermediates).to(x.dtype)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return t⁻¹(y) and log |det dy/dx|, reading the parameters once."""
        x, intermediates = self._preimage(y)
        return x, self._log_det(intermediates).to(y.dtype)

    def inverse_along_path(self, y: Tensor, origin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t⁻¹(y) and log |det dy/dx| as functions of y alone, the parameters held fixed.

        Where ``origin`` is what this transform has just made nothing is solved: the activations
        of the forward pass are the solution.

        Args:
            y: shape (*B, D).
            origin: a tensor with the values of y: y itself, or the origin that the next
                transform towards the data returned.

        Returns:
            x, shape (*B, D); log |det|, shape (*B); the origin of x.
        """
        parameters = self._map_parameters()
        self._check("y", y, parameters)
        fixed = tuple(t.detach() for t in parameters)
        pair = None if torch.compiler.is_compiling() else self._made_from(y, origin, parameters)
        cached = pair and (pair.x, pair.intermediates)
        x, intermediates = precisely(self._invert, y, fixed, cached)
        return x, self._log_det(intermediates).to(y.dtype), pair.x if pair else x

    def with_cache(self, cache_size: int = 1) -> CachedTransform:
        """Return self: the cache is always on, and never changes a result."""
        return self

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_forward_pair": None, "_inverse_pair": None}

    def _image(self, x: Tensor) -> tuple[Tensor, Any]:
        parameters = self._map_parameters()
        self._check("x", x, parameters)
        y, intermediates = precisely(self._forward, x, parameters)
        if torch.compiler.is_compiling():  # a compiler merges equal passes itself
            return y, intermediates
        solved = self._inverse_pair
        if solved is not None and solved.x is _origin(x) and _unchanged(solved, parameters):
            _remember_origin(y, _origin(solved.y))
        self._forward_pair = _pair(x, y, intermediates, parameters)
        return y, intermediates

    def _preimage(self, y: Tensor) -> tuple[Tensor, Any]:
        parameters = self._map_parameters()
        self._check("y", y, parameters)
        if torch.compiler.is_compiling():
            return precisely(self._invert, y, parameters, None)
        made = self._made_from(y, y, parameters) or self._made_from(y, _origin(y), parameters)
        if made is not None and made.x.shape == y.shape:
            own = made.y is y and not (y.is_leaf and y.requires_grad)
            if (own and made.recorded) or not torch.is_grad_enabled():
                return made.x, made.intermediates
        cached = made and (made.x, made.intermediates)
        x, intermediates = precisely(self._invert, y, parameters, cached)
        if made is not None:
            _remember_origin(x, made.x)
        self._inverse_pair = _pair(x, y, intermediates, parameters)
        return x, intermediates

    def _made_from(self, y: Tensor, origin: Tensor, parameters: Parameters) -> _Pair | None:
        made = self._forward_pair
        if made is None or made.y is not origin or origin.shape != y.shape:
            return None
        return made if _unchanged(made, parameters) else None


def precisely(
    evaluate: Callable, value: Tensor, parameters: Parameters, *cached: Cached
) -> tuple[Tensor, Any]:
    """Evaluate in the value's own dtype: with fewer digits the two directions would not meet.

    Half precision has too few itself: it is evaluated in float32 and the image rounded once.
    """
    if value.dtype.itemsize < 4:
        cached = [pair and (pair[0].float(), pair[1]) for pair in cached]
        wide = tuple(t.float() for t in parameters)
        image, intermediates = precisely(evaluate, value.float(), wide, *cached)
        return image.to(value.dtype), intermediates
    device = value.device.type
    if value.is_meta or not torch.is_autocast_enabled(device):
        return evaluate(value, parameters, *cached)
    with torch.autocast(device, enabled=False):
        return evaluate(value, parameters, *cached)


def _pair(x: Tensor, y: Tensor, intermediates: Any, parameters: Parameters) -> _Pair | None:
    if any([t.is_inference() for t in (x, y, *parameters)]):  # their edits cannot be noticed
        return None
    stamp = _stamp(x, y, parameters)
    return _Pair(x, y, intermediates, torch.is_grad_enabled(), parameters, stamp)


def _serves(pair: _Pair, x: Tensor, y: Tensor, parameters: Parameters) -> bool:
    enough = pair.recorded or not torch.is_grad_enabled()
    return enough and pair.x is x and pair.y is y and _unchanged(pair, parameters)


def _unchanged(pair: _Pair, parameters: Parameters) -> bool:
    return pair.stamp == _stamp(pair.x, pair.y, parameters)


def _remember_origin(value: Tensor, origin: Tensor) -> None:
    """Let the next transform of a chain know that value repeats a tensor it has made itself."""
    if not value.is_inference():  # their edits cannot be noticed
        _ORIGINS[value] = (origin, value._version)


def _origin(value: Tensor) -> Tensor:
    origin, version = _ORIGINS.get(value, (value, None))
    return origin if version is None or version == value._version else value


def _stamp(x: Tensor, y: Tensor, parameters: Parameters) -> list:
    """What changes with the tensors, their values or what they record."""
    watched = [(id(t), _address(t), t._version, t.requires_grad) for t in (x, *parameters)]
    return [y._version, _address(y), *watched]


def _address(t: Tensor) -> int:
    """Where the data lie: assigning ``t.data`` changes it, but not the version."""
    try:
        return t.data_ptr()
    except RuntimeError:  # the tensors of torch.func have none
        return 0
