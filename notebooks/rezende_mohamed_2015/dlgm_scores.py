"""−ELBO, KL and −ln p(x) of a deep latent Gaussian model by importance sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyroflow.checks import check_count
from pyroflow.inference.processes import ALONE, Processes
from pyroflow.seeds import between_draws, seeded
from rezende_mohamed_2015.dlgm import DLGM

BATCH = {"cpu": 100, "cuda": 1000}  # images scored at once
CHUNK = {"cpu": 5000, "cuda": 200_000}  # latents decoded at once; on a GPU some 6 GB


@torch.no_grad()
def log_weights(dlgm: DLGM, x: Tensor, samples: int) -> Tensor:
    """Of S samples from the inference network, ln p(x, z) − ln q(z|x); shape (S, N)."""
    pieces, most = [], max(1, CHUNK[x.device.type] // len(x))
    for start in range(0, samples, most):
        terms = dlgm(x, min(samples - start, most))
        pieces.append(terms.log_joint - terms.log_q)
    return torch.cat(pieces)


def scores(
    dlgm: DLGM,
    images: Tensor,
    *,
    samples: int = 200,
    seed: int = 0,
    processes: Processes = ALONE,
    progress: bool = True,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The three curves of figure 4, each with its standard error over the images.

    −ln p(x) is estimated by −ln (1/S) Σ p(x, z_s)/q(z_s|x), in the mean an upper bound, whose gap
    falls with S. KL(q(z|x) ‖ p(z|x)) is the difference of the two, and so in the mean too small.

    Args:
        dlgm: the model, with its inference network.
        images: shape (N, X).
        samples: S, for each image.
        seed: of the samples.
        processes: the processes that share the images.
        progress: show a progress bar.
        between: called after each part of the images.

    Returns:
        ``free_energy`` (−ELBO), ``kl`` and ``nll``, each with ``..._se``, and the largest −ELBO of
        an image, in nats.

    Example:
        >>> import torch
        >>> scored = scores(DLGM(6, latent_dim=2, hidden_dim=8), torch.ones(9, 6), progress=False)
        >>> scored["nll"] <= scored["free_energy"]
        True
    """
    check_count("samples", samples, 2)
    mine = images[processes.rank :: processes.count]
    quiet = not (progress and processes.writes)
    bar = tqdm(total=len(mine), desc="scores", disable=quiet)
    with bar, seeded(seed + processes.rank), between_draws():
        parts = []
        for x in mine.split(BATCH[dlgm.centre.device.type]):
            weights = log_weights(dlgm, x.to(dlgm.centre), samples).double()
            parts.append(torch.stack([-weights.mean(0), math.log(samples) - weights.logsumexp(0)]))
            bar.update(len(x))
            between()
    shares = processes.gather(torch.cat(parts, -1).cpu())
    free_energy, nll = torch.cat(shares, -1)
    scored: dict[str, Any] = {"images": len(images), "samples": samples}
    for name, values in {"free_energy": free_energy, "kl": free_energy - nll, "nll": nll}.items():
        scored[name] = values.mean().item()
        scored[f"{name}_se"] = (values.std() / len(values) ** 0.5).item()
    return scored | {"free_energy_largest": free_energy.max().item()}
