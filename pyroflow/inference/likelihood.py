"""The likelihood of a flow's rows: of batches, in full, held out, and a Gaussian's beside it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pyroflow.flows import Flow
from pyroflow.flows.cells import noise
from pyroflow.inference.fit import Fit, Objective, trainable
from pyroflow.inference.processes import Processes
from pyroflow.seeds import drawing

POLISHED_ROWS = 20_000  # as many as keep an evaluation within tens of milliseconds
LEAST_LOSS = 0.02  # nats a row, by which a flow must lose to a Gaussian for a warning


class Likelihood:
    """The mean of −log q over rows, in nats; of dequantized columns by the probability of cells.

    Rows of such columns get fresh noise in each batch, and the same one whenever they are used in
    full or held out: by Jensen's inequality the mean is then above that of −log P.

    Args:
        flow: that is trained.
        rows: the data (N, D), and the contexts (N, C) if it takes some.
        steps: of the cells of each column (D,), 0 for none; None where no column has cells.
        holdout: fraction of the rows held out.
        batch_size: rows a step.
        ours: the processes that share them.
    """

    def __init__(
        self,
        flow: Flow,
        rows: list[Tensor],
        steps: Tensor | None,
        holdout: float,
        batch_size: int,
        ours: Processes,
    ) -> None:
        self.flow, self.steps, self.batch_size, self.ours = flow, steps, batch_size, ours
        self.log_cell = 0.0 if steps is None else steps[steps > 0].log().sum().item()
        held_out, self.rows = _split(rows, holdout)
        self.held_out, self.training = self._with_noise(held_out), self._with_noise(self.rows)
        self.polished = [t[:POLISHED_ROWS] for t in self.training]

    def objective(self) -> Objective:
        """What a fit minimises."""
        return Objective(
            trainable(self.flow),
            self._of_batch,
            self._held_out,
            buffers=list(self.flow.buffers()),
            exact_loss=lambda: self._mean(self.polished),
            processes=self.ours,
            steady=self._of_batch,
        )

    @torch.no_grad()
    def compared(self, fit: Fit) -> tuple[Fit, Tensor, float]:
        """The fit with the scores beside its own, and its losses of the held-out rows.

        Last comes what it loses to a Gaussian, 0 unless that is clear.
        """
        own = self._held_out().double().cpu()
        training = self._losses(self.polished).double().mean().item()
        fit, losses = replace(fit, training_loss=training), self._gaussian()
        if losses is None:
            return fit, own, 0.0
        excess = own - losses
        lost = excess.mean().item()
        clear = lost > max(LEAST_LOSS, 2 * standard_error(excess))
        return replace(fit, gaussian_loss=losses.mean().item()), own, lost if clear else 0.0

    def _gaussian(self) -> Tensor | None:
        losses = gaussian_losses(self.training, self.held_out)
        return None if losses is None else losses - self.log_cell

    def _with_noise(self, rows: list[Tensor]) -> list[Tensor]:
        if self.steps is None:
            return rows
        return [rows[0] + noise(self.steps, len(rows[0])), *rows[1:]]

    def _of_batch(self, step: int | Tensor) -> Tensor:
        device, shift = self.rows[0].device, None
        with drawing():
            index = torch.randint(len(self.rows[0]), (self.batch_size,), device=device)
            if self.steps is not None:
                shift = noise(self.steps, self.batch_size)
        data, *contexts = [t[index] for t in self.rows]
        return self._mean([data if shift is None else data + shift, *contexts])

    def _mean(self, rows: list[Tensor]) -> Tensor:
        own = self._losses([t[self.ours.share(len(t))] for t in rows])
        return self.ours.weighted(own.mean(), len(rows[0]))

    def _held_out(self) -> Tensor:
        if len(self.held_out[0]) < self.ours.count:
            return self._losses(self.held_out)
        own = [t[self.ours.share(len(t))] for t in self.held_out]
        return self.ours.joined(self._losses(own))

    def _losses(self, rows: list[Tensor]) -> Tensor:
        found = -self.flow(*rows[1:]).log_prob(rows[0])
        return found if self.steps is None else found - self.log_cell


def standard_error(values: Tensor) -> float:
    """Of the mean of values (n,); infinite for a single one."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.inf


def gaussian_losses(training: list[Tensor], held_out: list[Tensor]) -> Tensor | None:
    """−log density of held-out rows under the full Gaussian of others, linear in their contexts.

    None where its covariance is singular, as it is of data that follow from their contexts.
    """
    (y, *c), (there, *at) = ([t.cpu().double() for t in rows] for rows in (training, held_out))
    residuals, found = y - y.mean(0), there - y.mean(0)
    for own, others in zip(c, at, strict=True):
        mean, scale = own.mean(0), own.std(0, correction=0).clamp(min=torch.finfo(own.dtype).tiny)
        own, others = (own - mean) / scale, (others - mean) / scale
        slopes = torch.linalg.pinv(own.T @ own, hermitian=True) @ (own.T @ residuals)
        residuals, found = residuals - own @ slopes, found - others @ slopes
    factor, failed = torch.linalg.cholesky_ex(residuals.T @ residuals / len(y))
    if failed or (factor.diagonal() / y.std(0, correction=0)).min() < 1e-6:
        return None
    z = torch.linalg.solve_triangular(factor, found.T, upper=False)
    constant = factor.diagonal().log().sum() + 0.5 * len(factor) * math.log(2 * math.pi)
    return 0.5 * z.square().sum(0) + constant


def _split(rows: list[Tensor], holdout: float) -> tuple[list[Tensor], list[Tensor]]:
    n = len(rows[0])
    held = min(n - 1, max(1, round(holdout * n)))
    order = torch.randperm(n, device="cpu")
    return [t[order[:held]] for t in rows], [t[order[held:]] for t in rows]
