"""Triton's kernels against those of the CPU: on a GPU, or run by Triton's interpreter.

A file of its own, as all of it is skipped without either (the latter by TRITON_INTERPRET=1).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from cases import scatter
from test_kernels import BOTH, results, sylvester_units
from torch import Tensor

import pyroflow as pf
from pyroflow.inference import launches
from pyroflow.transforms.kernels import autograd, per_point, shared
from pyroflow.transforms.kernels.units import Units, constrain, monotone_root

# The interpreter's NumPy warns where a branch that is not taken overflows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

GPU = torch.cuda.is_available()
if find_spec("triton") is None or not (GPU or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU, or Triton with TRITON_INTERPRET=1", allow_module_level=True)

from pyroflow.transforms.kernels import cuda_per_point, cuda_shared  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
THERE = {shared: cuda_shared, per_point: cuda_per_point}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
SIZES = [  # units a layer (0: of each point's own), N, K, D
    (1, 1, 1, 1), (1, 130, 4, 3), (1, 65, 33, 7), (1, 5, 2, 40), (4, 70, 8, 5), (34, 5, 68, 36),
    (0, 7, 4, 3), (0, 5, 1, 40), (0, 70, 2, 1), (0, 3, 5, 300), (1, 3, 0, 2), (0, 3, 0, 2),
]  # fmt: skip


@pytest.fixture
def by_triton(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """The whole path, with Triton's kernels whatever the device."""

    def path(z: Tensor, units: Units, inverse: bool) -> tuple[Tensor, Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(autograd, "kernels_for_device", lambda kernels, _: THERE[kernels])
            image, found = autograd.evaluate_stack(z, units, inverse)
        assert found.done is not None
        return image, found.log_det

    return path


def by_torch(z: Tensor, units: Units, inverse: bool) -> tuple[Tensor, Tensor]:
    image, found = autograd.evaluate_stack(z, units, inverse)
    return image, found.log_det


def moved(units: Units, dtype: torch.dtype, device: str = DEVICE) -> Units:
    return Units(*[t if t is None else t.to(device, dtype) for t in units[:4]], units.size)


def draw(size: int, N: int, K: int, D: int, sd: float = 1.0) -> tuple[Tensor, Units]:
    """Points and units of planar layers, or of Sylvester's where a layer has several."""
    if size > 1:
        return torch.randn(N, D), sylvester_units(K, D, sd, size)
    own = () if size else (N,)
    w, u = sd / max(1, D / 4) ** 0.5 * torch.randn(2, *own, K, D)
    return torch.randn(N, D), Units(w, u, sd * torch.randn(*own, K), None)


def assert_same(
    path: Callable, z: Tensor, units: Units, inverse: bool, dtype: torch.dtype, most: float = 1e-10
) -> None:
    """Each result is as near the CPU's in float64, by its largest number, as the CPU's own are."""
    weights = torch.randn(len(z), z.shape[1] + 1)
    exact = results(by_torch, z, units, inverse, weights)
    usual = results(by_torch, z.to(dtype), moved(units, dtype, "cpu"), inverse, weights.to(dtype))
    there = z.to(DEVICE, dtype), moved(units, dtype), inverse, weights.to(DEVICE, dtype)
    for found, one, value in zip(results(path, *there), usual, exact, strict=True):
        assert found.dtype == dtype
        assert found.device.type == DEVICE
        assert found.shape == value.shape
        if not value.numel():
            continue
        size = value.abs().max().clamp(min=1)
        allowed = most if dtype == torch.float64 else 1e-5 + 20 * ((one - value).abs().max() / size)
        assert (found.cpu() - value).abs().max() <= allowed * size


@BOTH
@DTYPES
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients(
    sizes: tuple, dtype: torch.dtype, inverse: bool, by_triton: Callable
) -> None:
    z, units = draw(*sizes)
    assert_same(by_triton, z, units, inverse, dtype)
    if units.s is None:  # as torch.compile gives them
        u_hat, s = constrain(units.W, units.U)
        assert_same(by_triton, z, units._replace(U=u_hat, s=s), inverse, dtype)


@BOTH
@DTYPES
@pytest.mark.parametrize("sizes", [(1, 40, 9, 2), (0, 40, 9, 2)])
def test_large_parameters(
    sizes: tuple, dtype: torch.dtype, inverse: bool, by_triton: Callable
) -> None:
    """Of sd 2, at points up to 500 away, with |a| up to about 1000."""
    z, units = draw(*sizes, sd=2.0)
    z = z * torch.logspace(-2, 2, len(z)).unsqueeze(1)
    assert_same(by_triton, z, units, inverse, dtype, most=1e-8)


@BOTH
@DTYPES
@pytest.mark.parametrize("size", [1, 0])
def test_floors_of_the_norm(
    size: int, dtype: torch.dtype, inverse: bool, by_triton: Callable
) -> None:
    """Rows w that are zero or far below the floor, and a unit near it on either side."""
    floor = torch.finfo(dtype).tiny ** 0.5  # of the square
    z, units = draw(size, 6, 5, 3)
    units.W[..., 0, :] = 0.0
    units.W[..., 1, :] *= 0.1 * floor
    cases = [units]
    for share, u in ((0.3, 1.0), (3.0, 1.0), (3.0, -2.0 / floor**0.5)):
        _, unit = draw(size, 6, 1, 3)
        unit.W[:] = (share * floor / 3) ** 0.5
        unit.U.abs_().mul_(u)
        cases.append(unit)
    for case in cases:
        given = z.to(dtype), moved(case, dtype, "cpu"), inverse, torch.randn(6, 4).to(dtype)
        there = given[0].to(DEVICE), moved(case, dtype), inverse, given[3].to(DEVICE)
        pairs = zip(results(by_triton, *there), results(by_torch, *given), strict=True)
        for found, value in pairs:
            error = (found.cpu() - value).abs().max() / (1 + value.abs().max())
            assert error <= 300 * torch.finfo(dtype).eps


@BOTH
@DTYPES
@pytest.mark.parametrize("size", [1, 0])
@pytest.mark.parametrize("s", [0.0, 1e-20, 1e-8, 0.3, 1.0, 1.7, 30.0, 1e5])
def test_one_unit_to_all_digits(s: float, size: int, dtype: torch.dtype, inverse: bool) -> None:
    """h and pq where a and s are tiny, middling and huge; a root is as good as its equation's."""
    tiny, eps = torch.finfo(dtype).tiny, torch.finfo(dtype).eps
    near = torch.tensor([0.39, 0.4, 0.41, 1.0, 9.0, 20.0, 40.0, 1e3, 1e4])
    half = torch.cat([torch.logspace(-30, -0.5, 60), near])
    r = torch.cat([half, -half, torch.zeros(1)]).to(dtype)
    one, s = torch.ones(*([] if size else [len(r)]), 1, 1), max(s, tiny)
    units = moved(Units(one, 0 * one, 0 * one[..., 0], s * one), dtype)
    passes = THERE[shared if size else per_point]
    done = (passes.inverse if inverse else passes.forward)(r.to(DEVICE).unsqueeze(1), units)
    a = r.double()
    a = monotone_root(a, torch.full_like(a, s)) if inverse else a
    h, pq = a.tanh(), (2 * a).sigmoid() * (-2 * a).sigmoid()
    det = h.square() + 4 * pq * s
    most = 16 * eps * (1 + a.abs()) * (1 + 1 / det if inverse else 1)
    for found, value in ((done.h[0], h), (done.pq[0], pq)):
        assert ((found.cpu() - value).abs() <= most * value.abs() + tiny).all()
    assert ((done.log_det.cpu() - det.log()).abs() <= 2 * most * (1 + det.log().abs())).all()


@BOTH
@DTYPES
@pytest.mark.parametrize("sizes", [(1, 70, 4, 3), (0, 7, 4, 3)])
def test_bad_rows_stay_among_themselves(
    sizes: tuple, dtype: torch.dtype, inverse: bool, by_triton: Callable
) -> None:
    z, units = draw(*sizes)
    bad = z.clone()
    for row, value in ((1, torch.nan), (3, torch.inf), (6, -torch.inf)):
        bad[row, row % 3] = value
    good = bad.isfinite().all(-1)
    found, expected = (
        by_triton(t.to(DEVICE, dtype), moved(units, dtype), inverse) for t in (bad, z)
    )
    for result, value in zip(found, expected, strict=True):
        assert torch.allclose(result[good], value[good], rtol=0, atol=100 * torch.finfo(dtype).eps)
    assert not found[0][~good].isfinite().all(-1).any()


@BOTH
@pytest.mark.parametrize("size", [1, 0])
def test_strides_and_wants(size: int, inverse: bool, by_triton: Callable) -> None:
    """Parts of a network's output, points and gradients of odd strides, and z's gradient alone."""
    own = () if size else (7,)
    parts = torch.randn(*own, 29).to(DEVICE)[..., 1:]
    w, u = (parts[..., i : i + 12].unflatten(-1, (4, 3)) for i in (0, 12))
    units, z = Units(w, u, parts[..., 24:], None), torch.randn(3, 7).to(DEVICE).T
    plain = Units(*[t.contiguous() for t in units[:3]], None)

    def grads(path: Callable, z: Tensor, units: Units, wanted: int) -> list[Tensor]:
        leaves = [t.detach().requires_grad_(i < wanted) for i, t in enumerate((z, *units[:3]))]
        image, log_det = path(leaves[0], Units(*leaves[1:], None), inverse)
        total = image.sum() + (log_det.sum() if wanted > 1 else 0)  # gradients that are expanded
        return [image, log_det, *torch.autograd.grad(total, leaves[:wanted])]

    for wanted in (1, 4):
        found = grads(by_triton, z, units, wanted)
        expected = grads(by_torch, z.contiguous().cpu(), moved(plain, z.dtype, "cpu"), wanted)
        for one, value in zip(found, expected, strict=True):
            assert torch.allclose(one.cpu(), value, atol=1e-11)


def test_planar_and_sylvester_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round trips, cached pairs and second derivatives, through the public calls."""
    monkeypatch.setattr(autograd, "kernels_for_device", lambda kernels, _: THERE[kernels])
    for t in (pf.Planar(3, 5), pf.Sylvester(3, 2, 2)):
        t = scatter(t, 1.0).to(DEVICE)
        x = torch.randn(9, 3, device=DEVICE, requires_grad=True)
        y = t(x)
        assert torch.allclose(t.inv(y.detach().clone()), x, atol=1e-9)
        jacobians = torch.autograd.functional.jacobian(lambda x, t=t: t(x).sum(0), x)
        expected = torch.linalg.slogdet(jacobians.movedim(1, 0))[1]
        log_det = t.log_abs_det_jacobian(x, y)
        assert torch.allclose(log_det, expected, atol=1e-10)
        (first,) = torch.autograd.grad(log_det.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        assert second.isfinite().all()
        assert second.abs().max() > 0


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("kernels", [shared, per_point])
def test_a_step_is_one_launch_of_a_graph(kernels: ModuleType) -> None:
    z, units = draw(int(kernels is shared), 50, 6, 4)
    z, units = z.to(DEVICE), moved(units, z.dtype)
    leaves = [t.requires_grad_() for t in units[:3]]
    assert autograd.kernels_for_device(kernels, z) is THERE[kernels]
    found = [torch.zeros_like(t) for t in leaves]

    def step() -> None:
        image, log_det = by_torch(z, units, inverse=False)
        grads = torch.autograd.grad(image.square().sum() - log_det.sum(), leaves)
        for to, grad in zip(found, grads, strict=True):
            to.copy_(grad)

    replay = launches.capture(step, torch.zeros((), dtype=torch.bool, device=DEVICE))
    z.mul_(1.5)
    replay()
    graph = [t.clone() for t in found]
    step()
    for one, value in zip(graph, found, strict=True):
        assert torch.allclose(one, value, rtol=1e-12, atol=1e-12)
