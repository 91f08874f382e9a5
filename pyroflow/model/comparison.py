"""The one comparison of draws that run side by side with runs of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyroflow.model.records import Run, Sites, Values, is_random, log_joint
from pyroflow.model.supports import bijection

if TYPE_CHECKING:
    from pyroflow.model.runs import Runs

Way = Callable[[Values, int], Sites]

ROUNDING = 64  # units of rounding of the largest number, that any other one may be off
PROBES = (1.0, -1.0, 3.0)  # factors of the normal moves to where draws are compared

# What vmap, tracing and plates raise where a model is not made for them.
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, KeyError)


def differs(runs: Runs, latents: Values, size: int, way: Way) -> str | None:
    """The first site at which draws side by side differ from runs of their own, if any.

    A model that indexes its latents from the left, or reduces over all of a tensor, mixes
    draws that run side by side, often without an error. So, draw by draw and site by site,
    log densities (or the values that follow from others) must agree, and the gradients of the
    log joint; and no draw may have a gradient in another one's latents, which is exactly zero
    otherwise. Two numbers agree if they differ by less than :func:`tolerance` of the
    largest of them among the draws: elementwise, so that it does not grow with the data.

    Returns:
        It in words; "the log joint" if it is not one site, or the runs fail.
    """
    runs.keep_records(latents)
    try:
        found, slopes = _with_gradients(runs, way, latents, size)
    except FAILURES:
        return "the log joint"
    if not runs.compared:
        return None
    given = latents
    if runs.predict:
        given = {name: s.values for name, s in found.items() if is_random(s.record)}
    expected, alone = _with_gradients(runs, runs.one_by_one, given, size)
    for name, site in expected.items():
        if name not in found or not agree(found[name].compared, site.compared):
            return f"site {name!r}"
    same = all(agree(*pair) for pair in zip(slopes, alone, strict=True))
    return None if same else "the log joint"


def _with_gradients(runs: Runs, way: Way, latents: Values, size: int) -> tuple[Sites, list[Tensor]]:
    """The sites, and gradients in the latents of the log joint of all and of the first draw."""
    if runs.predict:
        return way(latents, size), []
    leaves = {name: value.detach().clone() for name, value in latents.items()}
    moving = [v.requires_grad_() for v in leaves.values() if v.is_floating_point()]
    with torch.enable_grad():
        sites = way(leaves, size)
        total = log_joint(sites)
        whole, first = total.sum(), total[0]
    if not moving or not total.requires_grad:
        return sites, []
    options = {"allow_unused": True, "materialize_grads": True}
    slopes = torch.autograd.grad(whole, moving, retain_graph=True, **options)
    leaks = torch.autograd.grad(first, moving, **options)
    exact = [((leak[1:] != 0) & ~leak[1:].isnan()).to(leak) for leak in leaks]
    return sites, [*slopes, *exact]


def tolerance(dtype: torch.dtype) -> float:
    """The relative difference of numbers that are equal but for rounding.

    ε^0.4, which is 2e-3 in float32 and 5e-7 in float64: thousands of times the rounding of an
    operation, and far less than what one draw's latents change in another's density.
    """
    return torch.finfo(dtype).eps ** 0.4


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors (S, *) are equal but for rounding, against the largest of S draws."""
    if found.shape != expected.shape:
        return False
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    usual = expected.nan_to_num(0.0, 0.0, 0.0).abs()
    if not usual.numel():
        return True
    # A small number may be the difference of large ones, as log p of a likely outcome is.
    rounding = ROUNDING * torch.finfo(expected.dtype).eps * usual.max()
    bound = tolerance(expected.dtype) * usual.amax(0, keepdim=True) + rounding
    near = (found - expected).abs() <= bound
    same = (found == expected) | (found.isnan() & expected.isnan())
    return bool((near | same).all())


def spread(latents: Values, records: Run) -> Values:
    """Draws (3, *) as widely spread in the unconstrained space as :func:`moves` says.

    Those on a support without such a space, as a sphere or a discrete one, stay where they are.
    """
    moved = dict(latents)
    for name, value in latents.items():
        try:
            to_support = bijection(records[name]["fn"].support)
        except NotImplementedError:
            continue
        z = to_support.inv(value)
        moved[name] = to_support(z[:1] + moves(len(z), z[0]))
    return moved


def moves(num: int, like: Tensor) -> Tensor:
    """Normal moves (num, *shape of ``like``), in groups of one, its opposite and one times 3."""
    groups = -(-num // len(PROBES))
    noise = torch.randn(groups, 2, *like.shape, dtype=like.dtype, device="cpu").to(like)
    factors = torch.tensor(PROBES, dtype=like.dtype, device=like.device).reshape(
        1, -1, *(1,) * like.dim()
    )
    return (factors * noise[:, [0, 0, 1]]).flatten(0, 1)[:num]
