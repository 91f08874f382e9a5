"""Scores of densities that mean something: few values, a Gaussian beside, the depth that gains."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, StudentT

import pyroflow as pf
from pyroflow import datasets
from pyroflow.flows import StandardNormal
from pyroflow.flows.cells import few_valued, find_cells
from pyroflow.inference.likelihood import Likelihood, gaussian_losses
from pyroflow.inference.processes import ALONE

SHORT = {"steps": 20, "polish": 20, "seed": 0, "progress": False}


def rounded(num: int, sd: float) -> Tensor:
    """Normal numbers of so many steps sd, as whole steps."""
    return (sd * torch.randn(num)).round()


def with_zeros(num: int, share: float) -> Tensor:
    values = torch.randn(num).exp()
    values[: round(share * num)] = 0
    return values


COLUMNS = {
    "flags": (lambda: (torch.rand(100) < 0.3).double(), "2 values in 100 rows"),
    "counts": (lambda: torch.poisson(torch.full((300,), 1.5)), "values in 300 rows"),
    "grades": (lambda: torch.randint(1, 7, (40,)).double(), "6 values in 40 rows"),
    "coarse steps": (lambda: rounded(1000, 2.0), "values in 1000 rows"),
    "steps of very many rows": (lambda: rounded(10_000, 4.0), "values in 10000 rows"),
    "zeros that are no measurements": (lambda: with_zeros(1000, 0.3), "0 in 30 % of 1000 rows"),
    "scaled": (lambda: 0.0476 * rounded(1000, 1.5) - 3, "values in 1000 rows"),
    "real": (lambda: torch.randn(1000), ""),
    "one decimal, few rows": (lambda: rounded(150, 4.4) / 10, ""),
    "whole years": (lambda: rounded(442, 13.0), ""),
    "some zeros": (lambda: with_zeros(569, 0.02), ""),
    "ties of pairs": (lambda: torch.randn(100).repeat(2), ""),
    "ten different ones": (lambda: torch.arange(10.0), ""),
    "two modes, one narrow": (
        lambda: torch.cat([rounded(50, 1.0) + 2, rounded(100, 4.0) + 17]) / 10,
        "",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", COLUMNS)
def test_few_values_are_told_from_rounded_ones(name: str, dtype: torch.dtype) -> None:
    make, reason = COLUMNS[name]
    values = make().to(dtype)
    found = few_valued(values[torch.randperm(len(values))])
    assert reason in found
    assert bool(reason) == bool(found)


def test_rounding_errors_make_no_other_values() -> None:
    values = torch.tensor([0.1 + 0.2, 0.3, 0.4, 0.1] * 20)
    assert "3 values" in few_valued(values)
    ((lowest, step),) = find_cells(values[:, None], True, None)
    assert (lowest, step) == (0.1, pytest.approx(0.1))


def table(num: int = 400) -> pd.DataFrame:
    z = torch.randn(num)
    kids = torch.poisson((0.5 + 0.3 * z).exp())
    return pd.DataFrame({"bmi": 25 + 3 * z.numpy(), "kids": kids.int().numpy(), "sick": (z > 0.4)})


def test_few_values_are_refused_by_name_and_have_ways_out() -> None:
    frame = table()
    flow = pf.planar_flow(3, 2)
    message = (
        r"column 'kids' \(\d+ values in 400 rows\), column 'sick' \(2 values.*"
        r"dequantize=\['kids', 'sick'\].*context_dim.*leave them out"
    )
    with pytest.raises(ValueError, match=message):
        pf.fit_density(flow, frame, **SHORT)
    with pytest.raises(ValueError, match=r"column 2 \(from 0\) \(2 values .*dequantize=\[2\]"):
        pf.fit_density(flow, frame.to_numpy(float), dequantize=1, **SHORT)
    with pytest.raises(
        ValueError, match="positions from 0 to 2, or 'bmi', 'kids', 'sick', got 'x'"
    ):
        pf.fit_density(flow, frame, dequantize=["x"], **SHORT)
    assert (flow.columns, flow.fitted) == (None, False)
    fits = [
        pf.fit_density(pf.planar_flow(3, 2), frame, dequantize=which, **SHORT)
        for which in (True, ["kids", "sick"], [1, "sick"])
    ]
    assert fits[0].scores == fits[1].scores == fits[2].scores
    conditional = pf.planar_flow(1, 2, context_dim=2, hidden_dims=(4,))
    pf.fit_density(conditional, frame["bmi"], context=frame[["kids", "sick"]], **SHORT)


def test_scores_are_bounds_on_probabilities() -> None:
    """The same for other units, above the entropy, and as for a known density of cells."""
    counts = torch.randint(0, 4, (2000, 1)).double()
    losses = []
    for unit in (1.0, 0.01):
        flow = pf.planar_flow(1, 4, support=[(0, 4 * unit)]).double()
        fit = pf.fit_density(flow, unit * counts, dequantize=True, **SHORT)
        losses.append(fit.best_loss)
        assert flow.cells[0] == pytest.approx((0, unit))
        probabilities = flow.log_prob(unit * torch.arange(4.0)[:, None]).exp()
        assert probabilities.sum().item() == pytest.approx(1, abs=0.02)
        assert -flow.log_prob(unit * counts).mean().item() <= fit.training_loss + 1e-3
        draws = (flow.sample(500, seed=0) / unit).round().unique()
        assert draws.tolist() == [0, 1, 2, 3]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert math.log(4) - 0.01 < losses[0] < math.log(4) + 0.2


def test_a_cell_has_the_probability_of_its_interval(tmp_path: Path) -> None:
    flow = pf.planar_flow(2, 0, affine="diagonal")
    data = torch.stack([rounded(800, 1.4), torch.randn(800)], 1)
    pf.fit_density(flow, data, dequantize=0, **SHORT)
    x = torch.tensor([[0.0, 0.3], [2.0, -1.0], [-1.0, 0.0]])
    loc = flow.parts[1](torch.zeros(2)).detach()
    scale = flow.parts[1](torch.ones(2)).detach() - loc
    first, second = Normal(loc[0], scale[0]), Normal(loc[1], scale[1])
    expected = (first.cdf(x[:, 0] + 1) - first.cdf(x[:, 0])).log() + second.log_prob(x[:, 1])
    assert torch.allclose(flow.log_prob(x), expected, atol=0.02)
    draws = flow.sample(4000, seed=1)
    assert torch.equal(draws[:, 0], draws[:, 0].round())
    assert (draws[:, 0] == 0).double().mean().log().item() == pytest.approx(
        (first.cdf(torch.tensor(1.0)) - first.cdf(torch.tensor(0.0))).log().item(), abs=0.1
    )
    pf.save(flow, tmp_path / "flow.pt")
    for other in (pf.load(tmp_path / "flow.pt"), copy.deepcopy(flow)):
        assert other.cells == flow.cells
        assert torch.equal(other.log_prob(x), flow.log_prob(x))


def test_noise_is_fresh_in_training_and_fixed_held_out() -> None:
    flow = pf.planar_flow(1, 0)
    data = [torch.zeros(20, 1)]
    likelihood = Likelihood(flow, data, torch.tensor([2.0]), 0.5, 64, ALONE)
    seen = []
    likelihood._losses = lambda rows: seen.append(rows[0]) or rows[0][:, 0]
    objective = likelihood.objective()
    for _ in range(2):
        objective.loss(0)
        objective.score()
        objective.exact_loss()
    batches, scored, full = seen[::3], seen[1::3], seen[2::3]
    assert not torch.equal(*batches)
    assert torch.equal(*scored)
    assert torch.equal(*full)
    assert all((t > 0).all() and (t < 2).all() for t in seen)
    assert batches[0].mean().item() == pytest.approx(1, abs=0.3)


def test_the_support_holds_whole_cells() -> None:
    counts = torch.randint(0, 3, (200, 1)).double()
    with pytest.raises(ValueError, match=r"data expects .* inside the support, got 3 .* to 2.5"):
        pf.fit_density(pf.planar_flow(1, 2, support=[(0, 2.5)]), counts, dequantize=True, **SHORT)
    pf.fit_density(pf.planar_flow(1, 2, support=["positive"]), counts, dequantize=True, **SHORT)


def test_a_full_gaussian_stands_beside_the_score() -> None:
    y = torch.randn(300, 2) @ torch.tensor([[2.0, 0.0], [1.5, 0.4]]) + 3
    centred = y - y.mean(0)
    q = MultivariateNormal(y.mean(0), centred.T @ centred / len(y))
    fresh = torch.randn(50, 2)
    assert torch.allclose(gaussian_losses([y], [fresh]), -q.log_prob(fresh), atol=1e-9)
    c = torch.randn(300, 2) * torch.tensor([1e-3, 1e4])
    X = torch.cat([torch.ones(300, 1), c], 1)
    y = y + c @ torch.tensor([[1e3, 0.0], [0.0, 1e-4]])
    slopes = torch.linalg.lstsq(X, y).solution
    rest = y - X @ slopes
    at = MultivariateNormal(X @ slopes, rest.T @ rest / 300)
    assert torch.allclose(gaussian_losses([y, c], [y, c]), -at.log_prob(y), atol=1e-6)
    assert gaussian_losses([y[:, :1].repeat(1, 2)], [y]) is None
    assert gaussian_losses([y, y[:, 1:]], [y, y[:, 1:]]) is None


def test_a_fit_says_what_its_score_is_worth() -> None:
    data = datasets.sine(800, seed=0)
    flow = pf.planar_flow(2, 4)
    fit = pf.fit_density(flow, data, **SHORT)
    assert fit.gaussian_loss == pytest.approx(fit.scores[0][1], abs=0.01)
    gain, gap = fit.gaussian_loss - fit.best_loss, fit.best_loss - fit.training_loss
    assert f"on the same held-out rows: the flow is {gain:.3g} nats better" in str(fit)
    assert f"{fit.training_loss:.6g} nats, {abs(gap):.3g} " in str(fit)
    assert f"{'less' if gap >= 0 else 'more'} than held out" in str(fit)
    correlated = torch.randn(800, 1) + 0.1 * torch.randn(800, 2)
    with pytest.warns(UserWarning, match="loses to a full Gaussian by .* affine='full'") as caught:
        fit = pf.fit_density(pf.planar_flow(2, 0, affine="diagonal"), correlated, **SHORT)
    assert " nats worse" in str(fit)
    assert Path(caught[0].filename).name == Path(__file__).name


@pytest.mark.parametrize("num_layers", [2, "auto"])
def test_one_row_held_out_says_little(num_layers: int | str) -> None:
    data = torch.randn(12, 1)
    fit = pf.fit_density(pf.planar_flow(1, num_layers), data, holdout=0.01, **SHORT)
    assert math.isfinite(fit.gaussian_loss)
    assert fit.num_layers in (None, 0)


def test_the_depth_is_found_on_held_out_rows(tmp_path: Path) -> None:
    data = datasets.sine(300, seed=0)
    flow = pf.planar_flow(2, "auto")
    with pytest.raises(TypeError, match="depth of layers, 'auto', that fit_density"):
        pf.save(flow, tmp_path / "flow.pt")
    with pytest.raises(ValueError, match="found by fit_density alone"):
        pf.fit_energy(flow, pf.targets.energy(1), progress=False)
    options = SHORT | {"checkpoint": tmp_path / "fit.pt"}
    fit, again = (pf.fit_density(each, data, **options) for each in (copy.deepcopy(flow), flow))
    assert again.depths == fit.depths
    assert dict(fit.depths)[fit.num_layers] == fit.best_loss < fit.depths[0][1] - 0.1
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == sorted(f"fit-K{depth}.pt" for depth, _ in fit.depths)
    plain = pf.planar_flow(2, fit.num_layers)
    assert pf.fit_density(plain, data, **SHORT).best_loss == fit.best_loss
    assert torch.equal(flow.log_prob(data), plain.log_prob(data))
    assert f"{fit.num_layers}, by the held-out scores 0: " in str(fit)
    pf.save(flow, tmp_path / "flow.pt")
    assert torch.equal(pf.load(tmp_path / "flow.pt").log_prob(data), plain.log_prob(data))
    assert pf.fit_density(flow, data, **SHORT).depths == []


@pytest.mark.parametrize("family", ["planar", "radial", "sylvester"])
def test_a_gaussian_needs_no_layers(family: str) -> None:
    frame = pd.DataFrame(torch.randn(300, 2).exp().numpy(), columns=["a", "b"])
    sizes = (2, 1) if family == "sylvester" else (2,)
    make = getattr(pf, f"{family}_flow")
    flow = make(*sizes, "auto", support={"a": "positive", "b": "positive"}).double()
    fit = pf.fit_density(flow, frame, steps=5, polish=0, lr=1e-4, seed=0, progress=False)
    assert (fit.num_layers, [depth for depth, _ in fit.depths]) == (0, [0, 2, 4])
    assert flow.columns == ("a", "b")
    assert (flow.sample(50, seed=0) > 0).all(axis=None)


def test_a_conditional_flow_finds_its_depth_too() -> None:
    data = torch.randn(200, 2)
    flow = pf.planar_flow(1, "auto", 1, hidden_dims=(4,), affine=None).double()
    options = {"steps": 5, "lr": 1e-4, "seed": 0, "progress": False}
    fit = pf.fit_density(flow, data[:, :1], context=data[:, 1:], **options)
    assert fit.num_layers == len(flow.parts[0].planar.w)
    fit = pf.fit_density(pf.planar_flow(2, "auto", affine=None), data, polish=0, **options)
    assert fit.depths[0][0] == 2


def test_heavy_tails_are_taken_by_their_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    heavy = StudentT(torch.tensor(3.0, dtype=torch.float64))
    root = torch.tensor([[2.0, 0.0], [1.0, 0.5]], dtype=torch.float64)  # |det| = 1

    def drawn(num: int) -> Tensor:
        normal = torch.randn(num, 2, 4, generator=generator, dtype=torch.float64)
        return normal[..., 0] / (normal[..., 1:].square().mean(-1)).sqrt()

    fresh, excess = drawn(20_000), {}
    for tails in (False, True):
        flow = pf.planar_flow(2, 0, tails=tails).double()
        pf.fit_density(flow, drawn(2000) @ root.T, **SHORT | {"polish": 60})
        losses = heavy.log_prob(fresh).sum(-1) - flow.log_prob(fresh @ root.T)
        excess[tails] = losses.mean().item()
    assert excess[False] > 0.2
    assert 0 < excess[True] < 0.06


@pytest.mark.parametrize("context_dim", [None, 3])
def test_flows_with_tails_run_both_ways_and_are_saved(
    context_dim: int | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    makes = (pf.planar_flow, pf.radial_flow, partial(pf.sylvester_flow, num_units=1))
    given = () if context_dim is None else (torch.randn(6, context_dim),)
    for make in makes:
        flow = make(2, num_layers=2, context_dim=context_dim, tails=True, support={1: "positive"})
        with torch.no_grad():
            for p in flow.parameters():
                p.add_(0.2 * torch.randn_like(p))
        x = flow(*given).sample(() if given else (6,))
        base = StandardNormal(2)().log_prob(torch.zeros(2))
        assert flow(*given).log_prob(x).isfinite().all()
        jacobian = torch.func.vmap(torch.func.jacrev(lambda z, *c, f=flow: _pushed(f, z, c)))
        z = torch.randn(6, 2)
        y = _pushed(flow, z, given)
        log_det = torch.linalg.slogdet(jacobian(z, *given)).logabsdet
        expected = base - z.square().sum(-1) / 2 - log_det
        assert torch.allclose(flow(*given).log_prob(y), expected, atol=1e-8)
        pf.save(flow, tmp_path / "flow.pt")
        assert torch.equal(
            pf.load(tmp_path / "flow.pt")(*given).log_prob(y), flow(*given).log_prob(y)
        )


def _pushed(flow: pf.Flow, z: Tensor, given: tuple) -> Tensor:
    for t in flow.transforms(*given):
        z = t(z)
    return z


def test_tails_are_true_or_false() -> None:
    with pytest.raises(ValueError, match="tails must be one of False, True; got 'heavy'"):
        pf.planar_flow(2, tails="heavy")
