"""Predictions for new rows, from the draws of ``posterior``, of chains, and of both."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyroflow as pf
from pyroflow.arviz import export


def line(x: Tensor, y: Tensor | None = None) -> None:
    a, b = (pyro.sample(name, dist.Normal(0.0, 5.0)) for name in "ab")
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)


@pytest.fixture(scope="module")
def fitted_line() -> tuple[Tensor, Tensor, pf.Posterior]:
    x = torch.linspace(-2, 2, 20, dtype=torch.float64)
    y = 1 + 2 * x + torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    return x, y, pf.posterior(line, x, y, seed=0, progress=False)


def test_new_rows_are_predicted_from_every_kind_of_draws(
    fitted_line: tuple[Tensor, Tensor, pf.Posterior],
) -> None:
    x, y, post = fitted_line
    chains = pf.mcmc(line, post.guide, x, y, num_samples=40, num_chains=64, progress=False)
    design = torch.stack([torch.ones_like(x), x], 1)
    precision = design.T @ design + torch.eye(2, dtype=x.dtype) / 25
    new = torch.tensor([3.0, 4.0], dtype=x.dtype)
    at = torch.stack([torch.ones_like(new), new], 1)
    mean = at @ torch.linalg.solve(precision, design.T @ y)
    sd = (1 + (at @ torch.linalg.inv(precision) * at).sum(1)).sqrt()
    mixed = dataclasses.replace(post, chains=chains)
    for draws in (post, chains, mixed):
        groups = draws.to_arviz(predictions_args=(new,))
        found = groups["predictions"]["y"].to_numpy().reshape(-1, 2)
        assert np.abs(found.mean(0) - mean.numpy()).max() < 6 * sd.max().item() / len(found) ** 0.5
        assert np.allclose(found.std(0), sd.numpy(), rtol=0.1)
        assert len(found) == groups["posterior"]["a"].size
        assert "predictions" not in dict(draws.to_arviz().items())


@pytest.mark.parametrize("wrong", [torch.zeros(2), (1, 2, 3), ()], ids=["tensor", "three", "none"])
def test_arguments_of_predictions_are_checked_before_any_work(
    wrong: Any,
    fitted_line: tuple[Tensor, Tensor, pf.Posterior],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    *_, post = fitted_line
    monkeypatch.setattr(export, "draw", None)
    with pytest.raises(TypeError, match="predictions_args must be (a tuple|the model's arguments)"):
        post.to_arviz(predictions_args=wrong)
