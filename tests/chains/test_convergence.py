"""R-hat, effective sample sizes and Monte Carlo errors against ArviZ's."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from pyroflow.chains.convergence import mean_and_error, summarise

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.x announces 1.x
    arviz = pytest.importorskip("arviz")


def autoregressive(rho: float, chains: int, num: int) -> Tensor:
    """Chains (C, N) of variance 1."""
    draws = [torch.randn(chains)]
    for _ in range(num - 1):
        draws.append(rho * draws[-1] + math.sqrt(1 - rho**2) * torch.randn(chains))
    return torch.stack(draws, 1)


def stuck(chains: int, num: int) -> Tensor:
    """Draws that repeat, as those of chains that reject do."""
    fresh, keep = torch.randn(chains, num), torch.rand(chains, num) < 0.7
    place = torch.where(keep, 0, torch.arange(num)).cummax(1).values
    return fresh.gather(1, place)


CASES = {
    "independent": lambda: torch.randn(4, 200),
    "sticky": lambda: autoregressive(0.9, 4, 300),
    "alternating": lambda: autoregressive(-0.8, 4, 200),
    "repeats": lambda: stuck(6, 250),
    "odd length": lambda: autoregressive(0.5, 3, 101),
    "heavy tails": lambda: torch.randn(4, 200) / torch.randn(4, 200),
    "apart": lambda: torch.randn(4, 200) + torch.arange(4.0)[:, None],
    "wider": lambda: torch.randn(4, 200) * torch.arange(1.0, 5.0)[:, None],
    "one chain": lambda: autoregressive(0.3, 1, 200),
    "many short": lambda: autoregressive(0.99, 64, 12),
    "never decays": lambda: torch.arange(40.0).expand(4, 40) + torch.randn(4, 40) / 10,
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_the_numbers_are_those_of_arviz(make: object) -> None:
    chains = make()
    found = summarise(chains[..., None])
    array = chains.numpy()
    # ArviZ has no R-hat of one chain, of which we have two halves.
    if len(chains) > 1:
        assert found["rhat"].item() == pytest.approx(float(arviz.rhat(array)), rel=1e-9)
    for name in ("bulk", "tail"):
        expected = float(arviz.ess(array, method=name))
        assert found[f"ess_{name}"].item() == pytest.approx(expected, rel=1e-9)
    assert found["mcse"].item() == pytest.approx(float(arviz.mcse(array)), rel=1e-9)
    assert found["mean"].item() == pytest.approx(array.mean())
    assert found["sd"].item() == pytest.approx(array.std(ddof=1))
    mean, error = mean_and_error(chains[..., None])
    assert (mean.item(), error.item()) == (found["mean"].item(), found["mcse"].item())


def test_columns_are_treated_one_by_one() -> None:
    chains = torch.stack([torch.randn(4, 50), torch.full((4, 50), 2.0)], 2)
    chains = torch.cat([chains, chains[..., :1].float().double()], 2)
    chains[1, 3, 2] = torch.nan
    found = summarise(chains)
    assert found["rhat"].isfinite().tolist() == [True, False, False]
    assert found["mean"][1] == 2.0
    assert found["sd"][1] == 0.0
    assert summarise(chains[:, :3])["rhat"].isnan().all()
    assert torch.allclose(found["rhat"][0], summarise(chains[..., :1].float())["rhat"], atol=1e-6)
