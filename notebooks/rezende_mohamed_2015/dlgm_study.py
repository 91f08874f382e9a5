"""Many flows on one deep latent Gaussian model: train each, score each, keep what is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform

from pyroflow.inference.processes import Processes, processes
from pyroflow.seeds import seeded
from rezende_mohamed_2015.dlgm import DLGM
from rezende_mohamed_2015.dlgm_scores import scores
from rezende_mohamed_2015.dlgm_training import Schedule, digest, train
from rezende_mohamed_2015.results import (
    Options,
    Results,
    Run,
    checkpoint_folder,
    label,
    machine,
)
from rezende_mohamed_2015.side_by_side import MOST_RUNS, side_by_side


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
        grey: shape (N, X), in uint8: what to draw images to train on from, afresh in every batch,
            in place of ``training``; None for none.
        more_samples: a run ↦ importance samples of a second estimate of −ln p(x), 0 for none.
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
    grey: Tensor | None = None
    more_samples: Callable[[Run], int] = lambda run: 0


def settings(study: Study, quick: bool) -> dict[str, Any]:
    """What the numbers depend on, for the JSON file."""
    return {
        "quick": quick,
        "training_images": len(study.training),
        "test_images": len(study.test),
        "digests": [digest(study.training), digest(study.test)],
        "samples": study.samples,
        **study.facts,
    }


def device_of(options: Options) -> Processes:
    """The processes, on the device that is asked for.

    Raises:
        ValueError: If there is no such device, or several runs at a time on another than one GPU.
    """
    ours = processes()
    if options.device == "cuda" and ours.device.type != "cuda":
        raise ValueError("--device cuda needs a GPU that torch can use; leave it out for the CPU")
    if options.device == "cpu":
        ours = replace(ours, device=torch.device("cpu"))
    if options.jobs > 1 and not one_gpu(ours):
        raise ValueError(
            f"--jobs {options.jobs} needs a GPU and one process; on the CPU start several commands "
            "with another --only each, which share the file of results"
        )
    return ours


def one_gpu(ours: Processes) -> bool:
    """Whether runs share one GPU with their like alone: then an update is one launch."""
    return ours.device.type == "cuda" and ours.count == 1


def run_study(study: Study, options: Options) -> dict[str, Any] | None:
    """Train and score every flow that is asked for and not finished, for every seed.

    Under torchrun the processes share each batch, and rank 0 writes. On one GPU runs go on side
    by side, and a run that is cut off begins anew.

    Returns:
        The report: the runs. None on other ranks than 0.

    Raises:
        ValueError: If there is no such device, or several runs at a time on another than one GPU.
    """
    began = time.monotonic()
    planned = [{**flow, "seed": seed} for seed in range(options.seeds or 1) for flow in study.flows]
    selected = options.selected(planned)
    ours = device_of(options)
    results = Results(options.out / f"{study.name}.json", settings(study, options.quick))
    folder = checkpoint_folder(options, study.checkpoints)

    def do(run: Run, between: Callable[[], None] = lambda: None) -> None:
        late = options.seconds is not None and time.monotonic() - began > options.seconds
        if ours.agree(late):
            return
        found = _run(study, run, folder, ours, options.progress, between)
        if ours.writes:
            results.add(run, found)

    missing = ours.agree(results.missing(selected))
    if one_gpu(ours):
        side_by_side(missing[:MOST_RUNS], do, options.jobs, ours.device)
    else:
        for run in missing:
            do(run)
    if not ours.writes:
        return None
    return {"runs": Results(results.path, results.settings).ordered(planned)}


def _run(
    study: Study,
    run: Run,
    folder: Path,
    ours: Processes,
    progress: bool,
    between: Callable[[], None],
) -> dict[str, Any]:
    seed, name = run["seed"], label(run)
    columns = {c: v for c, v in run.items() if c not in ("seed", "draws")}
    with seeded(seed):
        transforms = study.layers(**columns)
    with seeded(seed):  # the networks start alike, whatever the flow has drawn
        dlgm = study.model(transforms).to(ours.device)
    lines = progress and one_gpu(ours)
    if lines:
        print(f"{name}: begins", flush=True)
    quiet = {"processes": ours, "progress": progress and not lines, "between": between}
    images = {"images": study.training if study.grey is None else study.grey}
    images |= {"fresh": study.grey is not None}
    checkpoint = None if one_gpu(ours) else folder / f"{name}.pt"
    options = {"seed": seed, "checkpoint": checkpoint, "name": name} | quiet
    done = train(dlgm, schedule=study.schedule, **images, **options)
    began = time.perf_counter()
    scored = scores(dlgm, study.test, samples=study.samples, **quiet)
    if more := study.more_samples(run):
        again = scores(dlgm, study.test, samples=more, **quiet)
        scored |= {"more_samples": more, "nll_more": again["nll"], "nll_more_se": again["nll_se"]}
    found = {
        "machine": machine(ours.device),
        **scored,
        "training_free_energy": done.free_energy,
        "parameters": sum(p.numel() for p in dlgm.parameters()),
        "updates": done.updates,
        "batch_size": study.schedule.batch_size,
        "skipped_updates": done.skipped,
        "seconds": round(done.seconds, 1),
        "seconds_of_scoring": round(time.perf_counter() - began, 1),
        "processes": ours.count,
        "device": ours.device.type,
        "launches": done.launches,
    }
    if lines:
        print(f"{name}: {_line(found)}", flush=True)
    return found


def _line(found: Mapping[str, Any]) -> str:
    rate = found["updates"] / max(found["seconds"], 1e-9)
    return (
        f"−ELBO {found['free_energy']:.2f}, −ln p {found['nll']:.2f}; {found['updates']} updates "
        f"in {found['seconds']} s, {rate:.0f}/s, {found['skipped_updates']} skipped, "
        f"{found['launches'] or 'as they come'}; scored in {found['seconds_of_scoring']} s"
    )
