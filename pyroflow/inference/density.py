"""Maximum likelihood: a flow fitted to data."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyroflow.checks import check_count, check_fraction, known_options
from pyroflow.flows import Flow
from pyroflow.flows.cells import Dequantize, find_cells
from pyroflow.flows.families import check_flow
from pyroflow.flows.flow import take_over
from pyroflow.frames import column_names
from pyroflow.inference.callbacks import Callbacks, ended_by_caller, interrupted, kept
from pyroflow.inference.fit import Fit, check_options, trainable
from pyroflow.inference.likelihood import Likelihood, standard_error
from pyroflow.inference.processes import held, processes
from pyroflow.inference.schedule import LearningRateSchedule
from pyroflow.inference.trainer import Trainer
from pyroflow.seeds import seeded

# A network's weights want smaller and more steps, and are too many for L-BFGS.
UNCONDITIONAL = {"steps": 1000, "polish": 1000, "lr": 0.04}
CONDITIONAL = {"steps": 2000, "polish": 0, "lr": 0.005}

DEPTHS = (0, 2, 4, 8, 16, 32)  # of a flow whose depth is to be found
LEAST_GAIN = 0.01  # nats a row on held-out rows, and a standard error, that more layers must bring
PATIENCE = 2  # depths in a row without one


@known_options
def fit_density(
    flow: Flow,
    data: Any,
    *,
    context: Any = None,
    dequantize: Dequantize = False,
    steps: int | None = None,
    polish: int | None = None,
    batch_size: int = 512,
    lr: float | None = None,
    holdout: float = 0.1,
    seed: int | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    device: str | torch.device | None = None,
    callbacks: Callbacks = None,
) -> Fit:
    """Fit a flow to data by maximum likelihood.

    A new flow is first initialized: its affine layer gets the data's mean and covariance. One that
    was fitted, trained by hand or loaded goes on from where it is. Adam takes ``steps`` on
    mini-batches; L-BFGS on the full likelihood then goes on for ``polish`` evaluations. The flow
    ends in the state with the lowest loss on held-out rows, and the fit stops early where that no
    longer falls. Under torchrun the processes share each batch and come to one result.

    Args:
        flow: the flow, trained in place.
        data: shape (N, D): tensor, NumPy array, nested list, or a frame or column of pandas or
            polars, whose names ``flow.columns`` keeps. Cast to the flow's dtype.
        context: shape (N, C), the contexts of a conditional flow, likewise.
        dequantize: True, or the columns by position or name, whose values are to be numbers with
            a probability each, as integers are: training adds uniform noise of a cell, from the
            value on and as wide as the smallest difference of values, anew in each batch. Held-out
            rows have noise that the seed fixes; the losses add the log of the steps, so that they
            are upper bounds of −log P. Without it, columns of few or often repeated values are
            refused; True takes those alone. ``flow.sample`` then draws values of such a column,
            ``flow.log_prob`` is their log probability. A support to the end of the last cell, such
            as (0, 2) for 0 and 1, leaves no probability to other values.
        steps: Adam's steps; by default 1000, and 2000 for a conditional flow.
        polish: evaluations of the full likelihood for L-BFGS, on at most 20,000 rows; by default
            1000, and 0 for a conditional flow.
        batch_size: rows a step, drawn with replacement.
        lr: highest learning rate, after a warm-up and before a cosine decay to zero; by default
            0.04, and 0.005 for a conditional flow.
        holdout: fraction of the rows held out, in (0, 1).
        seed: makes the fit reproducible, without touching the global generator, whatever other
            threads draw; None draws from the global one.
        progress: show a progress bar, in a notebook or on a terminal.
        callbacks: a function, or several, called with a
            :class:`~pyroflow.inference.callbacks.FitProgress` after every step, of steps that are
            launches on a GPU after some, of L-BFGS after 20 iterations. One that returns True
            ends the fit, in its best state; with a checkpoint it can go on later. For TensorBoard,
            ``lambda p: writer.add_scalar("loss", p.loss, p.step)``.
        checkpoint: file that the fit is saved to as it goes, and resumed from if it exists;
            needs a seed. With ``num_layers="auto"`` one for each depth, such as fit-K8.pt.
        device: where to move flow and data.

    Returns:
        The course of the fit, up to Ctrl-C if that ended it, with a warning; ``best_loss`` is the
        held-out mean of −log q, in nats a row, with ``gaussian_loss`` and ``training_loss`` beside
        it. ``print(fit)`` says it in words.

    Warns:
        UserWarning: If the flow loses to a full Gaussian on held-out rows, by 0.02 nats and two
            standard errors.

    Raises:
        ValueError: If data have a NaN or inf (naming the row), the wrong width, fewer than two
            rows, a constant column, another number of dimensions than two, or numbers that the
            flow's dtype cannot hold; if a frame has columns that are not numbers, missing values,
            or other columns than before; if rows lie outside the flow's support, or columns have
            few values and no cells; if the context does not fit, an option is out of range, or
            the checkpoint is of another fit or in use by one.

    Example:
        >>> from pyroflow import datasets, planar_flow
        >>> flow = planar_flow(2, num_layers=4)
        >>> fit = fit_density(flow, datasets.sine(500), steps=20, polish=0, seed=0, progress=False)
        >>> fit.steps, fit.stopped
        (20, 'all 20 steps done')
    """
    check_flow("fit_density", flow)
    defaults = CONDITIONAL if flow.conditional else UNCONDITIONAL
    steps = defaults["steps"] if steps is None else steps
    polish = defaults["polish"] if polish is None else polish
    lr = defaults["lr"] if lr is None else lr
    check_count("polish", polish, 0)
    options = {"lr": lr, "seed": seed, "checkpoint": checkpoint, "device": device}
    check_options(steps=steps, batch_size=batch_size, **options)
    check_fraction("holdout", holdout)
    ours = processes()
    seed, checkpoint, progress = ours.options(seed, checkpoint, progress)
    ours.start_alike(flow.to(device))
    trainable(flow)
    rows = flow.read(data, context)
    columns = flow.columns or column_names(data)
    cells = find_cells(rows[0], dequantize, columns)
    widths = flow.cell_steps(cells)
    flow.check_support(rows[0], "data", columns, widths)
    given = {"kind": "density", "batch_size": batch_size, "holdout": holdout, "seed": seed}
    given["data"] = [sha256(t.cpu().numpy().tobytes()).hexdigest() for t in rows]

    def fit(flow: Flow, checkpoint: str | Path | None = checkpoint) -> tuple[Fit, Tensor, float]:
        with held(checkpoint), seeded(seed):
            likelihood = Likelihood(flow, rows, widths, holdout, batch_size, ours)
            flow.name_columns(data, context, cells)
            flow.initialize(likelihood.training[0])
            trainer = Trainer(
                likelihood.objective(),
                LearningRateSchedule(steps),
                lr=lr,
                settings=given | {"flow": flow.get_extra_state()},
                label="fit_density",
                progress=progress,
                checkpoint=checkpoint,
                callbacks=callbacks,
                polish=polish,
            )
            try:
                found = trainer.run()
            except KeyboardInterrupt:
                found = interrupted(trainer, stacklevel=4)
            return likelihood.compared(found)

    if flow.deepen is None:
        found, _, lost = fit(flow)
    else:
        seed = int(torch.randint(2**63 - 1, (), device="cpu")) if seed is None else seed
        found, lost = _deepened(flow, fit, checkpoint)
    if lost and ours.writes:
        warnings.warn(
            f"the flow loses to a full Gaussian by {lost:.3g} nats a row on held-out rows: take "
            "affine='full', another support or more steps, or num_layers=0, which is one",
            stacklevel=3,
        )
    return found


def _deepened(flow: Flow, fit: Callable, checkpoint: str | Path | None) -> tuple[Fit, float]:
    """Fit deeper and deeper flows anew while held-out rows gain, and let the flow be the best.

    All have the same rows, as the seed says which are held out.
    """
    tried, best, since, began = [], None, 0, time.perf_counter()
    for depth in DEPTHS:
        candidate = flow.deepen(depth).to(next(flow.parameters())).train(flow.training)
        if not any(p.numel() for p in candidate.parameters()):
            continue  # without layers and an affine layer there is nothing to fit
        path = checkpoint and Path(checkpoint)
        try:
            found, losses, lost = fit(candidate, path and path.with_stem(f"{path.stem}-K{depth}"))
        except KeyboardInterrupt:  # before its first score
            if best is None or processes().count > 1:
                raise
            best = (kept(best[0], f"before a score of {depth} layers", stacklevel=3), *best[1:])
            break
        tried.append((depth, found.best_loss))
        if best is None or _gains(best[1] - losses):
            best, since = (found, losses, lost, candidate, depth), 0
        else:
            since += 1
        if since == PATIENCE or ended_by_caller(found):
            break
    found, _, lost, chosen, depth = best
    take_over(flow, chosen)
    seconds = time.perf_counter() - began
    return replace(found, num_layers=depth, depths=tried, seconds=seconds), lost


def _gains(gains: Tensor) -> bool:
    """Whether the mean of held-out rows' gains is worth more layers, and above its error."""
    return gains.mean().item() > max(LEAST_GAIN, standard_error(gains))
