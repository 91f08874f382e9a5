"""Figure 3: the runs, their numbers, and what is made of them."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from cases import slow

import pyroflow as pf
from rezende_mohamed_2015 import figure3, figure3_drawing
from rezende_mohamed_2015.results import Options, Run, label
from rezende_mohamed_2015.tables import frame

KEYS = ("energy", "kind", "K", "seed")
ONLY = ("U2 planar K=2", "U1 NICE permutation K=2", "U1 NICE orthogonal K=8")


def labels(runs: list[Run]) -> list[str]:
    return [label({column: run[column] for column in KEYS}) for run in runs]


def quick(out: Path, **options: object) -> dict:
    return figure3.run(Options(out=out, quick=True, progress=False, **options))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("figure3")
    return out, quick(out, only=ONLY, seeds=2)


def test_runs_are_stored_with_their_numbers(short: tuple[Path, dict]) -> None:
    out, report = short
    assert set(labels(report["runs"])) == {
        f"{cell} seed={seed}" for cell in ONLY for seed in (0, 1)
    }
    for found in report["runs"]:
        limit = report["bound_limits"][found["energy"]]
        assert found["kl"] == pytest.approx(found["bound"] - limit, abs=1e-9)
        assert 0 < found["kl"] < 200
        assert 0 < found["kl_se"] < 0.5
        assert 0.3 < found["mass_inside"] <= 1
    planar = report["runs"][labels(report["runs"]).index("U2 planar K=2 seed=0")]
    assert planar["parameters"] == 8 + 2 * 5
    assert not list((out / "checkpoints" / "figure3").glob("*seed=?.pt"))
    for name in ("figure3_kl.png", "figure3_densities.png"):
        assert (out / name).stat().st_size > 10_000


def test_a_rerun_fits_nothing_and_draws_again(
    short: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, report = short
    monkeypatch.setattr(figure3, "fit_energy", None)
    (out / "figure3_kl.png").unlink()
    again = quick(out, only=ONLY, seeds=2)
    assert again["runs"] == report["runs"]
    assert (out / "figure3_kl.png").exists()


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = figure3.fit_energy, []

    def stops(*args: object, **kwargs: object) -> None:
        calls.append(kwargs["checkpoint"].name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(figure3, "fit_energy", stops)
    monkeypatch.setattr(figure3, "save_figure", lambda figure, path: None)
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path, only=("planar K=2",))
    report = quick(tmp_path, only=("planar K=2",))
    assert len(report["runs"]) == 4
    assert len(calls) == 5
    assert calls[1] == calls[2]


@pytest.mark.parametrize(
    ("number", "kind", "K", "seed"),
    [(3, "planar", 8, 1), slow(2, "NICE permutation", 2, 0), (4, "NICE orthogonal", 2, 2)],
)
def test_a_run_is_what_its_columns_say(
    number: int, kind: str, K: int, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The energy, the layers and where they start, the rate, β and the seed."""
    real, calls = figure3.fit_energy, []

    def spy(flow: pf.Flow, target: Callable, **options: object) -> object:
        calls.append((copy.deepcopy(flow), target, options))
        return real(flow, target, **options)

    monkeypatch.setattr(figure3, "fit_energy", spy)
    monkeypatch.setattr(figure3, "save_figure", lambda figure, path: None)
    quick(tmp_path, only=(f"U{number} {kind} K={K} seed={seed}",), seeds=3)
    ((flow, target, options),) = calls
    z = torch.randn(7, 2)
    assert torch.equal(target(z), pf.targets.energy(number)(z))
    torch.manual_seed(seed)
    (same, _) = figure3.make_flow(kind, K).parts
    layers, _ = flow.parts
    assert all(map(torch.equal, layers.state_dict().values(), same.state_dict().values()))
    assert layers.w.shape[0] == K if kind == "planar" else len(layers.mixed) == K
    if kind == "NICE permutation":
        assert set(layers.mixed.unique().tolist()) == {0.0, 1.0}
    if kind == "NICE orthogonal":
        assert len(layers.mixed.unique()) > 2
    assert (options["lr"], options["seed"]) == (figure3.RATES[kind], seed)
    assert [options["annealing"](t) for t in (0, 24)] == [0.01, 1.0]
    assert options["annealing"](12) == pytest.approx(0.51)
    assert options["steps"] == 40


