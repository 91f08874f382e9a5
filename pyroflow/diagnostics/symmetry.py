"""Why a posterior has several alike modes: labels that can be exchanged, signs that cancel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyroflow.guides.flow_guide import FlowGuide
from pyroflow.inference.census import Mode

ALIKE = 0.3  # nats between the bounds of modes that a symmetry makes equal
NEAR = 0.5  # standard deviations of a mode, root mean square, to where the other one is put


def find_symmetries(guide: FlowGuide, modes: list[Mode]) -> list[str]:
    """Advice on pairs of modes with equal evidence, where one is the other by a symmetry."""
    found = []
    for i, one in enumerate(modes):
        for other in modes[i + 1 :]:
            if abs(one.bound - other.bound) <= ALIKE:
                advice = _exchanged(guide, one, other) or _mirrored(guide, one, other)
                found += [advice] if advice else []
    return list(dict.fromkeys(found))


def _exchanged(guide: FlowGuide, one: Mode, other: Mode) -> str | None:
    """Advice, if the rows of a plate, or of vectors, are those of the other mode in new order."""
    from scipy.optimize import linear_sum_assignment

    values, moved = (guide.constrain(mode.loc)[0] for mode in (one, other))
    for size, where in _groups(guide):
        sites = {
            name: (values[name].movedim(axis, 0), moved[name].movedim(axis, 0), axis)
            for name, axis in where.items()
        }
        cost = sum(
            torch.cdist(a.reshape(size, -1).double(), b.reshape(size, -1).double())
            for a, b, _ in sites.values()
        )
        _, order = linear_sum_assignment(cost.cpu().numpy())
        order = torch.as_tensor(order, device=one.loc.device)
        if bool((order == torch.arange(size, device=order.device)).all()):
            continue
        put = {name: b[order].movedim(0, axis) for name, (_, b, axis) in sites.items()}
        try:
            x = guide.unconstrain(moved | put)[0]
        except ValueError:
            continue
        if _near(x, one):
            names = ", ".join(map(repr, where))
            return (
                f"the labels of the {size} rows of {names} can be exchanged, and each order is a "
                "mode of its own: give them one order, by a first value and positive steps to the "
                "next ones"
            )
    return None


def _groups(guide: FlowGuide) -> Iterator[tuple[int, dict[str, int]]]:
    """Sites with rows of one number, by what they share: a plate, or only the number."""
    found: dict[tuple, dict[str, int]] = {}
    for site in guide.latents:
        dims = len(site.batch_shape) + len(site.event_shape)
        for frame in site.plates:
            axis = frame.dim - len(site.event_shape) + dims
            found.setdefault((frame.size, frame.name), {})[site.name] = axis
        for axis, size in enumerate(site.value.shape):
            found.setdefault((size, None), {}).setdefault(site.name, axis)
    yield from ((size, where) for (size, _), where in found.items() if size > 1)


def _mirrored(guide: FlowGuide, one: Mode, other: Mode) -> str | None:
    """Advice, if some latents of the other mode have changed their signs."""
    flipped = (one.loc + other.loc).abs() < (one.loc - other.loc).abs()
    flipped &= one.loc.abs() > torch.linalg.vector_norm(one.scale, dim=-1)
    if not bool(flipped.any()) or not _near(torch.where(flipped, -other.loc, other.loc), one):
        return None
    parts = guide.latents.unpack(flipped)
    names = ", ".join(repr(name) for name, part in parts.items() if bool(part.any()))
    return (
        f"the signs of {names} can be changed, and each choice is a mode of its own: fix one, by "
        "a positive prior such as HalfNormal"
    )


def _near(x: Tensor, mode: Mode) -> bool:
    off = torch.linalg.solve(mode.scale, (x - mode.loc).unsqueeze(-1))
    return bool(off.square().mean().sqrt() <= NEAR)
