"""Ours, the rivals that run on torch, and the floor, each behind one call x ↦ (y, log|det|)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from pyro.distributions.transforms import Planar as PyroPlanar
from torch import Tensor, nn

import pyroflow as pf

from .problem import Problem, constrained

OURS, PYRO, NORMFLOWS, FLOWJAX, FLOOR = "pyroflow", "Pyro chain", "normflows", "flowjax", "floor"


class Contender:
    """A stack of layers whose gradients are those of its parameters."""

    parameters: Sequence[Tensor]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y, shape (N, D), and log|det|, shape (N,)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and log|det| without gradients. A new tensor object defeats every cache."""
        with torch.no_grad():
            return self(x.detach())

    def train(self, x: Tensor) -> Sequence[Tensor]:
        """Gradients of the reverse KL to a standard normal, up to its constant."""
        y, log_det = self(x.detach())
        return torch.autograd.grad((y.square().sum(-1) / 2 - log_det).mean(), self.parameters)


class Ours(Contender):
    """pyroflow's stack of K layers, through its public calls."""

    def __init__(self, problem: Problem) -> None:
        self.transform = pf.Planar(problem.shape.D, problem.shape.K).to(problem.x.dtype)
        self.parameters = (self.transform.w, self.transform.u, self.transform.b)
        with torch.no_grad():
            for mine, given in zip(self.parameters, problem.parameters, strict=True):
                mine.copy_(given)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.transform(x)
        return y, self.transform.log_abs_det_jacobian(x, y)

    def invert(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x and log|det dy/dx| at foreign data."""
        x = self.transform.inv(y)
        return x, self.transform.log_abs_det_jacobian(x, y)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The same without gradients."""
        with torch.no_grad():
            return self.invert(y.detach())

    def train_inverse(self, y: Tensor) -> Sequence[Tensor]:
        """Gradients of the negative log likelihood of data, up to its constant."""
        x, log_det = self.invert(y.detach())
        return torch.autograd.grad((x.square().sum(-1) / 2 + log_det).mean(), self.parameters)


class PyroChain(Contender):
    """K of Pyro's planar modules, as a transformed distribution would run them."""

    def __init__(self, problem: Problem) -> None:
        self.layers = [PyroPlanar(problem.shape.D) for _ in range(problem.shape.K)]
        for layer, w, u, b in zip(self.layers, *problem.parameters, strict=True):
            layer.w, layer.u = nn.Parameter(w.clone()), nn.Parameter(u.clone())
            layer.bias = nn.Parameter(b.reshape(1).clone())
        self.parameters = [p for layer in self.layers for p in (layer.w, layer.u, layer.bias)]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det: Tensor | float = 0.0
        for layer in self.layers:
            y = layer(x)
            log_det = log_det + layer.log_abs_det_jacobian(x, y)
            x = y
        return x, log_det


class Normflows(Contender):
    """K of normflows' planar modules."""

    def __init__(self, problem: Problem) -> None:
        from normflows.flows import Planar

        D = problem.shape.D
        self.layers = [
            Planar((D,), u=u[None].clone(), w=w[None].clone(), b=b.reshape(1).clone())
            for w, u, b in zip(*problem.parameters, strict=True)
        ]
        self.parameters = [p for layer in self.layers for p in (layer.w, layer.u, layer.b)]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det: Tensor | float = 0.0
        for layer in self.layers:
            x, step = layer(x)
            log_det = log_det + step
        return x, log_det


class Floor(Contender):
    """The bare products and elementwise work, forward and backward, as if layers did not couple.

    No recursion, no constraint, no autograd, no gradient of log|det|: less than any planar stack
    can do. With one layer the values are right.
    """

    def __init__(self, problem: Problem) -> None:
        self.w, self.b = problem.w, problem.b.unsqueeze(-1)
        self.u_hat = constrained(problem.w, problem.u)
        self.one = torch.ones((), dtype=self.w.dtype)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(x)[:2]

    def train(self, x: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            y, log_det, h, dh = self._run(x)
            _ = (y.square().sum(-1) / 2 - log_det).mean()
            gy = y / len(y)
            a = (self.u_hat @ gy.T) * dh
            coupling = a @ h.T
            gw = torch.addmm(a @ x, coupling, self.u_hat)
            gu = torch.addmm(h @ gy, coupling.T, self.w)
            return gw, gu, a.sum(-1)

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h = torch.addmm(self.b, self.w, x.T).tanh()
        y = torch.addmm(x, h.T, self.u_hat)
        coupling = self.w @ self.u_hat.T
        dh = torch.addcmul(self.one, h, h, value=-1)
        det = torch.addcmul(self.one, dh, coupling.diagonal().unsqueeze(-1))
        return y, det.log().sum(0), h, dh


def contenders(problem: Problem) -> dict[str, Contender]:
    """Ours, every rival that is installed here, and the floor."""
    rivals: dict[str, Contender] = {OURS: Ours(problem), PYRO: PyroChain(problem)}
    if find_spec("normflows") is not None:
        rivals[NORMFLOWS] = Normflows(problem)
    return rivals | {FLOOR: Floor(problem)}
