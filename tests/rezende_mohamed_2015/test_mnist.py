"""Figure 4 and Table 2: the command from files to figure, and what the runs depend on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from image_cases import write_mnist
from typer.testing import CliRunner

from pyroflow.transforms import ConditionalPlanar
from rezende_mohamed_2015 import (
    dlgm_study,
    image_files,
    mnist,
    mnist_drawing,
    mnist_validation,
    sylvester,
)
from rezende_mohamed_2015.__main__ import app
from rezende_mohamed_2015.dlgm_training import Schedule
from rezende_mohamed_2015.nice import AdditiveCoupling
from rezende_mohamed_2015.results import Options
from rezende_mohamed_2015.tables import frame

pytestmark = pytest.mark.usefixtures("float32")

FLOWS = [("planar", 0), ("planar", 10), ("NICE", 10)]
ONLY = [f"{kind} K={K}" for kind, K in FLOWS]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("data"), 1000, 100)


def quick(out: Path, data: Path | None, *only: str, module: Any = mnist) -> dict[str, Any]:
    options = {"only": only, "draws": "static", "progress": False}
    return module.run(Options(out=out, quick=True, data=data, **options))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out")
    torch.set_default_dtype(torch.float32)
    report = quick(out, data, *ONLY)
    torch.set_default_dtype(torch.float64)
    return out, report


def test_a_run_scores_every_flow_that_is_asked_for(short: tuple[Path, dict[str, Any]]) -> None:
    out, report = short
    runs = report["runs"]
    assert [(run["kind"], run["K"], run["seed"]) for run in runs] == [(*flow, 0) for flow in FLOWS]
    for found in runs:
        assert (found["images"], found["samples"], found["updates"]) == (100, 10, 50)
        assert (found["skipped_updates"], found["processes"]) == (0, 1)
        assert found["nll"] < found["free_energy"] < 784 * math.log(2)
        assert found["kl"] == pytest.approx(found["free_energy"] - found["nll"])
        assert 0 < found["nll_se"] < found["nll"]
        assert found["seconds"] > 0
    assert (out / "mnist.png").stat().st_size > 10_000


def test_all_lengths_have_the_same_networks(short: tuple[Path, dict[str, Any]]) -> None:
    """What K layers add: planar (400 + 1) · 81 a layer, and their own start; NICE is global."""
    parameters = [run["parameters"] for run in short[1]["runs"]]
    networks = 4 * 400 * (784 + 1) + 80 * 401 + 4 * 400 * 41 + 784 * 401
    assert parameters[0] == networks
    assert parameters[1] - networks == 10 * (400 + 2) * 81
    assert parameters[2] > networks
    model = mnist.model(torch.zeros(784), mnist.layers("NICE", 10))
    assert parameters[2] - networks == sum(p.numel() for p in model.parts.parameters())


def test_a_rerun_trains_nothing_and_draws_again(
    short: tuple[Path, dict[str, Any]], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, report = short
    monkeypatch.setattr(dlgm_study, "train", None)
    (out / "mnist.png").unlink()
    assert quick(out, data, *ONLY) == report
    assert (out / "mnist.png").exists()


def test_a_lost_file_of_results_is_made_again_from_the_checkpoints(
    short: tuple[Path, dict[str, Any]], data: Path
) -> None:
    out, report = short
    whole = (out / "mnist.json").read_text()
    (out / "mnist.json").unlink()
    (again,) = quick(out, data, ONLY[1])["runs"]
    (out / "mnist.json").write_text(whole)
    was = report["runs"][1]
    for name in ("free_energy", "nll", "updates", "seconds"):
        assert again[name] == was[name], name


def test_networks_start_alike_whatever_the_flow(data: Path) -> None:
    study = mnist.study("mnist", [], mnist.layers, Options(out=data, quick=True, data=data))
    starts = []
    with pytest.MonkeyPatch.context() as patch:

        def no_training(dlgm: Any, *_: Any, **__: Any) -> None:
            starts.append(dlgm.encoder.linear.weight.clone())
            raise InterruptedError

        patch.setattr(dlgm_study, "train", no_training)
        for kind, K in FLOWS:
            named = replace(study, flows=[{"kind": kind, "K": K}])
            with pytest.raises(InterruptedError):
                dlgm_study.run_study(named, Options(out=data / "out", progress=False))
    assert len(starts) == 3
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], starts[2])


def test_images_are_drawn_once_and_not_cut_at_a_threshold(data: Path) -> None:
    """Larochelle & Murray's way: each pixel by its grey, from a fixed seed, for both sets."""
    options = Options(out=data, data=data, draws="static")
    study, again = (mnist.study("mnist", [], mnist.layers, options) for _ in range(2))
    images = image_files.mnist(data)
    for ours, same, grey, seed in (
        (study.training, again.training, images.train_images, 0),
        (study.test, again.test, images.test_images, 1),
    ):
        assert torch.equal(ours, same)
        assert torch.equal(ours, image_files.binarize(grey, seed))
        assert ours.unique().tolist() == [0, 1]
        assert (ours.bool() != (grey > 127)).float().mean() > 0.02
        assert ours.float().mean() == pytest.approx((grey / 255.0).mean().item(), rel=0.02)
    assert study.grey is None


