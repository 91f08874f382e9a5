"""The start of an amortised guide: a regression on the best Gaussian of each row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyroflow.guides import AmortizedPlanarGuide, AutoStructuredFlow
from pyroflow.guides.structure import places_of
from pyroflow.inference.structured_start import structured_start
from pyroflow.model.bound import BoundModel
from pyroflow.model.comparison import FAILURES
from pyroflow.model.log_joint_at_hand import LogJointAtHand, LogJointInFull
from pyroflow.seeds import drawing
from pyroflow.transforms import Planar
from pyroflow.transforms.rowwise import RowsGiven

MOST_PARTS = 100  # draws of rows that cover the plate, above which there is no such start
DRAWS = 512  # of the Gaussian, to which the network is fitted
STEPS, ROWS, AT_ONCE = 2000, 256, 16  # of Adam, with so many rows and draws of each
RATE = 0.05


def amortized_start(bound: BoundModel, guide: AmortizedPlanarGuide, num: int) -> bool:
    """Start an untouched guide from a structured one of the same model; whether there is one.

    The globals have the moments of its draws. The rows' network and tables are fitted to the rows
    of these draws given their globals, by maximum likelihood.

    Args:
        bound: the model.
        guide: the guide.
        num: points at which the log joint of some rows is evaluated side by side.
    """
    table = AutoStructuredFlow(bound.given)
    with drawing():
        problem = bound.with_guide(table)
    kinds = [frozenset([guide.plate])]
    if table.subsampling.parts > MOST_PARTS or table.kinds != kinds:
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
        z = table.get_posterior().sample((DRAWS,))
    first, (places,) = places_of(guide.latents, kinds)
    shared = z[:, first]
    if len(first):
        guide.global_guide.affine.standardize(shared)
        with torch.no_grad():
            shared = guide.global_guide.affine.inv(shared.clone())
    _regress(bound, guide, shared, z[:, places])
    return True


def _regress(bound: BoundModel, guide: AmortizedPlanarGuide, shared: Tensor, rows: Tensor) -> None:
    """Fit what each row has to draws of its numbers (S, N, d), given the globals' (S, G)."""
    parameters = [*guide.local_flow.parameters()]
    parameters += [] if guide.context is None else [*guide.context.parameters()]
    adam = torch.optim.Adam(parameters, lr=RATE)
    num, size = rows.shape[:2]
    one = rows.new_ones(ROWS)
    with torch.enable_grad():
        for step in range(STEPS):
            with drawing():
                index = torch.randperm(size, device="cpu")[:ROWS].to(rows.device)
                drawn = torch.randint(num, (AT_ONCE,), device="cpu").to(rows.device)
            counts = one[: len(index)]
            given = guide.rows_given(index, counts, bound.args, bound.kwargs, sparse=False)
            layers, affine = given._map_parameters()[:3], given._map_parameters()[3:]
            parts = [*(t[:, :0] for t in layers), *affine]  # without planar layers, so far none
            given = RowsGiven(Planar(rows.shape[2], 0), parts, counts)
            y = torch.cat([shared[drawn], rows[drawn][:, index].flatten(1)], 1)
            x, log_det = given.inverse_and_log_det(y)
            loss = (x[:, shared.shape[1] :].square().sum(-1) / 2 + log_det).mean() / len(index)
            adam.zero_grad()
            loss.backward()
            adam.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / STEPS)) / 2
            adam.step()
