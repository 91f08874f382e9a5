"""Table 3: planar flows in a deep latent Gaussian model of 8 × 8 patches of CIFAR-10."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Transform

from pyroflow.plots.drawing import save_figure
from pyroflow.transforms import ConditionalPlanar
from rezende_mohamed_2015 import image_files
from rezende_mohamed_2015.cifar_files import cifar10
from rezende_mohamed_2015.dlgm import DLGM, LOGIT_NORMAL, MAX_LOG_SCALE
from rezende_mohamed_2015.dlgm_study import Study, run_study
from rezende_mohamed_2015.dlgm_training import Schedule
from rezende_mohamed_2015.mnist_drawing import NAMES, curves
from rezende_mohamed_2015.results import Options, Run

LATENT, HIDDEN = 30, 400
SIDE = 8  # pixels of a patch
TRAINING, TEST = 200_000, 10_000  # patches, cut once
TRAIN_SEED, TEST_SEED = 0, 1  # of the places where they are cut
SAMPLES = 200  # for −ln p(x)
MIN_START = 0.1  # scale of the logit of a pixel that is the same in all patches
SCHEDULE = Schedule(100_000, lr=2e-3, flow_lr=1e-3, cool_down=30_000)  # the paper: 500,000
QUICK_SCHEDULE = Schedule(20, lr=1e-3, flow_lr=1e-3, warm_up=5, cool_down=10, annealing=5)
QUICK: dict[str, Any] = {"schedule": QUICK_SCHEDULE, "samples": 10}
PAPER = {0: -293.7, 2: -308.6, 5: -317.9, 10: -320.7}  # Table 3, from memory: −ln p(x), nats


def run(options: Options) -> dict[str, Any] | None:
    """Train and score the flows of Table 3 on ``options.data``; write the numbers and the figure.

    Under torchrun the processes share each batch, and rank 0 writes.

    Returns:
        The report: the runs. None on other ranks than 0.

    Raises:
        ValueError: no ``data``.
        OSError: no CIFAR-10 there.
    """
    if options.data is None:
        raise ValueError("--data must name the folder of the binary version of CIFAR-10")
    images = cifar10(options.data)
    counts = (1000, 100) if options.quick else (TRAINING, TEST)
    training = colours(image_files.patches(images.train_images, counts[0], SIDE, TRAIN_SEED))
    test = colours(image_files.patches(images.test_images, counts[1], SIDE, TEST_SEED))
    report = run_study(study(training, test, **(QUICK if options.quick else {})), options)
    if report is not None:
        save_figure(draw(report["runs"]), options.out / "cifar.png")
    return report


def colours(patches: Tensor) -> Tensor:
    """Patches (N, 3, h, w) as the x of the model, shape (N, 3·h·w), in [1e-4, 1 − 1e-4]."""
    return image_files.scale_to_open_interval(patches).flatten(1)


def study(
    training: Tensor,
    test: Tensor,
    *,
    latent: int = LATENT,
    hidden: int = HIDDEN,
    schedule: Schedule = SCHEDULE,
    samples: int = SAMPLES,
) -> Study:
    """The comparison of Table 3 on any patches.

    Args:
        training: shape (N, X), of values inside (0, 1), in the dtype to compute in.
        test: shape (M, X).
        latent: D.
        hidden: units of each network's hidden layer.
        schedule: how long and how fast every K is trained.
        samples: importance samples for each test patch.

    Raises:
        ValueError: a colour outside (0, 1), which the logit-normal gives no density.

    Example:
        >>> import torch
        >>> [flow["K"] for flow in study(torch.rand(100, 192), torch.rand(10, 192)).flows]
        [0, 2, 5, 10]
    """
    for name, x in {"training": training, "test": test}.items():
        low, high = x.aminmax()
        if not (low > 0 and high < 1):
            raise ValueError(
                f"{name} expects colours inside (0, 1), got {low:g} to {high:g}: scale them by "
                "image_files.scale_to_open_interval"
            )
    logits = training.logit()
    start = torch.cat([logits.mean(0), logits.std(0).clamp(min=MIN_START).log()])
    return Study(
        name="cifar",
        checkpoints="cifar",
        training=training,
        test=test,
        model=partial(model, training.mean(0), start, latent, hidden),
        flows=[{"kind": "planar", "K": K} for K in PAPER],
        layers=partial(layers, latent, hidden),
        schedule=schedule,
        samples=samples,
        facts={
            "schedule": vars(schedule),
            "latent": latent,
            "hidden": hidden,
            "max_log_scale": MAX_LOG_SCALE,
        },
    )


def model(
    mean: Tensor, start: Tensor, latent: int, hidden: int, transforms: Sequence[Transform]
) -> DLGM:
    """The model of section 6.3 for patches of mean ``mean``.

    Its x starts as independent logit-normal pixels: ``start``, shape (2·X,), holds the means and
    log standard deviations of their logits.
    """
    dlgm = DLGM(
        len(mean),
        transforms,
        latent_dim=latent,
        hidden_dim=hidden,
        likelihood=LOGIT_NORMAL,
        centre=mean,
    )
    with torch.no_grad():
        dlgm.outputs.bias.copy_(start)
    return dlgm


def layers(latent: int, hidden: int, kind: str, K: int) -> list[Transform]:
    """K amortised planar layers: w, u and b are linear in the inference network's hidden units."""
    return [ConditionalPlanar(latent, hidden, K, hidden_dims=())] if K else []


def draw(runs: Sequence[Run]) -> Figure:
    """−ln p(x) against K, the paper's dashed."""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    ours = curves(runs, "planar", "nll")
    ax = figure.subplots()
    ax.plot(ours.keys(), ours.values(), "o-", color="C0", label="planar, pyroflow")
    ax.plot(PAPER.keys(), PAPER.values(), "--", color="C0", label="planar, the paper")
    ax.set(title=NAMES["nll"], xlabel="flow length K", ylabel="nats", xticks=list(PAPER))
    ax.legend(frameon=False)
    return figure
