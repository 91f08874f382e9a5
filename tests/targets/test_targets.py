"""Energies, the toy model and eight schools against values from outside the code."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyroflow.targets import (
    EIGHT_SCHOOLS_SIGMA,
    EIGHT_SCHOOLS_Y,
    TOY_LOG_EVIDENCE,
    eight_schools_centered,
    eight_schools_noncentered,
    energy,
    toy_log_joint,
    toy_model,
)

POSTERIORS = Path(__file__).resolve().parents[3] / "shared" / "data" / "posteriordb"
SCHOOLS = {"centered": eight_schools_centered, "noncentered": eight_schools_noncentered}


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(before)


# Energies.

# U1 at (2, 0): the ring is 0, the mixture 1 + exp(-22.2). At (0, 0): ring 12.5, mixture
# 2 exp(-50/9). U2 at (1, 0): w1 = 1, so (1 / 0.4)^2 / 2. U3 at (1, 0): w1 = 1, w2 = 3, gaps -1
# and 2. U4 at (1, 0): w3 = 1.5, gaps -1 (width 0.4) and 0.5 (width 0.35).
BY_HAND = [
    (1, (2.0, 0.0), -math.log1p(math.exp(-200 / 9))),
    (1, (0.0, 0.0), 12.5 - math.log(2) + 50 / 9),
    (2, (1.0, 0.0), 3.125),
    (2, (-1.0, -1.0), 0.0),
    (3, (1.0, 0.0), -math.log(math.exp(-0.5 / 0.1225) + math.exp(-2 / 0.1225))),
    (4, (1.0, 0.0), -math.log(math.exp(-3.125) + math.exp(-0.125 / 0.1225))),
]


@pytest.mark.parametrize("containment", [8.0, None])
@pytest.mark.parametrize(("number", "z", "expected"), BY_HAND)
def test_energy_by_hand(
    number: int, z: tuple[float, float], expected: float, containment: float | None
) -> None:
    assert energy(number, containment)(torch.tensor(z)).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_containment_is_a_squared_wall(number: int) -> None:
    z = torch.tensor([[4.0, -4.0], [5.0, 0.0], [0.0, -6.0], [-5.0, 5.5]])
    added = energy(number)(z) - energy(number, None)(z)
    assert torch.allclose(added, torch.tensor([0.0, 8.0, 32.0, 8.0 + 18.0]), atol=1e-10)


# -ln Z of the plane with the wall, and of the bare U1, each by an earlier independent quadrature.
@pytest.mark.parametrize(
    ("number", "expected"), [(1, -1.8775), (2, -2.1575), (3, -2.7171), (4, -2.7775)]
)
def test_log_normalizer(number: int, expected: float) -> None:
    assert -energy(number).log_normalizer == pytest.approx(expected, abs=1e-4)


def test_log_normalizer_without_containment() -> None:
    assert -energy(1, None).log_normalizer == pytest.approx(-1.8775, abs=1e-4)
    assert [energy(k, None).log_normalizer for k in (2, 3, 4)] == [math.inf] * 3


@pytest.mark.parametrize("containment", [0.1, 8.0, 1e4])
def test_log_normalizer_of_the_wave(containment: float) -> None:
    # Along z2 the wave integrates to 0.4 sqrt(2 pi) at each z1, along z1 the wall adds
    # sqrt(pi / containment) to the eight units of the square.
    expected = math.log(0.4 * math.sqrt(2 * math.pi) * (8 + math.sqrt(math.pi / containment)))
    assert energy(2, containment).log_normalizer == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_energy_far_away_in_float32(number: int) -> None:
    z = torch.tensor([[0.0, 0.0], [30.0, -40.0], [-1e3, 1e3]], dtype=torch.float32)
    z.requires_grad_()
    values = energy(number)(z)
    values.sum().backward()
    assert values.dtype == torch.float32
    assert values.isfinite().all()
    assert z.grad.isfinite().all()
    assert (values[1:] > 100).all()


def test_energy_shapes() -> None:
    assert energy(3)(torch.zeros(2)).shape == ()
    assert energy(3)(torch.zeros(6, 5, 2)).shape == (6, 5)


def test_energy_is_a_value() -> None:
    target = energy(4)
    assert (target.number, target.containment) == (4, 8.0)
    assert pickle.loads(pickle.dumps(target)) == target


@pytest.mark.parametrize("number", [0, 5, "U1"])
def test_energy_refuses_other_numbers(number: int) -> None:
    with pytest.raises(ValueError, match="expects a number from 1 to 4, got"):
        energy(number)


@pytest.mark.parametrize("containment", [0.0, -1.0, math.inf, math.nan])
def test_energy_refuses_containment(containment: float) -> None:
    with pytest.raises(ValueError, match="containment expects a positive number.*pass None"):
        energy(2, containment)


def test_energy_refuses_other_widths() -> None:
    with pytest.raises(ValueError, match=r"last dimension 2, got shape \(4, 3\)"):
        energy(2)(torch.zeros(4, 3))


# Toy model.


def numpy_toy(z1: np.ndarray, z2: np.ndarray) -> np.ndarray:
    prior = np.exp(-(z1**2 + z2**2) / 8) / (8 * np.pi)
    residual = (z2 - np.sin(np.pi * z1 / 2)) / 0.4
    return prior * np.exp(-(residual**2) / 2) / (0.4 * np.sqrt(2 * np.pi))


def test_toy_evidence() -> None:
    grid = np.linspace(-16, 16, 1601)
    joint = numpy_toy(grid[:, None], grid[None, :])
    assert np.log(joint.sum() * 0.02**2) == pytest.approx(TOY_LOG_EVIDENCE, abs=1e-8)
    assert pytest.approx(-1.690890, abs=1e-6) == TOY_LOG_EVIDENCE


def test_toy_log_joint() -> None:
    z = 2 * torch.randn(7, 3, 2)
    expected = np.log(numpy_toy(*z.numpy().transpose(2, 0, 1)))
    assert np.allclose(toy_log_joint(z).numpy(), expected, atol=1e-10)
    with pytest.raises(ValueError, match=r"last dimension 2, got shape \(3,\)"):
        toy_log_joint(torch.zeros(3))


def test_toy_model_is_the_toy_log_joint() -> None:
    for z in 2 * torch.randn(20, 2):
        trace = poutine.trace(poutine.condition(toy_model, {"z": z})).get_trace()
        assert trace.log_prob_sum().item() == pytest.approx(toy_log_joint(z).item(), abs=1e-10)


def test_toy_model_vectorizes() -> None:
    guide = AutoNormal(toy_model)
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)
    assert math.isfinite(elbo.loss(toy_model, guide))
    assert Predictive(toy_model, num_samples=5, parallel=True)()["z"].shape == (5, 2)


# Eight schools.


def read_reference(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    stem = POSTERIORS / f"eight_schools-eight_schools_{name}"
    if not stem.with_suffix(".json").is_file():
        pytest.skip(f"no reference draws at {POSTERIORS}")
    with np.load(f"{stem}.draws.npz") as arrays:
        return json.loads(stem.with_suffix(".json").read_text()), dict(arrays)


def log_joint(model: Callable[[], None], values: dict[str, Tensor]) -> Tensor:
    """Log joint density at each draw; values have the draws on the left of the plate."""

    def many() -> None:
        with pyro.plate("draws", len(values["mu"]), dim=-2):
            model()

    trace = poutine.trace(poutine.condition(many, values)).get_trace()
    trace.compute_log_prob()
    sites = ["mu", "tau", "y", *(set(values) - {"mu", "tau"})]
    return sum(trace.nodes[site]["log_prob"].sum(-1) for site in sites)


@pytest.mark.parametrize("name", SCHOOLS)
def test_eight_schools_log_joint(name: str) -> None:
    stored, arrays = read_reference(name)
    draws = torch.from_numpy(arrays["draws"])
    values = {"mu": draws[:, 8:9], "tau": draws[:, 9:10]}
    effects = torch.from_numpy(arrays["derived"]) if name == "noncentered" else draws[:, :8]
    values["theta_trans" if name == "noncentered" else "theta"] = effects
    difference = log_joint(SCHOOLS[name], values) - torch.from_numpy(arrays["log_density"])
    # The stored densities leave out the factor 2 of the half-Cauchy.
    assert difference.sub(math.log(2)).abs().max().item() < 1e-6
    assert tuple(stored["data"]["y"]) == EIGHT_SCHOOLS_Y
    assert tuple(stored["data"]["sigma"]) == EIGHT_SCHOOLS_SIGMA


def test_eight_schools_log_joint_by_hand() -> None:
    # mu = 0, tau = 5, theta = y = 0, sigma = 1, one school: three normals at their centres and
    # a half-Cauchy at its scale, 2 / (pi 5) / 2.
    values = {"mu": torch.tensor(0.0), "tau": torch.tensor(5.0), "theta": torch.zeros(1)}
    model = poutine.condition(eight_schools_centered, values)
    trace = poutine.trace(model).get_trace([0.0], [1.0])
    expected = -1.5 * math.log(2 * math.pi) - 2 * math.log(5) - math.log(5 * math.pi)
    assert trace.log_prob_sum().item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", SCHOOLS)
def test_eight_schools_sites(name: str) -> None:
    nodes = poutine.trace(SCHOOLS[name]).get_trace().nodes
    latent = {"mu", "tau", "theta_trans" if name == "noncentered" else "theta"}
    assert latent == {
        k
        for k, v in nodes.items()
        if v["type"] == "sample" and not (v["is_observed"] or k == "schools")
    }
    assert nodes["theta"]["value"].shape == (8,)
    assert nodes["y"]["value"].tolist() == list(EIGHT_SCHOOLS_Y)


def test_eight_schools_theta_is_deterministic() -> None:
    nodes = poutine.trace(eight_schools_noncentered).get_trace().nodes
    mu, tau, standard = (nodes[site]["value"] for site in ("mu", "tau", "theta_trans"))
    assert torch.equal(nodes["theta"]["value"], mu + tau * standard)
    assert nodes["theta"]["infer"]["_deterministic"]


@pytest.mark.parametrize("name", SCHOOLS)
def test_eight_schools_vectorizes(name: str) -> None:
    guide = AutoNormal(SCHOOLS[name])
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    elbo.differentiable_loss(SCHOOLS[name], guide).backward()
    assert all(p.grad.isfinite().all() for p in guide.parameters())


@pytest.mark.parametrize("name", SCHOOLS)
def test_eight_schools_takes_other_data(name: str) -> None:
    y, sigma = torch.tensor([1, 2, 3]), [1.0, 1.0, 2.0]
    nodes = poutine.trace(SCHOOLS[name]).get_trace(y, sigma).nodes
    assert nodes["theta"]["value"].shape == (3,)
    single = poutine.trace(SCHOOLS[name]).get_trace(*torch.ones(2, 4, dtype=torch.float32)).nodes
    assert single["theta"]["value"].dtype == torch.float32


@pytest.mark.parametrize("name", SCHOOLS)
def test_eight_schools_refuses_unequal_data(name: str) -> None:
    with pytest.raises(ValueError, match=r"one shape \(J,\), got \(3,\) and \(8,\)"):
        SCHOOLS[name]([1.0, 2.0, 3.0])
