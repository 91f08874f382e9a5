"""When to draw the training images of mnist, by images that neither training nor the test has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rezende_mohamed_2015 import mnist
from rezende_mohamed_2015.dlgm_study import run_study
from rezende_mohamed_2015.results import Options

LENGTH = 20
HELD_OUT = 1 / 6  # of the training images: 10,000


def run(options: Options) -> dict[str, Any] | None:
    """Train a planar flow on fresh and on static draws of the first training images.

    The other training images are scored; the test images are not looked at.

    Returns:
        The report: the runs, for both draws. None on other ranks than 0.

    Raises:
        ValueError: no ``data``, or no such device.
        OSError: no MNIST there.
    """
    flows = [{"kind": "planar", "K": LENGTH}]
    reports = [
        run_study(mnist.study("mnist_validation", flows, mnist.layers, each, HELD_OUT), each)
        for each in (replace(options, draws=draws) for draws in mnist.SCHEDULES)
    ]
    return reports[-1]
