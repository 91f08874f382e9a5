"""The figures: what their axes hold, that they share one scale, and what they refuse."""

from __future__ import annotations

import io
import math
import sys
from typing import Any

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import AffineTransform, ComposeTransform, ExpTransform

import pyroflow as pf
from pyroflow.plots import (
    plot_density,
    plot_grid_bending,
    plot_losses,
    plot_marginals,
    plot_posteriors,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def flow() -> dist.MultivariateNormal:
    return dist.MultivariateNormal(torch.zeros(2), torch.eye(2))


def points(n: int = 400, width: int = 2) -> Tensor:
    return torch.randn(n, width)


def panels(figure: Figure) -> list:
    return [ax for ax in figure.axes if ax.get_title()]


def size_of(figure: Figure) -> int:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return len(buffer.getvalue())


def images(figure: Figure) -> list:
    return [ax.images[0] for ax in panels(figure)]


def mass(image: object) -> float:
    left, right, bottom, top = image.get_extent()
    return float(image.get_array().mean()) * (right - left) * (top - bottom)


# Density.


def test_density_panels() -> None:
    figure = plot_density(flow, points(), num_samples=300, bins=30)
    titles = [ax.get_title().split("\n")[0] for ax in panels(figure)]
    assert titles == ["Data", "Samples", "Model density"]
    assert len(figure.axes) == 4
    assert all(ax.get_aspect() == 1 for ax in panels(figure))
    assert size_of(figure) > 10_000


def test_density_shares_one_scale() -> None:
    figure = Figure()
    assert plot_density(flow, points(), figure=figure) is figure
    assert len({id(image.norm) for image in images(figure)}) == 1
    assert len({image.get_cmap().name for image in images(figure)}) == 1
    assert len({tuple(image.get_extent()) for image in images(figure)}) == 1


def test_a_narrow_approximation_does_not_make_the_others_dark() -> None:
    exact = dist.Normal(torch.zeros(2), 1.0)
    narrow = dist.Normal(torch.zeros(2), 0.1)
    panels = {"narrow": lambda z: narrow.log_prob(z).sum(-1)}
    figure = plot_posteriors(lambda z: exact.log_prob(z).sum(-1), panels, bounds=(-3, 3))
    assert images(figure)[0].norm.vmax == pytest.approx(1 / (2 * math.pi), rel=0.02)


def test_density_panels_are_densities() -> None:
    figure = plot_density(flow(), points(20_000), num_samples=20_000, bounds=(-5, 5))
    assert [mass(image) for image in images(figure)] == pytest.approx([1, 1, 1], abs=1e-3)


def test_density_counts_points_out_of_bounds() -> None:
    inside = torch.cat([points(300) % 1, 10 + points(100)])
    data, _, _ = images(plot_density(flow, inside, bounds=((0, 1), (0, 1)), bins=10))
    assert mass(data) == pytest.approx(0.75)


def test_density_puts_x1_across() -> None:
    narrow = dist.Normal(torch.tensor([3.0, -1.0]), 0.1).to_event(1)
    data = narrow.sample((1000,))
    for image in images(plot_density(narrow, data, bounds=((0, 4), (-4, 4)), bins=40)):
        row, column = np.unravel_index(image.get_array().argmax(), image.get_array().shape)
        rows, columns = image.get_array().shape
        assert 4 * (column + 0.5) / columns == pytest.approx(3.0, abs=0.3)
        assert 8 * (row + 0.5) / rows - 4 == pytest.approx(-1.0, abs=0.3)
        assert image.origin == "lower"


def test_density_of_a_broken_flow_still_shows_the_data() -> None:
    broken = flow()
    broken.log_prob = lambda z: z.sum(-1) * torch.nan
    data, _, density = images(plot_density(broken, points()))
    assert data.norm.vmax > 0
    assert density.get_array().mask.all()


def test_density_of_unequal_scales_fills_its_panels() -> None:
    wide = dist.Normal(torch.zeros(2), torch.tensor([1.0, 1e4])).to_event(1)
    figure = plot_density(wide, wide.sample((500,)))
    figure.canvas.draw()
    for ax in panels(figure):
        width, height = ax.get_window_extent().size
        assert 0.5 < width / height < 2


def test_density_has_outliers_beyond_its_axes() -> None:
    data = points(1000)
    data[0] = 1e6
    (left, right), _ = np.reshape(images(plot_density(flow, data))[0].get_extent(), (2, 2))
    assert -5 < left < right < 5


def test_density_is_not_dark() -> None:
    figure = plot_density(flow, points())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba", dpi=30)
    assert np.frombuffer(buffer.getvalue(), np.uint8).mean() > 200


def test_density_refuses_other_widths() -> None:
    with pytest.raises(ValueError, match=r"data expects shape \(n, 2\).*got shape \(400, 3\)"):
        plot_density(flow, points(width=3))
    with pytest.raises(ValueError, match=r"event shape \(2,\), got \(3,\)"):
        plot_density(dist.Normal(torch.zeros(3), 1.0).to_event(1), points())


@pytest.mark.parametrize("bounds", [(1, 1), (2, -2), ((0, 1), (1, 0))])
def test_density_refuses_bounds(bounds: tuple) -> None:
    with pytest.raises(ValueError, match="bounds expects low < high"):
        plot_density(flow, points(), bounds=bounds)


# Posteriors.


def log_joint(z: Tensor) -> Tensor:
    return flow().log_prob(z) - 3.0


@pytest.mark.parametrize("log_evidence", [-3.0, None])
def test_posteriors(log_evidence: float | None) -> None:
    figure = plot_posteriors(
        log_joint,
        {"Exact": flow().log_prob, "Draws": points(2000)},
        log_evidence=log_evidence,
        subtitles={"Exact": "KL 0.00"},
    )
    titles = [ax.get_title() for ax in panels(figure)]
    assert titles == ["Exact posterior", "Exact\nKL 0.00", "Draws"]
    exact, guide, draws = images(figure)
    assert exact.norm is guide.norm is draws.norm
    assert np.allclose(exact.get_array(), guide.get_array(), atol=1e-5)
    assert [mass(image) for image in images(figure)] == pytest.approx([1, 1, 1], abs=1e-4)


def test_posteriors_refuse() -> None:
    with pytest.raises(ValueError, match=r"Draws expects shape \(n, 2\).*\(400, 3\)"):
        plot_posteriors(log_joint, {"Draws": points(width=3)})
    with pytest.raises(ValueError, match=r"titles out of \['a'\], got \['b'\]"):
        plot_posteriors(log_joint, {"a": log_joint}, subtitles={"b": "KL"})


# Grid bending.


def lines(figure: Figure, panel: int) -> np.ndarray:
    return np.array(figure.axes[panel].collections[0].get_segments())


def test_grid_bending_moves_the_grid() -> None:
    figure = plot_grid_bending(AffineTransform(1.0, torch.tensor([2.0, 0.5])))
    base, image = lines(figure, 0), lines(figure, 1)
    assert np.allclose(image, 1 + base * [2, 0.5], atol=1e-5)
    assert base.min() == -3
    assert base.max() == 3
    assert size_of(figure) > 10_000


def test_grid_bending_keeps_colours() -> None:
    figure = plot_grid_bending(AffineTransform(0.0, -1.0))
    before, after = (ax.collections[0].get_colors() for ax in figure.axes)
    assert np.array_equal(before, after)
    assert len(np.unique(before.round(3), axis=0)) > 1000


def chained() -> dist.TransformedDistribution:
    steps = ComposeTransform([AffineTransform(0.0, 2.0), AffineTransform(0.0, 3.0)])
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    return dist.TransformedDistribution(base, [steps, ExpTransform()])


@pytest.mark.parametrize("subject", [chained, chained()], ids=["function", "distribution"])
def test_grid_bending_layers(subject: object) -> None:
    figure = plot_grid_bending(subject, layers=[1, 2, 3], bounds=(-1, 1))
    assert [ax.get_title() for ax in figure.axes] == [
        "Base space",
        "After 1 of 3 transforms",
        "After 2 of 3 transforms",
        "Image",
    ]
    assert np.allclose(lines(figure, 2), 6 * lines(figure, 0), atol=1e-5)


def test_grid_bending_takes_the_type_of_the_parameters() -> None:
    planar = dist.transforms.Planar(2).double()
    assert len(plot_grid_bending(planar).axes) == 2


@pytest.mark.parametrize("layers", [[0], [4], [1, 7]])
def test_grid_bending_refuses_layers(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="layers between 1 and .*and 3 transform"):
        plot_grid_bending(chained, layers=layers)


def test_grid_bending_refuses_plain_distributions() -> None:
    with pytest.raises(ValueError, match="and 0 transform"):
        plot_grid_bending(flow)


# Losses.


@pytest.mark.parametrize("losses", [[3.0, 2.0, 1.5], torch.tensor([3.0, 2.0, 1.5])])
def test_losses(losses: list[float] | Tensor) -> None:
    figure = plot_losses(losses, floor=1.0, label="K = 8")
    _, raw, floor = figure.axes[0].lines
    assert np.allclose(raw.get_xydata(), [[1, 3], [2, 2], [3, 1.5]])
    assert floor.get_linestyle() == "--"
    assert list(floor.get_ydata()) == [1.0, 1.0]
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["K = 8", "floor 1"]
    assert size_of(figure) > 5_000


def test_losses_share_an_axis() -> None:
    figure = plot_losses(2 + torch.rand(500), label="a")
    assert plot_losses(7 + torch.rand(900), label="b", ax=figure.axes[0]) is figure
    low, high = figure.axes[0].get_ylim()
    assert low < 2.01
    assert high > 7.95
    assert len({line.get_color() for line in figure.axes[0].lines}) == 2


def test_losses_of_the_start_do_not_set_the_scale() -> None:
    losses = 1 + 0.1 * torch.rand(2000)
    losses[:5] = 1e4
    losses[1000] = torch.nan
    assert plot_losses(losses).axes[0].get_ylim()[1] < 1.2
    assert plot_losses([1.0]).axes[0].get_ylim() == (0.0, 2.0)


@pytest.mark.parametrize("losses", [[], [float("nan")] * 3, torch.ones(3, 2)])
def test_losses_refuse(losses: list[float] | Tensor) -> None:
    with pytest.raises(ValueError, match=r"expects finite losses of shape \(n,\), got shape"):
        plot_losses(losses)


def fit_of_a_density(**options: Any) -> pf.Fit:
    losses = [9.0, 5.0, 4.0, *np.linspace(3.0, 1.0, 297)]
    scores = [(0, 9.5), (100, 2.8), (200, 1.6), (300, 1.7)]
    beside = {"gaussian_loss": 3.3, "training_loss": 0.9}
    return pf.Fit(losses, scores, 1.6, 300, "all steps done", 1.0, **beside, **options)


def test_losses_of_a_density_beside_its_held_out_scores() -> None:
    (ax,) = plot_losses(fit_of_a_density()).axes
    assert ax.get_ylabel() == "\u2212log q, nats per row"
    curves = {line.get_label(): line for line in ax.lines}
    assert list(curves["held-out rows"].get_ydata()) == [9.5, 2.8, 1.6, 1.7]
    assert list(map(list, curves["best, 1.6"].get_data())) == [[200], [1.6]]
    assert list(curves["full Gaussian, held-out rows"].get_ydata()) == [3.3, 3.3]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["training rows", "held-out rows", "best, 1.6", "full Gaussian, held-out rows"]
    assert ax.get_ylim()[1] < 5.5  # the score of the start is above


def test_losses_beside_the_scores_of_depths() -> None:
    fit = fit_of_a_density(num_layers=4, depths=[(0, 3.3), (2, 2.0), (4, 1.6), (8, 1.65)])
    curves, depths = plot_losses(fit).axes
    assert [text.get_text() for text in depths.get_xticklabels()] == ["0", "2", "4", "8"]
    scores, chosen, gaussian = depths.lines
    assert list(scores.get_ydata()) == [3.3, 2.0, 1.6, 1.65]
    assert list(map(list, chosen.get_data())) == [[2], [1.6]]
    assert chosen.get_label() == "chosen, 4 layers"
    assert list(gaussian.get_ydata()) == [3.3, 3.3]
    assert plot_losses(fit, ax=plot_losses([2.0, 1.0]).axes[0]).axes[1:] == []
    assert curves.get_xlabel() == "step"


def test_losses_of_a_guide() -> None:
    fit = pf.Fit([3.0, 2.0, 1.0], [(3, math.nan), (3, 1.1)], 1.1, 3, "all steps done", 1.0)
    (ax,) = plot_losses(fit, label="planar").axes
    assert ax.get_ylabel() == "loss, nats"
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == [
        "planar: training loss",
        "planar: fixed draws or points",
        "planar: best, 1.1",
    ]


# Marginals.


def sites(n: int = 1000, scale: float = 1.0) -> dict[str, Tensor]:
    return {"mu": scale * torch.randn(n, 1), "theta": scale * torch.randn(n, 2)}


def test_marginals() -> None:
    figure = plot_marginals(sites(), {"narrow": sites(scale=0.5), "wide": sites(500, 2.0)})
    assert [ax.get_title() for ax in panels(figure)] == ["mu", "theta[0]", "theta[1]"]
    assert [text.get_text() for text in figure.axes[-1].get_legend().get_texts()] == [
        "reference",
        "narrow",
        "wide",
    ]
    assert size_of(figure) > 10_000


def test_marginals_count_draws_out_of_sight() -> None:
    figure = plot_marginals(
        {"x": torch.linspace(0, 1, 1001)}, {"g": {"x": torch.tensor([0.5, 90.0])}}
    )
    reference, guide = figure.axes[0].patches
    areas = [
        float(np.sum(p.get_data().values * np.diff(p.get_data().edges))) for p in (reference, guide)
    ]
    assert areas == pytest.approx([0.995, 0.5], abs=2e-3)


def test_marginals_of_a_grid_of_sites() -> None:
    figure = plot_marginals({"m": torch.randn(50, 2, 2)}, {})
    assert [ax.get_title() for ax in panels(figure)] == ["m[0,0]", "m[0,1]", "m[1,0]", "m[1,1]"]


def test_marginals_refuse_missing_sites() -> None:
    with pytest.raises(ValueError, match=r"draws\['g'\] expects .*'theta\[1\]'.*got \['mu'\]"):
        plot_marginals(sites(), {"g": {"mu": torch.randn(10)}})


def test_marginals_refuse_broken_reference() -> None:
    with pytest.raises(ValueError, match=r"reference\['mu'\] expects finite numbers"):
        plot_marginals({"mu": torch.tensor([1.0, torch.nan, 2.0])}, {})


# No pyplot.


def test_a_figure_shows_itself_in_a_notebook() -> None:
    assert plot_losses([2.0, 1.0])._repr_png_().startswith(b"\x89PNG")


def test_figures_leave_pyplot_alone() -> None:
    plot_losses([2.0, 1.0])
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_plot_density_of_a_frame_inside_a_support() -> None:
    draws = points().exp().numpy()
    flow = pf.planar_flow(2, num_layers=2, support={"b$": "positive"})
    frame = pd.DataFrame(draws, columns=["a$", "b$"])
    flow.name_columns(frame, None, None)
    figure = plot_density(flow, frame[["b$", "a$"]], bounds=((-1.0, 9.0), (-1.0, 9.0)))
    ax = panels(figure)[2]
    assert (ax.get_xlabel(), panels(figure)[0].get_ylabel()) == (r"a\$", r"b\$")
    density = ax.images[0].get_array()
    assert (density[:20] == 0).all()  # b is from -1 to 0 there
    centre = torch.tensor([[-1 + 10 * 60.5 / 200, -1 + 10 * 40.5 / 200]])
    assert density[40, 60] == pytest.approx(flow.log_prob(centre).exp().item(), rel=1e-4)
    assert density[40, 60] > 0