def test_the_real_budget() -> None:
    assert figure3._budget(False) == {"steps": 3000, "num_particles": 256, "fresh": 100_000}
    assert figure3.SEEDS == 5


@pytest.mark.slow
def test_runs_are_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure3, "save_figure", lambda figure, path: None)
    only = ("U1 NICE permutation K=2", "U1 planar K=2")
    one, two = (quick(tmp_path / name, only=only)["runs"] for name in "ab")
    assert len(one) == 2
    assert [run["kl"] for run in one] == [run["kl"] for run in two]


def test_panels_show_the_best_runs(short: tuple[Path, dict]) -> None:
    out, report = short
    best = figure3_drawing.shown(report["runs"])
    assert [(run["energy"], run["kind"], run["K"]) for run in best] == [
        ("U1", "NICE orthogonal", 8),
        ("U2", "planar", 2),
    ]
    low = figure3.summarise(report["runs"]).set_index(figure3.CELL)["low"]
    for run in best:
        density, kl = torch.load(out / "checkpoints" / "figure3" / f"{label(run)} density.pt")
        assert kl == low[run["energy"], run["kind"], run["K"]]
        area = (2 * figure3_drawing.WINDOW / figure3_drawing.PIXELS) ** 2
        assert 0.5 < density.sum() * area < 1.01


@pytest.mark.slow
def test_a_picture_without_its_densities_is_made_from_new_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a clone, which has the numbers and no checkpoints: only the panels' runs are fitted."""
    cell = "U2 planar K=2"
    report = quick(tmp_path, only=(cell,), seeds=2)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "figure3_densities.png").unlink()
    assert quick(tmp_path, only=(cell,), seeds=2) == report
    (left,) = (tmp_path / "checkpoints" / "figure3").iterdir()
    (best,) = figure3_drawing.shown(report["runs"])
    assert left.name == f"{label(best)} density.pt"
    assert torch.load(left)[1] == min(run["kl"] for run in report["runs"])
    shutil.rmtree(tmp_path / "checkpoints")
    with monkeypatch.context() as patched:
        patched.setattr(figure3, "fit_energy", None)
        quick(tmp_path, only=(cell,), seeds=2)  # the picture is there and shows the best runs


