"""What every pyroflow transform shares: the pair cache, shape checks, broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from torch.distributions import Transform, constraints
from torch.utils.weak import WeakTensorKeyDictionary

# Beside the tensors and not on them: an attribute would travel into files and copies.
_ORIGINS = WeakTensorKeyDictionary()


class _Pair(NamedTuple):
    """One (x, y) with the intermediate results of the call that made it."""

    x: Tensor
    y: Tensor
    work: Any
    recorded: bool
    parameters: tuple[Tensor, ...]  # kept alive, so that no other tensor gets one of their ids
    stamp: list


class Bijection(Transform):
    """A bijection of R^D whose cache is never stale.

    Two pairs are remembered. The pair that the last *forward* call made lets a sample be
    scored without a root search, in a chain of bijections as well. The pair of the last
    *inverse* call only hands its intermediate results on to ``log_abs_det_jacobian``. A pair
    serves the very tensors it was made with, as long as they and the parameters are unchanged:
    neither an optimiser step nor an in-place edit leaves a wrong answer behind (pyro issues
    #2718 and #2564). Only an edit in place through ``.data`` escapes, as it escapes autograd.
    Copies and pickles start with an empty cache.

    As with torch's cached transforms, the x found for a sample that carries its graph is the x
    it was made from: gradients flow on to the parameters, and not into the sample as such. For
    the latter clone the sample, or use :class:`~pyroflow.path_derivative.AlongPath`.

    Subclasses implement the four methods that raise ``NotImplementedError`` here.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self) -> None:
        super().__init__(cache_size=1)
        self._made: _Pair | None = None
        self._solved: _Pair | None = None

    def _map_parameters(self) -> tuple[Tensor, ...]:
        """The tensors that decide the map; the first has shape (*P, D) or (*P, K, D)."""
        raise NotImplementedError

    def _forward(self, x: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
        """Return y and the intermediate results ("work") that the other methods reuse."""
        raise NotImplementedError

    def _backward(
        self, y: Tensor, parameters: tuple[Tensor, ...], known: tuple[Tensor, Any] | None
    ) -> tuple[Tensor, Any]:
        """Return x and the work; ``known`` holds their values where they were found before."""
        raise NotImplementedError

    def _log_det(self, work: Any) -> Tensor:
        """Return log |det dy/dx|, shape (*B)."""
        raise NotImplementedError

    def _parameter_batch(self) -> Size:
        """The batch shape P of the parameters."""
        return Size()

    def __call__(self, x: Tensor) -> Tensor:
        """Return y = t(x) for x of shape (*B, D), and remember the pair."""
        parameters = self._map_parameters()
        self._check("x", x, parameters)
        y, work = precisely(self._forward, x, parameters)
        if torch.compiler.is_compiling():  # a compiler merges equal passes itself
            return y
        solved = self._solved
        if solved is not None and solved.x is _origin(x) and self._unchanged(solved):
            _remember_origin(y, _origin(solved.y))
        self._made = self._pair(x, y, work, parameters)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        parameters = self._map_parameters()
        self._check("y", y, parameters)
        if torch.compiler.is_compiling():
            return precisely(self._backward, y, parameters, None)[0]
        made = self._made_from(y, y) or self._made_from(y, _origin(y))
        if made is not None and made.x.shape == y.shape:
            own = made.y is y and not (y.is_leaf and y.requires_grad)
            if (own and made.recorded) or not torch.is_grad_enabled():
                return made.x
        known = made and (made.x, made.work)
        x, work = precisely(self._backward, y, parameters, known)
        if made is not None:
            _remember_origin(x, made.x)
        self._solved = self._pair(x, y, work, parameters)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log |det dy/dx|, shape (*B), for y = t(x)."""
        known = () if torch.compiler.is_compiling() else (self._made, self._solved)
        for pair in known:
            if pair is not None and self._serves(pair, x, y):
                return self._log_det(pair.work).to(x.dtype)
        parameters = self._map_parameters()
        self._check("x", x, parameters)
        return self._log_det(precisely(self._forward, x, parameters)[1]).to(x.dtype)

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
        made = None if torch.compiler.is_compiling() else self._made_from(y, origin)
        x, work = precisely(self._backward, y, fixed, made and (made.x, made.work))
        return x, self._log_det(work).to(y.dtype), made.x if made else x

    def forward_shape(self, shape: Size) -> Size:
        """Broadcast the batch part of a shape with that of the parameters."""
        return torch.broadcast_shapes(shape[:-1], self._parameter_batch()) + shape[-1:]

    inverse_shape = forward_shape

    def with_cache(self, cache_size: int = 1) -> Bijection:
        """Return self: the cache is always on, and never changes a result."""
        return self

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_made": None, "_solved": None}

    def _pair(
        self, x: Tensor, y: Tensor, work: Any, parameters: tuple[Tensor, ...]
    ) -> _Pair | None:
        if any([t.is_inference() for t in (x, y, *parameters)]):  # their edits cannot be noticed
            return None
        stamp = _stamp(x, y, parameters)
        return _Pair(x, y, work, torch.is_grad_enabled(), parameters, stamp)

    def _made_from(self, y: Tensor, origin: Tensor) -> _Pair | None:
        made = self._made
        if made is None or made.y is not origin or origin.shape != y.shape:
            return None
        return made if self._unchanged(made) else None

    def _serves(self, pair: _Pair, x: Tensor, y: Tensor) -> bool:
        enough = pair.recorded or not torch.is_grad_enabled()
        return enough and pair.x is x and pair.y is y and self._unchanged(pair)

    def _unchanged(self, pair: _Pair) -> bool:
        return pair.stamp == _stamp(pair.x, pair.y, self._map_parameters())

    def _check(self, name: str, value: Tensor, parameters: tuple[Tensor, ...]) -> None:
        parameter = parameters[0]
        kind, size = type(self).__name__, parameter.shape[-1]
        if value.dim() == 0 or value.shape[-1] != size:
            raise ValueError(
                f"{kind} expects {name} with last dimension {size}, got shape {tuple(value.shape)}"
            )
        if value.dtype != parameter.dtype:
            raise ValueError(
                f"{kind} has {parameter.dtype} parameters, got {name} in {value.dtype}: "
                f"convert one of them, as in {name}.to({parameter.dtype})"
            )
        if self._parameter_batch():
            self._check_batch(name, value)

    def _check_batch(self, name: str, value: Tensor) -> None:
        try:
            self.forward_shape(value.shape)
        except RuntimeError as error:
            raise ValueError(
                f"{type(self).__name__} has parameters of batch shape "
                f"{tuple(self._parameter_batch())}, which does not broadcast with {name} of "
                f"shape {tuple(value.shape)}"
            ) from error


def precisely(
    evaluate: Callable, value: Tensor, parameters: tuple[Tensor, ...], *known: Any
) -> tuple[Tensor, Any]:
    """Evaluate in the value's own dtype: with fewer digits the two directions would not meet.

    Half precision has too few itself: it is evaluated in float32 and the image rounded once.
    """
    if value.dtype.itemsize < 4:
        known = [pair and (pair[0].float(), pair[1]) for pair in known]
        wide = tuple(t.float() for t in parameters)
        image, work = precisely(evaluate, value.float(), wide, *known)
        return image.to(value.dtype), work
    device = value.device.type
    if value.is_meta or not torch.is_autocast_enabled(device):
        return evaluate(value, parameters, *known)
    with torch.autocast(device, enabled=False):
        return evaluate(value, parameters, *known)


def _remember_origin(value: Tensor, origin: Tensor) -> None:
    """Let the next transform of a chain know that value repeats a tensor it has made itself."""
    if not value.is_inference():  # their edits cannot be noticed
        _ORIGINS[value] = (origin, value._version)


def _origin(value: Tensor) -> Tensor:
    origin, version = _ORIGINS.get(value, (value, None))
    return origin if version is None or version == value._version else value


def _stamp(x: Tensor, y: Tensor, parameters: tuple[Tensor, ...]) -> list:
    """What changes with the tensors, their values or what they record."""
    watched = [(id(t), _address(t), t._version, t.requires_grad) for t in (x, *parameters)]
    return [y._version, _address(y), *watched]


def _address(t: Tensor) -> int:
    """Where the data lie: assigning ``t.data`` changes it, but not the version."""
    try:
        return t.data_ptr()
    except RuntimeError:  # the tensors of torch.func have none
        return 0
