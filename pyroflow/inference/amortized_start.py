"""The start of an amortised guide: a regression on the best Gaussian of each row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyroflow.guides import AmortizedPlanarGuide, AutoStructuredFlow
from pyroflow.guides.plate_rows import PlateRows
from pyroflow.guides.structure import places_of
from pyroflow.inference.structured_start import structured_start
from pyroflow.model.bound import BoundModel
from pyroflow.model.comparison import FAILURES
from pyroflow.model.log_joint_at_hand import LogJointAtHand, LogJointInFull
from pyroflow.seeds import drawing
from pyroflow.transforms import Planar
from pyroflow.transforms.affine import inverse_softplus
from pyroflow.transforms.rowwise import RowsGiven

MOST_PARTS = 100  # draws of rows that cover the plate, above which there is no such start
DRAWS, NUMBERS = 8192, 2**24  # of the Gaussian, to which rows are fitted; with so many numbers
ROWS, AT_ONCE = 256, 16  # of a step of Adam, with so many draws of each
# Each cycle's rate falls from RATE to zero; no further cycle where one gains less than ENOUGH.
CYCLES, RATE, ENOUGH = (125, 250, 500, 1000), 0.05, 0.001


def amortized_start(bound: BoundModel, guide: AmortizedPlanarGuide, num: int) -> bool:
    """Start an untouched guide from a structured one of the same model; whether there is one.

    The globals have the moments of its draws. The rows' tables and network are fitted to the rows
    of these draws given their globals, by maximum likelihood.

    Args:
        bound: the model.
        guide: the guide.
        num: points at which the log joint of some rows is evaluated side by side.
    """
    table = AutoStructuredFlow(bound.given)
    try:
        with drawing():
            problem = bound.with_guide(table)
    except FAILURES:  # such as rows that interact, or one row at a time, of which none can tell
        return False
    kinds = [frozenset([plate]) for plate in guide.local_plates]
    if table.subsampling.parts > MOST_PARTS or {*table.kinds} != {*kinds}:
        return False
    table.find_coordinates(bound.args, bound.kwargs, table.subsampling)
    try:
        log_joint = LogJointInFull(LogJointAtHand(problem, table, num))
        found = structured_start(log_joint, table)
    except FAILURES:  # such as a matrix that is singular on the way
        return False
    if not found:
        return False
    with drawing(), torch.no_grad():
        z = table.get_posterior().sample((min(DRAWS, max(64, NUMBERS // table.latent_dim)),))
    first, places = places_of(guide.latents, kinds)
    shared = z[:, first]
    if len(first):
        guide.global_guide.affine.standardize(shared)
        with torch.no_grad():
            shared = guide.global_guide.affine.inv(shared.clone())
    for part, own in zip(guide.parts, places, strict=True):
        _least_squares(bound, part, shared, z[:, own])
        if part.flow.net is not None:
            _regress(bound, part, shared, z[:, own])
    return True


@torch.no_grad()
def _least_squares(bound: BoundModel, part: PlateRows, shared: Tensor, rows: Tensor) -> None:
    """The Gaussian of each row of draws (S, N, d), linear in the globals' (S, G).

    Tables have all of it. A network starts at what rows have in common; the location is linear in
    their features.
    """
    flow, loc = part.flow, rows.mean(0)
    v = shared[:, : flow.shift.shape[-1]]  # none where the rows do not depend on them
    middle = v.mean(0)
    spread = (rows - loc).flatten(1)
    slopes = torch.linalg.pinv(v - middle) @ spread  # (G, N d)
    left = (spread - (v - middle) @ slopes).unflatten(1, loc.shape).permute(1, 2, 0)
    slopes = slopes.unflatten(1, loc.shape).permute(1, 2, 0)  # (N, d, G)
    scale = left.std(-1)
    if not flow.affine.diagonal:
        factor = torch.linalg.cholesky_ex(left @ left.mT / left.shape[-1])[0]
        scale = factor.diagonal(dim1=-2, dim2=-1)
    smallest = torch.finfo(scale.dtype).tiny
    found = [loc - slopes @ middle, inverse_softplus(scale.clamp(min=smallest))]
    if not flow.affine.diagonal:
        found.append((factor / scale[..., None]).tril(-1))
    found += [slopes, torch.zeros_like(slopes)]
    common = [*flow.affine.trained(), flow.shift, flow.stretch]
    for parameter, each in zip(common, found, strict=True):
        parameter.copy_(each.mean(0))
    if part.context is not None:
        features = part.context(part.context.rows(bound.args, bound.kwargs), loc)
        design = features / features.shape[-1]
        weight = torch.linalg.pinv(design - design.mean(0)) @ (found[0] - found[0].mean(0))
        flow.linear.nn.weight.copy_(weight.mT)
        flow.affine.offset.sub_(design.mean(0) @ weight)
    for table, parameter, each in zip(flow.tables[3:], common, found, strict=False):
        table.copy_(each - parameter)


def _regress(bound: BoundModel, part: PlateRows, shared: Tensor, rows: Tensor) -> None:
    """Fit what each row has to draws of its numbers (S, N, d), given the globals' (S, G)."""
    parameters = [*part.flow.parameters()]
    parameters += [] if part.context is None else [*part.context.parameters()]
    adam = torch.optim.Adam(parameters, lr=RATE)
    before = math.inf
    for length in CYCLES:
        losses = []
        for step in range(length):
            adam.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / length)) / 2
            with torch.enable_grad():
                loss = _minus_log_density(bound, part, shared, rows)
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(loss.detach())
        now = torch.stack(losses[-length // 5 :]).mean().item()
        if now > before - ENOUGH:
            return
        before = now


def _minus_log_density(bound: BoundModel, part: PlateRows, shared: Tensor, rows: Tensor) -> Tensor:
    """Of some rows, by the number, in some draws, up to a constant: its mean."""
    num, size = rows.shape[:2]
    with drawing():
        index = torch.randperm(size, device="cpu")[:ROWS].to(rows.device)
        drawn = torch.randint(num, (AT_ONCE,), device="cpu").to(rows.device)
    counts = rows.new_ones(len(index))
    at = bound.args, bound.kwargs
    given = part.given(index, counts, shared.shape[1], *at, sparse=False)
    layers, affine = given._map_parameters()[:3], given._map_parameters()[3:]
    parts = [*(t[:, :0] for t in layers), *affine]  # without planar layers, so far none
    given = RowsGiven(Planar(rows.shape[2], 0), parts, counts)
    y = torch.cat([shared[drawn], rows[drawn][:, index].flatten(1)], 1)
    x, log_det = given.inverse_and_log_det(y)
    return (x[:, shared.shape[1] :].square().sum(-1) / 2 + log_det).mean() / len(index)
