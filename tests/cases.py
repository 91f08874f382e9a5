"""The table of transforms under test: a new transform is one line in ``CASES``."""

from __future__ import annotations

import io
from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import Transform

from pyroflow import Flow
from pyroflow.transforms import (
    Affine,
    ConditionalAffine,
    ConditionalPlanar,
    ConditionedAffine,
    ConditionedPlanar,
    Planar,
)

SHAPES = [(), (7,), (6, 5)]


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


def planar(dim: int, layers: int, sd: float = 1.5) -> Source:
    return Source(dim, scatter(Planar(dim, layers), sd))


def given_planar(dim: int, layers: int, batch: tuple[int, ...], sd: float = 1.2) -> Source:
    sizes = {"w": (layers, dim), "u": (layers, dim), "b": (layers,)}
    parts = nn.ParameterDict({k: sd * torch.randn(*batch, *size) for k, size in sizes.items()})
    return Source(dim, parts, lambda p: ConditionedPlanar(p["w"], p["u"], p["b"]), batch)


def context_planar(dim: int, layers: int, batch: tuple[int, ...]) -> Source:
    parts = scatter(ConditionalPlanar(dim, 3, layers, hidden_dims=(4,)), 1.0)
    context = torch.randn(*batch, 3)
    return Source(dim, parts, lambda t: t.condition(context.to(t.planar.w.dtype)), batch)


def affine(dim: int, kind: str) -> Source:
    t = Affine(dim, kind)
    t.standardize(3 + 2 * torch.randn(50, dim) @ torch.randn(dim, dim))
    return Source(dim, scatter(t, 1.5))


def given_affine(dim: int, batch: tuple[int, ...], diagonal: bool) -> Source:
    widths = torch.rand(*batch, dim) + 0.5
    scale = widths if diagonal else torch.randn(*batch, dim, dim).tril(-1) + widths.diag_embed()
    parts = nn.ParameterDict({"loc": torch.randn(*batch, dim), "scale": scale})
    return Source(
        dim, parts, lambda p: ConditionedAffine(p["loc"], p["scale"], diagonal=diagonal), batch
    )


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
