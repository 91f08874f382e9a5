"""Why a posterior is hard: a funnel, labels that can be exchanged, signs that cancel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from pyro.distributions import Distribution, ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import Independent

from pyroflow.guides.flow_guide import FlowGuide
from pyroflow.inference.census import Mode
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import Draws
from pyroflow.model.program import Program

PARTS = 5  # fifths of the draws, in the order of the scale
SCATTER = 1.5  # of the log weights, in an outer fifth against the middle one
# Where torch's and Pyro's distributions keep a scale: of numbers, of multivariate normals and
# Student-t, of those of low rank.
SCALES = ("scale", "_unbroadcasted_scale_tril", "cov_factor", "cov_diag")
ALIKE = 0.3  # nats between the bounds of modes that a symmetry makes equal
NEAR = 0.5  # standard deviations of a mode, root mean square, to where the other one is put


class Funnel(NamedTuple):
    """A site of a location-scale prior, by the latents that its scale depends on."""

    scales: list[str]
    matrix: bool  # whether the scale is one, as that of a multivariate normal


def find_funnels(bound: BoundModel, draws: Draws) -> dict[str, Funnel]:
    """Sites whose prior scale is another latent, where the weights scatter with it.

    Such a pair is a funnel where the data say little of the first site: its posterior is
    narrow at one end of the second and wide at the other, a guide that misses it fits the middle
    only, and log p − log q scatters more in an outer fifth of the second site's draws than in the
    middle fifth. None are found where the model cannot be run with gradients: what is looked for
    here is advice, which must not cost the report.
    """
    try:
        pairs = scale_pairs(bound, draws)
    except Exception:
        return {}
    scales = {name for pair in pairs.values() for name in pair.scales}
    scattered = {name for name in scales if _scatters(draws.log_weights, draws.sites[name])}
    found = {site: [n for n in pair.scales if n in scattered] for site, pair in pairs.items()}
    return {site: Funnel(names, pairs[site].matrix) for site, names in found.items() if names}


def scale_pairs(bound: BoundModel, draws: Draws) -> dict[str, Funnel]:
    """Latents of a location-scale prior, each with the latents that its scale depends on.

    The dependence is read off the gradient of the scale at the draw with the largest weight.
    """
    best = int(draws.log_weights.nan_to_num(-torch.inf, -torch.inf, -torch.inf).argmax())
    values = {name: value[best : best + 1].clone() for name, value in draws.sites.items()}
    leaves = {name: v.requires_grad_() for name, v in values.items() if v.is_floating_point()}
    program = Program(bound.model, bound.args, bound.kwargs)
    with torch.enable_grad():
        program.keep_records(values)
    pairs = {}
    for name in leaves:
        scale = _scale(program.records[name]["fn"])
        if scale:
            total, inputs = sum(t.sum() for t in scale.values()), list(leaves.values())
            grads = torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=True)
            used = [n for n, g in zip(leaves, grads, strict=True) if g is not None and g.any()]
            pairs[name] = Funnel([n for n in used if n != name], matrix="scale" not in scale)
    return {name: pair for name, pair in pairs.items() if pair.scales}


def _scale(fn: Distribution) -> dict[str, Tensor]:
    """What a distribution with a location has for a scale, as far as that depends on latents."""
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    held = vars(fn)  # a property may compute, and fail
    scale = {name: held[name] for name in SCALES if name in held} if "loc" in held else {}
    return {name: t for name, t in scale.items() if t.requires_grad}


def _scatters(log_weights: Tensor, scale: Tensor) -> bool:
    finite = log_weights.isfinite()
    log_weights, scale = log_weights[finite], scale[finite].reshape(int(finite.sum()), -1)
    for column in scale.unbind(1):
        parts = [log_weights[part].std() for part in column.argsort().chunk(PARTS)]
        if max(parts[0], parts[-1]) >= SCATTER * parts[len(parts) // 2]:
            return True
    return False


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
