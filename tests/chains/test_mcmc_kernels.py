"""Each kernel by itself: it leaves its target as it is, step by step, over any guide."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from chains_cases import (
    FACTOR,
    MEAN,
    TARGETS,
    draw_gaussian,
    gaussian,
    poor_guide,
    student,
    target_of,
)
from torch import Tensor

import pyroflow as pf
from pyroflow.chains.hmc import HMC
from pyroflow.chains.independence import Independence, Proposal, expected_acceptance
from pyroflow.chains.pilot import take_pilot
from pyroflow.chains.result import longest_rejection
from pyroflow.chains.sampler import _bound, run
from pyroflow.chains.target import Target

CHAINS = 6000


def hmc(target: Target) -> HMC:
    kernel = HMC(target, 0)
    kernel.step_size, kernel.length = 0.3, 1.2
    kernel.unit = torch.tensor([[1.0, 0, 0], [0.4, 0.8, 0], [0.2, -0.3, 0.7]])[
        : target.dim, : target.dim
    ].double()
    return kernel


KERNELS = {
    "independence": lambda t: Independence(t, Proposal(t.base, 0.0), CHAINS, 4),
    "with a wider part": lambda t: Independence(t, Proposal(t.base, 0.3), CHAINS, 4),
    "HMC": hmc,
}


def images(target: Target, exact: Tensor) -> Tensor:
    """The points in base space that a flow maps to exact draws x (N, D)."""
    for t in reversed(target.flow.transforms()):
        exact = t.inv(exact)
    return exact


@pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("name", TARGETS)
def test_a_step_is_in_detailed_balance(name: str, make: Callable) -> None:
    """From exact draws, as many chains go from any bin to another as come back."""
    model, draw = TARGETS[name]
    target = target_of(model, poor_guide(model), CHAINS)
    kernel = make(target)
    start = target.with_gradients(images(target, draw(CHAINS)))
    end = kernel.step(start)
    part_moved = (end.u != start.u).any(1).double().mean()
    assert part_moved > 0.1
    for column in range(target.dim):
        pair = torch.stack([start.x[:, column], end.x[:, column]]).double()
        edges = pair[0].quantile(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64))
        before, after = torch.bucketize(pair, edges)
        flows = torch.zeros(6, 6).index_put_((before, after), torch.ones(CHAINS), accumulate=True)
        there, back = flows.triu(1).flatten(), flows.T.triu(1).flatten()
        used = there + back >= 10
        statistic = ((there - back)[used].square() / (there + back)[used]).sum().item()
        assert used.sum() >= 3
        assert scipy.stats.chi2(int(used.sum())).sf(statistic) > 1e-3
    for _ in range(3):
        end = kernel.step(end)
    for column, exact in zip(end.x.unbind(1), draw(20_000).unbind(1), strict=True):
        assert scipy.stats.ks_2samp(column.numpy(), exact.numpy()).pvalue > 1e-3


def test_the_target_is_the_posterior_in_base_space() -> None:
    """Against the exact density, and autograd's Jacobian and gradient."""
    guide = poor_guide(gaussian)
    target = target_of(gaussian, guide, 5)
    u = torch.randn(5, 3)
    points = target.with_gradients(u)
    exact = dist.MultivariateNormal(MEAN, scale_tril=FACTOR)
    for row in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda v: target.image(v[None]).x[0], u[row])
        expected = exact.log_prob(points.x[row]) + jacobian.slogdet().logabsdet
        assert torch.allclose(points.log_target[row], expected)
        step = 1e-6 * torch.eye(3)
        ahead, behind = target.at(u[row] + step), target.at(u[row] - step)
        numeric = (ahead.log_target - behind.log_target) / 2e-6
        assert torch.allclose(points.gradient[row], numeric, atol=1e-6)
    plain = target.at(u)
    assert torch.allclose(plain.log_target, points.log_target)
    # The guide's own parameters can still be trained, and were not touched.
    assert all(p.requires_grad and p.grad is None for p in guide.parameters())


