"""Figure 4 and Table 2: the command from files to figure, and what the runs depend on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from image_cases import write_mnist
from typer.testing import CliRunner

from pyroflow.transforms import ConditionalPlanar
from rezende_mohamed_2015 import dlgm_study, image_files, mnist, mnist_drawing, sylvester
from rezende_mohamed_2015.__main__ import app
from rezende_mohamed_2015.dlgm_training import Schedule
from rezende_mohamed_2015.nice import AdditiveCoupling
from rezende_mohamed_2015.results import Options

pytestmark = pytest.mark.usefixtures("float32")

FLOWS = ("planar K=0", "planar K=10", "NICE K=10")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("data"), 1000, 100)


def quick(out: Path, data: Path | None, *only: str, module: Any = mnist) -> dict[str, Any]:
    return module.run(Options(out=out, quick=True, data=data, only=only, progress=False))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out")
    torch.set_default_dtype(torch.float32)
    report = quick(out, data, *FLOWS)
    torch.set_default_dtype(torch.float64)
    return out, report


def test_a_run_scores_every_flow_that_is_asked_for(short: tuple[Path, dict[str, Any]]) -> None:
    out, report = short
    assert list(report["runs"]) == [f"{flow} seed=0" for flow in FLOWS]
    for found in report["runs"].values():
        assert (found["images"], found["samples"], found["updates"]) == (100, 10, 50)
        assert (found["skipped_updates"], found["processes"]) == (0, 1)
        assert found["nll"] < found["free_energy"] < 784 * math.log(2)
        assert found["kl"] == pytest.approx(found["free_energy"] - found["nll"])
        assert 0 < found["nll_se"] < found["nll"]
        assert found["seconds"] > 0
    assert (out / "mnist.png").stat().st_size > 10_000


def test_all_lengths_have_the_same_networks(short: tuple[Path, dict[str, Any]]) -> None:
    """What K layers add: planar (400 + 1) · 81 a layer, and their own start; NICE is global."""
    parameters = [run["parameters"] for run in short[1]["runs"].values()]
    networks = 4 * 400 * (784 + 1) + 80 * 401 + 4 * 400 * 41 + 784 * 401
    assert parameters[0] == networks
    assert parameters[1] - networks == 10 * (400 + 2) * 81
    assert parameters[2] > networks
    model = mnist.model(torch.zeros(784), mnist.nice(10))
    assert parameters[2] - networks == sum(p.numel() for p in model.parts.parameters())


def test_a_rerun_trains_nothing_and_draws_again(
    short: tuple[Path, dict[str, Any]], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, report = short
    monkeypatch.setattr(dlgm_study, "train", None)
    (out / "mnist.png").unlink()
    assert quick(out, data, *FLOWS) == report
    assert (out / "mnist.png").exists()


def test_a_lost_file_of_results_is_made_again_from_the_checkpoints(
    short: tuple[Path, dict[str, Any]], data: Path
) -> None:
    out, report = short
    whole = (out / "mnist.json").read_text()
    (out / "mnist.json").unlink()
    again = quick(out, data, FLOWS[1])["runs"]["planar K=10 seed=0"]
    (out / "mnist.json").write_text(whole)
    was = report["runs"]["planar K=10 seed=0"]
    for name in ("free_energy", "nll", "updates", "seconds"):
        assert again[name] == was[name], name


def test_networks_start_alike_whatever_the_flow(data: Path) -> None:
    study = mnist.study("mnist", {}, Options(out=data, quick=True, data=data))
    starts = []
    with pytest.MonkeyPatch.context() as patch:

        def no_training(dlgm: Any, *_: Any, **__: Any) -> None:
            starts.append(dlgm.encoder.linear.weight.clone())
            raise InterruptedError

        patch.setattr(dlgm_study, "train", no_training)
        for flow in (list, lambda: mnist.planar(10), lambda: mnist.nice(10)):
            named = dlgm_study.Study(**vars(study) | {"flows": {"flow": flow}})
            with pytest.raises(InterruptedError):
                dlgm_study.run_study(named, Options(out=data / "out", progress=False))
    assert len(starts) == 3
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], starts[2])


def test_images_are_drawn_once_and_not_cut_at_a_threshold(data: Path) -> None:
    """Larochelle & Murray's way: each pixel by its grey, from a fixed seed, for both sets."""
    options = Options(out=data, data=data)
    study, again = (mnist.study("mnist", {}, options) for _ in range(2))
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


