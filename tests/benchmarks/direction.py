"""Which way should the planar layers of a flow run? Both ways, fitted to data and to energies.

python tests/benchmarks/direction.py writes notebooks/results/direction.json: for the sine data
the gap above the floor in nats, for the paper's energies KL(q‖p), each with the ratio of the
seconds that the two directions took in this run.
"""

import json
from pathlib import Path

import torch

import pyroflow as pf

OUT = Path(__file__).resolve().parents[2] / "notebooks" / "results" / "direction.json"
DIRECTIONS = ("data_to_base", "base_to_data")
FRESH = 100_000


def sine(direction: str, seed: int) -> tuple[float, float]:
    """Gap and seconds of a fit to the sine data, K = 16."""
    flow = pf.planar_flow(2, num_layers=16, direction=direction)
    fit = pf.fit_density(flow, pf.datasets.sine(10_000, seed=100 + seed), seed=seed)
    fresh = pf.datasets.sine(FRESH, seed=10**6)
    with torch.no_grad():
        return (
            pf.datasets.sine_log_prob(fresh) - flow().log_prob(fresh)
        ).mean().item(), fit.seconds


def energy(direction: str, number: int) -> tuple[float, float]:
    """KL and seconds of a fit to one of the paper's energies, K = 16."""
    target = pf.targets.energy(number)
    flow = pf.planar_flow(2, num_layers=16, direction=direction)
    fit = pf.fit_energy(flow, target, steps=1500, seed=0)
    with torch.no_grad():
        z = flow().sample((FRESH,))
        return (flow().log_prob(z) + target(z)).mean().item() + target.log_normalizer, fit.seconds


def main() -> None:
    """Run every case in both directions."""
    cases = {f"sine, seed {seed}: gap": (sine, seed) for seed in (0,)}
    cases |= {f"U{number}: KL": (energy, number) for number in (1,)}
    results = {}
    for name, (measure, argument) in cases.items():
        found = {direction: measure(direction, argument) for direction in DIRECTIONS}
        results[name] = {direction: round(value, 4) for direction, (value, _) in found.items()}
        seconds = [found[direction][1] for direction in DIRECTIONS]
        results[name]["seconds, base_to_data / data_to_base"] = round(seconds[1] / seconds[0], 2)
        OUT.parent.mkdir(parents=True, exist_ok=True)
        OUT.write_text(json.dumps(results, indent=2) + "\n")
    print(OUT.read_text())


if __name__ == "__main__":
    main()
