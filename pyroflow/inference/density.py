"""Maximum likelihood: a flow fitted to data."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyroflow.checks import check_count, check_fraction, known_options
from pyroflow.flows import Flow
from pyroflow.inference.callbacks import Callbacks, interrupted
from pyroflow.inference.fit import Fit, Objective, check_options, trainable
from pyroflow.inference.processes import held, processes
from pyroflow.inference.schedule import LearningRateSchedule
from pyroflow.inference.trainer import Trainer
from pyroflow.seeds import drawing, seeded

# A network's weights want smaller and more steps, and are too many for L-BFGS.
UNCONDITIONAL = {"steps": 1000, "polish": 1000, "lr": 0.04}
CONDITIONAL = {"steps": 2000, "polish": 0, "lr": 0.005}
POLISHED_ROWS = 20_000  # as many as keep an evaluation within tens of milliseconds


@known_options
def fit_density(
    flow: Flow,
    data: Any,
    *,
    context: Any = None,
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
            needs a seed.
        device: where to move flow and data.

    Returns:
        The course of the fit, up to Ctrl-C if that ended it, with a warning; ``best_loss`` is the
        held-out mean of −log q, in nats.

    Raises:
        ValueError: If data have a NaN or inf (naming the row), the wrong width, fewer than two
            rows, a constant column, another number of dimensions than two, or numbers that the
            flow's dtype cannot hold; if a frame has columns that are not numbers, missing values,
            or other columns than before; if the context does not fit, an option is out of range, or
            the checkpoint is of another fit or in use by one.

    Example:
        >>> from pyroflow import datasets, planar_flow
        >>> flow = planar_flow(2, num_layers=4)
        >>> fit = fit_density(flow, datasets.sine(500), steps=20, polish=0, seed=0, progress=False)
        >>> fit.steps, fit.stopped
        (20, 'all 20 steps done')
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"flow must be a pyroflow.Flow, got {type(flow).__name__}")
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
    settings = {"kind": "density", "batch_size": batch_size, "holdout": holdout, "seed": seed}
    settings["data"] = [sha256(t.cpu().numpy().tobytes()).hexdigest() for t in rows]
    with held(checkpoint), seeded(seed):
        held_out, training = _split(rows, holdout)
        flow.name_columns(data, context)
        flow.initialize(training[0])
        settings["flow"] = flow.get_extra_state()

        def loss(step: int) -> Tensor:
            with drawing():
                index = torch.randint(len(training[0]), (batch_size,), device=training[0].device)
            return mean([t[index] for t in training])

        def mean(rows: list[Tensor]) -> Tensor:
            own = _negative_log_prob(flow, [t[ours.share(len(t))] for t in rows])
            return ours.weighted(own.mean(), len(rows[0]))

        def score() -> Tensor:
            if len(held_out[0]) < ours.count:
                return _negative_log_prob(flow, held_out)
            own = [t[ours.share(len(t))] for t in held_out]
            return ours.joined(_negative_log_prob(flow, own))

        polished = [t[:POLISHED_ROWS] for t in training]
        objective = Objective(
            trainable(flow),
            loss,
            score,
            buffers=list(flow.buffers()),
            exact_loss=lambda: mean(polished),
            processes=ours,
            steady=loss,
        )
        trainer = Trainer(
            objective,
            LearningRateSchedule(steps),
            lr=lr,
            settings=settings,
            label="fit_density",
            progress=progress,
            checkpoint=checkpoint,
            callbacks=callbacks,
            polish=polish,
        )
        try:
            return trainer.run()
        except KeyboardInterrupt:
            return interrupted(trainer, stacklevel=3)


def _split(rows: list[Tensor], holdout: float) -> tuple[list[Tensor], list[Tensor]]:
    n = len(rows[0])
    held = min(n - 1, max(1, round(holdout * n)))
    order = torch.randperm(n, device="cpu")
    return [t[order[:held]] for t in rows], [t[order[held:]] for t in rows]


def _negative_log_prob(flow: Flow, rows: list[Tensor]) -> Tensor:
    return -flow(*rows[1:]).log_prob(rows[0])
