"""How close do the defaults come, for three seeds each, where the answer is known?

python tests/benchmarks/accuracy.py writes notebooks/results/accuracy.json: the gap of the sine
density above its floor and KL(q‖p) of the toy posterior, in nats, with the seconds of each fit.
"""

import json
from pathlib import Path
from typing import Any

import pyro
import torch

import pyroflow as pf
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw
from pyroflow.targets import TOY_LOG_EVIDENCE, toy_model

OUT = Path(__file__).resolve().parents[2] / "notebooks" / "results" / "accuracy.json"
SEEDS = (0, 1, 2)
FRESH = 100_000


def sine(num_layers: int, seed: int) -> dict[str, Any]:
    """Gap of log q to log p over fresh points, and the noise that samples show (0.1 is right)."""
    flow = pf.planar_flow(2, num_layers)
    fit = pf.fit_density(flow, pf.datasets.sine(10_000, seed=100 + seed), seed=seed)
    fresh = pf.datasets.sine(FRESH, seed=10**6)
    torch.manual_seed(seed)
    with torch.no_grad():
        gap = (pf.datasets.sine_log_prob(fresh) - flow().log_prob(fresh)).mean().item()
        x = flow().sample((FRESH,))
    noise = (x[:, 0] - x[:, 1].sin()).std().item()
    return {"gap": round(gap, 4), "sd of noise": round(noise, 4), "seconds": round(fit.seconds, 1)}


def toy(num_layers: int, seed: int) -> dict[str, Any]:
    """KL of the guide to the toy posterior."""
    pyro.clear_param_store()
    guide = pf.AutoPlanarFlow(toy_model, num_layers)
    fit = pf.fit_guide(toy_model, guide, seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        elbo = draw(BoundModel(toy_model, guide), FRESH).log_weights.mean().item()
    return {"KL": round(TOY_LOG_EVIDENCE - elbo, 4), "seconds": round(fit.seconds, 1)}


def main() -> None:
    """Run every case, and write after each."""
    cases = {f"toy posterior, K = {K}": (toy, K) for K in (32,)}
    cases |= {f"sine density, K = {K}": (sine, K) for K in (8, 16, 32)}
    results: dict[str, Any] = {"threads": torch.get_num_threads()}
    for name, (measure, num_layers) in cases.items():
        results[name] = {f"seed {seed}": measure(num_layers, seed) for seed in SEEDS}
        OUT.parent.mkdir(parents=True, exist_ok=True)
        OUT.write_text(json.dumps(results, indent=2) + "\n")
    print(OUT.read_text())


if __name__ == "__main__":
    main()
