"""NICE: volume-preserving additive couplings with fixed random mixing (Dinh et al. 2015)."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import Transform
from torch.nn.functional import linear

from pyroflow.checks import check_choice, check_count
from pyroflow.targets import Energy
from pyroflow.transforms import Bijection

Mixing = Literal["permutation", "orthogonal"]


class AdditiveCoupling(Bijection, TransformModule):
    """K layers y = (m_A, m_B + h(m_A)), m = Q x, of volume one; trainable, but for Q.

    Base to data: ``t(x) = y``. A is the first half of the coordinates and B the others, h is a
    network with one hidden layer that starts as zero, and Q is a fixed random matrix of the
    layer's own: a permutation, or any orthogonal matrix. It is drawn from torch's global
    generator when the transform is made, uniformly from all permutations, or from all orthogonal
    matrices (Haar's measure). In two dimensions half of all permutations are the
    identity, and layers that follow one move the same coordinate again; it is left so, as in the
    paper.

    log |det| is 0. The inverse costs what the forward call costs.

    References:
        Rezende and Mohamed, Variational Inference with Normalizing Flows, 2015,
        https://arxiv.org/abs/1505.05770, equation 18; Dinh, Krueger and Bengio, NICE, 2015,
        https://arxiv.org/abs/1410.8516.

    Args:
        input_dim: D, at least 2; inputs have shape (*B, D).
        num_layers: K; 0 is the identity.
        mixing: the kind of Q, "permutation" or "orthogonal"; None for layers that do not mix.
        hidden_dim: H, the rectified linear units of each h.

    Attributes:
        mixed: the matrices Q, shape (K, D, D), or None; a buffer: saved, moved and copied.

    Raises:
        ValueError: a size that is too small or an unknown mixing; at a call, an input whose last
            dimension is not D or whose dtype is not that of the parameters.

    Example:
        >>> t = AdditiveCoupling(5, num_layers=2, hidden_dim=16)
        >>> x = torch.randn(7, 5)
        >>> t(x).shape, t.log_abs_det_jacobian(x, t(x)).shape
        (torch.Size([7, 5]), torch.Size([7]))
    """

    def __init__(
        self,
        input_dim: int,
        num_layers: int = 1,
        mixing: Mixing | None = "permutation",
        hidden_dim: int = 64,
    ) -> None:
        Bijection.__init__(self)
        self.input_dim = D = check_count("input_dim", input_dim, 2)
        K, H = check_count("num_layers", num_layers, 0), check_count("hidden_dim", hidden_dim, 1)
        check_choice("mixing", mixing, ("permutation", "orthogonal", None))
        kept = D // 2
        self.register_buffer("mixed", mixing and _mixing_matrices(K, D, mixing))
        self.hidden_weight = nn.Parameter(torch.randn(K, H, kept) * math.sqrt(2 / kept))
        # each unit bends at a point of a standard normal, so that none idles at the start
        points = torch.randn(K, H, kept)
        self.hidden_bias = nn.Parameter((self.hidden_weight.detach() * points).sum(-1))
        self.weight = nn.Parameter(torch.zeros(K, D - kept, H))
        self.bias = nn.Parameter(torch.zeros(K, D - kept))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Zeros of shape (*B), for x of shape (*B, D)."""
        return self._log_det(x)

    def _map_parameters(self) -> tuple[Tensor, ...]:
        networks = self.hidden_weight, self.hidden_bias, self.weight, self.bias
        return networks if self.mixed is None else (*networks, self.mixed)

    def _forward(self, x: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        sizes = self._sizes()
        for *network, Q in self._layers(parameters):
            kept, moved = (x if Q is None else linear(x, Q)).split(sizes, -1)
            x = torch.cat([kept, moved + _shift(kept, *network)], -1)
        return x, x

    def _invert(
        self, y: Tensor, parameters: tuple[Tensor, ...], cached: Any
    ) -> tuple[Tensor, Tensor]:
        sizes = self._sizes()
        for *network, Q in reversed(self._layers(parameters)):
            kept, moved = y.split(sizes, -1)
            y = torch.cat([kept, moved - _shift(kept, *network)], -1)
            y = y if Q is None else y @ Q
        return y, y

    def _log_det(self, intermediates: Tensor) -> Tensor:
        return intermediates.new_zeros(intermediates.shape[:-1])

    def _sizes(self) -> list[int]:
        return [self.input_dim // 2, self.input_dim - self.input_dim // 2]

    def _layers(self, parameters: tuple[Tensor, ...]) -> list[tuple[Tensor | None, ...]]:
        """The parameters of each layer, Q last."""
        stacks = [t.unbind(0) for t in parameters]
        if self.mixed is None:
            stacks.append([None] * len(parameters[0]))
        return list(zip(*stacks, strict=True))

    def _check(self, name: str, value: Tensor, parameters: tuple[Tensor, ...]) -> None:
        super()._check(name, value, (parameters[0].new_empty(self.input_dim),))


def nice_layers(
    input_dim: int, num_layers: int, mixing: Mixing = "permutation", hidden_dim: int = 64
) -> list[Transform]:
    """The transforms of a NICE flow, from base to data: K layers, each mixing and a coupling.

    Args:
        input_dim: D.
        num_layers: K.
        mixing: "permutation" or "orthogonal".
        hidden_dim: hidden units of each coupling.

    Raises:
        ValueError: a size that is too small, or an unknown mixing.

    Example:
        >>> from pyroflow.flows import Flow, StandardNormal
        >>> flow = Flow(StandardNormal(4), nice_layers(4, 3, "orthogonal"))
        >>> flow().log_prob(flow().sample((5,))).shape
        torch.Size([5])
    """
    return [AdditiveCoupling(input_dim, num_layers, mixing, hidden_dim)]


def volume_preserving_floor(target: Energy) -> float:
    """The least KL(T(q_0) ‖ p) over Gaussians q_0 in the plane and maps T of volume one.

    T keeps the entropy. E[U(T(x))] is least where the level sets of U are filled in the order
    of those of q_0. A Gaussian with √|Σ| = s² has, outside the level set of area v, the mass
    exp(−v / 2πs²): v is exponential with mean m = 2πs². With U*(v) the least U outside area v,
    the best T has KL = E[U*(v)] − ln(e m) + ln Z.

    Args:
        target: U, a map (N, 2) → (N,) that has a ``log_normalizer`` and is high beyond ±9.

    Raises:
        ValueError: the best Gaussian is narrower or wider than this grid can tell.

    Example:
        >>> from pyroflow.targets import energy
        >>> round(volume_preserving_floor(energy(1)), 3)
        0.009
    """
    cells, half = 400, 9.0
    places = half * ((torch.arange(cells, dtype=torch.float64) + 0.5) / cells * 2 - 1)
    levels = target(torch.cartesian_prod(places, places)).sort().values
    area = torch.arange(cells**2 + 1, dtype=torch.float64) * (2 * half / cells) ** 2
    means = np.geomspace(1.0, 60.0, 200)
    values = [
        ((-area / m).exp().diff().neg() @ levels).item() - math.log(math.e * m) for m in means
    ]
    best = int(np.argmin(values))
    if best in (0, len(means) - 1):
        raise ValueError(
            f"target must have its best Gaussian at a level set of area between {means[0]:g} and "
            f"{means[-1]:g}, got one at {means[best]:g} or beyond: scale z"
        )
    return values[best] + target.log_normalizer


def _shift(kept: Tensor, inner: Tensor, inner_bias: Tensor, outer: Tensor, bias: Tensor) -> Tensor:
    """The network h at m_A."""
    return linear(linear(kept, inner, inner_bias).relu(), outer, bias)


def _mixing_matrices(count: int, size: int, kind: Mixing) -> Tensor:
    """Random matrices, shape (count, size, size)."""
    if kind == "permutation":
        return torch.eye(size)[torch.rand(count, size).argsort(-1)]
    # QR with R's diagonal made positive: Mezzadri 2007, arXiv math-ph/0609050
    q, r = torch.linalg.qr(torch.randn(count, size, size, dtype=torch.float64))
    signs = r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return (q * signs).to(torch.get_default_dtype())
