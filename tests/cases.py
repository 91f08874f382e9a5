"""The table of transforms under test: a new transform is one line in ``CASES``."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from torch import Size, Tensor, nn
from torch.distributions import Transform

from pyroflow import Flow
from pyroflow.transforms import (
    Affine,
    ConditionalAffine,
    ConditionalPlanar,
    ConditionalRadial,
    ConditionalSinhArcsinh,
    ConditionalSylvester,
    Conditioned,
    Planar,
    Radial,
    SinhArcsinh,
    Sylvester,
)

SHAPES = [(), (7,), (6, 5)]

# A parameter of the slow suite: ``@pytest.mark.parametrize("seed", [0, slow(1)])``.
slow = partial(pytest.param, marks=pytest.mark.slow)


class Source(nn.Module):
    """A transform of known sizes, as a function of ``parts``, which hold its parameters."""

    def __init__(
        self,
        dim: int,
        parts: nn.Module,
        build: Callable[[nn.Module], Transform] = lambda parts: parts,
        batch: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.dim, self.parts, self.build, self.batch = dim, parts, build, Size(batch)

    def transform(self) -> Transform:
        return self.build(self.parts)

    def forward(self, value: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """The image of value and the log-determinant of this direction."""
        t = self.transform().inv if inverse else self.transform()
        image = t(value)
        return image, t.log_abs_det_jacobian(value, image)

    def inverted(self) -> Source:
        build = self.build
        return Source(self.dim, self.parts, lambda parts: build(parts).inv, self.batch)


@torch.no_grad()
def scatter(module: nn.Module, sd: float) -> nn.Module:
    """Draw every parameter from N(0, sd²); networks only in their last layer."""
    network = getattr(module, "nn", None)
    spared = [] if network is None else list(network.nn.layers[:-1].parameters())
    for p in module.parameters():
        if not any(p is q for q in spared):
            p.normal_(std=sd)
    return module


def untouched(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Make a module without a change of the generator that the start values are drawn from."""

    def made(*args: object, **kwargs: object) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            return make(*args, **kwargs)

    return made


def planar_at(w: Tensor, u: Tensor, b: Tensor, **bend: object) -> Conditioned:
    return untouched(Planar)(w.shape[-1], w.shape[-2], **bend).at(w, u, b)


def radial_at(x0: Tensor, raw_alpha: Tensor, beta: Tensor) -> Conditioned:
    return untouched(Radial)(x0.shape[-1], x0.shape[-2]).at(x0, raw_alpha, beta)


def sylvester_at(
    frame: Tensor, R: Tensor, R_tilde: Tensor, b: Tensor, orthogonal: str = "householder"
) -> Conditioned:
    L, M, D = frame.shape[-3:]
    t = untouched(Sylvester)(D, M, L, orthogonal)
    if orthogonal == "triangular":
        t.frame = frame
        return t.at(R, R_tilde, b)
    return t.at(frame, R, R_tilde, b)


def planar(dim: int, layers: int, sd: float = 1.5) -> Source:
    return Source(dim, scatter(Planar(dim, layers), sd))


def given_planar(
    dim: int, layers: int, batch: tuple[int, ...], sd: float = 1.2, **bend: object
) -> Source:
    sizes = {"w": (layers, dim), "u": (layers, dim), "b": (layers,)}
    family = untouched(Planar)(dim, layers, **bend)
    parts = nn.ParameterDict({k: sd * torch.randn(*batch, *size) for k, size in sizes.items()})
    return Source(dim, parts, lambda p: family.at(*(p[k] for k in sizes)), batch)


def context_planar(dim: int, layers: int, batch: tuple[int, ...]) -> Source:
    parts = scatter(ConditionalPlanar(dim, 3, layers, hidden_dims=(4,)), 1.0)
    context = torch.randn(*batch, 3)
    return Source(dim, parts, lambda t: t.condition(context.to(t.planar.w.dtype)), batch)


def radial(dim: int, layers: int, sd: float = 1.5) -> Source:
    return Source(dim, scatter(Radial(dim, layers), sd))


def given_radial(dim: int, layers: int, batch: tuple[int, ...], sd: float = 1.2) -> Source:
    sizes = {"x0": (layers, dim), "raw_alpha": (layers,), "beta": (layers,)}
    family = untouched(Radial)(dim, layers)
    parts = nn.ParameterDict({k: sd * torch.randn(*batch, *size) for k, size in sizes.items()})
    return Source(dim, parts, lambda p: family.at(*(p[k] for k in sizes)), batch)


def context_radial(dim: int, layers: int, batch: tuple[int, ...]) -> Source:
    parts = scatter(ConditionalRadial(dim, 3, layers, hidden_dims=(4,)), 1.0)
    context = torch.randn(*batch, 3)
    return Source(dim, parts, lambda t: t.condition(context.to(t.radial.x0.dtype)), batch)


