"""Sylvester layers (van den Berg et al. 2018): M units a layer that act side by side."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn

from pyroflow.checks import check_choice, check_count
from pyroflow.transforms.bijection import Parameters
from pyroflow.transforms.kernels.autograd import Stack
from pyroflow.transforms.kernels.units import Units, softplus
from pyroflow.transforms.planar import INIT_SLOPE

Orthogonal = Literal["householder", "qr", "triangular"]
KINDS = ("householder", "qr", "triangular")


class Sylvester(Stack, TransformModule):
    """L Sylvester layers y = x + Q R tanh(R̃ Qᵀ x + b), trainable, starting as the identity.

    Base to data: ``t(x) = y``. Q (D×M) has orthonormal columns, R and R̃ are upper triangular:
    the M units of a layer act side by side, where M planar layers act in a row, and
    det = Π_i (1 + tanh'(a_i) r_ii r̃_ii). A diagonal is bound only by r_ii r̃_ii > −1, which is
    all that a bijection needs. The inverse is back-substitution with a scalar root for each
    unit. Pyro's transform of this name has a wrong determinant and no inverse.

    References:
        van den Berg, Hasenclever, Tomczak and Welling, Sylvester normalizing flows for
        variational inference, 2018, https://arxiv.org/abs/1803.05649, equations 13 and 14.

    Args:
        input_dim: D; inputs have shape (*B, D).
        num_units: M, from 1 to D.
        num_layers: L; 0 is the identity.
        orthogonal: how Q is made: a product of M "householder" reflections; the orthogonal factor
            of a "qr" decomposition; or "triangular", where Q is fixed, in turn the first columns
            of the identity and the last ones in reverse: meant for M = D, as of D > 2 M
            coordinates D − 2 M stay as they are.

    Attributes:
        frame: what Q is made of, shape (L, M, D); a buffer where Q is fixed.
        R, R_tilde: shape (L, M, M).
        b: shape (L, M).

    Raises:
        ValueError: If a size is out of range or ``orthogonal`` unknown; at a call, if an input's
            last dimension is not D or its dtype not that of the parameters.

    Example:
        >>> import torch
        >>> from pyroflow import Sylvester
        >>> t, x = Sylvester(5, num_units=3, num_layers=2), torch.randn(7, 5)
        >>> t.log_abs_det_jacobian(x, t(x)).shape, torch.allclose(t.inv(t(x).clone()), x, atol=1e-5)
        (torch.Size([7]), True)
    """

    event_dims = {"frame": 3, "R": 3, "R_tilde": 3, "b": 2}

    def __init__(
        self,
        input_dim: int,
        num_units: int,
        num_layers: int = 1,
        orthogonal: Orthogonal = "householder",
    ) -> None:
        D, M = check_count("input_dim", input_dim, 1), check_count("num_units", num_units, 1)
        L = check_count("num_layers", num_layers, 0)
        check_choice("orthogonal", orthogonal, KINDS)
        if M > D:
            raise ValueError(
                f"num_units must be at most input_dim = {D}, as Q has orthonormal columns, got "
                f"{M}: use more layers instead"
            )
        Stack.__init__(self)
        self.orthogonal = orthogonal
        if orthogonal == "triangular":
            self.fixed = ("frame",)
            turns = torch.stack([torch.eye(M, D), torch.eye(M, D).flip(1)])
            self.register_buffer("frame", turns[torch.arange(L) % 2])
        else:
            self.frame = nn.Parameter(torch.empty(L, M, D))
        self.R = nn.Parameter(torch.empty(L, M, M))
        self.R_tilde = nn.Parameter(torch.empty(L, M, M))
        self.b = nn.Parameter(torch.empty(L, M))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw Q and hyperplanes that cross a standard normal, and set R so that it is bound to 0.

        p softplus(β (r + 1/p)) = β, where p is the diagonal of R̃ and β = 1 + p.
        """
        if self.orthogonal != "triangular":
            self.frame.normal_()
        M = self.b.shape[-1]
        self.R_tilde.normal_(std=INIT_SLOPE / math.sqrt(2 * M)).triu_(1)
        p = INIT_SLOPE / math.sqrt(2)
        self.R_tilde.diagonal(dim1=-2, dim2=-1).fill_(p)
        self.b.normal_().mul_(self.R_tilde.square().sum(-1).sqrt())
        self.R.zero_().diagonal(dim1=-2, dim2=-1).fill_(
            math.log(math.expm1(1 + 1 / p)) / (1 + p) - 1 / p
        )

    def _units(self, parameters: Parameters) -> Units:
        """The layers as planar units: W = R̃ Qᵀ and Û = (Q R)ᵀ, so that G = R̃ R is triangular."""
        frame, R, R_tilde, b = parameters
        M, D = frame.shape[-2:]
        bound, s = bind_diagonal(*(t.diagonal(dim1=-2, dim2=-1) for t in (R, R_tilde)))
        Q_T = orthonormal(frame, self.orthogonal)
        W = R_tilde.triu() @ Q_T
        U = (R.triu(1) + bound.diag_embed()).mT @ Q_T
        W, U, s = (t.flatten(-3, -2) for t in (W, U, s.unsqueeze(-1)))
        return Units(W, U, b.flatten(-2), s, max(M, 1))


def orthonormal(frame: Tensor, orthogonal: Orthogonal) -> Tensor:
    """Qᵀ, shape (*, M, D) with orthonormal rows, of an unconstrained frame of that shape.

    "householder": the first M columns of the product of M reflections I − 2 v vᵀ/‖v‖², a row v
    of the frame each, in the compact form I − V T Vᵀ (Joffrin and Higham 2006): any Q can be
    reached. "qr": the orthogonal factor of the frame, with a positive diagonal of the other, so
    that it is smooth and unique. "triangular": the frame itself, which is fixed.
    """
    if orthogonal == "triangular" or 0 in frame.shape:
        return frame
    if orthogonal == "qr":
        Q, R = torch.linalg.qr(frame.mT)
        return (Q * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q).unsqueeze(-2)).mT
    M, tiny = frame.shape[-2], torch.finfo(frame.dtype).tiny
    # A reflection does not depend on the length of v, and neither do derivatives on this scale.
    frame = frame / frame.detach().abs().amax(-1, keepdim=True).clamp(min=tiny)
    products = frame @ frame.mT
    halves = (products.diagonal(dim1=-2, dim2=-1) / 2).clamp(min=tiny)
    middle = products.triu(1) + halves.diag_embed()
    reflected = torch.linalg.solve_triangular(middle.mT, frame, upper=False)
    identity = torch.eye(M, frame.shape[-1], dtype=frame.dtype, device=frame.device)
    return identity - frame[..., :M].mT @ reflected


