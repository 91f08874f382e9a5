"""Supports by column: log-determinants, round trips, corners, fits, files and refusals."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.distributions import transforms as T

import pyroflow as pf
from pyroflow.transforms import Support

INF = math.inf
GIVEN = [None, "positive", (-2.0, 0.0), (-INF, 1.5), (3.0, INF), (0.1, 0.7)]
SHORT = {"steps": 5, "polish": 0, "seed": 0, "progress": False}


def torchs() -> T.Transform:
    """The same by torch's own transforms; σ(x) is from low to high."""
    exp, move = T.ExpTransform(), T.AffineTransform
    parts = [
        T.identity_transform,
        exp,
        T.ComposeTransform([T.SigmoidTransform(), move(-2.0, 2.0)]),
        T.ComposeTransform([move(0.0, -1.0), exp, move(1.5, -1.0)]),
        T.ComposeTransform([exp, move(3.0, 1.0)]),
        T.ComposeTransform([T.SigmoidTransform(), move(0.1, 0.6)]),
    ]
    return T.StackTransform(parts, dim=-1)


def inside(t: Support, y: Tensor) -> bool:
    low, high = torch.tensor(t.bounds, dtype=torch.float64).to(y.dtype).T
    return bool(((y > low) & (y < high)).all())


def test_log_determinants_are_those_of_the_jacobian_and_of_torch() -> None:
    t, reference = Support(6, GIVEN), torchs()
    x = 2 * torch.randn(20, 6)
    x[0] = 0
    y = t(x)
    assert torch.allclose(y, reference(x), atol=1e-12)
    found = t.log_abs_det_jacobian(x, y)
    matrices = torch.stack([torch.autograd.functional.jacobian(t, row) for row in x])
    assert torch.allclose(found, torch.linalg.slogdet(matrices)[1], atol=1e-9)
    assert torch.allclose(found, reference.log_abs_det_jacobian(x, y).sum(-1), atol=1e-9)
    back, log_det = Support(6, GIVEN).inverse_and_log_det(y)
    assert torch.allclose(back, x, atol=1e-10)
    assert torch.allclose(log_det, found, atol=1e-9)
    inverse = torch.stack([torch.autograd.functional.jacobian(t.inv, row) for row in y.clone()])
    assert torch.allclose(torch.linalg.slogdet(inverse)[1], -found, atol=1e-9)
    assert torch.autograd.gradcheck(t, x[:3].requires_grad_())
    assert torch.autograd.gradcheck(t.inv, y[:3].clone().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_of_any_size_lie_strictly_inside(dtype: torch.dtype) -> None:
    t = Support(6, GIVEN).to(dtype)
    size = torch.tensor([0.0, 1e-30, 1.0, 17.0, 40.0, 100.0, 800.0, 1e10], dtype=dtype)
    x = torch.cat([size, -size])[:, None].expand(-1, 6).clone().requires_grad_()
    y = t(x)
    assert inside(t, y)
    assert y.isfinite().all()
    back, log_det = Support(6, GIVEN).to(dtype).inverse_and_log_det(y.detach())
    assert back.isfinite().all()
    assert log_det.isfinite().all()
    assert t.codomain.check(y).all()
    (gradient,) = torch.autograd.grad(y.clamp(-1e30, 1e30).sum() + log_det.sum(), x)
    assert gradient.isfinite().all()
    near = x.detach().abs().amax(-1) < 5
    assert torch.allclose(back[near], x[near], rtol=1e-3)


def test_bounds_stay_exact_in_every_dtype() -> None:
    t = Support(2, [(0, 0.1), None]).float().double()
    assert t.high[0].item() == 0.1
    t.check(torch.tensor([[0.1 - 1e-12, 0.0]]), "data", None)
    with pytest.raises(ValueError, match="support"):
        t.check(torch.tensor([[0.1 + 1e-12, 0.0]]), "data", None)


def rows(num: int = 300) -> Tensor:
    """A log-normal number, a share and a number below 1.5 that depend on each other."""
    z = torch.randn(num, 3) @ torch.tensor([[1.0, 0.6, 0.0], [0.0, 0.8, 0.5], [0.0, 0.0, 1.0]])
    return torch.stack([z[:, 0].exp(), z[:, 1].sigmoid(), 1.5 - z[:, 2].exp()], 1)


SUPPORT = {0: "positive", 1: (0, 1), 2: (-INF, 1.5)}


@pytest.mark.parametrize("family", ["planar", "radial", "sylvester"])
def test_a_fit_sees_data_in_unconstrained_space(family: str, tmp_path: Path) -> None:
    sizes = (3, 2, 2) if family == "sylvester" else (3, 2)
    flow = getattr(pf, f"{family}_flow")(*sizes, support=SUPPORT)
    data = rows()
    flow.initialize(data)
    z = torch.stack([data[:, 0].log(), data[:, 1].logit(), -(1.5 - data[:, 2]).log()], 1)
    normal = torch.distributions.MultivariateNormal(z.mean(0), torch.cov(z.T))
    log_det = data[:, 0].log() + (data[:, 1] * (1 - data[:, 1])).log() + (1.5 - data[:, 2]).log()
    assert torch.allclose(flow.log_prob(data), normal.log_prob(z) - log_det, atol=1e-9)
    fit = pf.fit_density(flow, data, **SHORT)
    assert fit.best_loss <= fit.scores[0][1]
    draws = flow.sample(2000, seed=0)
    assert inside(flow.parts[-1], draws)
    pf.save(flow, tmp_path / "flow.pt")
    state = getattr(pf, f"{family}_flow")(*sizes, support=SUPPORT)
    state.load_state_dict(flow.state_dict())
    for other in (copy.deepcopy(flow), pf.load(tmp_path / "flow.pt"), state):
        assert torch.equal(other.log_prob(data), flow.log_prob(data))
        assert torch.equal(other.sample(5, seed=1), flow.sample(5, seed=1))
        assert other.parts[-1].bounds == flow.parts[-1].bounds
    with pytest.raises(RuntimeError, match="make the flow with the same support first"):
        getattr(pf, f"{family}_flow")(*sizes, support={0: "positive"}).load_state_dict(
            flow.state_dict()
        )


def test_the_density_integrates_to_one() -> None:
    flow = pf.planar_flow(1, 4, support=[(-1, 2)])
    pf.fit_density(flow, 3 * torch.rand(200, 1).square() - 1, steps=50, polish=0, progress=False)
    x = torch.linspace(-1, 2, 20_002)[1:-1, None]
    assert flow.log_prob(x).exp().mean().item() * 3 == pytest.approx(1, abs=2e-3)


def test_a_conditional_flow_and_an_energy_have_supports() -> None:
    flow = pf.planar_flow(1, 2, context_dim=1, hidden_dims=(4,), support=["positive"])
    data = rows()
    pf.fit_density(flow, data[:, :1], context=data[:, 1:2], **SHORT)
    assert (flow.sample(4, seed=0, context=data[:, 1:2]) > 0).all()
    flow = pf.planar_flow(1, 0, support=["positive"])
    log_normal = torch.distributions.LogNormal(0.5, 0.7)
    energy = lambda y: -log_normal.log_prob(y).sum(-1)  # noqa: E731
    pf.fit_energy(flow, energy, steps=100, lr=0.05, seed=0, progress=False)
    draws = flow.sample(4000, seed=0).log()
    assert draws.mean().item() == pytest.approx(0.5, abs=0.05)
    assert draws.std().item() == pytest.approx(0.7, abs=0.05)


def test_names_are_resolved_by_the_frame(tmp_path: Path) -> None:
    frame = pd.DataFrame(rows().numpy(), columns=["dose", "share", "debt"])
    flow = pf.planar_flow(3, 2, support={"share": (0, 1), "dose": "positive", 2: (-INF, 1.5)})
    with pytest.raises(ValueError, match="support names the columns 'share', 'dose', whose places"):
        flow()
    with pytest.raises(ValueError, match="fit it to one, or give positions"):
        pf.fit_density(flow, rows(), **SHORT)
    with pytest.raises(ValueError, match="names the columns 'share', which are not among"):
        pf.fit_density(flow, frame.rename(columns={"share": "Share"}), **SHORT)
    with pytest.raises(TypeError, match="support of columns by name"):
        pf.save(flow, tmp_path / "flow.pt")
    fresh = copy.deepcopy(flow)
    pf.fit_density(flow, frame, **SHORT)
    plain = pf.planar_flow(3, 2, support=SUPPORT)
    pf.fit_density(plain, frame, **SHORT)
    assert torch.equal(flow.log_prob(frame), plain.log_prob(frame))
    fresh.load_state_dict(flow.state_dict())
    assert fresh.sample(5, seed=0).equals(flow.sample(5, seed=0))
    with pytest.raises(ValueError, match="x expects .* got -1 in row 0, column 'dose', whose"):
        flow.log_prob(frame.assign(dose=-1.0))


def test_data_outside_are_refused_with_their_place() -> None:
    data = rows()
    data[7, 1], data[9, 2] = 1.0, 2.0
    message = r"got 1 in row 7, column 1 \(from 0\), .* from 0 to 1 without .*; 2 of 300 rows"
    flow = pf.planar_flow(3, 2, support=SUPPORT)
    for call in (flow.log_prob, lambda data: pf.fit_density(flow, data, **SHORT)):
        with pytest.raises(ValueError, match=message):
            call(data)
    assert not flow.fitted
    with pytest.raises(ValueError, match="support"):
        flow().log_prob(data)


BAD = {
    "a word": ({0: "negative"}, "for column 0, got 'negative'"),
    "order": ({1: (2, 1)}, r"low < high for column 1, got \(2, 1\)"),
    "nan": ({1: (math.nan, 1)}, "for column 1"),
    "three": ({1: (0, 1, 2)}, "for column 1"),
    "text": ({1: ("0", "1")}, "for column 1"),
    "position": ({2: "positive"}, "positions from 0 to 1, or names, got 2"),
    "negative position": ({-1: "positive"}, "positions from 0 to 1, or names, got -1"),
    "length": (["positive"], "an entry for each of 2 columns"),
    "one word": ("positive", "an entry for each of 2 columns"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_supports_are_refused(case: str) -> None:
    support, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        pf.planar_flow(2, 2, support=support)


def test_numpy_bounds_are_numbers() -> None:
    t = Support(2, [np.array([0.0, 1.0]), (np.float32(0), INF)])
    assert t.bounds == [(0.0, 1.0), (0.0, INF)]
