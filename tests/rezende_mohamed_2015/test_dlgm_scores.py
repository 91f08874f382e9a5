"""−ELBO, KL and −ln p(x) of a model with one latent, which a grid integrates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyroflow.inference.processes import Processes
from pyroflow.transforms import ConditionalPlanar
from rezende_mohamed_2015 import dlgm_scores
from rezende_mohamed_2015.dlgm import DLGM
from rezende_mohamed_2015.dlgm_scores import log_weights, scores

H, X = 8, 6


def grid(reach: float = 9.0, n: int = 4001) -> tuple[Tensor, float]:
    z = torch.linspace(-reach, reach, n)
    return z[:, None], 2 * reach / (n - 1)


def small() -> tuple[DLGM, Tensor]:
    """One latent, and parameters small enough for q to cover the posterior."""
    flow = ConditionalPlanar(1, H, 2, hidden_dims=())
    dlgm = DLGM(X, [flow], latent_dim=1, hidden_dim=H)
    with torch.no_grad():
        for p in dlgm.parameters():
            p.normal_(std=0.4)
        dlgm.q_0.weight[1:].zero_()
        dlgm.q_0.bias[1:].zero_()
    return dlgm, torch.rand(7, X).bernoulli()


def by_integration(dlgm: DLGM, x: Tensor) -> tuple[Tensor, Tensor]:
    """−ln p(x) and KL(q ‖ p(z|x)), shape (N,) each."""
    z, step = grid()
    with torch.no_grad():
        log_joint = dlgm.log_joint(x, z[:, None].expand(-1, len(x), -1))
        log_q = dlgm.posterior(x).log_prob(z[:, None].expand(-1, len(x), -1))
    log_p = log_joint.logsumexp(0) + math.log(step)
    assert log_q.exp().sum(0).mul(step).sub(1).abs().max() < 1e-3
    kl = (log_q.exp() * (log_q - log_joint)).sum(0) * step + log_p
    return -log_p, kl


def test_scores_by_integration() -> None:
    dlgm, x = small()
    nll, kl = by_integration(dlgm, x)
    assert kl.mean() > 0.1  # something to find
    found = scores(dlgm, x, samples=100_000, progress=False)
    assert found["nll"] == pytest.approx(nll.mean().item(), abs=0.02)
    assert found["kl"] == pytest.approx(kl.mean().item(), abs=0.03)
    assert found["free_energy"] == pytest.approx((nll + kl).mean().item(), abs=0.03)
    assert found["free_energy_largest"] == pytest.approx((nll + kl).max().item(), abs=0.1)
    for name, values in {"nll": nll, "kl": kl, "free_energy": nll + kl}.items():
        assert found[f"{name}_se"] == pytest.approx((values.std() / 7**0.5).item(), rel=0.05)


def test_few_samples_are_a_bound() -> None:
    """E −ln (1/S) Σ w_s falls towards −ln p(x) as S grows, from the −ELBO at S = 1."""
    dlgm, x = small()
    nll, _ = by_integration(dlgm, x)
    found = [
        sum(scores(dlgm, x, samples=S, seed=s, progress=False)["nll"] for s in range(200)) / 200
        for S in (2, 20)
    ]
    assert found[0] > found[1] > nll.mean().item() - 0.02


def test_weights_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    dlgm, x = small()
    monkeypatch.setitem(dlgm_scores.CHUNK, "cpu", 21)
    weights = log_weights(dlgm, x, 11)
    assert weights.shape == (11, 7)
    assert not weights.requires_grad
    assert len(weights.unique()) == 77


def test_ranks_share_the_images_and_have_noise_of_their_own() -> None:
    """Of one image many times, no two ranks have the same samples."""
    dlgm, x = small()
    same = x[:1].expand(8, -1)
    seen = []

    class Rank(Processes):
        def gather(self, value: Tensor) -> list[Tensor]:
            seen.append(value)
            return [value]

    for rank in range(2):
        scores(dlgm, same, samples=5, processes=Rank(rank, 2), progress=False)
    assert [part.shape for part in seen] == [(2, 4), (2, 4)]
    assert len(torch.cat(seen, -1)[0].unique()) == 8


def test_scores_repeat_and_refuse() -> None:
    dlgm, x = small()
    first, second = (scores(dlgm, x, samples=5, seed=2, progress=False) for _ in range(2))
    assert first == second != scores(dlgm, x, samples=5, seed=3, progress=False)
    with pytest.raises(ValueError, match="samples"):
        scores(dlgm, x, samples=1, progress=False)
