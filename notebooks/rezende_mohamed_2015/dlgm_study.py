"""Many flows on one deep latent Gaussian model: train each, score each, keep what is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributions import Transform

from pyroflow.inference.processes import Processes, processes
from pyroflow.seeds import seeded
from rezende_mohamed_2015.dlgm import DLGM
from rezende_mohamed_2015.dlgm_scores import scores
from rezende_mohamed_2015.dlgm_training import Schedule, digest, train
from rezende_mohamed_2015.results import Options, Results, Run, checkpoint_folder, label


@dataclass(frozen=True)
class Study:
    """Flows to compare on the same model and data.

    Attributes:
        name: of the JSON file.
        checkpoints: name of the folder of checkpoints; studies of the same model share it.
        training: images to train on, shape (N, X).
        test: images to score, shape (M, X).
        model: transforms ↦ DLGM.
        flows: the columns that tell each flow from the others.
        layers: columns of a flow ↦ its transforms.
        schedule: of the training, the same for all.
        samples: importance samples for each test image.
        facts: what else the results depend on, for the JSON file.
    """

    name: str
    checkpoints: str
    training: Tensor
    test: Tensor
    model: Callable[[Sequence[Transform]], DLGM]
    flows: Sequence[Run]
    layers: Callable[..., list[Transform]]
    schedule: Schedule
    samples: int
    facts: Mapping[str, Any]


def settings(study: Study, quick: bool) -> dict[str, Any]:
    """What the numbers depend on, for the JSON file."""
    return {
        "quick": quick,
        "training_images": len(study.training),
        "test_images": len(study.test),
        "digests": [digest(study.training), digest(study.test)],
        "samples": study.samples,
        "schedule": vars(study.schedule),
        **study.facts,
    }


def run_study(study: Study, options: Options) -> dict[str, Any] | None:
    """Train and score every flow that is asked for and not finished, for every seed.

    Under torchrun the processes share each batch, and rank 0 writes.

    Returns:
        The report: the runs. None on other ranks than 0.
    """
    planned = [{**flow, "seed": seed} for seed in range(options.seeds or 1) for flow in study.flows]
    selected = options.selected(planned)
    ours = processes()
    results = Results(options.out / f"{study.name}.json", settings(study, options.quick))
    folder = checkpoint_folder(options, study.checkpoints)
    for run in ours.agree(results.missing(selected)):
        found = _run(study, run, folder, ours, options.progress)
        if ours.writes:
            results.add(run, found)
    if not ours.writes:
        return None
    return {"runs": Results(results.path, results.settings).ordered(planned)}


def _run(study: Study, run: Run, folder: Path, ours: Processes, progress: bool) -> dict[str, Any]:
    seed, name = run["seed"], label(run)
    with seeded(seed):
        transforms = study.layers(**{c: v for c, v in run.items() if c != "seed"})
    with seeded(seed):  # the networks start alike, whatever the flow has drawn
        dlgm = study.model(transforms).to(ours.device)
    quiet = {"processes": ours, "progress": progress}
    options = {"seed": seed, "checkpoint": folder / f"{name}.pt", "name": name} | quiet
    done = train(dlgm, study.training, study.schedule, **options)
    began = time.perf_counter()
    scored = scores(dlgm, study.test, samples=study.samples, **quiet)
    return {
        **scored,
        "training_free_energy": done.free_energy,
        "parameters": sum(p.numel() for p in dlgm.parameters()),
        "updates": done.updates,
        "skipped_updates": done.skipped,
        "seconds": round(done.seconds, 1),
        "seconds_of_scoring": round(time.perf_counter() - began, 1),
        "processes": ours.count,
        "device": ours.device.type,
    }
