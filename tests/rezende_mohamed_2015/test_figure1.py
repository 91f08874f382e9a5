"""Figure 1: densities that integrate to one, and are those of the paper's formulas."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pyroflow import Planar, Radial
from rezende_mohamed_2015 import figure1
from rezende_mohamed_2015.results import Options, label
from rezende_mohamed_2015.tables import frame


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("figure1")
    return out, figure1.run(Options(out=out, quick=True, progress=False))


@pytest.mark.slow
def test_every_density_integrates_to_one(quick: tuple[Path, dict]) -> None:
    out, report = quick
    assert len(report["runs"]) == 12
    for panel in report["runs"]:
        assert panel["integral"] == pytest.approx(1, abs=1e-3), label(panel)
    assert report["complete"]
    assert report["worst_error"] < 1e-3
    assert (out / "figure1.png").stat().st_size > 20_000
    table = frame("figure1", report)
    assert len(table) == 4
    assert table["K = 10"].astype(float).tolist() == pytest.approx([1.0] * 4, abs=1e-3)


def test_a_rerun_keeps_what_is_there(
    quick: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, report = quick
    monkeypatch.setattr(figure1, "integrate", None)
    monkeypatch.setattr(figure1, "PIXELS", 20)
    again = figure1.run(Options(out=out, quick=True, progress=False))
    assert again["runs"] == report["runs"]


@pytest.mark.parametrize("kind", ["planar", "radial"])
@pytest.mark.parametrize("K", [1, 2, 10])
def test_density_follows_from_the_jacobian(kind: str, K: int) -> None:
    t = figure1.LAYERS[kind](K)
    x = torch.randn(20, 2)
    jacobians = torch.stack([torch.autograd.functional.jacobian(t, point) for point in x])
    for name, base in figure1.BASES.items():
        expected = base(x).exp() / jacobians.det().abs()
        got = figure1.density(base, t, t(x).detach())
        assert torch.allclose(got, expected, rtol=1e-7), name


@pytest.mark.parametrize("kind", ["planar", "radial"])
def test_layers_are_far_from_the_identity_and_nested(kind: str) -> None:
    x = torch.randn(1000, 2)
    ten = figure1.LAYERS[kind](10)
    for K in (1, 2):
        first = figure1.LAYERS[kind](K)
        for short, long in zip(first._map_parameters(), ten._map_parameters(), strict=True):
            assert short.equal(long[:K])
        log_det = first.log_abs_det_jacobian(x, first(x))
        assert log_det.std() > 0.15
        assert (first(x) - x).norm(dim=-1).mean() > 0.4


@pytest.mark.parametrize(("kind", "made_of"), [("planar", Planar), ("radial", Radial)])
@pytest.mark.parametrize("base", ["gaussian", "uniform"])
def test_the_box_holds_the_image(kind: str, made_of: type, base: str) -> None:
    """Of every point of the base's square, on its edge and inside."""
    t = figure1.LAYERS[kind](10)
    assert type(t.family) is made_of
    half = figure1.REACH if base == "gaussian" else figure1.HALF_WIDTH
    places = torch.linspace(-half, half, 301)
    image = t(torch.cartesian_prod(places, places))
    low, high = figure1._box(figure1.BASES[base], t)
    assert (low < image.amin(0)).all()
    assert (high > image.amax(0)).all()
    assert (high - low < 1.05 * (image.amax(0) - image.amin(0))).all()


def test_bases_are_densities_of_unit_variance() -> None:
    normal = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    x = torch.randn(5, 2)
    assert torch.allclose(figure1.gaussian(x), normal.log_prob(x))
    edge = math.sqrt(3) - 1e-9
    inside = figure1.uniform(torch.tensor([[0.0, 0.0], [edge, -edge]]))
    assert torch.allclose(inside.exp(), torch.tensor(1 / 12))
    assert figure1.uniform(torch.tensor([edge + 1e-6, 0.0])) == -math.inf


def test_integral_notices_a_density_that_is_none() -> None:
    layers = figure1.planar_layers(2)
    found = figure1.integrate(lambda x: figure1.uniform(x) + math.log(1.01), layers, 400)
    assert found["integral"] == pytest.approx(1.01, abs=2e-3)


def test_parts_of_labels_select_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure1, "PIXELS", 20)
    options = Options(out=tmp_path, quick=True, only=("uniform radial K=1",), progress=False)
    report = figure1.run(options)
    (run,) = report["runs"]
    assert (run["base"], run["kind"], run["K"]) == ("uniform", "radial", 1)
    assert not report["complete"]
    assert frame("figure1", report)["K = 2"].tolist() == ["–"] * 4
