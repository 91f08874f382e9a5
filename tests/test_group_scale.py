"""The exact posteriors of groups, and what the measurement says of guides that are known."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from benchmarks import group_scale, groups
from torch import Tensor

import pyroflow as pf

FAMILIES = tuple(groups.FAMILIES)


def by_hand(family: str, found: groups.Data) -> groups.Exact:
    """The same on one fixed grid of mu, log tau and (theta - mu) / tau, a row at a time."""
    mu = torch.linspace(-11, 12, 81, dtype=torch.float64).reshape(-1, 1, 1)
    log_tau = torch.linspace(-8.0, 3.4, 96, dtype=torch.float64).reshape(-1, 1)
    steps = torch.linspace(-8, 8, 241, dtype=torch.float64)
    grid = dist.Normal(0.0, 1.0).log_prob(steps) + (steps[1] - steps[0]).log()
    theta, tau = mu + log_tau.exp() * steps, log_tau.exp()
    value = dist.Normal(0.0, groups.MU).log_prob(mu)
    value = (value + dist.HalfNormal(groups.TAU).log_prob(tau) + log_tau).squeeze(-1)
    for group in range(found.groups):
        rows = found.y[found.group == group].double()
        inner = grid + sum(groups.FAMILIES[family](theta).log_prob(y) for y in rows)
        value = value + inner.logsumexp(-1)
    cell = (mu[1, 0, 0] - mu[0, 0, 0]) * (log_tau[1, 0] - log_tau[0, 0])
    weights = value.flatten().softmax(0).reshape(value.shape)
    mean, sd = {}, {}
    for name, at in {"mu": mu.squeeze(-1), "tau": tau.squeeze(-1)}.items():
        mean[name] = (weights * at).sum().item()
        sd[name] = (weights * (at - mean[name]).square()).sum().sqrt().item()
    return groups.Exact((value.logsumexp((0, 1)) + cell.log()).item(), mean, sd)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_quadrature_agrees_with_a_fixed_grid(family: str, seed: int) -> None:
    found = groups.data(family, 6, 17, seed)
    exact, expected = groups.exact(family, found), by_hand(family, found)
    assert exact.log_evidence == pytest.approx(expected.log_evidence, abs=2e-3)
    for name, sd in expected.sd.items():
        assert exact.mean[name] == pytest.approx(expected.mean[name], abs=5e-3 * sd)
        assert exact.sd[name] == pytest.approx(sd, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_quadrature_does_not_depend_on_its_grid(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = groups.data(family, 50, 120, seed=3)
    exact = groups.exact(family, found)
    monkeypatch.setattr(groups, "POINTS", 61)
    monkeypatch.setattr(groups, "NODES", 64)
    finer = groups.exact(family, found)
    assert finer.log_evidence == pytest.approx(exact.log_evidence, abs=2e-4)
    assert finer.mean == pytest.approx(exact.mean, rel=1e-3)


@pytest.mark.parametrize("off", [0.0, 0.5])
def test_judge_of_a_guide_that_is_known(off: float) -> None:
    def model(group: Tensor, y: Tensor, J: int) -> None:
        for name in ("mu", "tau"):
            pyro.sample(name, dist.Normal(0.0, 1.0))

    def guide(group: Tensor, y: Tensor, J: int) -> None:
        pyro.sample("mu", dist.Normal(off, 1.0))
        pyro.sample("tau", dist.Normal(0.0, 1.0))

    known = groups.Exact(0.0, {"mu": 0.0, "tau": 0.0}, {"mu": 1.0, "tau": 1.0})
    pyro.set_rng_seed(0)
    found = group_scale.judge(model, guide, (None, torch.zeros(1), 1), known)
    assert found["KL"] == pytest.approx(off**2 / 2, abs=5 * found["KL se"] + 1e-12)
    assert found["error"] == pytest.approx(off, abs=0.1)
    assert found["ESS"] == pytest.approx(math.exp(-(off**2)), abs=0.1)


def fitted(family: str, size: tuple[int, int], seed: int) -> dict[str, float]:
    found = groups.data(family, *size, seed)
    model = partial(groups.model, family)
    guide = pf.AutoStructuredFlow(model)
    pyro.set_rng_seed(seed)
    group_scale.fit(model, guide, tuple(found), None)
    return group_scale.judge(model, guide, tuple(found), groups.exact(family, found))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_hundred_normal_groups(seed: int) -> None:
    found = fitted("normal", (100, 1000), seed)
    assert found["KL"] < 0.05
    assert found["ESS"] > 0.95
    assert found["error"] < 0.15  # of 1,000 draws


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_thousand_normal_groups(seed: int) -> None:
    found = fitted("normal", (1000, 1000), seed)
    assert found["KL"] < 0.05
    assert found["ESS"] > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Poisson", "Bernoulli"])
def test_ten_thousand_groups_that_are_not_normal(family: str) -> None:
    found = fitted(family, (10_000, 100_000), 0)
    assert found["error"] < 0.2  # of 1,000 draws
    assert 0.9 < found["sd"] < 1.1


@pytest.mark.slow
@pytest.mark.parametrize("way", list(group_scale.WAYS)[1:])
def test_other_guides_are_trained(way: str) -> None:
    found = groups.data("normal", 5, 10)
    model = partial(groups.model, "normal")
    guide = group_scale.WAYS[way](model)
    assert group_scale.fit(model, guide, tuple(found), 0.2) > 1
    said = group_scale.judge(model, guide, tuple(found), groups.exact("normal", found))
    assert math.isfinite(said["KL"])


def test_table_and_figure(tmp_path: pytest.TempPathFactory) -> None:
    record = {"seconds": 1.0, "steps": 0, "MiB": 400.0, "MiB before": 250.0, "KL": 0.01}
    record |= {"KL se": 0.001, "ESS": 0.97, "error": 0.02, "sd": 1.01}
    cells = {"100 1000": {group_scale.OURS: record}, "1000 10000": {group_scale.OURS: record}}
    stored = {"groups": {"normal": cells}}
    assert "| normal | 1,000 | 10,000 | `AutoStructuredFlow` | 1.0 |" in group_scale.markdown(
        stored
    )
    group_scale.draw(stored, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 1000