class TestProposal:
    def test_in_one_dimension_it_is_a_mixture_of_two(self) -> None:
        base = pf.flows.StandardNormal(1).double()()
        proposal = Proposal(base, 0.2)
        u, own = proposal.sample(50_000)
        normal, wide = scipy.stats.norm(), scipy.stats.t(2.0)
        found = scipy.stats.kstest(
            u[:, 0].numpy(), lambda v: 0.8 * normal.cdf(v) + 0.2 * wide.cdf(v)
        )
        assert found.pvalue > 1e-3
        assert own.double().mean().item() == pytest.approx(0.8, abs=0.01)
        grid = torch.linspace(-30.0, 30.0, 41, dtype=torch.float64)
        expected = 0.8 * normal.pdf(grid) + 0.2 * wide.pdf(grid)
        assert torch.allclose(proposal.log_prob(grid[:, None]).exp(), torch.as_tensor(expected))

    @pytest.mark.parametrize("df", [None, 3.0])
    def test_its_density_is_that_of_its_draws(self, df: float | None) -> None:
        """Weighted by other densities over it, its draws integrate them to one."""
        module = pf.flows.StandardNormal(3)
        if df is not None:
            module = pf.guides.autoflow.StandardStudentT(3, df)
        base = module.double()()
        proposal = Proposal(base, 0.3)
        u, _ = proposal.sample(200_000)
        log_q = proposal.log_prob(u)
        zero = torch.zeros(3)
        others = [
            dist.Normal(torch.tensor([0.5, 0.0, -0.5]), 1.2).to_event(1),
            dist.Normal(torch.tensor([6.0, 0.0, 0.0]), torch.tensor([2.0, 0.8, 0.8])).to_event(1),
            dist.Normal(torch.tensor([2.0, 2.0, 2.0]), 1.0).to_event(1),
            dist.MultivariateStudentT(4.0, zero, torch.eye(3)),
        ]
        for other in others:
            weights = (other.log_prob(u) - log_q).exp()
            error = weights.std() / math.sqrt(len(u))
            assert error < 0.1
            assert abs(weights.mean() - 1) < 4 * error

    def test_its_parts_in_closed_form(self) -> None:
        base = pf.flows.StandardNormal(3).double()()
        u = 3 * torch.randn(20, 3, dtype=torch.float64)
        df, normal = torch.tensor(2.0), dist.Normal(torch.tensor(0.0), 1.0)
        tail = dist.StudentT(df, 0.0, 1.0)
        far = dist.MultivariateStudentT(df, torch.zeros(3), torch.eye(3)).log_prob(u).exp()
        each = normal.log_prob(u).exp()
        along = sum(
            tail.log_prob(u[:, i]).exp() * each[:, [j for j in range(3) if j != i]].prod(1)
            for i in range(3)
        )
        expected = 0.9 * each.prod(1) + 0.05 * far + 0.05 * along / 3
        assert torch.allclose(Proposal(base, 0.1).log_prob(u).exp(), expected)

    def test_weights_are_bounded_where_the_guide_has_no_tail(self) -> None:
        guide = poor_guide(student, 0.5)
        target = target_of(student, guide, 8)
        u = torch.linspace(-40.0, 40.0, 81, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1])
        points = target.at(u)
        bounded = points.log_target - Proposal(target.base, 0.05).log_prob(u)
        free = points.log_target - Proposal(target.base, 0.0).log_prob(u)
        assert bounded.max() < 15
        assert free.max() > 100


