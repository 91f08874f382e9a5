"""A bijection: a formula and its parameters, with a cache of pairs (x, y) that is never stale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from torch.distributions import Transform, constraints
from torch.utils.weak import WeakTensorKeyDictionary

from pyroflow.transforms.shown import ShownTransform

# Beside the tensors and not on them: an attribute would travel into files and copies.
_ORIGINS = WeakTensorKeyDictionary()

Parameters = tuple[Tensor, ...]


class Pair(NamedTuple):
    """One (x, y) with the intermediates of the call that made it."""

    x: Tensor
    y: Tensor
    intermediates: Any
    parameters: Parameters  # kept alive, so that no other tensor gets one of their ids
    recorded: bool  # with a graph
    stamp: list

    @classmethod
    def of(cls, x: Tensor, y: Tensor, intermediates: Any, parameters: Parameters) -> Pair | None:
        """The pair as it is now; None in inference mode, where edits cannot be noticed."""
        if any([t.is_inference() for t in (x, y, *parameters)]):
            return None
        stamp = _stamp(x, y, parameters)
        return cls(x, y, intermediates, parameters, torch.is_grad_enabled(), stamp)

    def unchanged(self, parameters: Parameters) -> bool:
        """Whether x, y and the parameters are what they were."""
        return self.stamp == _stamp(self.x, self.y, parameters)


class PairCache:
    """The pair (x, y) of the last forward call and that of the last inverse call.

    The first lets a sample be scored without a root search, in a chain of transforms as well; the
    second only hands its intermediates on to ``log_abs_det_jacobian``. A pair serves the very
    tensors it was made with, while they and the parameters are unchanged, so that no optimiser
    step or edit in place leaves a wrong answer behind (pyro issues #2718 and #2564), but for an
    edit in place through ``.data``, which escapes autograd too.
    """

    def __init__(self) -> None:
        self.forward: Pair | None = None
        self.inverse: Pair | None = None

    def made_together(self, x: Tensor, y: Tensor, parameters: Parameters) -> Pair | None:
        """The pair of these very tensors."""
        for pair in () if torch.compiler.is_compiling() else (self.forward, self.inverse):
            if pair is not None and pair.x is x and pair.y is y and pair.unchanged(parameters):
                return pair if pair.recorded or not torch.is_grad_enabled() else None
        return None

    def made_from(self, y: Tensor, origin: Tensor, parameters: Parameters) -> Pair | None:
        """The forward pair, where it made ``origin``, a tensor with the values of y."""
        pair = None if torch.compiler.is_compiling() else self.forward
        if pair is None or pair.y is not origin or origin.shape != y.shape:
            return None
        return pair if pair.unchanged(parameters) else None


class Bijection(ShownTransform, Transform):
    """A bijection of R^D: a formula, the tensors that it takes, and a :class:`PairCache`.

    A family holds a tensor under each name of ``event_dims``, whose values are their numbers of
    dimensions without a batch; the first one's last size is D, and those in ``fixed`` are not
    trained. It implements ``_forward(x, parameters)`` and ``_invert(y, parameters, cached)``, which
    return the image and intermediates, and ``_log_det(intermediates)``. ``cached`` is the pair
    that holds the solution, or None.

    As with torch's cached transforms, the x found for a sample that carries its graph is the x
    it was made from: gradients flow on to the parameters, and not into the sample as such. For
    the latter clone the sample, or use :class:`~pyroflow.flows.AlongPath`.
    """

    domain = codomain = constraints.real_vector
    bijective = True
    event_dims: Mapping[str, int] = {}
    fixed: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__(cache_size=1)
        self._cache = PairCache()

    def trained(self) -> Parameters:
        """The trainable parameters."""
        return tuple(getattr(self, name) for name in self.event_dims if name not in self.fixed)

    def at(self, *trained: Tensor) -> Conditioned:
        """The same map with other tensors, of any batch shape, in place of :meth:`trained`."""
        names = [name for name in self.event_dims if name not in self.fixed]
        if len(trained) != len(names):
            raise ValueError(f"{self._name()}.at expects {', '.join(names)}, got {len(trained)}")
        return Conditioned(self, dict(zip(names, trained, strict=True)))

    def __call__(self, x: Tensor) -> Tensor:
        """Return y = t(x) for x of shape (*B, D), and cache the pair."""
        return self._cached_forward(x)[0]

    def _inv_call(self, y: Tensor) -> Tensor:
        return self._cached_inverse(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log |det dy/dx|, shape (*B), for y = t(x)."""
        parameters = self._map_parameters()
        pair = self._cache.made_together(x, y, parameters)
        if pair is not None:
            return self._log_det(pair.intermediates).to(x.dtype)
        self._check("x", x, parameters)
        return self._log_det(precisely(self._forward, x, parameters)[1]).to(x.dtype)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return t(x) and log |det dy/dx|, reading the parameters once."""
        y, intermediates = self._cached_forward(x)
        return y, self._log_det(intermediates).to(x.dtype)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return t⁻¹(y) and log |det dy/dx|, reading the parameters once."""
        x, intermediates = self._cached_inverse(y)
        return x, self._log_det(intermediates).to(y.dtype)

    def inverse_along_path(self, y: Tensor, origin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t⁻¹(y) and log |det dy/dx| as functions of y alone, and the origin of t⁻¹(y).

        Where this transform has just made ``origin`` (y itself, or the origin that the next
        transform towards the data returned) nothing is solved: the forward pass has the solution.
        """
        parameters = self._map_parameters()
        self._check("y", y, parameters)
        pair = self._cache.made_from(y, origin, parameters)
        fixed = tuple(t.detach() for t in parameters)
        x, intermediates = precisely(self._invert, y, fixed, pair)
        return x, self._log_det(intermediates).to(y.dtype), pair.x if pair else x

    def with_cache(self, cache_size: int = 1) -> Bijection:
        """Return self: the cache is always on, and never changes a result."""
        return self

    def forward_shape(self, shape: Size) -> Size:
        """The shape itself: the trained parameters have no batch dimensions."""
        return shape

    inverse_shape = forward_shape

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_cache": PairCache()}

    def _name(self) -> str:
        return type(self).__name__

    def _map_parameters(self) -> Parameters:
        return tuple([getattr(self, name) for name in self.event_dims])

    def _check(self, name: str, value: Tensor, parameters: Parameters) -> None:
        size, dtype = parameters[0].shape[-1], parameters[0].dtype
        if value.dim() == 0 or value.shape[-1] != size:
            raise ValueError(
                f"{self._name()} expects {name} with last dimension {size}, got shape "
                f"{tuple(value.shape)}"
            )
        if value.dtype != dtype:
            raise ValueError(
                f"{self._name()} has {dtype} parameters, got {name} in {value.dtype}: convert one "
                f"of them, as in {name}.to({dtype})"
            )
        try:
            self.forward_shape(value.shape)
        except RuntimeError as error:
            batch = tuple(batch_shape(parameters, self.event_dims))
            raise ValueError(
                f"{self._name()} has parameters of batch shape {batch}, which does not broadcast "
                f"with {name} of shape {tuple(value.shape)}"
            ) from error

    def _cached_forward(self, x: Tensor) -> tuple[Tensor, Any]:
        parameters = self._map_parameters()
        self._check("x", x, parameters)
        y, intermediates = precisely(self._forward, x, parameters)
        if torch.compiler.is_compiling():  # a compiler merges equal passes itself
            return y, intermediates
        last = self._cache.inverse
        if last is not None and last.x is _origin(x) and last.unchanged(parameters):
            _remember_origin(y, _origin(last.y))
        self._cache.forward = Pair.of(x, y, intermediates, parameters)
        return y, intermediates

    def _cached_inverse(self, y: Tensor) -> tuple[Tensor, Any]:
        parameters = self._map_parameters()
        self._check("y", y, parameters)
        if torch.compiler.is_compiling():
            return precisely(self._invert, y, parameters, None)
        made_from = self._cache.made_from
        pair = made_from(y, y, parameters) or made_from(y, _origin(y), parameters)
        if pair is not None and pair.x.shape == y.shape:
            own = pair.y is y and not (y.is_leaf and y.requires_grad)
            if (own and pair.recorded) or not torch.is_grad_enabled():
                return pair.x, pair.intermediates
        x, intermediates = precisely(self._invert, y, parameters, pair)
        if pair is not None:
            _remember_origin(x, pair.x)
        self._cache.inverse = Pair.of(x, y, intermediates, parameters)
        return x, intermediates


class Conditioned(Bijection):
    """The formula of a bijection at given parameters, each with batch dimensions of its own.

    Made by :meth:`Bijection.at` and by the conditional transforms; a snapshot.

    Example:
        >>> import torch
        >>> from pyroflow import Planar
        >>> t = Planar(3, num_layers=4)
        >>> t.at(torch.randn(7, 4, 3), t.u, t.b)(torch.zeros(5, 7, 3)).shape
        torch.Size([5, 7, 3])
    """

    def __init__(self, family: Bijection, trained: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.family, self.event_dims, self.fixed = family, family.event_dims, family.fixed
        self._forward, self._invert = family._forward, family._invert
        self._log_det = family._log_det
        vars(self).update({name: getattr(family, name) for name in self.fixed} | dict(trained))
        self._batch_shape = batch_shape(self._map_parameters(), self.event_dims)

    def forward_shape(self, shape: Size) -> Size:
        """Broadcast the batch part of a shape with that of the parameters."""
        return torch.broadcast_shapes(shape[:-1], self._batch_shape) + shape[-1:]

    inverse_shape = forward_shape

    def _shown(self) -> tuple[str, dict[str, str]]:
        return f"{self._name()}.at(...)", {}

    def _name(self) -> str:
        return self.family._name()


def batch_shape(parameters: Parameters, event_dims: Mapping[str, int]) -> Size:
    """The shape P of the parameters' batch."""
    pairs = list(zip(parameters, event_dims.values(), strict=True))
    if not any([t.dim() > n for t, n in pairs]):
        return Size()
    return torch.broadcast_shapes(*[t.shape[: t.dim() - n] for t, n in pairs])


def precisely(
    evaluate: Callable, value: Tensor, parameters: Parameters, *cached: Pair | None
) -> tuple[Tensor, Any]:
    """Evaluate in the value's own dtype: with fewer digits the two directions would not meet.

    Half precision has too few itself: it is evaluated in float32 and the image rounded once.
    """
    if value.dtype.itemsize < 4:
        cached = [pair and pair._replace(x=pair.x.float()) for pair in cached]
        wide = tuple(t.float() for t in parameters)
        image, intermediates = precisely(evaluate, value.float(), wide, *cached)
        return image.to(value.dtype), intermediates
    device = value.device.type
    if value.is_meta or not torch.is_autocast_enabled(device):
        return evaluate(value, parameters, *cached)
    with torch.autocast(device, enabled=False):
        return evaluate(value, parameters, *cached)


def _remember_origin(value: Tensor, origin: Tensor) -> None:
    """Let the next transform of a chain know that value repeats a tensor it has made itself."""
    if not value.is_inference():
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
