"""Figure 4 and Table 2: planar flows and NICE in a deep latent Gaussian model of MNIST.

A training image is drawn from its grey values, x ~ Bernoulli(grey/255): afresh in every batch, or
once for all ("static"), as the paper's are. The test images are drawn once either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform

from pyroflow.checks import check_choice
from pyroflow.plots.drawing import save_figure
from pyroflow.transforms import ConditionalPlanar
from rezende_mohamed_2015 import image_files, mnist_drawing
from rezende_mohamed_2015.dlgm import DLGM
from rezende_mohamed_2015.dlgm_study import Study, device_of, one_gpu, run_study
from rezende_mohamed_2015.dlgm_training import Schedule
from rezende_mohamed_2015.nice import nice_layers
from rezende_mohamed_2015.results import Options, Run

LATENT, HIDDEN = 40, 400
LENGTHS = (10, 20, 40, 80)
NICE_HIDDEN = 40  # units of each coupling
SAMPLES = 200  # for −ln p(x), as in the paper
MORE_SAMPLES, MORE_LENGTHS = 5000, (0, 80)  # how much lower −ln p(x) is then, at both ends
TRAIN_SEED, TEST_SEED = 0, 1  # of the static draws
SCHEDULES = {
    "static": Schedule(40_000, lr=2e-3, flow_lr=5e-4, cool_down=27_000),
    "fresh": Schedule(120_000, lr=2e-3, flow_lr=5e-4, cool_down=81_000),
}
GPU_BATCH = 200  # of fresh draws: as good at the same number of images, in half the launches


def run(options: Options) -> dict[str, Any] | None:
    """Train and score the flows of Figure 4 on ``options.data``; write the numbers and the figure.

    Under torchrun the processes share each batch, and rank 0 writes.

    Returns:
        The report: the runs. None on other ranks than 0.

    Raises:
        ValueError: no ``data``, unknown ``draws``, or no such device.
        OSError: no MNIST there.
    """
    flows = [{"kind": "planar", "K": 0}]
    flows += [{"kind": kind, "K": K} for kind in ("planar", "NICE") for K in LENGTHS]
    report = run_study(study("mnist", flows, layers, options), options)
    if report is not None:
        save_figure(mnist_drawing.draw(report["runs"]), options.out / "mnist.png")
    return report


def study(
    name: str,
    flows: Sequence[Run],
    layers: Callable[..., list[Transform]],
    options: Options,
    held_out: float = 0.0,
) -> Study:
    """A comparison of flows on binarised MNIST.

    With ``held_out``, this share of the training images, the last ones, takes the place of the
    test images.
    """
    if options.data is None:
        raise ValueError("--data must name the folder of the four MNIST files")
    check_choice("draws", options.draws, tuple(SCHEDULES))
    images = image_files.mnist(options.data)
    training = image_files.binarize(images.train_images, TRAIN_SEED)
    test = image_files.binarize(images.test_images, TEST_SEED)
    if held_out:
        first = len(training) - round(held_out * len(training))
        test = image_files.binarize(images.train_images[first:], TEST_SEED)
        training = training[:first]
    schedules, samples, more = SCHEDULES, SAMPLES, MORE_SAMPLES
    if options.quick:
        training, test, samples, more = training[:1000], test[:100], 10, 20
        short = Schedule(50, lr=1e-3, flow_lr=1e-3, warm_up=5, cool_down=25, annealing=10)
        schedules = dict.fromkeys(SCHEDULES, short)
    fresh = options.draws == "fresh"
    return Study(
        name=name,
        checkpoints="mnist",
        training=training,
        test=test,
        model=partial(model, training.float().mean(0)),
        flows=[{**flow, "draws": options.draws} for flow in flows],
        layers=layers,
        schedule=_on_device(schedules[options.draws], fresh, options),
        samples=samples,
        facts={
            "schedules": {draws: vars(schedule) for draws, schedule in schedules.items()},
            "latent": LATENT,
            "hidden": HIDDEN,
            "nice_hidden": NICE_HIDDEN,
        },
        grey=images.train_images[: len(training)] if fresh else None,
        more_samples=lambda run: more if fresh and _has_more(run) else 0,
    )


def _has_more(run: Run) -> bool:
    return run.get("K") in MORE_LENGTHS and run["seed"] == 0


def _on_device(schedule: Schedule, fresh: bool, options: Options) -> Schedule:
    return schedule.in_batches_of(GPU_BATCH) if fresh and one_gpu(device_of(options)) else schedule


def model(mean: Tensor, transforms: Sequence[Transform]) -> DLGM:
    """The model of section 6.2 for images of mean ``mean``, where its pixels start."""
    dlgm = DLGM(len(mean), transforms, latent_dim=LATENT, hidden_dim=HIDDEN, centre=mean)
    with torch.no_grad():
        dlgm.outputs.bias.copy_(mean.clamp(1e-3, 1 - 1e-3).logit())
    return dlgm


def layers(kind: str, K: int) -> list[Transform]:
    """K layers of a kind.

    Planar layers are amortised: w, u and b are linear in the inference network's hidden units.
    Couplings of NICE preserve volume, and are the same for every image.
    """
    if not K:
        return []
    if kind == "planar":
        return [ConditionalPlanar(LATENT, HIDDEN, K, hidden_dims=())]
    return nice_layers(LATENT, K, hidden_dim=NICE_HIDDEN)