@pytest.mark.slow
def test_a_picture_of_other_runs_is_drawn_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an interruption between the last fit and the picture."""
    report = quick(tmp_path, only=("U2 planar K=2",))
    picture = tmp_path / "figure3_densities.png"
    before = picture.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(figure3, "volume_preserving_floor", stopped)
        with pytest.raises(KeyboardInterrupt):
            quick(tmp_path, only=("U1 planar K=2",))
    assert picture.read_bytes() == before
    again = quick(tmp_path, only=("U1 planar K=2",))
    assert picture.read_bytes() != before
    assert labels(again["runs"]) == ["U1 planar K=2 seed=0", *labels(report["runs"])]


def stopped(*_: object) -> None:
    raise KeyboardInterrupt


def test_panels_are_the_right_way_up() -> None:
    """Row i of a density is the i-th z2, column j the j-th z1, at the centres of the cells."""
    density = figure3_drawing._density(lambda z: -50 * ((z[:, 0] - 2) ** 2 + (z[:, 1] + 1) ** 2))
    row, column = divmod(density.argmax().item(), figure3_drawing.PIXELS)
    places = torch.linspace(-4, 4, figure3_drawing.PIXELS + 1)
    assert places[column] <= 2 <= places[column + 1]
    assert places[row] <= -1 <= places[row + 1]


def test_curves_are_medians_within_ranges() -> None:
    cell = {"energy": "U1", "kind": "planar", "low": 0.1, "median": 0.2, "high": 0.4}
    cells = pd.DataFrame([cell | {"K": K} for K in (8, 2)])
    figure = figure3_drawing.lengths(cells, {"U1": 0.05}, {"U1": -1.5})
    upper, lower = figure.axes
    assert list(upper.lines[0].get_xdata()) == [2, 8]
    assert list(upper.lines[0].get_ydata()) == [0.2, 0.2]
    assert list(lower.lines[0].get_ydata()) == [-1.3, -1.3]
    band = upper.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (0.1, 0.4)
    assert upper.lines[-1].get_ydata()[0] == 0.05
    assert lower.lines[-1].get_ydata()[0] == -1.5


def test_bound_of_a_known_gaussian() -> None:
    """For q = N(0, I) and U4, F by quadrature on a grid."""
    target = pf.targets.energy(4)
    q = figure3.make_flow("planar", 0)()
    places = torch.linspace(-8, 8, 801)
    z = torch.cartesian_prod(places, places)
    log_q = q.log_prob(z)
    exact = (log_q.exp() * (log_q + target(z))).sum().item() * 0.02**2
    judged = figure3._judged(q, target, 100_000)
    assert judged["bound"] == pytest.approx(exact, abs=5 * judged["kl_se"])
    assert judged["kl_se"] < 0.05
    assert judged["mass_inside"] > 0.9999


def test_annealing_is_equation_20_scaled() -> None:
    beta = figure3.annealing(1000)
    assert [beta(0), beta(300), beta(600), beta(999)] == pytest.approx([0.01, 0.51, 1.0, 1.0])


@pytest.mark.parametrize("kind", figure3.KINDS)
def test_flows_start_as_gaussians(kind: str) -> None:
    q = figure3.make_flow(kind, 3)()
    z = torch.randn(6, 2)
    expected = -0.5 * z.square().sum(-1) - math.log(2 * math.pi)
    assert torch.allclose(q.log_prob(z), expected)


def test_summary_has_medians_ranges_and_the_best_of_three() -> None:
    cell = {"energy": "U3", "kind": "planar", "K": 8, "seconds": 3.0}
    runs = [
        cell | {"seed": seed, "kl": kl, "mass_inside": 1 - kl / 10}
        for seed, kl in enumerate((0.5, 0.3, 0.4, 0.1, 0.9))
    ]
    (found,) = figure3.summarise(runs).to_dict("records")
    assert found == {
        "energy": "U3",
        "kind": "planar",
        "K": 8,
        "seeds": 5,
        "median": 0.4,
        "low": 0.1,
        "high": 0.9,
        "best_of_three": 0.3,
        "least_mass_inside": 0.91,
        "fastest": 3.0,
        "slowest": 3.0,
    }


def test_table_sets_ours_beside_the_reference(short: tuple[Path, dict]) -> None:
    _, report = short
    table = frame("figure3", report).set_index("KL, nats")
    assert len(table) == 12
    row = table.loc["U2, K = 2"]
    best = min(run["kl"] for run in report["runs"] if run["kind"] == "planar")
    assert row["a plain recipe"] == "0.820"
    assert row["planar, best of 3"] == f"{best:.4f}"
    assert row["NICE permutation"] == "–"
    assert row["no NICE below"] == "0.053"
    assert row["seeds"] == "2"
    assert table.loc["U4, K = 32"].tolist() == ["0.022", *["–"] * 4, "0.030", "–", "–"]


@pytest.mark.slow
@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize(("number", "bound"), [(1, 0.02), (2, 0.02), (3, 0.1), (4, 0.05)])
def test_planar_reaches_the_energies(number: int, bound: float, tmp_path: Path) -> None:
    only = (f"U{number} planar K=32",)
    report = figure3.run(Options(out=tmp_path, seeds=3, only=only, progress=False))
    (best,) = figure3.summarise(report["runs"])["best_of_three"]
    print(f"U{number}: KL = {best:.4f}")
    assert -0.01 < best < bound
