"""Table 3: the logit-normal likelihood, the command on small files, and the order of the flows."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor
from typer.testing import CliRunner

from pyroflow.seeds import seeded
from rezende_mohamed_2015 import cifar, dlgm_study, image_files
from rezende_mohamed_2015.__main__ import app
from rezende_mohamed_2015.dlgm import DLGM, LOGIT_NORMAL, MAX_LOG_SCALE
from rezende_mohamed_2015.dlgm_scores import log_weights
from rezende_mohamed_2015.dlgm_study import Study, run_study
from rezende_mohamed_2015.dlgm_training import Schedule, train
from rezende_mohamed_2015.results import Options
from rezende_mohamed_2015.tables import frame

LENGTHS = [0, 2, 5, 10]


def outputs(mean: list[float], scale: list[float]) -> Tensor:
    """What the network puts out for means and scales of the logits."""
    raw = [MAX_LOG_SCALE * math.atanh(math.log(s) / MAX_LOG_SCALE) for s in scale]
    return torch.tensor([*mean, *raw])


def leaves(count: int, seed: int, noise: float = 0.03, discs: int = 50) -> Tensor:
    """Pictures of discs that hide each other, after the dead leaves of natural images.

    Radii follow a power law, the three channels go together, edges are soft and there is noise.
    Shape (count, 3, 32, 32), in [0, 1].
    """
    g = torch.Generator().manual_seed(seed)
    grid = torch.arange(32.0)
    pictures = torch.full((count, 3, 32, 32), 0.5)
    for _ in range(discs):
        grey = 0.15 + 0.7 * torch.rand(count, 1, 1, 1, generator=g)
        colour = grey + 0.1 * torch.randn(count, 3, 1, 1, generator=g)
        radius = 2 / torch.rand(count, 1, 1, generator=g).clamp(min=0.1)
        left, top = 32 * torch.rand(2, count, 1, 1, generator=g)
        inside = radius - torch.hypot(grid - left, grid[:, None] - top)
        cover = (inside / 0.7).sigmoid()[:, None]
        pictures = pictures * (1 - cover) + colour * cover
    return (pictures + noise * torch.randn(pictures.shape, generator=g)).clamp(0, 1)


def cut(pictures: Tensor, count: int, seed: int) -> Tensor:
    return cifar.colours(image_files.patches(pictures, count, 8, seed))


def small(training: Tensor, test: Tensor, schedule: Schedule) -> Study:
    return cifar.study(training, test, latent=10, hidden=48, schedule=schedule, samples=50)


def short_schedule(updates: int) -> Schedule:
    """Falls from its peak on, and has no annealing to speak of."""
    lengths = {"warm_up": 50, "cool_down": updates, "annealing": 1, "batch_size": 50}
    return Schedule(updates, lr=3e-3, flow_lr=5e-3, **lengths)


# the likelihood


@pytest.mark.parametrize(
    ("mean", "scale"), [(-6.0, 0.02), (-4.0, 3.0), (0.0, 0.7), (1.5, 3.0), (8.0, 0.5)]
)
def test_logit_normal_integrates_to_one(mean: float, scale: float) -> None:
    density = LOGIT_NORMAL.make(outputs([mean], [scale]))
    edges = torch.sigmoid(mean + scale * torch.linspace(-9, 9, 37)).tolist()
    pieces = zip([0.0, *edges], [*edges, 1.0], strict=True)
    mass = sum(
        quad(lambda x: density.log_prob(torch.tensor([x])).exp().item(), *piece)[0]
        for piece in pieces
    )
    assert mass == pytest.approx(1, abs=1e-6)


def test_logit_normal_is_the_papers() -> None:
    """Π N(logit x | µ, α) / (x (1 − x)), section 6.3, in plain arithmetic."""
    x, mean, scale = [0.3, 1e-4, 1 - 1e-4], [-1.0, -9.0, 3.0], [0.5, 0.25, 2.0]
    expected = 1.0
    for x_i, m, s in zip(x, mean, scale, strict=True):
        t = math.log(x_i / (1 - x_i))
        normal = math.exp(-((t - m) ** 2) / (2 * s * s)) / (s * math.sqrt(2 * math.pi))
        expected *= normal / (x_i * (1 - x_i))
    density = LOGIT_NORMAL.make(outputs(mean, scale).expand(4, 5, 6))
    assert density.batch_shape == (4, 5)
    found = density.log_prob(torch.tensor(x).expand(5, 3))
    torch.testing.assert_close(found, torch.full((4, 5), math.log(expected)))


@pytest.mark.parametrize("log_scale", [-4.9, -2.0, 0.0, 2.0])
def test_every_colour_is_accurate_in_float32(log_scale: float) -> None:
    colours = torch.arange(256, dtype=torch.uint8)[:, None]
    x = image_files.scale_to_open_interval(colours).float()
    mean = (x.double().logit() + math.exp(log_scale)).float()
    raw = torch.full_like(mean, MAX_LOG_SCALE * math.atanh(log_scale / MAX_LOG_SCALE))
    out = torch.cat([mean, raw], -1)
    exact = LOGIT_NORMAL.make(out.double()).log_prob(x.double())
    found = LOGIT_NORMAL.make(out).log_prob(x)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 2e-4


def test_scales_are_bounded_and_keep_their_gradient() -> None:
    """Pixels that repeat exactly want a scale of 0; one that went too far must find back."""
    raw = torch.tensor([-1e3, -12.0, 12.0, 1e3], requires_grad=True)
    density = LOGIT_NORMAL.make(torch.cat([torch.zeros(4), raw]))
    log_scale = density.base_dist.base_dist.scale.log()
    assert log_scale.detach().abs().max() < MAX_LOG_SCALE + 1e-9
    density.log_prob(torch.full((4,), 0.8)).backward()
    assert raw.grad[1] > 1e3  # the residual is 1.4, the scale below 0.01
    assert raw.grad[2] < -0.01
    assert raw.grad.isfinite().all()


# the command


def write_cifar(folder: Path) -> Path:
    """The six files of the binary version, with 20 pictures in each."""
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for seed, name in enumerate(names):
        rows = (255 * leaves(20, seed)).round().to(torch.uint8).flatten(1)
        labels = torch.full((20, 1), seed, dtype=torch.uint8)
        (folder / name).write_bytes(torch.cat([labels, rows], 1).numpy().tobytes())
    return folder


def quick(out: Path, data: Path | None, **options: Any) -> dict[str, Any]:
    return cifar.run(Options(out=out, quick=True, data=data, progress=False, **options))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    out, data = tmp_path_factory.mktemp("out"), write_cifar(tmp_path_factory.mktemp("data"))
    return out, data, quick(out, data)


def test_a_run_scores_every_flow(short: tuple[Path, Path, dict[str, Any]]) -> None:
    out, _, report = short
    assert [(run["K"], run["seed"]) for run in report["runs"]] == [(K, 0) for K in LENGTHS]
    for found in report["runs"]:
        assert (found["images"], found["samples"], found["updates"]) == (100, 10, 20)
        assert found["skipped_updates"] == 0
        assert found["nll"] <= found["free_energy"] < 200
        assert found["kl"] == pytest.approx(found["free_energy"] - found["nll"])
    parameters = [found["parameters"] for found in report["runs"]]
    layer = (400 + 2) * (2 * 30 + 1)  # w, u and b: weights, their bias and their own start
    assert [p - parameters[0] for p in parameters] == [K * layer for K in (0, 2, 5, 10)]
    assert (out / "cifar.png").stat().st_size > 10_000
    table = frame("cifar", report)
    assert table["K"].tolist() == [str(K) for K in LENGTHS]
    assert table["the paper: −ln p"].tolist() == ["-293.7", "-308.6", "-317.9", "-320.7"]
    assert table["−ln p"][3].startswith(f"{report['runs'][3]['nll']:.2f}")


@pytest.mark.usefixtures("float32")
def test_a_rerun_trains_nothing_and_draws_again(
    short: tuple[Path, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, data, report = short
    monkeypatch.setattr(dlgm_study, "train", None)
    (out / "cifar.png").unlink()
    assert quick(out, data) == report
    assert (out / "cifar.png").exists()


def test_the_command_asks_for_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data must name the folder of the binary version"):
        quick(tmp_path, None)
    command = ["cifar", "--quick", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, command).exit_code == 2


# the study


@pytest.mark.parametrize("name", ["training", "test"])
@pytest.mark.parametrize("colour", [0.0, 1.0, math.nan])
def test_colours_without_a_density_are_refused(name: str, colour: float) -> None:
    patches = {"training": torch.full((5, 12), 0.5), "test": torch.full((5, 12), 0.5)}
    patches[name][2, 3] = colour
    with pytest.raises(ValueError, match=f"{name} expects colours inside .*scale_to_open_interval"):
        cifar.study(**patches)


def test_the_model_starts_at_the_pixels() -> None:
    """Independent logit-normal pixels, up to what the small weights of the network add."""
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(5000, 12, generator=g) * torch.linspace(0.2, 2, 12) + 1
    patches = normal.sigmoid()
    patches[:, 3] = 0.25  # the same in all patches
    dlgm = cifar.study(patches, patches).model([])
    mean, raw = dlgm.outputs.bias.detach().chunk(2)
    torch.testing.assert_close(mean, patches.logit().mean(0))
    others = [i for i in range(12) if i != 3]
    torch.testing.assert_close(
        raw[others].exp(), torch.linspace(0.2, 2, 12)[others], rtol=0.05, atol=0
    )
    assert raw[3] == pytest.approx(math.log(0.1))
    torch.testing.assert_close(dlgm.centre, patches.mean(0))


@pytest.mark.usefixtures("float32")
def test_saturated_colours_train_in_float32(tmp_path: Path) -> None:
    """A third of the colours at the very edges, where a density may grow without end."""
    harsh = [(8 * (leaves(50, seed) - 0.5) + 0.5).clamp(0, 1) for seed in (0, 1)]
    training, test = (cut(pictures, 1000, 0) for pictures in harsh)
    edge = (training == training.min()) | (training == training.max())
    assert edge.float().mean() > 1 / 3
    study = small(training, test[:100], short_schedule(100))
    (found,) = run_study(study, Options(tmp_path, only=("K=10",), progress=False))["runs"]
    assert found["skipped_updates"] == 0
    assert all(math.isfinite(found[name]) for name in ("free_energy", "nll", "free_energy_se"))


def ladder(seed: int, lengths: tuple[int, ...], updates: int) -> dict[int, Tensor]:
    """By K, -ELBO and -ln p(x) at every test patch, shape (2, M).

    K = 0 is trained for 300 updates. From there every K, and 0 too, has the same further updates
    on the same patches with the same noise, and is scored with the same noise. So differences are
    far more certain than either number.
    """
    training = cut(leaves(300, seed=0, noise=0.1), 10_000, seed=0)
    test = cut(leaves(150, seed=1, noise=0.1), 1000, seed=1)
    study = small(training, test, short_schedule(updates))
    with seeded(seed):
        base = study.model([])
    train(base, training, short_schedule(300), seed=seed, progress=False)
    return {K: values(study, base, K, seed) for K in lengths}


def values(study: Study, base: DLGM, K: int, seed: int) -> Tensor:
    with seeded(seed):
        dlgm = study.model(study.layers("planar", K))
    dlgm.load_state_dict(base.state_dict(), strict=False)
    train(dlgm, study.training, study.schedule, seed=seed + 100, progress=False)
    with seeded(seed):
        pieces = [log_weights(dlgm, x, study.samples) for x in study.test.split(100)]
    weights = torch.cat(pieces, -1)
    return torch.stack([-weights.mean(0), math.log(len(weights)) - weights.logsumexp(0)])


def assert_falls(longer: Tensor, shorter: Tensor, errors: float) -> None:
    """Both numbers, by more than ``errors`` standard errors over the patches."""
    gain = shorter - longer
    error = gain.std(-1) / gain.shape[-1] ** 0.5
    assert (gain.mean(-1) > errors * error).all(), (gain.mean(-1), error)


@pytest.mark.slow
def test_a_flow_betters_both_numbers() -> None:
    found = ladder(0, (0, 10), updates=300)
    assert_falls(found[10], found[0], errors=3)


@pytest.mark.slow
def test_longer_flows_are_better() -> None:
    """The order of Table 3, in the mean over three seeds; a single seed may swap neighbours."""
    lengths = (0, 2, 5, 10)
    ladders = [ladder(seed, lengths, updates=500) for seed in range(3)]
    found = {K: torch.stack([values[K] for values in ladders]).mean(0) for K in lengths}
    for shorter, longer in pairwise(lengths):
        assert_falls(found[longer], found[shorter], errors=2)