def test_fresh_draws_are_of_the_grey_values_and_all_else_of_the_static_draw(data: Path) -> None:
    fresh, static = (
        mnist.study("mnist", [], mnist.layers, Options(out=data, data=data, draws=draws))
        for draws in ("fresh", "static")
    )
    assert torch.equal(fresh.grey, image_files.mnist(data).train_images)
    assert torch.equal(fresh.test, static.test)
    assert torch.equal(fresh.model([]).centre, static.model([]).centre)
    assert dlgm_study.settings(fresh, False) == dlgm_study.settings(static, False)
    asked = [(draws, K) for draws in ("fresh", "static") for K in (0, 10, 80)]
    more = {"fresh": fresh, "static": static}
    runs = [{"kind": "planar", "K": K, "seed": 0} for _, K in asked]
    found = [more[draws].more_samples(run) for (draws, _), run in zip(asked, runs, strict=True)]
    assert more["fresh"].more_samples(runs[0] | {"seed": 1}) == 0  # of one seed, as it is dear
    assert found == [5000, 0, 5000, 0, 0, 0]


def test_flows_are_what_their_columns_say(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(mnist, "run_study", lambda study, _: asked.append(study))
    mnist.run(Options(out=data, data=data))
    ((first, *others), make) = asked[0].flows, asked[0].layers
    assert [(flow["kind"], flow["K"]) for flow in (first, *others)] == [
        *(("planar", K) for K in (0, 10, 20, 40, 80)),
        *(("NICE", K) for K in (10, 20, 40, 80)),
    ]
    assert {flow.pop("draws") for flow in (first, *others)} == {"fresh"}
    assert make(**first) == []
    for flow in others:
        (layers,) = make(**flow)
        planar = flow["kind"] == "planar"
        assert isinstance(layers, ConditionalPlanar if planar else AdditiveCoupling)
        stack = layers.condition(torch.zeros(1, 400)).u[0] if planar else layers.mixed
        assert stack.shape[:2] == (flow["K"], 40)
    assert set(layers.mixed.unique().tolist()) == {0.0, 1.0}


def test_other_images_are_another_file(
    short: tuple[Path, dict[str, Any]], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "TEST_SEED", 7)
    with pytest.raises(ValueError, match=r"mnist\.json is of a run with digests="):
        quick(short[0], data, *ONLY)


def test_the_real_run_is_the_papers_but_for_its_schedule() -> None:
    assert (mnist.LATENT, mnist.HIDDEN, mnist.SAMPLES) == (40, 400, 200)
    assert mnist.LENGTHS == (10, 20, 40, 80)
    for schedule in mnist.SCHEDULES.values():
        assert schedule.batch_size == 100
        assert schedule.updates < 500_000
        assert schedule.cool_down == 0.675 * schedule.updates


def test_pixels_start_at_their_mean() -> None:
    mean = torch.linspace(0, 1, 784)
    model = mnist.model(mean, [])
    start = model.outputs.bias.detach().sigmoid()
    torch.testing.assert_close(start, mean.clamp(1e-3, 1 - 1e-3))
    assert torch.equal(model.centre, mean)


@pytest.mark.parametrize("name", ["mnist", "sylvester"])
def test_the_command_asks_for_data(tmp_path: Path, name: str) -> None:
    command = [name, "--quick", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, command).exit_code == 2
    nothing = CliRunner().invoke(app, [*command, "--data", str(tmp_path)])
    assert nothing.exit_code == 2
    assert "train-images" in nothing.output
    assert not (tmp_path / f"{name}.json").exists()


def test_another_schedule_is_another_file(
    short: tuple[Path, dict[str, Any]], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "Schedule", lambda *_, **__: Schedule(60, lr=1e-3, flow_lr=1e-3))
    with pytest.raises(ValueError, match=r"mnist\.json is of a run with schedules="):
        quick(short[0], data, *ONLY)


@pytest.mark.slow
def test_draws_are_compared_on_images_held_out(tmp_path: Path, data: Path) -> None:
    """A sixth of the 1,000 training images; nothing is trained on them, or on test images."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist_validation, "run_study", lambda study, _: asked.append(study))
        mnist_validation.run(Options(out=tmp_path, data=data))
    images = image_files.mnist(data)
    for study, draws in zip(asked, mnist.SCHEDULES, strict=True):
        assert study.flows == [{"kind": "planar", "K": 20, "draws": draws}]
        assert study.schedule == mnist.SCHEDULES[draws]
        assert (len(study.training), len(study.test)) == (833, 167)
        assert (study.test <= images.train_images[833:]).all()  # ink only where there is grey
        assert study.grey is None or torch.equal(study.grey, images.train_images[:833])
    assert [study.grey is None for study in asked] == [True, False]
    runs = quick(tmp_path, data, module=mnist_validation)["runs"]
    assert [(run["draws"], run["images"]) for run in runs] == [("fresh", 100), ("static", 100)]
    assert len(frame("mnist_validation", {"runs": runs})) == 2


# Sylvester


@pytest.mark.slow
def test_sylvester_stands_beside_the_planar_flow_of_mnist(tmp_path: Path, data: Path) -> None:
    """Equal K·M and equal updates."""
    planar, nice = quick(tmp_path, data, "planar K=40", "NICE K=40")["runs"]
    report = quick(tmp_path, data, "qr", module=sylvester)
    assert (planar["kind"], nice["kind"]) == ("planar", "NICE")
    assert report["planar"] == [planar]
    (found,) = report["runs"]
    assert [found[column] for column in ("kind", "M", "L", "seed")] == ["qr", 8, 5, 0]
    assert found["updates"] == planar["updates"]
    assert found["nll"] < found["free_energy"] < 784 * math.log(2)
    assert (tmp_path / "sylvester.png").stat().st_size > 5_000
    table = frame("sylvester", report)
    assert table.iloc[:, 9].tolist() == ["86.06 / 81.91", "83.32 / 80.22"]
    assert table["parameters"][0] == f"{planar['parameters']:,}"
    assert table["−ln p"][1].startswith(f"{found['nll']:.2f}")


def with_static(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    schedules = settings["schedules"]
    return schedules | {"static": schedules["static"] | changes}


def test_sylvester_stands_beside_no_other_model(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other updates, other images or a quick run: no planar flow is shown. The rate is its own."""
    study = mnist.study("mnist", [], mnist.layers, Options(out=tmp_path, data=data))
    ours = dlgm_study.settings(study, False)
    file = tmp_path / "mnist.json"
    assert sylvester.planar(file, ours) == []
    beside = {"kind": "planar", "K": 40, "nll": 87.0}
    others = [{"kind": "planar", "K": 4, "nll": 90.0}, {"kind": "NICE", "K": 40, "nll": 90.0}]
    for change, runs in (
        ({}, [beside]),
        ({"quick": True}, []),
        ({"digests": ["0", "1"]}, []),
        ({"schedules": with_static(ours, updates=7)}, []),
        ({"schedules": with_static(ours, flow_lr=7.0)}, [beside]),
    ):
        report = {"settings": ours | change, "runs": [beside, *others]}
        file.write_text(json.dumps(report))
        assert sylvester.planar(file, ours) == runs
    asked = []
    monkeypatch.setattr(sylvester, "run_study", lambda study, _: asked.append(study))
    sylvester.run(Options(out=tmp_path, data=data))
    for draws, schedule in mnist.SCHEDULES.items():
        rates = {**vars(schedule), "flow_lr": sylvester.FLOW_LR}
        assert asked[0].facts["schedules"][draws] == rates
        assert draws != "fresh" or vars(asked[0].schedule) == rates


@pytest.mark.parametrize("kind", sylvester.UNITS)
def test_sylvester_flows_start_near_the_identity_and_move_every_latent(kind: str) -> None:
    """Rotations stay, but the density is hardly another."""
    M = sylvester.UNITS[kind]
    (flow,) = sylvester.layers(kind, M, 40 // M)
    z, context = torch.randn(100, 40), torch.randn(100, 400) / 20
    layers = flow.condition(context)
    assert (layers.family.orthogonal, layers.R.shape[-3:]) == (kind, (40 // M, M, M))
    assert layers.log_abs_det_jacobian(z, layers(z)).abs().max() < 2
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.1 * torch.randn_like(p)
    moved = flow.condition(context)(z) - z
    assert (moved.abs().amax(0) > 1e-3).all()


# the figure


def runs_of(
    values: dict[tuple[str, int, int], float], draws: str = "fresh"
) -> list[dict[str, Any]]:
    errors = {"free_energy_se": 0.1, "kl_se": 0.1, "nll_se": 0.1}
    return [
        {"kind": kind, "K": K, "draws": draws, "seed": seed, "free_energy": v + 5, "kl": 5.0}
        | {"nll": v}
        | errors
        for (kind, K, seed), v in values.items()
    ]


def test_curves_are_means_over_seeds_and_share_their_start() -> None:
    runs = runs_of({("NICE", 10, 0): 89.0, ("planar", 0, 0): 90.0, ("planar", 0, 1): 92.0})
    assert mnist_drawing.curves(runs, "NICE", "nll") == {0: 91.0, 10: 89.0}
    assert mnist_drawing.curves(runs, "planar", "free_energy") == {0: 96.0}


def test_the_figure_has_ours_and_theirs() -> None:
    values = {("planar", 0, 0): 90.0, ("NICE", 20, 0): 88.0}
    worse = {flow: nll + 1 for flow, nll in values.items()}
    figure = mnist_drawing.draw([*runs_of(worse, "static"), *runs_of(values)])
    bound, kl, nll = figure.axes
    for ax, paper in ((bound, 96.75), (kl, 6.83), (nll, 89.9)):
        dashed = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
        assert dashed["planar, the paper"][0] == dashed["NICE, the paper"][0] == paper
    planar, _, nice, static = nll.containers
    labels = [container.get_label() for container in nll.containers]
    assert labels == [
        f"{k}, pyroflow, {d}" for k in ("planar", "NICE") for d in ("fresh", "static")
    ]
    assert list(static[0].get_ydata()) == [91.0, 89.0]
    (line, _, (bars,)) = nice
    assert list(line.get_ydata()) == [90.0, 88.0]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [
        pytest.approx([89.9, 90.1]),
        pytest.approx([87.9, 88.1]),
    ]
