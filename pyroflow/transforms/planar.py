"""Planar layers (Rezende & Mohamed 2015, equation 10), K of them as one transform."""

from __future__ import annotations

import math

import torch
from pyro.distributions.torch_transform import TransformModule
from torch import nn

from pyroflow.checks import check_choice, check_count
from pyroflow.transforms.kernels.autograd import Stack
from pyroflow.transforms.kernels.units import TANH, LeakyReLU, Nonlinearity

IDENTITY_SLOPE = math.log(math.e - 1)  # wᵀu at which m(wᵀu) = 0, so that û = 0
INIT_SLOPE = 3.0  # ‖w‖ at the start, about: hyperplanes with bends as sharp as data need


class Planar(Stack, TransformModule):
    """K planar layers y = x + û tanh(wᵀx + b), trainable, starting as the identity.

    Base to data: ``t(x) = y``. û is the paper's constrained u, so every parameter value is
    a bijection, with log |det| = ln |1 + ûᵀψ(x)|, ψ(x) = h'(wᵀx + b) w (equations 10 to 13). The
    layers act in order, layer 1 first, and together cost two matrix products and a recursion in
    K numbers. The inverse solves K monotone scalar equations to rounding level; a sample that the
    transform just made is scored without solving anything.

    References:
        Rezende and Mohamed, Variational Inference with Normalizing Flows, 2015,
        https://arxiv.org/abs/1505.05770, equations 10 to 13 and appendix A.1.

    Args:
        input_dim: D; inputs have shape (*B, D).
        num_layers: K; 0 is the identity.
        nonlinearity: "tanh" as in the paper, or "leaky_relu": piecewise linear layers, whose
            inverse takes no root search and which may change the tails of the base.
        negative_slope: of the leaky ReLU, in (0, 1).

    Attributes:
        w, u: shape (K, D).
        b: shape (K,).

    Raises:
        ValueError: If a size is too small or the nonlinearity unknown; at a call, if an input's
            last dimension is not D or its dtype not that of the parameters.

    Example:
        >>> import torch
        >>> from pyroflow import Planar
        >>> t, x = Planar(2, num_layers=8), torch.randn(5, 2)
        >>> t.log_abs_det_jacobian(x, t(x)).shape, torch.allclose(t.inv(t(x).clone()), x, atol=1e-5)
        (torch.Size([5]), True)
    """

    event_dims = {"w": 2, "u": 2, "b": 1}

    def __init__(
        self,
        input_dim: int,
        num_layers: int = 1,
        *,
        nonlinearity: Nonlinearity = "tanh",
        negative_slope: float = 0.2,
    ) -> None:
        check_count("input_dim", input_dim, 1)
        check_count("num_layers", num_layers, 0)
        check_choice("nonlinearity", nonlinearity, ("tanh", "leaky_relu"))
        Stack.__init__(self)
        self.activation = TANH if nonlinearity == "tanh" else LeakyReLU(negative_slope)
        self.w = nn.Parameter(torch.empty(num_layers, input_dim))
        self.u = nn.Parameter(torch.empty(num_layers, input_dim))
        self.b = nn.Parameter(torch.empty(num_layers))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw hyperplanes that cross a standard normal, and set u so that each û is 0.

        û = 0 needs wᵀu = ln(e − 1). Small weights would not do: u = 0 makes wᵀû = ln 2 − 1,
        and a stack of such layers a strong contraction.
        """
        D = self.w.shape[-1]
        self.w.normal_(std=INIT_SLOPE / math.sqrt(D))
        norm = self.w.norm(dim=-1, keepdim=True)
        self.w *= norm.clamp(min=0.1 * INIT_SLOPE) / norm
        self.b.copy_((self.w * torch.randn_like(self.w)).sum(-1))
        self.u.copy_(IDENTITY_SLOPE * self.w / self.w.square().sum(-1, keepdim=True))
