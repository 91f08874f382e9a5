"""Pair plots and PIT checks: what the panels hold, on which axes, and when lines leave the band."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Tensor

import pyroflow as pf
from pyroflow.plots import drawing, plot_pairs, plot_pit
from pyroflow.plots.compared import Compared, compare

SCALES = torch.tensor([1.0, 1e4, 0.01])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def normal(scales: Tensor = SCALES) -> dist.Distribution:
    return dist.Normal(torch.zeros_like(scales), scales).to_event(1)


def grid(figure: Figure) -> np.ndarray:
    width = math.isqrt(len(figure.axes))
    return np.array(figure.axes).reshape(width, width)


def words(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [legend.get_title().get_text(), *(text.get_text() for text in legend.get_texts())]


def offsets(ax: Axes) -> np.ndarray:
    return np.asarray(ax.collections[0].get_offsets())


# Pairs.


def test_pairs_are_on_the_axes_and_under_the_names_of_the_data() -> None:
    frame = pd.DataFrame(normal().sample((500,)).numpy(), columns=["a$", "b", "c"])
    axes = grid(plot_pairs(normal(), frame, num_samples=900, num_points=300))
    assert [ax.get_xlabel() for ax in axes[-1]] == [r"a\$", "b", "c"]
    assert [ax.get_ylabel() for ax in axes[1:, 0]] == ["b", "c"]
    assert axes[0, 2].get_ylabel() == r"a\$"
    for (i, j), ax in np.ndenumerate(axes):
        low, high = frame.iloc[:, j].quantile([0.0025, 0.9975])
        assert ax.get_xlim() == pytest.approx(
            (low - 0.05 * (high - low), high + 0.05 * (high - low))
        )
        assert ax.get_aspect() == "auto"
        if i != j:
            assert ax.get_ylim() == axes[i, 0 if i else 1].get_ylim()
            assert len(offsets(ax)) == 300


def test_pairs_have_data_below_and_samples_above_the_diagonal() -> None:
    data, shift = normal().sample((100,)), torch.tensor([100.0, 0.0, 0.0])
    moved = dist.Normal(shift, SCALES).to_event(1)
    axes = grid(plot_pairs(moved, data, num_samples=50))
    rows = set(map(tuple, data[:, :2].tolist()))
    assert set(map(tuple, offsets(axes[1, 0]).tolist())) <= rows
    assert offsets(axes[0, 1])[:, 1].mean() == pytest.approx(100.0, abs=1.0)
    below, above = (axes[at].collections[0].get_facecolor()[0] for at in [(1, 0), (0, 1)])
    assert [to_hex(below), to_hex(above)] == [drawing.DATA, drawing.FLOW]


def test_pairs_on_the_diagonal_are_densities_of_all_rows() -> None:
    axes = grid(plot_pairs(normal(), normal().sample((4000,)), num_points=10))
    for ax in axes.diagonal():
        data, flow = (patch.get_data() for patch in ax.patches)
        assert np.array_equal(data.edges, flow.edges)
        for found in (data, flow):
            assert np.sum(found.values * np.diff(found.edges)) == pytest.approx(1.0, abs=0.01)


def test_contours_hold_their_shares() -> None:
    ax = Figure().subplots()
    points = torch.randn(100_000, 2) * torch.tensor([1.0, 1e4])
    drawing.contours(ax, points, ((-4.0, 4.0), (-4e4, 4e4)), (0.5, 0.9), "red")
    paths = ax.collections[0].get_paths()
    # A normal density in the plane holds a share s within the radius sqrt(-2 log(1 - s)).
    expected = [math.sqrt(-2 * math.log(1 - share)) for share in (0.9, 0.5)]
    for path, radius in zip(paths, expected, strict=True):
        found = np.hypot(*(path.vertices / [1.0, 1e4]).T)
        assert np.mean(found) == pytest.approx(radius, rel=0.05)


def test_contours_of_samples_out_of_sight_are_left_out() -> None:
    ax = Figure().subplots()
    drawing.contours(ax, torch.full((50, 2), 9.0), ((0.0, 1.0), (0.0, 1.0)), (0.5, 0.9), "red")
    assert len(ax.collections) == 0


def test_pairs_of_one_column() -> None:
    (ax,) = plot_pairs(normal(SCALES[:1]), torch.randn(50, 1)).axes
    assert ax.get_xlabel() == "$x_{1}$"
    assert len(ax.patches) == 2


def test_pairs_choose_columns() -> None:
    wide, data = normal(torch.ones(14)), torch.randn(40, 14)
    frame = pd.DataFrame(data.numpy(), columns=[f"c{j}" for j in range(14)])
    figure = plot_pairs(wide, frame, columns=["c13", 2], num_points=5)
    assert [ax.get_xlabel() for ax in grid(figure)[-1]] == ["c13", "c2"]
    title, rows, samples = words(figure)
    assert title == "2 of 14 columns: c13, c2"
    assert rows == "data: 40 rows, 5 as points"
    assert samples.replace("\n", " ") == (
        "flow: 10,000 samples, 5 as points; lines hold 50 % and 90 %"
    )
    assert compare(wide, data).shown(None) == list(range(12))
    for columns, message in (
        (["d"], "columns expects positions from 0 to 13, or 'c0'.*got 'd'"),
        (range(13), "columns expects 1 to 12 columns, got 13"),
        ([], "columns expects 1 to 12 columns, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_pairs(wide, frame, columns=columns)


def test_pairs_of_a_flow_with_cells_a_support_and_another_order_of_columns() -> None:
    frame = pd.DataFrame({"kids": np.arange(60) % 4, "income": np.exp(np.linspace(-1, 2, 60))})
    flow = pf.planar_flow(2, num_layers=1, support={"income": "positive"})
    flow.name_columns(frame, None, ((0.0, 1.0), (0.0, 0.0)))
    axes = grid(plot_pairs(flow, frame[["income", "kids"]], num_points=60))
    assert [ax.get_xlabel() for ax in axes[-1]] == ["kids", "income"]
    income, kids = offsets(axes[0, 1]).T  # of the samples
    assert (income > 0).all()
    assert np.array_equal(kids, kids.round())


def test_pairs_of_a_conditional_flow() -> None:
    flow, contexts = pf.planar_flow(2, context_dim=1, num_layers=1), torch.randn(30, 1)
    both = compare(flow, torch.randn(30, 2), contexts)
    assert both.draw(100).shape == (120, 2)
    assert (
        "flow: 120 samples"
        in words(plot_pairs(flow, both.data, context=contexts, num_samples=100))[2]
    )
    with pytest.raises(ValueError, match="context is needed by a conditional flow"):
        plot_pairs(flow, both.data)
    with pytest.raises(ValueError, match=r"context is for a conditional pyroflow\.Flow, got Indep"):
        plot_pairs(normal(), torch.randn(30, 3), context=contexts)


def test_pairs_refuse_distributions_that_are_not_of_rows() -> None:
    with pytest.raises(ValueError, match=r"event shape \(D,\), got \(\)"):
        plot_pairs(dist.Normal(0.0, 1.0), torch.randn(9, 1))
    with pytest.raises(ValueError, match=r"data expects shape \(n, 3\).*got shape \(9, 2\)"):
        plot_pairs(normal(), torch.randn(9, 2))
    with pytest.raises(ValueError, match=r"one distribution, got batch shape \(9,\)"):
        plot_pairs(dist.Normal(torch.zeros(9, 2), 1.0).to_event(1), torch.randn(9, 2))


# PIT.


def leaving(figure: Figure) -> list[str]:
    titles = [ax.get_title().split("\n") for ax in figure.axes]
    return [title for title, *verdict in titles if verdict]


@pytest.mark.parametrize("num", [40, 500])
def test_the_band_holds_lines_of_uniform_values(num: int) -> None:
    cells = min(100, num // 5)
    band = drawing.ecdf_band(num, 0.9, cells)
    places = np.arange(1, cells) / cells
    values = np.sort(np.random.default_rng(1).random((4000, num)))
    found = np.array([np.searchsorted(row, places, side="right") for row in values]) / num
    inside = (np.abs(found - places) <= band + 1e-12).all(1).mean()
    assert inside == pytest.approx(0.9, abs=0.02)


def test_pit_keeps_data_of_the_flow_in_the_band() -> None:
    flow = pf.planar_flow(3, num_layers=2, support={2: "positive"})
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    figure = plot_pit(flow, flow.sample(800, seed=0), num_samples=4_000)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == ["base, each $z_j$", "base, $|z|^2$", "$x_{1}$", "$x_{2}$", "$x_{3}$"]
    assert len(figure.axes[0].lines) == 1 + 3
    assert "where all lines stay, with a chance of 95 %, if the flow is right" in words(figure)


def test_pit_names_the_column_of_a_wrong_scale() -> None:
    data = normal().sample((800,)) * torch.tensor([1.0, 1.4, 1.0])
    frame = pd.DataFrame(data.numpy(), columns=["a", "b", "c"])
    figure = plot_pit(normal(), frame, num_samples=20_000)
    assert leaving(figure) == ["base, each $z_j$", "base, $|z|^2$", "b"]
    other = plot_pit(normal(), frame, columns=["c"], num_samples=20_000)
    assert leaving(other) == leaving(figure)[:2]
    base = figure.axes[0].lines[1:]
    assert [to_hex(line.get_color()) == drawing.FLOW for line in base] == [False, True, False]
    x, y = figure.axes[3].lines[1].get_data()
    # Data that spread more: first above, then below; by Φ(1.4⁻¹ Φ⁻¹(p)) − p.
    z = torch.special.ndtri(torch.from_numpy(x[1:-1]))
    expected = torch.special.ndtr(z / 1.4).numpy() - x[1:-1]
    assert np.abs(y[1:-1] - expected).max() < 0.06
    assert y[10] > 0 > y[-10]


def test_pit_of_the_squared_distance_sees_what_columns_do_not() -> None:
    """Rows whose columns are normal, but large together."""
    x = torch.randn(1500, 2)
    x[:, 1] = x[:, 0].abs() * torch.randn(1500).sign()
    figure = plot_pit(normal(torch.ones(2)), x, num_samples=20_000)
    assert leaving(figure) == ["base, $|z|^2$"]


def test_pit_breaks_ties_of_cells_at_random() -> None:
    cells = ((0.0, 1.0), (0.0, 0.0))
    model = normal(torch.tensor([2.0, 1.0]))
    draws = Compared(model, torch.zeros(2, 2), None, cells).draw(3000)
    both = Compared(model, draws, None, cells)
    pits, independent = both.column_pits(30_000)
    assert independent == pytest.approx(3000 * 30_000 / 33_000)
    assert pits.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    assert pits.var(0).tolist() == pytest.approx([1 / 12, 1 / 12], abs=0.005)
    assert both.base().std(0).tolist() == pytest.approx([1.0, 1.0], abs=0.05)


def test_pit_of_rows_with_contexts_is_among_their_own_draws() -> None:
    loc = 100 * torch.arange(2000.0)[:, None]
    model = dist.Normal(loc, 1.0).to_event(1)
    pits, independent = Compared(model, model.sample(), None, None).column_pits(10)
    assert independent == 2000
    assert pits.mean().item() == pytest.approx(0.5, abs=0.03)
    assert pits.var().item() == pytest.approx(1 / 12, abs=0.006)
    flow, contexts = pf.planar_flow(1, context_dim=1, num_layers=1), torch.randn(60, 1)
    assert len(plot_pit(flow, torch.randn(60, 1), context=contexts).axes[2].lines) == 2


def test_pit_takes_data_and_a_flow_of_two_dtypes() -> None:
    data = normal().sample((400,)).double()
    assert leaving(plot_pit(normal(), data)) == []


def test_pit_without_a_normal_base_has_columns_alone() -> None:
    model = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    figure = plot_pit(model, model.sample((100,)), num_samples=1000)
    assert [ax.get_title() for ax in figure.axes] == ["$x_{1}$", "$x_{2}$"]


def test_pit_refuses() -> None:
    with pytest.raises(ValueError, match="level must be a fraction"):
        plot_pit(normal(), torch.randn(9, 3), level=1.0)
    flow = pf.planar_flow(1, num_layers=1, support={0: "positive"})
    with pytest.raises(ValueError, match="column 0"):
        plot_pit(flow, torch.randn(50, 1))
