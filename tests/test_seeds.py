"""Draws from generators of our own: the numbers, other threads, what interferes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, JitTrace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils.checkpoint import checkpoint

import pyroflow as pf
from pyroflow.seeds import between_draws, drawing, quick, seeded
from pyroflow.targets import eight_schools_centered as schools

X = torch.linspace(0.1, 2, 30, dtype=torch.float64).reshape(6, 5)
DRAWS: dict[str, Callable[[], Tensor]] = {
    "randn": lambda: torch.randn(3),
    "randint": lambda: torch.randint(3, 10, (4,)),
    "randperm": lambda: torch.randperm(9),
    "randn_like": lambda: torch.randn_like(X.T),
    "rand_like": lambda: torch.rand_like(X),
    "randint_like": lambda: torch.randint_like(X, 2, 9),
    "normal": lambda: torch.normal(X, X),
    "multinomial": lambda: torch.multinomial(X, 3),
    "in place": lambda: torch.empty(5).uniform_(1, 2) + torch.empty(5).exponential_(),
    "dropout": lambda: F.dropout(X, 0.5),
    "fused dropout": lambda: torch.native_dropout(X, 0.5, True)[0],
    "feature dropout": lambda: F.dropout2d(X[None, :, :, None], 0.5),
    "rrelu": lambda: F.rrelu(-X, training=True),
    "gumbel": lambda: F.gumbel_softmax(X),
    "attention": lambda: F.scaled_dot_product_attention(X, X, X, dropout_p=0.5),
    "gru": lambda: nn.GRU(5, 4, 2, dropout=0.5)(X[:, None])[0],
    "orthogonal": lambda: nn.init.orthogonal_(torch.empty(4, 4)),
    "gamma": lambda: dist.Gamma(X, 1.0).sample(),
    "dirichlet": lambda: dist.Dirichlet(X).sample(),
    "von mises": lambda: dist.VonMises(X, 1.0).sample(),
    "binomial": lambda: dist.Binomial(10, X / 3).sample(),
    "poisson": lambda: dist.Poisson(X).sample(),
    "cholesky": lambda: dist.LKJCholesky(3, 1.0).sample(),
    "categorical": lambda: dist.Categorical(logits=X).sample(),
    "script": lambda: _scripted(X),
    "vmap": lambda: torch.func.vmap(lambda a: a + torch.randn(5), randomness="different")(X),
}


def _scripted(x: Tensor) -> Tensor:
    return torch.jit.script(_dropped)(x)


def _dropped(x: Tensor) -> Tensor:
    return torch.dropout(x, 0.5, True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of its scripts
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_numbers_are_those_of_torch_with_the_seed(draw: Callable[[], Tensor]) -> None:
    torch.manual_seed(3)
    expected, after = draw(), torch.rand(2)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    with seeded(3):
        assert torch.equal(draw(), expected)
        assert torch.equal(torch.rand(2), after)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_of_the_caller_is_used() -> None:
    own = torch.Generator().manual_seed(5)
    with seeded(3):
        found = torch.rand(4, generator=own)
    assert torch.equal(found, torch.rand(4, generator=torch.Generator().manual_seed(5)))


def test_no_seed_goes_on_with_the_seed_around_it() -> None:
    with seeded(3):
        expected = torch.rand(4)
    with seeded(3), seeded(None):
        first = torch.rand(2)
        with seeded(8):
            torch.rand(7)
        assert torch.equal(torch.cat([first, torch.rand(2)]), expected)


def test_an_error_ends_a_seed() -> None:
    torch.manual_seed(1)
    with pytest.raises(ZeroDivisionError), seeded(3):
        1 / 0  # noqa: B018
    found = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(found, torch.rand(3))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_draws_are_refused(reentrant: bool) -> None:
    """Their recomputation would draw another mask, and the gradient would be wrong."""
    w = torch.ones(50, requires_grad=True)
    run = partial(checkpoint, lambda w: F.dropout(w, 0.5) * w, w, use_reentrant=reentrant)
    with seeded(0), pytest.raises(RuntimeError, match="checkpoint.*draw them before"):
        run()
    y = run()
    y.sum().backward()
    assert torch.equal(w.grad, 2 * y)


@pytest.mark.filterwarnings("ignore")  # what tracing says of the model's control flow
def test_recorded_functions_run_inside() -> None:
    options = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1}
    losses = []
    for jit in (True, False):
        pyro.clear_param_store()
        elbo = (JitTrace_ELBO if jit else pyro.infer.Trace_ELBO)(**options)
        with seeded(0):
            guide = AutoNormal(schools)
            guide()
            svi = SVI(schools, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        with seeded(1):
            losses.append([svi.step() for _ in range(3)])
    assert losses[0][2] < 1.5 * losses[1][2]


@pytest.mark.slow
def test_compiled_functions_draw_the_same() -> None:
    torch._dynamo.reset()
    step = torch.compile(lambda z: z.sin() + torch.randn(5), backend="aot_eager")
    torch.manual_seed(3)
    expected = step(X)
    before = torch.get_rng_state()
    with seeded(3):
        assert torch.equal(step(X), expected)
    assert torch.equal(torch.get_rng_state(), before)
    torch._dynamo.reset()
    Distribution.set_default_validate_args(True)  # which the compiler switches off


def test_quick_functions_leave_the_mode_where_they_draw_as_they_should() -> None:
    seen = []

    def known() -> Tensor:
        seen.append(torch.utils._python_dispatch._get_current_dispatch_mode() is not None)
        with drawing():
            return torch.rand(1)

    def stray() -> Tensor:
        return torch.rand(1)

    with seeded(0):
        expected = torch.rand(6)
    before = torch.get_rng_state()
    with seeded(0), between_draws():
        both = quick(known), quick(stray)
        assert torch.equal(torch.cat([f() for _ in range(3) for f in both]), expected)
    assert seen == [True, False, False]
    assert torch.equal(torch.get_rng_state(), before)


QUICK: dict[str, Any] = {"progress": False, "seed": 3}


def test_a_thread_that_is_started_inside_draws_from_the_global_generator() -> None:
    torch.manual_seed(7)
    expected, found = torch.rand(3), []
    torch.manual_seed(7)
    with seeded(0):
        thread = threading.Thread(target=lambda: found.append(torch.rand(3)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("noisy", [False, True], ids=["plain", "noisy"])
def test_a_resumed_fit_draws_on(tmp_path: Path, noisy: bool) -> None:
    def target(z: Tensor) -> Tensor:
        return z.square().sum(-1) * (1 + noisy * torch.rand(()))

    def fitted(flow: pf.Flow, target: Callable, name: str) -> pf.Fit:
        return pf.fit_energy(flow, target, steps=30, checkpoint=tmp_path / name, **QUICK)

    def breaks_off(z: Tensor) -> Tensor:
        left.pop()
        return target(z)

    whole, flow = pf.planar_flow(2, 2), pf.planar_flow(2, 2)
    expected = fitted(whole, target, "whole")
    left = [None] * 40
    with pytest.raises(IndexError):
        fitted(flow, breaks_off, "part")
    resumed = fitted(flow, target, "part")
    assert resumed.losses == expected.losses
    assert all(map(torch.equal, flow.parameters(), whole.parameters()))