def sinh_arcsinh(dim: int, sd: float = 0.7) -> Source:
    return Source(dim, scatter(SinhArcsinh(dim), sd))


def given_sinh_arcsinh(dim: int, batch: tuple[int, ...], sd: float = 0.5) -> Source:
    sizes = {"skew": (dim,), "raw": (dim,)}
    family = untouched(SinhArcsinh)(dim)
    parts = nn.ParameterDict({k: sd * torch.randn(*batch, *size) for k, size in sizes.items()})
    return Source(dim, parts, lambda p: family.at(*(p[k] for k in sizes)), batch)


def context_sinh_arcsinh(dim: int, batch: tuple[int, ...]) -> Source:
    parts = scatter(ConditionalSinhArcsinh(dim, 3, hidden_dims=(4,)), 0.5)
    context = torch.randn(*batch, 3)
    return Source(dim, parts, lambda t: t.condition(context.to(t.sinharcsinh.raw.dtype)), batch)


def leaky(dim: int, layers: int, sd: float = 1.5) -> Source:
    return Source(dim, scatter(Planar(dim, layers, nonlinearity="leaky_relu"), sd))


def given_leaky(dim: int, layers: int, batch: tuple[int, ...], sd: float = 1.2) -> Source:
    return given_planar(dim, layers, batch, sd, nonlinearity="leaky_relu", negative_slope=0.4)


def sylvester(dim: int, units: int, layers: int, kind: str, sd: float = 1.2) -> Source:
    return Source(dim, scatter(Sylvester(dim, units, layers, kind), sd))


def given_sylvester(
    dim: int, units: int, layers: int, batch: tuple[int, ...], kind: str, sd: float = 1.0
) -> Source:
    sizes = {
        "frame": (layers, units, dim),
        "R": (layers, units, units),
        "R_tilde": (layers, units, units),
        "b": (layers, units),
    }
    family = untouched(Sylvester)(dim, units, layers, kind)
    parts = nn.ParameterDict({k: sd * torch.randn(*batch, *size) for k, size in sizes.items()})
    return Source(dim, parts, lambda p: family.at(*(p[k] for k in sizes)), batch)


def context_sylvester(
    dim: int, units: int, layers: int, batch: tuple[int, ...], kind: str
) -> Source:
    parts = scatter(ConditionalSylvester(dim, 3, units, layers, kind, hidden_dims=(4,)), 1.0)
    context = torch.randn(*batch, 3)
    return Source(dim, parts, lambda t: t.condition(context.to(t.sylvester.b.dtype)), batch)


def affine(dim: int, kind: str) -> Source:
    t = Affine(dim, kind)
    t.standardize(3 + 2 * torch.randn(50, dim) @ torch.randn(dim, dim))
    return Source(dim, scatter(t, 1.5))


def given_affine(dim: int, batch: tuple[int, ...], diagonal: bool) -> Source:
    t = Affine(dim, "diagonal" if diagonal else "full")
    t.standardize(3 + 2 * torch.randn(50, dim) @ torch.randn(dim, dim))
    for name, p in list(t.named_parameters()):
        setattr(t, name, nn.Parameter(torch.randn(*batch, *p.shape)))
    return Source(dim, t, lambda t: t.at(*t.trained()), batch)


def context_affine(dim: int, kind: str, batch: tuple[int, ...]) -> Source:
    t = ConditionalAffine(dim, 3, kind, hidden_dims=(4,))
    t.standardize(3 + 2 * torch.randn(50, dim))
    parts, context = scatter(t, 1.0), torch.randn(*batch, 3)
    return Source(dim, parts, lambda t: t.condition(context.to(t.affine.centre.dtype)), batch)


