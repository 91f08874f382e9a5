"""Files of flows: the same density, no code in the file, errors that name what is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pyro.distributions as dist
import pyro.distributions.transforms as T
import pyro.nn
import pytest
import torch
import torch.distributions as torch_dist
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions import transforms as torch_transforms

import pyroflow as pf
from pyroflow.flows import StandardNormal
from pyroflow.guides.autoflow import StandardStudentT
from tests.cases import CASES, Source, scatter, wild


def returned(obj: object, tmp_path: Path) -> object:
    """What comes back from a file."""
    pf.save(obj, tmp_path / "file.pt")
    return pf.load(tmp_path / "file.pt")


def assert_equal(loaded: pf.Flow, flow: pf.Flow, context: Tensor | None = None) -> None:
    """The same modules in type and state, the same density and draws to the last bit."""
    named = {name: type(module) for name, module in flow.named_modules()}
    assert {name: type(module) for name, module in loaded.named_modules()} == named
    state = loaded.state_dict()
    for name, value in flow.state_dict().items():
        if isinstance(value, Tensor):
            assert state[name].dtype == value.dtype, name
            assert torch.equal(state[name], value), name
        else:
            assert state[name] == value
    given = () if context is None else (context,)
    draws = []
    for each in (flow, loaded):
        torch.manual_seed(3)
        draws.append(each(*given).sample((4,)))
    assert torch.equal(*draws)
    there, here = (each(*given).log_prob(draws[0].clone()) for each in (flow, loaded))
    assert torch.equal(there, here)
    assert there.isfinite().all()


def of_source(name: str) -> tuple[Source, pf.Flow]:
    source = CASES[name]()
    t = source.parts.inv if name.endswith("-inverse") else source.parts
    return source, pf.Flow(StandardNormal(source.dim), [t])


# Transforms with given parameters are snapshots that no flow holds.
TRAINABLE = [name for name in CASES if not name.startswith("given_")]


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_flow_of_each_transform_comes_back(name: str, tmp_path: Path) -> None:
    source, flow = of_source(name)
    context = torch.randn(*source.batch, 3) if flow.conditional else None
    assert_equal(returned(flow, tmp_path), flow, context)


FLOWS = {
    "planar-open": lambda: pf.planar_flow(2, 3),
    "planar-base_to_data": lambda: pf.planar_flow(2, 3, direction="base_to_data"),
    "planar-leaky": lambda: pf.planar_flow(2, 3, nonlinearity="leaky_relu", negative_slope=0.4),
    "planar-K0-diagonal": lambda: pf.planar_flow(2, 0, affine="diagonal"),
    "planar-bare": lambda: pf.planar_flow(2, 3, affine=None),
    "radial": lambda: pf.radial_flow(2, 3),
    "sylvester-qr": lambda: pf.sylvester_flow(3, 2, orthogonal="qr"),
    "sylvester-triangular": lambda: pf.sylvester_flow(3, 2, orthogonal="triangular"),
}


@pytest.mark.parametrize("name", FLOWS)
def test_flows_come_back_with_their_direction(name: str, tmp_path: Path) -> None:
    flow = wild(FLOWS[name](), 0.5)
    loaded = returned(flow, tmp_path)
    assert_equal(loaded, flow)
    assert loaded.get_extra_state() == flow.get_extra_state()


@pytest.mark.parametrize("family", ["planar", "radial", "sinhArcsinh", "sylvester", "affine"])
def test_conditional_options_come_back(family: str, tmp_path: Path) -> None:
    options = {
        "planar": {"nonlinearity": "leaky_relu", "negative_slope": 0.4},
        "sylvester": {"num_units": 2, "orthogonal": "qr"},
        "affine": {"kind": "diagonal"},
    }
    made = getattr(pf, f"Conditional{family[0].upper()}{family[1:]}")
    t = made(3, 5, hidden_dims=[6, 4], **options.get(family, {}))
    flow = pf.Flow(StandardNormal(3), [scatter(t, 0.3)])
    assert_equal(returned(flow, tmp_path), flow, torch.randn(2, 5))


def network(*sizes: int) -> pyro.nn.DenseNN:
    return pyro.nn.DenseNN(*sizes[:1], [7], sizes[1:], nonlinearity=nn.ELU(0.5))


def masked_network() -> pyro.nn.AutoRegressiveNN:
    return pyro.nn.AutoRegressiveNN(4, [9, 8], skip_connections=True, nonlinearity=nn.Tanh())


FOREIGN: dict[str, Callable[[], list[Transform]]] = {
    "affine_autoregressive": lambda: [T.AffineAutoregressive(masked_network(), -3.0, stable=True)],
    "affine_autoregressive-inverse": lambda: [T.affine_autoregressive(4).inv],
    "affine_coupling": lambda: [T.AffineCoupling(1, network(1, 3, 3), log_scale_max_clip=1.0)],
    "batch_norm-eval": lambda: [T.BatchNorm(4, momentum=0.3)],
    "householder": lambda: [T.householder(4, 2)],
    "lower_cholesky": lambda: [T.LowerCholeskyAffine(torch.randn(4), torch.eye(4) * 2)],
    "permute": lambda: [T.Permute(torch.tensor([2, 0, 3, 1])), pf.Planar(4, 2)],
    "pyro-planar": lambda: [T.Planar(4)],
    "pyro-radial": lambda: [T.Radial(4)],
    "spline": lambda: [T.spline(4, count_bins=5, bound=2.0)],
    "spline-quadratic": lambda: [T.Spline(4, 6, order="quadratic")],
    "spline_autoregressive": lambda: [T.spline_autoregressive(4, [9], count_bins=3, bound=2.5)],
    "elementwise": lambda: [
        torch_transforms.TanhTransform(),
        torch_transforms.IndependentTransform(torch_transforms.SigmoidTransform(), 1).inv,
        torch_transforms.AffineTransform(torch.randn(4), 2.0),
        T.ELUTransform(),
        T.LeakyReLUTransform(),
        torch_transforms.SoftplusTransform(),
        torch_transforms.PowerTransform(2.0),
        torch_transforms.ExpTransform().inv,
    ],
    "nested": lambda: [
        torch_transforms.ReshapeTransform((4,), (2, 2)),
        torch_transforms.IndependentTransform(
            torch_transforms.ComposeTransform(
                [
                    torch_transforms.SigmoidTransform(),
                    torch_transforms.SigmoidTransform().inv,
                    torch_transforms.ExpTransform(),
                ]
            ),
            1,
        ),
        torch_transforms.ReshapeTransform((2, 2), (4,)),
    ],
}


@pytest.mark.parametrize("name", FOREIGN)
def test_transforms_of_pyro_and_torch_come_back(name: str, tmp_path: Path) -> None:
    flow = pf.Flow(StandardNormal(4), FOREIGN[name]()).train(not name.endswith("eval"))
    loaded = returned(flow, tmp_path)
    assert loaded.training == flow.training
    assert loaded.state_dict().keys() == flow.state_dict().keys()
    results = []
    for each in (flow, loaded):
        torch.manual_seed(3)
        q = each()
        y = q.rsample((3,))
        results.append((y, q.log_prob(y)))
    (y, log_q), (loaded_y, loaded_log_q) = results
    assert torch.equal(loaded_y, y)
    assert torch.equal(loaded_log_q, log_q)


BASES = {
    "module-normal": lambda: StandardNormal(2),
    "module-student": lambda: StandardStudentT(2, 5.0),
    "normal": lambda: dist.Normal(torch.zeros(2), 3.0).to_event(1),
    "laplace": lambda: dist.Laplace(torch.ones(2), 3.0).to_event(1),
    "student": lambda: dist.StudentT(4.0, torch.ones(2), 3.0).to_event(1),
    "uniform": lambda: dist.Uniform(-torch.ones(2), 3.0).to_event(1),
    "cauchy": lambda: dist.Cauchy(torch.ones(2), 3.0).to_event(1),
    "multivariate": lambda: dist.MultivariateNormal(torch.ones(2), 3 * torch.eye(2)),
    "torch": lambda: torch_dist.Independent(torch_dist.Normal(torch.zeros(2), 3.0), 1),
}


@pytest.mark.parametrize("name", BASES)
def test_bases_come_back(name: str, tmp_path: Path) -> None:
    flow = pf.Flow(BASES[name](), [pf.Planar(2, 2)])
    loaded = returned(flow, tmp_path)
    assert type(loaded.base) is type(flow.base)
    assert_equal(loaded, flow)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_flow_keeps_its_dtype_whatever_the_default(dtype: torch.dtype, tmp_path: Path) -> None:
    flow = wild(pf.sylvester_flow(3, 2)).to(dtype)
    pf.save(flow, tmp_path / "flow.pt")
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        assert_equal(pf.load(tmp_path / "flow.pt"), flow)


def test_load_puts_tensors_where_it_is_told(tmp_path: Path) -> None:
    pf.save(pf.planar_flow(2), tmp_path / "flow.pt")
    loaded = pf.load(tmp_path / "flow.pt", device="meta")
    assert {t.device.type for t in loaded.state_dict().values() if isinstance(t, Tensor)} == {
        "meta"
    }


def test_parameters_stay_frozen_or_shared_and_train_on(tmp_path: Path) -> None:
    shared = pf.Planar(2, 2)
    flow = pf.Flow(StandardNormal(2), [shared, pf.Affine(2), shared.inv, pf.Radial(2)])
    flow.parts[1].requires_grad_(False)
    loaded = returned(flow, tmp_path)
    assert loaded.parts[2] is loaded.parts[0]
    assert loaded.parts[0] is not shared
    frozen = [p.requires_grad for p in flow.parameters()]
    assert [p.requires_grad for p in loaded.parameters()] == frozen
    assert not all(frozen)
    loaded().log_prob(torch.ones(3, 2)).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad)


def trained(flow: pf.Flow, y: Tensor) -> pf.Flow:
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        (-flow().log_prob(y)).mean().backward()
        optimizer.step()
    return flow


def test_a_fitted_flow_trains_on_as_it_would_have(tmp_path: Path) -> None:
    y = 3 + 2 * torch.randn(50, 2)
    flow = pf.planar_flow(2, 4)
    flow.initialize(y)
    loaded = returned(trained(flow, y), tmp_path)
    assert loaded.fitted
    loaded.initialize(5 * y)  # does nothing, as on any fitted flow
    assert_equal(loaded, flow)
    before = flow().log_prob(y)
    assert_equal(trained(loaded, y), trained(flow, y))
    assert not torch.equal(flow().log_prob(y), before)


def test_saving_and_loading_leave_the_generator_alone(tmp_path: Path) -> None:
    flow = pf.planar_flow(2, context_dim=3)
    before = torch.get_rng_state()
    returned(flow, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_file_holds_no_more_than_the_numbers(tmp_path: Path) -> None:
    flow = pf.planar_flow(2, 4)
    store = torch.zeros(1_000_000)  # as after vector_to_parameters, where parameters are views
    flow.parts[0].w.data = store[:8].view(4, 2)
    pf.save(flow, tmp_path / "flow.pt")
    assert os.path.getsize(tmp_path / "flow.pt") < 20_000


class MyPlanar(pf.Planar):
    pass


class MyBase(nn.Module):
    def forward(self) -> dist.Distribution:
        return dist.Normal(torch.zeros(2), 1.0).to_event(1)


REFUSED = {
    "MyPlanar": lambda: pf.Flow(StandardNormal(2), [pf.Radial(2), MyPlanar(2)]),
    "MyBase": lambda: pf.Flow(MyBase(), [pf.Radial(2)]),
    "MatrixExponential": lambda: pf.Flow(StandardNormal(2), [T.MatrixExponential(2)]),
    "function torch.nn.functional.silu": lambda: pf.Flow(
        StandardNormal(2),
        [T.AffineCoupling(1, pyro.nn.DenseNN(1, [3], [1, 1], nonlinearity=nn.functional.silu))],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_description_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"obj holds .*{name}, .*state_dict\(\)"):
        pf.save(REFUSED[name](), tmp_path / "flow.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("obj", [pf.Planar(2), nn.Linear(2, 2), {"w": 1}, None])
def test_other_objects_are_refused(obj: object, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"obj must be a Flow .* got {type(obj).__name__}"):
        pf.save(obj, tmp_path / "flow.pt")
