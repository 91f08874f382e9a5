"""Hamiltonian Monte Carlo in base space, for all chains at once."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pyro.ops.dual_averaging import DualAveraging
from torch import Tensor

from pyroflow.chains.target import Points, Target
from pyroflow.seeds import drawing

ACCEPTANCE = 0.651  # that the step size aims at, the best one for trajectories of a fixed length
LEAST_ACCEPTANCE = 0.1  # of a chain in the harmonic mean, so that one that is stuck is not all
MOST_STEPS = 64  # of a trajectory
RATE, DECAY = 0.05, 0.95  # of Adam, for the log of the trajectory length, without momentum
SCALED_AT = (0.2, 0.5)  # parts of the warm-up after which the units are set anew
AVERAGED_FROM = 0.75  # part of the warm-up from which the trajectory length is averaged


class Path(NamedTuple):
    """A trajectory of each chain: its end, the momenta there, and min(1, e^−ΔH)."""

    end: Points
    momentum: Tensor
    acceptance: Tensor


class HMC:
    """A trajectory for all chains, of one length, and a Metropolis step at its end.

    During the warm-up it adapts what the chains share: the step size, by dual averaging on the
    harmonic mean of their acceptances; the trajectory length, along the gradient of ChEES, the
    change in squared distance from the mean; and the units, in which all numbers of u have variance
    1 and no correlations over the chains. Each trajectory takes a uniform part of the length, so
    that no period of the target is met for ever.

    References:
        Hoffman, Radul and Sountsov, An adaptive-MCMC scheme for setting trajectory lengths in
        Hamiltonian Monte Carlo, 2021, https://proceedings.mlr.press/v130/hoffman21a.html.

    Args:
        target: the posterior in base space.
        warmup: steps that adapt.

    Attributes:
        rates: of each step since :meth:`settle`, the mean acceptance.
        step_size, length: of a leapfrog step, and of a trajectory at most.
        unit: u is this times the numbers that trajectories run in, lower triangular (D, D).
    """

    name = "HMC"

    def __init__(self, target: Target, warmup: int) -> None:
        self.target, self.warmup = target, warmup
        self.rates: list[float] = []
        self.unit = torch.diag(torch.ones_like(target.flow.base.loc))
        self._averaged: list[float] = []  # logs of the length
        self._seen: list[Tensor] = []
        self._taken = 0
        self._begin()

    def _begin(self) -> None:
        """Start the adaptation in the present units."""
        self.step_size, self.length = self.target.dim**-0.25, 1.0
        self._dual = DualAveraging(prox_center=math.log(self.step_size))
        self._square, self._updates = 0.0, 0  # of the slope, averaged

    def settle(self) -> None:
        """End the adaptation; from here on steps count."""
        if self._taken:
            self.step_size = math.exp(self._dual.get_state()[1])
        if self._averaged:
            self.length = math.exp(sum(self._averaged) / len(self._averaged))
        self.warmup = 0
        self._seen.clear()
        self.rates.clear()

    def step(self, points: Points) -> Points:
        """All chains one trajectory on."""
        if points.gradient is None:
            points = self.target.with_gradients(points.u)
        with drawing():
            part = torch.rand((), dtype=torch.float64, device="cpu").item()
            momentum = torch.randn_like(points.u)
            log_uniform = torch.rand_like(points.log_target).log()
        path = self.trajectory(points, momentum, part)
        if self._taken < self.warmup:
            self._adapt(points, path, part)
        self.rates.append(path.acceptance.mean().item())
        return points.replaced(log_uniform < path.acceptance.log(), path.end)

    def trajectory(self, points: Points, momentum: Tensor, part: float = 1.0) -> Path:
        """Leapfrog steps over a part of the length, with momenta (C, D) in the present units."""
        step, end, velocity = self.step_size, points, momentum
        for _ in range(min(max(1, math.ceil(part * self.length / step)), MOST_STEPS)):
            velocity = velocity + step / 2 * end.gradient @ self.unit
            end = self.target.with_gradients(end.u + step * velocity @ self.unit.T)
            velocity = velocity + step / 2 * end.gradient @ self.unit
        gain = _energy(points, momentum) - _energy(end, velocity)
        return Path(end, velocity, gain.nan_to_num(-torch.inf).clamp(max=0.0).exp())

    def _adapt(self, points: Points, path: Path, part: float) -> None:
        self._taken += 1
        chains = len(points)
        harmonic = chains / (1 / path.acceptance.clamp(min=LEAST_ACCEPTANCE)).sum().item()
        self._dual.step(ACCEPTANCE - harmonic)
        self.step_size = math.exp(self._dual.get_state()[0])
        slope = self._chees_slope(points, path, part)
        if math.isfinite(slope) and slope:
            self._updates += 1
            self._square = DECAY * self._square + (1 - DECAY) * slope**2
            corrected = self._square / (1 - DECAY**self._updates)
            change = RATE * slope / math.sqrt(corrected)
            longest = self.step_size * MOST_STEPS
            self.length = min(max(self.length * math.exp(change), self.step_size), longest)
        if self._taken > AVERAGED_FROM * self.warmup:
            self._averaged.append(math.log(self.length))
        self._seen.append(points.u)
        if self._taken in [round(part * self.warmup) for part in SCALED_AT]:
            self._set_units()

    def _chees_slope(self, points: Points, path: Path, part: float) -> float:
        """An estimate of the derivative of ChEES in the log of the length, in the present units."""
        weight = path.acceptance
        before, after = (
            torch.linalg.solve_triangular(self.unit.T, u, upper=True, left=False)
            for u in (points.u, path.end.u)
        )
        usable = after.isfinite().all(1) & (weight > 0)
        if not bool(usable.any()):
            return 0.0
        weight, before, after = weight[usable], before[usable], after[usable]
        there = (weight.unsqueeze(1) * after).sum(0) / weight.sum()
        before, after = before - before.mean(0), after - there
        change = after.square().sum(1) - before.square().sum(1)
        slopes = part * self.length * change * (after * path.momentum[usable]).sum(1)
        return ((weight * slopes).sum() / weight.sum()).item()

    def _set_units(self) -> None:
        """Make them of the covariance over chains, in the last half of what was seen.

        It is shrunk towards its diagonal, as far as the chains are too few for all of it.
        """
        seen = torch.stack(self._seen[len(self._seen) // 2 :])
        self._seen = []
        chains, dim = seen.shape[1:]
        if seen.numel() == dim:
            return  # one point has no spread
        covariance = seen.flatten(0, 1).T.cov().reshape(dim, dim) * chains / (chains + dim)
        covariance += torch.diag(covariance.diagonal()) * dim / chains
        if not bool(covariance.isfinite().all()):
            return
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if not failed:
            self.unit = factor
            self._begin()


def _energy(points: Points, momentum: Tensor) -> Tensor:
    return momentum.square().sum(1) / 2 - points.log_target