CASES: dict[str, Callable[[], Source]] = {
    "planar-D1-K1": lambda: planar(1, 1),
    "planar-D1-K3": lambda: planar(1, 3),
    "planar-D2-K1": lambda: planar(2, 1, sd=2.0),
    "planar-D2-K3": lambda: planar(2, 3, sd=2.0),
    "planar-D2-K8": lambda: planar(2, 8),
    "planar-D5-K1": lambda: planar(5, 1),
    "planar-D5-K8": lambda: planar(5, 8),
    "planar-D10-K3": lambda: planar(10, 3, sd=1.0),
    "planar-D10-K8": lambda: planar(10, 8, sd=1.0),
    "planar-D2-K8-inverse": lambda: planar(2, 8).inverted(),
    "planar-D5-K3-inverse": lambda: planar(5, 3).inverted(),
    "given_planar-7": lambda: given_planar(3, 4, (7,)),
    "given_planar-6x5": lambda: given_planar(2, 3, (6, 5)),
    "given_planar-6x1": lambda: given_planar(2, 3, (6, 1)),
    "given_planar-7-inverse": lambda: given_planar(3, 2, (7,)).inverted(),
    "context_planar": lambda: context_planar(2, 3, ()),
    "context_planar-7": lambda: context_planar(2, 3, (7,)),
    "radial-D1-K3": lambda: radial(1, 3),
    "radial-D2-K1": lambda: radial(2, 1, sd=2.0),
    "radial-D2-K8": lambda: radial(2, 8),
    "radial-D5-K3": lambda: radial(5, 3, sd=2.0),
    "radial-D2-K8-inverse": lambda: radial(2, 8).inverted(),
    "radial-D5-K3-inverse": lambda: radial(5, 3).inverted(),
    "given_radial-7": lambda: given_radial(3, 4, (7,)),
    "given_radial-6x5": lambda: given_radial(2, 3, (6, 5)),
    "given_radial-6x1": lambda: given_radial(2, 3, (6, 1)),
    "given_radial-7-inverse": lambda: given_radial(3, 2, (7,)).inverted(),
    "context_radial": lambda: context_radial(2, 3, ()),
    "context_radial-7": lambda: context_radial(2, 3, (7,)),
    "sinh_arcsinh-D1": lambda: sinh_arcsinh(1),
    "sinh_arcsinh-D5": lambda: sinh_arcsinh(5),
    "sinh_arcsinh-D3-inverse": lambda: sinh_arcsinh(3).inverted(),
    "given_sinh_arcsinh-6x5": lambda: given_sinh_arcsinh(2, (6, 5)),
    "given_sinh_arcsinh-7-inverse": lambda: given_sinh_arcsinh(3, (7,)).inverted(),
    "context_sinh_arcsinh-7": lambda: context_sinh_arcsinh(2, (7,)),
    "leaky-D2-K8": lambda: leaky(2, 8),
    "leaky-D5-K3-inverse": lambda: leaky(5, 3).inverted(),
    "given_leaky-7": lambda: given_leaky(3, 4, (7,)),
    "sylvester-D1-M1": lambda: sylvester(1, 1, 2, "householder"),
    "sylvester-D2-M2": lambda: sylvester(2, 2, 3, "householder"),
    "sylvester-D5-M3": lambda: sylvester(5, 3, 2, "householder"),
    "sylvester-D5-M3-inverse": lambda: sylvester(5, 3, 2, "householder").inverted(),
    "sylvester-D4-M4-qr": lambda: sylvester(4, 4, 2, "qr"),
    "sylvester-D5-M2-qr": lambda: sylvester(5, 2, 1, "qr"),
    "sylvester-D4-M4-triangular": lambda: sylvester(4, 4, 2, "triangular"),
    "sylvester-D5-M3-triangular": lambda: sylvester(5, 3, 3, "triangular"),
    "given_sylvester-7": lambda: given_sylvester(4, 2, 2, (7,), "householder"),
    "given_sylvester-6x5-qr": lambda: given_sylvester(3, 2, 1, (6, 5), "qr"),
    "given_sylvester-7-inverse": lambda: given_sylvester(3, 3, 1, (7,), "householder").inverted(),
    "context_sylvester-7": lambda: context_sylvester(3, 2, 2, (7,), "householder"),
    "context_sylvester-triangular": lambda: context_sylvester(3, 3, 2, (), "triangular"),
    "affine-full": lambda: affine(3, "full"),
    "affine-full-D1": lambda: affine(1, "full"),
    "affine-diagonal": lambda: affine(3, "diagonal"),
    "affine-full-inverse": lambda: affine(3, "full").inverted(),
    "given_affine-7-full": lambda: given_affine(3, (7,), diagonal=False),
    "given_affine-6x5-diagonal": lambda: given_affine(2, (6, 5), diagonal=True),
    "context_affine-full-7": lambda: context_affine(2, "full", (7,)),
    "context_affine-diagonal": lambda: context_affine(2, "diagonal", ()),
}


def saved(module: nn.Module) -> nn.Module:
    """The module after torch.save and torch.load."""
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def wild(flow: Flow, sd: float = 0.8) -> Flow:
    """The flow away from its start, where the directions differ."""
    for part in flow.parts:
        scatter(part, sd)
    return flow


# Two-dimensional parts for chains.

D = 2


def normal() -> dist.Distribution:
    return dist.Normal(torch.zeros(D), 1.0).to_event(1)


def layers(num_layers: int = 3) -> Planar:
    return planar(D, num_layers, sd=1.0).parts


def log_prob_at(t: Transform, x: Tensor) -> Tensor:
    """log q(t(x)) by the definition: base density and the Jacobian's determinant."""
    matrices = torch.stack([torch.autograd.functional.jacobian(t, row) for row in x.detach()])
    return normal().log_prob(x) - torch.linalg.slogdet(matrices)[1]
