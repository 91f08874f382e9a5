"""Figure 4 and Table 2: planar flows and NICE in a deep latent Gaussian model of MNIST."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform

from pyroflow.plots.drawing import save_figure
from pyroflow.transforms import ConditionalPlanar
from rezende_mohamed_2015 import image_files, mnist_drawing
from rezende_mohamed_2015.dlgm import DLGM
from rezende_mohamed_2015.dlgm_study import Study, run_study
from rezende_mohamed_2015.dlgm_training import Schedule
from rezende_mohamed_2015.nice import nice_layers
from rezende_mohamed_2015.results import Options, Run

LATENT, HIDDEN = 40, 400
LENGTHS = (10, 20, 40, 80)
NICE_HIDDEN = 40  # units of each coupling
SAMPLES = 200  # for −ln p(x), as in the paper
TRAIN_SEED, TEST_SEED = 0, 1  # of the binarisation, drawn once
SCHEDULE = Schedule(40_000, lr=2e-3, flow_lr=5e-4, cool_down=27_000)


def run(options: Options) -> dict[str, Any] | None:
    """Train and score the flows of Figure 4 on ``options.data``; write the numbers and the figure.

    Under torchrun the processes share each batch, and rank 0 writes.

    Returns:
        The report: the runs. None on other ranks than 0.

    Raises:
        ValueError: no ``data``.
        OSError: no MNIST there.
    """
    flows = [{"kind": "planar", "K": 0}]
    flows += [{"kind": kind, "K": K} for kind in ("planar", "NICE") for K in LENGTHS]
    report = run_study(study("mnist", flows, layers, options), options)
    if report is not None:
        save_figure(mnist_drawing.draw(report["runs"]), options.out / "mnist.png")
    return report


def study(
    name: str, flows: Sequence[Run], layers: Callable[..., list[Transform]], options: Options
) -> Study:
    """A comparison of flows on binarised MNIST."""
    if options.data is None:
        raise ValueError("--data must name the folder of the four MNIST files")
    images = image_files.mnist(options.data)
    training = image_files.binarize(images.train_images, TRAIN_SEED)
    test = image_files.binarize(images.test_images, TEST_SEED)
    schedule, samples = SCHEDULE, SAMPLES
    if options.quick:
        training, test, samples = training[:1000], test[:100], 10
        schedule = Schedule(50, lr=1e-3, flow_lr=1e-3, warm_up=5, cool_down=25, annealing=10)
    return Study(
        name=name,
        checkpoints="mnist",
        training=training,
        test=test,
        model=partial(model, training.float().mean(0)),
        flows=flows,
        layers=layers,
        schedule=schedule,
        samples=samples,
        facts={"latent": LATENT, "hidden": HIDDEN, "nice_hidden": NICE_HIDDEN},
    )


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