def test_flows_are_what_their_keys_say(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr(mnist, "run_study", lambda study, _: asked.update(study.flows))
    mnist.run(Options(out=data, data=data))
    assert list(asked) == [f"planar K={K}" for K in (0, 10, 20, 40, 80)] + [
        f"NICE K={K}" for K in (10, 20, 40, 80)
    ]
    assert asked["planar K=0"]() == []
    for key, make in list(asked.items())[1:]:
        kind, K = key.split(" K=")
        (layers,) = make()
        assert isinstance(layers, ConditionalPlanar if kind == "planar" else AdditiveCoupling)
        stack = layers.condition(torch.zeros(1, 400)).u[0] if kind == "planar" else layers.mixed
        assert stack.shape[:2] == (int(K), 40)
    assert set(layers.mixed.unique().tolist()) == {0.0, 1.0}


def test_other_images_are_another_file(
    short: tuple[Path, dict[str, Any]], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "TEST_SEED", 7)
    with pytest.raises(ValueError, match=r"mnist\.json is of a run with digests="):
        quick(short[0], data, *FLOWS)


def test_the_real_run_is_the_papers_but_for_its_schedule() -> None:
    assert (mnist.LATENT, mnist.HIDDEN, mnist.SAMPLES) == (40, 400, 200)
    assert mnist.LENGTHS == (10, 20, 40, 80)
    assert mnist.SCHEDULE.batch_size == 100
    assert mnist.SCHEDULE.updates < 500_000


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
    with pytest.raises(ValueError, match=r"mnist\.json is of a run with schedule="):
        quick(short[0], data, *FLOWS)


# Sylvester


def test_sylvester_stands_beside_the_planar_flow_of_mnist(tmp_path: Path, data: Path) -> None:
    """Equal K·M and equal updates."""
    planar = quick(tmp_path, data, "planar K=40", "NICE K=40")["runs"]["planar K=40 seed=0"]
    report = quick(tmp_path, data, "qr", module=sylvester)
    assert report["planar"] == {"planar K=40 seed=0": planar}
    assert list(report["runs"]) == ["qr M=8 L=5 seed=0"]
    found = report["runs"]["qr M=8 L=5 seed=0"]
    assert found["updates"] == planar["updates"]
    assert found["nll"] < found["free_energy"] < 784 * math.log(2)
    assert (tmp_path / "sylvester.png").stat().st_size > 5_000
    lines = sylvester.table(report).splitlines()
    assert lines[1].split()[-4:] == [f"{planar['parameters']:,}", "86.06", "/", "81.91"]
    assert lines[2].split()[-3:] == ["83.32", "/", "80.22"]
    assert f"{found['nll']:.2f}" in lines[2]


def test_sylvester_stands_beside_no_other_model(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other updates, other images or a quick run: no planar flow is shown. The rate is its own."""
    study = mnist.study("mnist", {}, Options(out=tmp_path, data=data))
    ours = dlgm_study.settings(study, False)
    file = tmp_path / "mnist.json"
    assert sylvester.planar(file, ours) == {}
    for change, runs in (
        ({}, {"planar K=40 seed=0": {"nll": 87.0}}),
        ({"quick": True}, {}),
        ({"digests": ["0", "1"]}, {}),
        ({"schedule": ours["schedule"] | {"updates": 7}}, {}),
        ({"schedule": ours["schedule"] | {"flow_lr": 7.0}}, {"planar K=40 seed=0": {"nll": 87.0}}),
    ):
        report = {"settings": ours | change, "runs": {"planar K=40 seed=0": {"nll": 87.0}}}
        report["runs"]["planar K=4 seed=0"] = report["runs"]["NICE K=40 seed=0"] = {"nll": 90.0}
        file.write_text(json.dumps(report))
        assert sylvester.planar(file, ours) == runs
    asked = []
    monkeypatch.setattr(sylvester, "run_study", lambda study, _: asked.append(study))
    sylvester.run(Options(out=tmp_path, data=data))
    rates = {**vars(mnist.SCHEDULE), "flow_lr": sylvester.FLOW_LR}
    assert vars(asked[0].schedule) == rates


@pytest.mark.parametrize("kind", sylvester.UNITS)
def test_sylvester_flows_start_near_the_identity_and_move_every_latent(kind: str) -> None:
    """Rotations stay, but the density is hardly another."""
    (flow,) = sylvester.sylvester(kind)
    z, context = torch.randn(100, 40), torch.randn(100, 400) / 20
    layers = flow.condition(context)
    M, L = sylvester.UNITS[kind], layers.R.shape[-3]
    assert (layers.orthogonal, M * L, layers.R.shape[-1]) == (kind, 40, M)
    assert layers.log_abs_det_jacobian(z, layers(z)).abs().max() < 2
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.1 * torch.randn_like(p)
    moved = flow.condition(context)(z) - z
    assert (moved.abs().amax(0) > 1e-3).all()


# the figure and the table


def runs_of(values: dict[str, float]) -> dict[str, dict[str, float]]:
    errors = {"free_energy_se": 0.1, "kl_se": 0.1, "nll_se": 0.1}
    return {key: {"free_energy": v + 5, "kl": 5.0, "nll": v, **errors} for key, v in values.items()}


def test_curves_are_means_over_seeds_and_share_their_start() -> None:
    runs = runs_of({"planar K=0 seed=0": 90.0, "planar K=0 seed=1": 92.0, "NICE K=10 seed=0": 89.0})
    assert mnist_drawing.curves(runs, "NICE", "nll") == {0: 91.0, 10: 89.0}
    assert mnist_drawing.curves(runs, "planar", "free_energy") == {0: 96.0}


def test_the_table_has_the_papers_numbers() -> None:
    """Table 2, and what can be read off Figure 4, to 0.05 nats."""
    runs = runs_of({"planar K=0 seed=0": 90.0, "planar K=80 seed=0": 86.0})
    _, *lines = (line.split("  ") for line in mnist.table({"runs": runs}).splitlines())
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert rows == [
        ["planar, −ELBO", "95.00", "91.00"],
        ["the paper", "96.75", "93.55", "91.95", "90.65", "89.60"],
        ["planar, KL", "5.00", "5.00"],
        ["the paper", "6.83", "6.04", "5.43", "4.86", "4.43"],
        ["planar, −ln p(x)", "90.00", "86.00"],
        ["the paper", "89.90", "87.50", "86.50", "85.70", "85.10"],
        ["NICE, −ELBO", "95.00"],
        ["the paper", "96.75", "94.85", "93.95", "93.00", "92.85"],
        ["NICE, KL", "5.00"],
        ["the paper", "6.83", "6.27", "6.01", "5.69", "5.56"],
        ["NICE, −ln p(x)", "90.00"],
        ["the paper", "89.90", "88.60", "87.90", "87.30", "87.20"],
    ]


def test_the_figure_has_ours_and_theirs() -> None:
    figure = mnist_drawing.draw(runs_of({"planar K=0 seed=0": 90.0, "NICE K=20 seed=0": 88.0}))
    bound, kl, nll = figure.axes
    for ax, paper in ((bound, 96.75), (kl, 6.83), (nll, 89.9)):
        dashed = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
        assert dashed["planar, the paper"][0] == dashed["NICE, the paper"][0] == paper
    planar, nice = nll.containers
    assert (planar.get_label(), nice.get_label()) == ("planar, pyroflow", "NICE, pyroflow")
    (line, _, (bars,)) = nice
    assert list(line.get_ydata()) == [90.0, 88.0]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [
        pytest.approx([89.9, 90.1]),
        pytest.approx([87.9, 88.1]),
    ]