def bind_diagonal(r: Tensor, r_tilde: Tensor) -> tuple[Tensor, Tensor]:
    """The bound diagonal r̂ of R, and s = 1 + r̂ r̃ > 0; all of one shape.

    For r̃ > 0 the bound r̂ > −1/r̃ is kept by r̂ = −1/r̃ + softplus(β (r + 1/r̃))/β, β = 1 + r̃, and
    r̃ < 0 is its mirror image, since tanh is odd. At r̃ = 0 there is no bound and r̂ = r, with all
    derivatives. The û of planar layers has β = r̃, and so a pole at 0, which a diagonal passes on
    its way from one sign to the other.
    """
    p = r_tilde.abs().clamp(min=1e-6)  # below, softplus is linear but for r beyond 1e6
    beta = 1 + p
    v = (1 + r * r_tilde) * beta / p
    tail, above = softplus(-v.abs()) / beta, v > 0
    # p softplus(v)/β for v > 0 is 1 + r r̃ + p tail: v is large at small p, and would cancel later
    near = softplus(v.masked_fill(above, 0.0)) * p / beta
    s = torch.where(above, 1 + r * r_tilde + p * tail, near).clamp(min=torch.finfo(r.dtype).tiny)
    sign = r_tilde.sign()
    return torch.where(above, r + sign * tail, sign * (tail - 1 / p)), s
