"""A small deep latent Gaussian model, its images and its schedule."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroflow.seeds import seeded
from pyroflow.transforms import ConditionalPlanar
from rezende_mohamed_2015.dlgm import DLGM
from rezende_mohamed_2015.dlgm_training import Schedule, train

LENGTHS = {"warm_up": 3, "cool_down": 5, "annealing": 4, "batch_size": 10}
SCHEDULE = Schedule(12, lr=0.01, flow_lr=0.02, **LENGTHS)
IMAGES = (torch.rand(35, 6, generator=torch.Generator().manual_seed(5)) < 0.5).to(torch.uint8)


def small(seed: int = 0) -> DLGM:
    with seeded(seed):
        flow = ConditionalPlanar(2, 8, 3, hidden_dims=())
        return DLGM(6, [flow], latent_dim=2, hidden_dim=8)


def trained(schedule: Schedule = SCHEDULE, seed: int = 0, **options: object) -> DLGM:
    dlgm = small()
    train(dlgm, IMAGES, schedule, seed=seed, progress=False, **options)
    return dlgm


def parameters(dlgm: DLGM) -> Tensor:
    return torch.cat([p.detach().flatten() for p in dlgm.parameters()])
