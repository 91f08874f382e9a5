"""The bound of any guide and model by Pyro's traces: where the log joint cannot stand alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import default_process_message
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.distributions import TransformedDistribution

from pyroflow.flows import draw_from
from pyroflow.inference.fit import path_derivative
from pyroflow.inference.objectives import (
    DRAWS_ONE_BY_ONE,
    SCORED_ONE_BY_ONE,
    bound_loss,
    bound_scores,
    cut_loss,
)
from pyroflow.inference.processes import ALONE, Processes
from pyroflow.inference.trainer import EVALUATIONS
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw
from pyroflow.model.records import is_random, log_joint
from pyroflow.seeds import drawing, fixed_draws

DRAWS_BY_TRACES, SCORED_BY_TRACES = 256, 1024  # of a step by default, and that are compared


class TraceBound:
    """The bound of any guide and model by Pyro's ``Trace_ELBO``; all draws are one IWAE group.

    Several processes draw apart. They share the draws of a step, or have a group each.
    """

    evaluations, slower = EVALUATIONS, 1.0

    def __init__(
        self,
        problem: BoundModel,
        objective: str,
        num_particles: int | None,
        processes: Processes = ALONE,
    ) -> None:
        self.problem, self.guide, self.objective = problem, problem.guide, objective
        self.processes = processes
        draws, scored, options = DRAWS_ONE_BY_ONE, SCORED_ONE_BY_ONE, {}
        if problem.max_plate_nesting is not None:
            draws, scored = DRAWS_BY_TRACES, SCORED_BY_TRACES
            options = {"vectorize_particles": True, "max_plate_nesting": problem.max_plate_nesting}
        self.num_particles = num_particles or draws
        self.keep_last, self.path = problem.subsampled, objective != "iwae"
        self.skipped = torch.zeros((), dtype=torch.long, device="cpu")
        self._seed = torch.randint(2**31, (), device="cpu")
        own = processes.most(scored)
        weigh = _DrawingAtSites()(lambda: draw(problem, own).log_weights)
        self._weigh_fixed = fixed_draws(lambda: int(self._seed) + processes.rank, weigh)
        self._draw_apart = processes.apart(self._loss)
        sites = prune_subsample_sites(problem.guide_trace).iter_stochastic_nodes()
        self._has_rsample = all(site["fn"].has_rsample for _, site in sites)
        if objective == "iwae" and not self._has_rsample:
            raise ValueError(
                "objective='iwae' needs a guide all of whose sites are reparametrised (rsample), "
                "and the guide has others: use objective='elbo'"
            )
        # Bound, so that no name of the model's arguments meets one of Pyro's own.
        self._model = partial(problem.model, *problem.args, **problem.kwargs)
        self._guide = partial(problem.guide, *problem.args, **problem.kwargs)
        whole = slice(self.num_particles)
        part = whole if objective == "iwae" else processes.share(self.num_particles)
        self._own = part.stop - (part.start or 0)  # draws of a step
        self._elbo = Trace_ELBO(self._own, **options)
        self._parameters = self._met()

    def _met(self) -> list[Tensor]:
        """Every parameter that a run of model and guide meets, as Pyro's own SVI collects them."""
        unchecked = pyro.validation_enabled(False)
        with torch.no_grad(), unchecked, poutine.trace(param_only=True) as captured:
            poutine.replay(self._model, trace=poutine.trace(self._guide).get_trace())()
        parameters = [site["value"].unconstrained() for site in captured.trace.nodes.values()]
        parameters = [p for p in parameters if p.requires_grad]
        if not parameters:
            raise ValueError(
                "guide has no parameters to train: pass one such as AutoPlanarFlow(model)"
            )
        return parameters

    def parameters(self) -> list[Tensor]:
        """All that is trained."""
        return self._parameters

    def buffers(self) -> list[Tensor]:
        """What a checkpoint restores beside it."""
        module = isinstance(self.guide, nn.Module)
        return [*(self.guide.buffers() if module else ()), self._seed]

    def loss(self, beta: float, _: None = None) -> Tensor:
        """The loss of fresh draws, or of this process's share, with weight β of the log joint."""
        loss = self._draw_apart(beta)
        whole = self.objective == "iwae"
        return loss if whole else self.processes.weighted(loss, self.num_particles)

    def _loss(self, beta: float) -> Tensor:
        with _DrawingAtSites():
            if self.objective == "elbo":
                scaled = poutine.scale(self._model, scale=beta)
                found = self._elbo.differentiable_loss(scaled, self._guide)
                if bool(found.isfinite()) or not self._has_rsample:
                    return found
            return self._loss_of_weights(beta)

    def _loss_of_weights(self, beta: float) -> Tensor:
        """The loss from log weights one by one: Pyro's is not finite where one of them is not."""
        problem, num, guided = self.problem, self._own, self.problem.guide_runs
        drawn = problem.guide_draws(num)  # which chooses how they run
        problem.runs.choose({name: drawn[name].values for name in problem.latents}, num)
        sites = guided.way({}, num)
        latents = {name: sites[name].values for name in problem.latents}
        log_weights = beta * problem.runs.log_joint(latents, num) - log_joint(sites)
        if bool(log_weights.isfinite().all()):
            return bound_loss(log_weights, self.objective, num)
        path = getattr(self.guide, "path_derivative", False)
        random = {name: site for name, site in sites.items() if is_random(site.record)}
        with path_derivative(self.guide, False):
            fixed = {name: site.values.detach() for name, site in random.items()}
            log_q = log_joint(guided.way(fixed, num))
        z = torch.cat([value.detach().reshape(num, -1) for value in latents.values()], 1)
        return cut_loss(log_weights, self.objective, num, z, log_q, path=path)

    def score(self) -> Tensor:
        """The loss on fixed draws."""
        return bound_scores(self.processes.joined(self._weigh_fixed()))

    def mixing(self) -> str | None:
        """Where draws that run side by side differ from runs alone, at the fitted guide's own."""
        return None if self.problem.max_plate_nesting is None else self.problem.mixes()


class _DrawingAtSites(Messenger):
    """Lets sample sites draw inside of ``drawing``, flows their base alone."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn, known = msg["fn"], msg["done"] or msg["is_observed"] or msg["value"] is not None
        if known or isinstance(fn, Delta):
            return
        if isinstance(fn, TransformedDistribution) and fn.has_rsample and not msg["args"]:
            msg["value"], msg["done"] = draw_from(fn), True
            return
        with drawing():
            default_process_message(msg)
