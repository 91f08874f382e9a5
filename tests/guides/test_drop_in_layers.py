"""What the guides are made of: Sylvester layers, Student-t bases, layers that are added."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import init_to_value
from torch import Tensor

import pyroflow as pf
from pyroflow.targets import eight_schools_noncentered

KINDS = ("random", "householder", "qr", "triangular")


def scattered(guide: pf.AutoFlow) -> pf.AutoFlow:
    """The guide set up, and away from its start."""
    guide.setup()
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return guide


def gradients(guide: pf.AutoFlow) -> dict[str, Tensor]:
    guide.zero_grad()
    Trace_ELBO().differentiable_loss(eight_schools_noncentered, guide).backward()
    return {name: p.grad for name, p in guide.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("orthogonal", KINDS)
def test_sylvester_starts_as_the_gaussian_and_trains_all_it_has(orthogonal: str) -> None:
    guide = pf.AutoSylvesterFlow(eight_schools_noncentered, 3, 2, orthogonal=orthogonal).setup()
    plain = pf.AutoPlanarFlow(eight_schools_noncentered, 0).setup()
    z = torch.randn(5, 10)
    start = plain.get_posterior().log_prob(z)
    with torch.no_grad():
        guide.affine.offset.copy_(plain.affine.offset)
    assert torch.allclose(guide.get_posterior().log_prob(z), start, atol=1e-9)
    scattered(guide)
    found = gradients(guide)
    assert ("flow.parts.0.frame" in found) == (orthogonal in ("householder", "qr"))
    assert all(grad is not None and grad.abs().max() > 0 for grad in found.values())


@pytest.mark.parametrize("orthogonal", KINDS)
def test_sylvester_density_is_the_change_of_variables(orthogonal: str) -> None:
    guide = scattered(pf.AutoSylvesterFlow(eight_schools_noncentered, 4, 3, orthogonal=orthogonal))
    q = guide.get_posterior()
    x = torch.randn(10)

    def push(x: Tensor) -> Tensor:
        for t in q.transforms:
            x = t(x)
        return x

    sign, log_det = torch.linalg.slogdet(torch.autograd.functional.jacobian(push, x))
    expected = dist.Normal(0.0, 1.0).log_prob(x).sum() - log_det
    assert sign == 1
    assert q.log_prob(push(x).clone()).item() == pytest.approx(expected.item(), abs=1e-8)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_random_frames_are_rotations_to_the_last_digit_and_stay(default: torch.dtype) -> None:
    torch.set_default_dtype(default)
    try:
        guide = pf.AutoSylvesterFlow(wide(40), num_layers=2, orthogonal="random").setup()
        frame = guide.sylvester.frame
        assert frame.shape == (2, 32, 40)
        assert frame.dtype == torch.float64
        eye = torch.eye(32, dtype=torch.float64).expand(2, 32, 32)
        assert torch.allclose(frame @ frame.mT, eye, atol=1e-13)
        assert not torch.allclose(frame[0], frame[1])
        guide.sylvester.reset_parameters()
        assert guide.sylvester.frame is frame
    finally:
        torch.set_default_dtype(torch.float64)


def wide(size: int) -> Callable:
    def model() -> None:
        loc = torch.zeros(size, dtype=torch.float64)
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    return model


def test_sylvester_options_are_checked_by_name() -> None:
    for name, value in [("num_units", 0), ("num_layers", -1), ("orthogonal", "none")]:
        with pytest.raises(ValueError, match=name):
            pf.AutoSylvesterFlow(wide(3), **{name: value})
    with pytest.raises(ValueError, match="num_units must be at most input_dim = 3.* got 4"):
        pf.AutoSylvesterFlow(wide(3), num_units=4).setup()
    guide = pf.AutoSylvesterFlow(wide(3))
    assert (guide.num_layers, guide.num_units, guide.orthogonal) == (8, None, "householder")
    assert guide.setup().sylvester.b.shape == (8, 3)


@pytest.mark.parametrize("make", [pf.AutoPlanarFlow, pf.AutoSylvesterFlow])
@pytest.mark.parametrize("path_derivative", [False, True])
def test_student_base(make: Callable, path_derivative: bool) -> None:
    guide = scattered(make(wide(2), num_layers=2, base_df=5.0, affine="diagonal"))
    guide.path_derivative = path_derivative
    base = guide.get_base_dist()
    assert base.event_shape == (2,)
    x = torch.randn(6, 2)
    assert torch.allclose(base.log_prob(x), dist.StudentT(5.0).log_prob(x).sum(-1))
    q = guide.get_posterior()
    draws = q.sample((7,))
    y, log_det = draws, 0.0
    for t in reversed(guide.get_transforms()):
        x = t.inv(y)
        y, log_det = x, log_det + t.log_abs_det_jacobian(x, y)
    assert torch.allclose(q.log_prob(draws), base.log_prob(y) - log_det)
    loss = Trace_ELBO().differentiable_loss(wide(2), guide)
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(loss, list(guide.parameters())))


def test_student_base_reaches_a_heavy_tailed_posterior_that_the_normal_one_misses() -> None:
    """With the posterior's own tails, no layers and the right scale the loss is zero."""

    def model() -> None:
        pyro.sample("z", dist.StudentT(3.0, torch.zeros(2), 2.0).to_event(1))

    start = init_to_value(values={"z": torch.zeros(2)})
    losses = {}
    for df in (None, 3.0):
        guide = pf.AutoPlanarFlow(model, 0, init_loc_fn=start, init_scale=2.0, base_df=df)
        elbo = Trace_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=0)
        losses[df] = elbo.loss(model, guide)
    assert losses[3.0] == pytest.approx(0.0, abs=1e-12)
    assert losses[None] > 0.02
    with pytest.raises(ValueError, match="base_df"):
        pf.AutoPlanarFlow(model, base_df=0.0)