class TestHMC:
    def test_trajectories_turn_back(self) -> None:
        target = target_of(gaussian, poor_guide(gaussian), 50)
        kernel = hmc(target)
        start = target.with_gradients(torch.randn(50, 3))
        there = kernel.trajectory(start, torch.randn(50, 3))
        assert not torch.allclose(there.end.u, start.u, atol=0.1)
        back = kernel.trajectory(there.end, -there.momentum)
        assert torch.allclose(back.end.u, start.u, atol=1e-8)

    def test_energy_is_conserved_to_second_order(self) -> None:
        target = target_of(gaussian, poor_guide(gaussian), 200)
        kernel = hmc(target)
        start = target.with_gradients(images(target, draw_gaussian(200)))
        momentum, errors = torch.randn(200, 3), []
        for steps in (16, 32, 64):
            kernel.length, kernel.step_size = 1.0, 1.0 / steps
            path = kernel.trajectory(start, momentum)
            change = (path.momentum.square() - momentum.square()).sum(1) / 2
            change = change - path.end.log_target + start.log_target
            errors.append(change.abs().median().item())
        assert errors[1] / errors[2] == pytest.approx(4, rel=0.2)
        assert errors[2] < 0.01

    def test_the_warm_up_finds_the_scales(self) -> None:
        """Over an untrained guide a tenth as wide, and in a space where nothing is standard."""
        guide = pf.AutoPlanarFlow(gaussian, 0, "diagonal", init_scale=0.1).setup()
        target = target_of(gaussian, guide, 64)
        kernel = HMC(target, 200)
        start = target.at(0.1 * torch.randn(64, 3))
        recorded = run([kernel], start, 200, warmup=200)
        covariance = 100 * FACTOR @ FACTOR.T
        assert torch.allclose(kernel.unit @ kernel.unit.T, covariance, rtol=0.4, atol=30)
        rate = sum(kernel.rates) / len(kernel.rates)
        assert 0.6 < rate < 0.97
        assert 0.8 < kernel.length < 5
        x = recorded.x.flatten(0, 1)
        assert torch.allclose(x.mean(0), MEAN, atol=0.15)
        assert torch.allclose(x.T.cov(), FACTOR @ FACTOR.T, atol=0.4)

    def test_a_place_without_density_is_never_entered(self) -> None:
        target = target_of(gaussian, poor_guide(gaussian), 30)
        joint = target.with_gradients

        def cut(u: Tensor) -> object:
            points = joint(u)
            points.log_target[points.x[:, 0] > 1] = -torch.inf
            return points

        target.with_gradients = cut
        start = target.at(images(target, draw_gaussian(400)))
        start = start.at((start.x[:, 0] < 1).nonzero()[:30, 0])
        recorded = run([hmc(target)], start, 50, warmup=0)
        assert recorded.x[..., 0].max() <= 1
        assert recorded.moved.any(0).all()


def test_a_thinned_run_records_one_in_so_many_steps() -> None:
    target = target_of(gaussian, poor_guide(gaussian), 30)
    start = target.at(images(target, draw_gaussian(30)))
    every, third = (
        (torch.manual_seed(0), run([hmc(target)], start, num, warmup=2, thin=thin))[1]
        for num, thin in ((12, 1), (4, 3))
    )
    assert torch.equal(third.x, every.x[2::3])
    assert torch.equal(third.log_joint, every.log_joint[2::3])
    assert torch.equal(third.moved, every.moved.unflatten(0, (4, 3)).any(1))
    assert torch.equal(third.last.x, every.x[-1])


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
def test_expected_acceptance_is_the_double_sum(spread: float) -> None:
    log_weights = spread * torch.randn(300)
    log_weights[:20] = -torch.inf
    weights = log_weights.exp()
    pairs = (weights[None] / weights[:, None]).clamp(max=1)[weights > 0]
    shares = weights[weights > 0] / weights.sum()
    expected = (shares[:, None] * pairs).sum() / 300
    assert expected_acceptance(log_weights) == pytest.approx(expected.item())


def test_expected_acceptance_is_that_of_the_chains() -> None:
    guide = poor_guide(student)
    target = target_of(student, guide, 500)
    proposal = Proposal(target.base, 0.05)
    pilot = take_pilot(_bound(student, guide, (), None), target, proposal, 20_000)
    kernel = Independence(target, proposal, 500, 120)
    run([kernel], pilot.starts(500), 100, warmup=20)
    assert sum(kernel.rates) / 100 == pytest.approx(pilot.acceptance, abs=0.01)
    assert 0.1 < pilot.acceptance < 0.9
    assert expected_acceptance(torch.full((5,), -torch.inf)) == 0.0


def test_longest_rejection() -> None:
    moved = torch.tensor([[1, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.bool)
    assert longest_rejection(moved[:, :1]) == 1
    assert longest_rejection(moved[:, 1:2]) == 4
    assert longest_rejection(moved[:, 2:]) == 2
    assert longest_rejection(moved) == 4
