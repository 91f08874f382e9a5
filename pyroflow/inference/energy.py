"""Reverse KL: a flow fitted to an unnormalised density exp(−U)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from numbers import Real
from pathlib import Path

import torch
from pyro.distributions import TransformedDistribution
from torch import Tensor

from pyroflow.checks import known_options
from pyroflow.flows import Flow, draw_from, log_prob_at_fixed
from pyroflow.flows.families import check_flow
from pyroflow.inference.callbacks import Callbacks, interrupted
from pyroflow.inference.fit import Fit, Objective, check_options, trainable
from pyroflow.inference.natural import steps_within
from pyroflow.inference.objectives import bound_scores, cut_loss
from pyroflow.inference.processes import held, processes
from pyroflow.inference.schedule import LearningRateSchedule, described
from pyroflow.inference.trainer import Trainer
from pyroflow.seeds import fixed_draws, seeded

STEPS_AT_FULL_WEIGHT = 5000  # the default number of steps after annealing has ended
SCORED_DRAWS = 4096
RISE = 2.3  # nats that an energy must gain far out: half of what the heaviest proper tail gains


@known_options
def fit_energy(
    flow: Flow,
    energy: Callable[[Tensor], Tensor],
    *,
    annealing: Callable[[int], float] | None = None,
    steps: int | None = None,
    num_particles: int = 256,
    lr: float = 0.01,
    seed: int | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    device: str | torch.device | None = None,
    callbacks: Callbacks = None,
) -> Fit:
    """Fit a flow q to p ∝ exp(−U) by minimising F = E_q[log q + U] = KL(q‖p) − ln Z.

    With annealing the loss is E_q[log q + β_t U] (equation 20 of Rezende & Mohamed 2015). The
    flow ends in the state with the lowest F, at β = 1, on a fixed set of draws. Under torchrun the
    processes share each step's draws and come to one result.

    Args:
        flow: the flow, trained in place.
        energy: U, a map (N, D) → (N,). exp(−U) must have a finite integral, or F has no minimum
            and mass leaks away where U is flat: an energy that stays flat along a coordinate axis
            is warned of (other directions are not checked).
        annealing: step ↦ β_t in [0, 1], reaching 1, such as :func:`~pyroflow.paper_annealing`.
        steps: optimiser steps; by default 5000 more than annealing needs. The last of them, one in
            fifteen and at most 100, are natural gradient steps where the flow consists of
            pyroflow's own layers with at most 1024 parameters, and β is 1 before.
        num_particles: draws a step.
        lr: highest learning rate, after a warm-up and before a cosine decay to zero.
        seed: makes the fit reproducible, without touching the global generator, whatever other
            threads draw; None draws from the global one.
        progress: show a progress bar, in a notebook or on a terminal.
        callbacks: as in :func:`~pyroflow.fit_density`.
        checkpoint: file that the fit is saved to as it goes, and resumed from if it exists;
            needs a seed.
        device: where to move the flow.

    Returns:
        The course of the fit, up to Ctrl-C if that ended it, with a warning; ``best_loss`` is F in
        nats, at least −ln Z.

    Raises:
        ValueError: If the flow is conditional or its depth open, the energy has the wrong shape or
            an infinite ``log_normalizer``, the annealing is not 1 at the last step, an option is
            out of range, or the checkpoint is of another fit or in use by one.

    Example:
        >>> from pyroflow import planar_flow
        >>> from pyroflow.targets import energy
        >>> fit = fit_energy(planar_flow(2), energy(1), steps=10, seed=0, progress=False)
        >>> fit.steps
        10
    """
    steps = _default_steps(annealing) if steps is None else steps
    options = {"lr": lr, "seed": seed, "checkpoint": checkpoint, "device": device}
    check_options(steps=steps, num_particles=num_particles, **options)
    _check_annealing(annealing, steps)
    check_flow("fit_energy", flow)
    if flow.conditional:
        raise ValueError("flow must be unconditional: an energy has no context")
    if flow.deepen is not None:
        raise ValueError("flow must have a number of layers: 'auto' is found by fit_density alone")
    _check_proper(energy)
    ours = processes()
    seed, checkpoint, progress = ours.options(seed, checkpoint, progress)
    ours.start_alike(flow.to(device))
    beta = (lambda step: 1.0) if annealing is None else annealing
    settings = {"kind": "energy", "num_particles": num_particles, "seed": seed}
    with held(checkpoint), seeded(seed):
        settings["energy"] = _check_energy(flow, energy)
        _warn_of_flat_axes(flow, energy)
        settings["annealing"] = described(annealing, steps)
        flow.initialize()
        settings["flow"] = flow.get_extra_state()
        scored = torch.randint(2**31, (), device="cpu")

        def weighed(
            beta: float | Tensor, num: int
        ) -> tuple[TransformedDistribution, Tensor, Tensor]:
            q = flow()
            z = draw_from(q, (num,), ours.share(num))
            return q, z, -beta * energy(z) - q.log_prob(z)

        def loss(step: int) -> Tensor:
            q, z, log_weights = weighed(beta(step), num_particles)
            if bool(log_weights.isfinite().all()):
                return ours.weighted(-log_weights.mean(), num_particles)
            cut = cut_loss(log_weights, "elbo", 1, z, log_prob_at_fixed(q, z), path=False)
            return ours.weighted(cut, num_particles)

        weigh_fixed = fixed_draws(scored, lambda: ours.joined(weighed(1.0, SCORED_DRAWS)[2]))
        objective = Objective(
            trainable(flow),
            loss,
            lambda: bound_scores(weigh_fixed()),
            buffers=[*flow.buffers(), scored],
            processes=ours,
            steady=lambda beta: -weighed(beta, num_particles)[2].mean(),
            weight=beta,
            recordable=False,
            natural=(flow, lambda z: -energy(z)),
        )
        natural = steps_within(flow(), objective.parameters, steps)
        natural = natural if beta(steps - natural - 1) == 1 else 0
        trainer = Trainer(
            objective,
            LearningRateSchedule(steps - natural),
            polish=natural,
            lr=lr,
            settings=settings,
            label="fit_energy",
            progress=progress,
            checkpoint=checkpoint,
            callbacks=callbacks,
        )
        try:
            return trainer.run()
        except KeyboardInterrupt:
            return interrupted(trainer, stacklevel=3)


def _default_steps(annealing: Callable[[int], float] | None) -> int:
    if annealing is None:
        return STEPS_AT_FULL_WEIGHT
    ends = next((t for t in range(0, 10**6, 100) if annealing(t) >= 1), None)
    if ends is None:
        raise ValueError("annealing must reach 1, but is below it for a million steps")
    return ends + STEPS_AT_FULL_WEIGHT


def _check_annealing(annealing: Callable[[int], float] | None, steps: int) -> None:
    if annealing is not None and annealing(steps - 1) != 1:
        raise ValueError(
            f"annealing must have reached 1 at the last step, is {annealing(steps - 1)!r} at step "
            f"{steps - 1}: take more steps, or anneal faster"
        )


def _check_energy(flow: Flow, energy: Callable) -> list[float]:
    """Refuse what is no energy; return its values at fixed points, by which to know it again."""
    like = trainable(flow)[0]
    at = {"dtype": like.dtype, "device": like.device}
    z = torch.linspace(-2, 2, 3 * flow.input_dim, **at).reshape(3, -1).requires_grad_()
    if flow.outer_support is not None:
        z = flow.outer_support(z)
    value = energy(z)
    if not isinstance(value, Tensor) or value.shape != (3,):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"energy must map (N, D) to (N,): for shape (3, {flow.input_dim}) got {got}"
        )
    if not value.requires_grad:
        raise ValueError(
            "energy must be differentiable in z, got a result without gradient: compute it with "
            "torch operations on z itself, without detach or NumPy"
        )
    return [float(f"{v:.5g}") for v in value.tolist()]


def _check_proper(energy: Callable) -> None:
    """Refuse an energy that knows that exp(−U) has no finite integral, and what is no function."""
    if not callable(energy):
        raise TypeError(
            f"energy must be a function U of points (N, D), shape (N,), got {type(energy).__name__}"
        )
    known = getattr(energy, "log_normalizer", None)
    if isinstance(known, Real) and known == math.inf:
        raise ValueError(
            f"energy must have a finite integral of exp(−U), {energy!r} has an infinite one: the "
            "bound has no minimum, and mass leaks away where U is flat. Contain it, as "
            "targets.energy(k) does by default (containment=8.0)"
        )


def _warn_of_flat_axes(flow: Flow, energy: Callable) -> None:
    """Warn where U does not rise along an axis, far out."""
    like = trainable(flow)[0]
    axes = torch.eye(flow.input_dim, dtype=like.dtype, device=like.device)
    try:
        flat = [
            i for i, axis in enumerate(axes) if min(_rise(energy, s * axis) for s in (1, -1)) < RISE
        ]
    except (ValueError, RuntimeError):  # an energy need not be computable that far out
        return
    if flat:
        warnings.warn(
            f"energy does not rise along coordinate {', '.join(map(str, flat))} (of 0 to "
            f"{flow.input_dim - 1}) from 100 to 1,000,000: exp(−U) can then hardly have a finite "
            "integral, and mass leaks away without end. Contain it: add a term that rises outside "
            "the region of interest, such as 8 * (z.abs() - 4).relu().square().sum(-1)",
            stacklevel=4,
        )


@torch.no_grad()
def _rise(energy: Callable, direction: Tensor) -> float:
    """The rise of U along a ray from about 1,000 to about 100,000.

    Along an axis a proper density falls faster than 1/r, heavy tails included, and then U gains
    more than ln 100 = 4.6 here. Medians over many radii are what waves do not disturb.
    """
    radii = torch.logspace(2, 6, 128, dtype=direction.dtype, device=direction.device)
    near, far = energy(radii.unsqueeze(-1) * direction).double().view(2, 64).median(-1).values
    return (far - near).item()
