"""A bijection is a formula and parameters; ``t.at(...)`` is the same formula at other tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from pyroflow.transforms.cache import Cached, CachedTransform, Parameters


class Bijection(CachedTransform):
    """A bijection of R^D: a formula, and the tensors that it takes.

    A family sets ``event_dims``, holds a tensor under each of its names, and implements
    ``_forward``, ``_invert`` and ``_log_det``.

    Attributes:
        event_dims: the number of dimensions of each parameter without its batch, by name and in
            the order in which the formula takes them; the first parameter's last size is D.
        fixed: the names of those that are not trained.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    event_dims: Mapping[str, int] = {}
    fixed: tuple[str, ...] = ()

    def trained(self) -> Parameters:
        """The trainable parameters."""
        return tuple(getattr(self, name) for name in self._trained_names())

    def at(self, *trained: Tensor) -> Conditioned:
        """The same map with other tensors, of any batch shape, in place of the trained ones.

        Args:
            *trained: as :meth:`trained` returns them, each with batch dimensions of its own.

        Raises:
            ValueError: If their number is not that of the trained parameters.
        """
        names = self._trained_names()
        if len(trained) != len(names):
            raise ValueError(f"{self._name()}.at expects {', '.join(names)}, got {len(trained)}")
        fixed = {name: getattr(self, name) for name in self.fixed}
        return Conditioned(self, fixed | dict(zip(names, trained, strict=True)))

    def forward_shape(self, shape: Size) -> Size:
        """The shape itself: the trained parameters have no batch dimensions."""
        return shape

    inverse_shape = forward_shape

    def _name(self) -> str:
        return type(self).__name__

    def _map_parameters(self) -> Parameters:
        return tuple([getattr(self, name) for name in self.event_dims])

    def _trained_names(self) -> list[str]:
        return [name for name in self.event_dims if name not in self.fixed]

    def _batch(self, parameters: Parameters) -> Size:
        """The batch shape P of the parameters."""
        pairs = list(zip(parameters, self.event_dims.values(), strict=True))
        if not any([t.dim() > n for t, n in pairs]):
            return Size()
        return torch.broadcast_shapes(*[t.shape[: t.dim() - n] for t, n in pairs])

    def _check(self, name: str, value: Tensor, parameters: Parameters) -> None:
        parameter = parameters[0]
        if value.dim() == 0 or value.shape[-1] != parameter.shape[-1]:
            raise ValueError(
                f"{self._name()} expects {name} with last dimension {parameter.shape[-1]}, got "
                f"shape {tuple(value.shape)}"
            )
        if value.dtype != parameter.dtype:
            raise ValueError(
                f"{self._name()} has {parameter.dtype} parameters, got {name} in {value.dtype}: "
                f"convert one of them, as in {name}.to({parameter.dtype})"
            )


class Conditioned(Bijection):
    """The formula of a bijection at given parameters, each with batch dimensions of its own.

    Made by :meth:`Bijection.at`, and by the conditional transforms; a snapshot.

    Args:
        family: whose formula it is.
        parameters: a tensor for each name of its ``event_dims``.

    Example:
        >>> import torch
        >>> from pyroflow import Planar
        >>> t = Planar(3, num_layers=4)
        >>> t.at(torch.randn(7, 4, 3), t.u, t.b)(torch.zeros(5, 7, 3)).shape
        torch.Size([5, 7, 3])
    """

    def __init__(self, family: Bijection, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.family = family
        self.event_dims, self.fixed = family.event_dims, family.fixed
        vars(self).update(parameters)
        self._batch_shape = self._batch(self._map_parameters())

    def forward_shape(self, shape: Size) -> Size:
        """Broadcast the batch part of a shape with that of the parameters."""
        return torch.broadcast_shapes(shape[:-1], self._batch_shape) + shape[-1:]

    inverse_shape = forward_shape

    def __repr__(self) -> str:
        return f"{self._name()}.at(...)"

    def _name(self) -> str:
        return self.family._name()

    def _forward(self, x: Tensor, parameters: Parameters) -> tuple[Tensor, Any]:
        return self.family._forward(x, parameters)

    def _invert(self, y: Tensor, parameters: Parameters, cached: Cached) -> tuple[Tensor, Any]:
        return self.family._invert(y, parameters, cached)

    def _log_det(self, intermediates: Any) -> Tensor:
        return self.family._log_det(intermediates)

    def _check(self, name: str, value: Tensor, parameters: Parameters) -> None:
        super()._check(name, value, parameters)
        try:
            self.forward_shape(value.shape)
        except RuntimeError as error:
            raise ValueError(
                f"{self._name()} has parameters of batch shape {tuple(self._batch_shape)}, which "
                f"does not broadcast with {name} of shape {tuple(value.shape)}"
            ) from error
