"""Updates per second of the model of MNIST, with our planar layers and with Pyro's.

The same networks, batches of 100 random images, and K = 40 layers whose parameters are linear in
the inference network's hidden units, by one :class:`ConditionalPlanar` of ours, and by a chain of
40 of Pyro's with a linear map each. All take turns; the ratios are of the rounds' own times. The
paper's "400 hidden units, maxout of 4" are 400 left by the maximum, as in our model, or 400 before
it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro.distributions.transforms as T
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from pyroflow.seeds import seeded
from pyroflow.transforms import ConditionalPlanar
from rezende_mohamed_2015 import mnist
from rezende_mohamed_2015.dlgm import DLGM
from rezende_mohamed_2015.results import Options, Results

LAYERS, BATCH, STEPS, ROUNDS = 40, 100, 10, 9
HIDDEN = (400, 100)


class Linear(nn.Module):
    """What Pyro's layer wants of a network: b, u and w, each (*B, size)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, 1 + 2 * mnist.LATENT)
        nn.init.normal_(self.linear.weight, std=1e-3)

    def forward(self, context: Tensor) -> tuple[Tensor, ...]:
        """Linear in ``context``, shape (*B, hidden)."""
        return self.linear(context).split([1, mnist.LATENT, mnist.LATENT], -1)


CONTENDERS = {
    "pyroflow": lambda hidden: [ConditionalPlanar(mnist.LATENT, hidden, LAYERS, hidden_dims=())],
    "Pyro": lambda hidden: [T.ConditionalPlanar(Linear(hidden)) for _ in range(LAYERS)],
    "K = 0": lambda hidden: [],
}


def updates(dlgm: DLGM, images: Tensor) -> Callable[[], float]:
    """A function that does STEPS updates and returns the milliseconds of one."""
    parameters = list(dlgm.parameters())
    adam = torch.optim.Adam(parameters, lr=1e-4, fused=True)

    def timed() -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            adam.zero_grad()
            dlgm(images).bound().mean().backward()
            clip_grad_norm_(parameters, 200.0)
            adam.step()
            for p in parameters:
                torch.autograd.graph.increment_version(p)
        return 1e3 * (time.perf_counter() - start) / STEPS

    return timed


def compare(hidden: int, num_rounds: int) -> dict[str, Any]:
    """Milliseconds of an update with ``hidden`` units left by the maximum, and their ratios."""
    images = torch.rand(BATCH, 784).bernoulli()
    began, timed = time.perf_counter(), {}
    for name, make in CONTENDERS.items():
        dlgm = DLGM(784, make(hidden), latent_dim=mnist.LATENT, hidden_dim=hidden)
        timed[name] = updates(dlgm, images)
        timed[name]()
    rounds = [{name: run() for name, run in timed.items()} for _ in range(num_rounds)]
    ratios = sorted(times["Pyro"] / times["pyroflow"] for times in rounds)
    medians = {name: statistics.median(times[name] for times in rounds) for name in timed}
    ours, pyros, base = medians["pyroflow"], medians["Pyro"], medians["K = 0"]
    return {
        "updates": STEPS * (num_rounds + 1),
        "seconds": round(time.perf_counter() - began, 1),
        "milliseconds": {name: round(t, 2) for name, t in medians.items()},
        "ratio": round(statistics.median(ratios), 2),
        "ratio_range": [round(ratios[0], 2), round(ratios[-1], 2)],
        "ratio_of_the_layers": round((pyros - base) / (ours - base), 2),
    }


def run(options: Options) -> dict[str, Any]:
    """Time an update with 400 and with 100 hidden units; one round alone in a quick run.

    Returns:
        The report: the runs, milliseconds and ratios by the number of hidden units.
    """
    quick = {"quick": True} if options.quick else {}
    results = Results(options.out / "mnist_speed.json", {"layers": LAYERS, "batch": BATCH} | quick)
    planned = [{"hidden": hidden} for hidden in HIDDEN]
    for run in results.missing(options.selected(planned)):
        with seeded(0):
            results.add(run, compare(run["hidden"], 1 if options.quick else ROUNDS))
    return {"runs": results.ordered(planned)}
