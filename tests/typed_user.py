"""What a user writes, with annotations: ``make types`` checks it, a slow test runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyroflow as pf


def model(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)


def density(path: Path) -> Tensor:
    y: Tensor = pf.datasets.sine(200)
    flow: pf.Flow = pf.planar_flow(2, num_layers=4)
    fit: pf.Fit = pf.fit_density(flow, y, steps=5, seed=0, progress=False)
    stopped: str = fit.stopped
    losses: list[float] = fit.losses
    print(stopped, losses[-1])
    pf.save(flow, path)
    loaded = pf.load(path)
    assert isinstance(loaded, pf.Flow)
    drawn: Tensor = loaded().sample((10,))
    return loaded().log_prob(drawn)


def conditional(x: Tensor, y: Tensor) -> Tensor:
    flow = pf.sylvester_flow(2, num_units=1, num_layers=2, context_dim=1)
    pf.fit_density(flow, torch.stack([x, y], -1), context=x[:, None], steps=5, progress=False)
    return flow(x[:, None]).log_prob(torch.zeros(len(x), 2))


def energy() -> pf.Fit:
    flow = pf.planar_flow(2, num_layers=4)
    target, paper = pf.targets.energy(1), pf.paper_annealing
    return pf.fit_energy(
        flow, target, annealing=lambda i: paper(2000 * (i + 1)), steps=5, seed=0, progress=False
    )


def parts() -> Tensor:
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    flow = pf.Flow(base, [pf.Planar(2, num_layers=3), pf.Sylvester(2, 1).inv, pf.Affine(2)])
    at = pf.ConditionalPlanar(2, 3).condition(torch.zeros(3))
    y: Tensor = at(torch.zeros(2))
    return flow().log_prob(y)


def guide(x: Tensor, y: Tensor, path: Path) -> dict[str, Tensor]:
    guide = pf.AutoPlanarFlow(model, num_layers=4)
    pf.fit_guide(model, guide, x, y, steps=5, seed=0, progress=False)
    report: pf.Report = pf.diagnose(model, guide, x, y, num_samples=500, max_sets=1)
    verdict: str = report.verdict
    khat: float = report.khat
    print(verdict, khat, report.elbo)
    pf.save(guide, path)
    loaded = pf.load(path, model=model)
    assert isinstance(loaded, pf.AutoFlow)
    median: dict[str, Tensor] = loaded.median(x, y)
    print(median, guide.quantiles([0.05, 0.95], x, y))
    chains: pf.Chains = pf.mcmc(model, guide, x, y, num_samples=50, progress=False)
    print(chains.rhat, chains.ess, pf.to_arviz(model, guide, x, y, num_samples=50))
    return report.resample(200)


def other_guides() -> list[object]:
    build = lambda dim: [pf.Sylvester(dim, 1), pf.Planar(dim, 2)]  # noqa: E731
    return [
        pf.AutoFlow(model, build),
        pf.AutoSylvesterFlow(model, tails=True),
        pf.AutoStructuredFlow(model),
        pf.AmortizedPlanarGuide(model, "rows"),
    ]


def whole(x: Tensor, y: Tensor) -> Tensor:
    post: pf.Posterior = pf.posterior(model, x, y, seed=0, progress=False)
    level: str = post.level
    print(level, post.log_evidence, post.to_arviz())
    return post.draws["slope"]


def calibrated(x: Tensor) -> pf.Calibration:
    def made(given: Any) -> pf.AutoPlanarFlow:
        return pf.AutoPlanarFlow(given, num_layers=2)

    found = pf.calibrate(
        model, made, (x,), data={"y": "y"}, num_simulations=20, steps=5, progress=False
    )
    found.plot()
    return found


def main(folder: Path) -> None:
    x = torch.linspace(-1.0, 1.0, 30)
    y = 0.7 * x + 0.3 * torch.sin(9.0 * x)
    print(density(folder / "flow.pt"), conditional(x, y), energy(), parts())
    print(guide(x, y, folder / "guide.pt"), other_guides(), whole(x, y), calibrated(x))
