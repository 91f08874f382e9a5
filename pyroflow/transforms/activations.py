"""The bends of a unit: h(a), its slope, and the scalar equation a + (s − 1) h(a) = r."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pyroflow.checks import check_choice, check_fraction
from pyroflow.transforms.monotone_root import monotone_root

Nonlinearity = Literal["tanh", "leaky_relu"]


def sech2(a: Tensor) -> Tensor:
    """sech²(a) = 1 − tanh²(a), to full relative precision and without overflow."""
    return 4 * torch.sigmoid(2 * a) * torch.sigmoid(-2 * a)


class Tanh:
    """h = tanh, as in the paper."""

    def value(self, a: Tensor) -> Tensor:
        """h(a)."""
        return a.tanh()

    def slope(self, a: Tensor) -> Tensor:
        """h'(a)."""
        return sech2(a)

    def det(self, a: Tensor, s: Tensor) -> Tensor:
        """1 + (s − 1) h'(a) as a sum of positives, t² + s (1 − t²)."""
        return a.tanh().square() + s * sech2(a)

    def root(self, r: Tensor, s: Tensor) -> Tensor:
        """The a with a + (s − 1) h(a) = r; gradients are not recorded."""
        return monotone_root(r, s)


class LeakyReLU:
    """h(a) = max(a, slope·a) for a slope in (0, 1).

    The condition for a bijection is that of tanh, s > 0, as 1 + (s − 1) h' lies between 1 and s.
    """

    def __init__(self, negative_slope: float) -> None:
        self.negative_slope = check_fraction("negative_slope", negative_slope)

    def value(self, a: Tensor) -> Tensor:
        """h(a)."""
        return F.leaky_relu(a, self.negative_slope)

    def slope(self, a: Tensor) -> Tensor:
        """h'(a), 1 at the origin."""
        return torch.where(a >= 0, torch.ones_like(a), self.negative_slope)

    def det(self, a: Tensor, s: Tensor) -> Tensor:
        """1 + (s − 1) h'(a) as a sum of positives."""
        return torch.where(a >= 0, s, (1 - self.negative_slope) + self.negative_slope * s)

    def root(self, r: Tensor, s: Tensor) -> Tensor:
        """The a with a + (s − 1) h(a) = r: r over the determinant on its side."""
        return r / self.det(r, s)


Activation = Tanh | LeakyReLU
TANH = Tanh()


def activation_named(nonlinearity: Nonlinearity, negative_slope: float) -> Activation:
    """The activation of that name; only the leaky one has a slope.

    Raises:
        ValueError: an unknown name, or a slope outside (0, 1).
    """
    check_choice("nonlinearity", nonlinearity, ("tanh", "leaky_relu"))
    return TANH if nonlinearity == "tanh" else LeakyReLU(negative_slope)