def test_path_derivative_is_zero_at_a_posterior_with_student_tails() -> None:
    def model() -> None:
        pyro.sample("z", dist.StudentT(3.0, torch.zeros(2), 2.0).to_event(1))

    guide = pf.AutoPlanarFlow(
        model,
        2,
        affine="diagonal",
        init_loc_fn=init_to_value(values={"z": torch.zeros(2)}),
        init_scale=2.0,
        base_df=3.0,
    ).setup()
    guide.path_derivative = True
    loss = Trace_ELBO().differentiable_loss(model, guide)
    assert all(g.abs().max() < 1e-10 for g in torch.autograd.grad(loss, list(guide.parameters())))


GROWING = {
    "planar": lambda depth: pf.AutoPlanarFlow(eight_schools_noncentered, depth, base_df=7.0),
    **{
        kind: lambda depth, kind=kind: pf.AutoSylvesterFlow(
            eight_schools_noncentered, 3, depth, orthogonal=kind
        )
        for kind in KINDS
    },
}


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("depth", [0, 3, "auto"])
def test_growing_leaves_the_distribution_and_adds_parameters(name: str, depth: int | str) -> None:
    make = GROWING[name]
    guide = scattered(make(depth))
    guide.flow.fitted = True
    first, old = guide.num_layers, guide.stack
    z = torch.randn(6, 10)
    before = guide.get_posterior().log_prob(z)
    guide()  # the store now has the old tensors under the guide's name
    guide.grow(2)
    assert guide.num_layers == len(guide.stack.b) == first + 2
    assert guide.flow.fitted
    assert torch.allclose(guide.get_posterior().log_prob(z), before, rtol=1e-12, atol=1e-12)
    if old is not None:
        assert torch.equal(guide.stack.b[:first], old.b)
    found = gradients(guide)
    assert all(grad is not None for grad in found.values())
    assert all(g[first:].abs().max() > 0 for n, g in found.items() if n.endswith((".u", ".R")))
    held = {n: p.detach().clone() for n, p in guide.named_parameters()}
    svi = SVI(eight_schools_noncentered, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step()
    svi.step()
    assert not any(torch.equal(p, held[n]) for n, p in guide.named_parameters())
    for other in (make(first + 2).setup(), make(depth).setup()):
        if other.num_layers == first:
            other.grow(1)
            other.grow(1)
        other.load_state_dict(guide.state_dict())
        assert torch.equal(other.get_posterior().log_prob(z), guide.get_posterior().log_prob(z))


def test_auto_depth_starts_small_and_says_so() -> None:
    for make in (pf.AutoPlanarFlow, pf.AutoSylvesterFlow):
        guide = make(wide(3), num_layers="auto")
        assert (guide.num_layers, guide.grows) == (4, True)
        assert make(wide(3)).grows is False
        with pytest.raises(RuntimeError, match=r"setup\(\*args\) before grow"):
            guide.grow(1)
        with pytest.raises(ValueError, match="num_layers"):
            guide.setup().grow(0)
        with pytest.raises(ValueError, match="num_layers"):
            make(wide(3), num_layers="many")
